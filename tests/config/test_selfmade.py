"""Text that a start model writes: which streams are asked for, what is kept, what a run does with it."""

import json
from pathlib import Path

import pytest
import talkers
import workers

from framework.config import build, drafts, making, record, selfmade
from framework.config.compose import compose
from framework.config.journal import Journal, Wave
from framework.config.synthesis import Order
from framework.errors import ConfigError, DataError

SMALL = [
    "synthesis.max_new_tokens=40",
    "synthesis.min_new_tokens=2",
    "synthesis.batch_size=4",
    "data.max_length=256",
    "precision=fp32",
    "launch.device=cpu",
    "launch.threads=1",
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return talkers.write(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return talkers.write(tmp_path_factory.mktemp("plain"), chat=False)


def run_of(model, cache, *more):
    task = Path(model) / "task.jsonl"
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "cba"}]
    rows = [{"messages": turns}] if "chat" in str(model) else [{"text": "abcdef"}]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return compose(
        [f"model.path={model}", f"data.train=[{{path: {task}}}]", f"data.cache_dir={cache}", *SMALL, *more]
    )


def made(model, cache, *more, **order):
    run = run_of(model, cache, *more)
    asked = selfmade.order_of(run).model_copy(update=order)
    return selfmade.make(asked, making.inspect(asked))


def rows_of(found):
    return [json.loads(line) for line in found.path.read_text().splitlines()]


def test_every_kind_gives_rows_of_its_own_form(chat, plain, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "ddd"}\n')
    talk = rows_of(made(chat, tmp_path, "synthesis.rows=6", "synthesis.kinds=[header,topics]"))
    assert [row["made"]["kind"] for row in talk] == ["header"] * 3 + ["topics"] * 3
    for row in talk:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert not any("<" in turn["content"] for turn in row["messages"])
    assert all(set(row["messages"][0]["content"]) <= set(talkers.WORDS) for row in talk[:3])
    assert {row["stratum"] for row in talk[3:]} <= {
        "chat",
        "prose",
        "code",
        "facts",
        "instructions",
        "arithmetic",
    }
    text = rows_of(made(plain, tmp_path, "synthesis.rows=6"))
    assert all(set(row) == {"text", "made"} and len(row["text"]) >= 2 for row in text)
    gone_on = rows_of(made(plain, tmp_path, "synthesis.rows=4", f"synthesis.prompts={prompts}"))
    assert {row["prompt"] for row in gone_on} == {"abc", "ddd"}
    assert all(row["completion"] for row in gone_on)


def test_a_note_says_where_the_rows_come_from_and_what_was_left_out(plain, tmp_path):
    found = made(plain, tmp_path, "synthesis.rows=20")
    notes = json.loads(found.path.with_suffix(".notes.json").read_text())
    (stream,) = notes["streams"].values()
    waves = Journal(tmp_path / "synthesised" / f"{stream['stream']}.jsonl").waves
    assert sum(len(wave.rows) + sum(wave.dropped.values()) for wave in waves) == stream["tried"]
    assert stream["rows"] == 20 < stream["tried"]
    assert {"special tokens", "too short"} <= set(stream["dropped"])
    assert notes["model"]["path"] == str(plain)
    assert notes["settings"]["synthesis"]["temperature"] == 1.0
    copy = found.copied(tmp_path / "out/mine.jsonl")
    assert copy.read_bytes() == found.path.read_bytes()
    assert json.loads((tmp_path / "out/mine.notes.json").read_text()) == notes


def test_what_was_written_is_found_again_and_more_of_it_begins_with_it(plain, tmp_path, monkeypatch):
    few = rows_of(made(plain, tmp_path, "synthesis.rows=8"))
    more = rows_of(made(plain, tmp_path, "synthesis.rows=20"))
    assert more[:8] == few
    monkeypatch.setattr(making, "make", None)  # to be called no more
    assert rows_of(made(plain, tmp_path, "synthesis.rows=20")) == more
    assert rows_of(made(plain, tmp_path, "synthesis.rows=8", "synthesis.batch_size=7")) == few
    with pytest.raises(TypeError):
        made(plain, tmp_path, "synthesis.rows=8", "synthesis.seed=1")


def written_on(world, order):
    making.make(Order.model_validate_json(order), world)


KINDS = ("synthesis.rows=24", "synthesis.kinds=[header,topics]")


def test_two_ranks_write_what_one_writes(chat, tmp_path):
    for ranks in (1, 2):
        order = selfmade.order_of(run_of(chat, tmp_path / str(ranks), *KINDS))
        workers.run(ranks, written_on, order.model_dump_json(by_alias=True))
    one, two = (sorted((tmp_path / str(ranks) / "synthesised").glob("*.jsonl")) for ranks in (1, 2))
    assert len(one) == 2
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_who_is_killed_while_writing_goes_on_there(chat, tmp_path):
    """After a whole wave and half of the next one; the same file in the end as in one go."""
    whole = made(chat, tmp_path / "whole", *KINDS)
    where = tmp_path / "killed/synthesised"
    where.mkdir(parents=True)
    for path in (tmp_path / "whole/synthesised").glob("header-*.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) > 1
        (where / path.name).write_bytes(lines[0] + lines[1][:-20])
    again = made(chat, tmp_path / "killed", *KINDS)
    assert again.path.name == whole.path.name
    for path in where.glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "whole/synthesised" / path.name).read_bytes()


def test_a_journal_forgets_half_a_line(tmp_path):
    path = tmp_path / "stream.jsonl"
    journal = Journal(path)
    journal.note(Wave(3, ({"text": "a"},), {"empty": 2}))
    journal.write(journal.waves[-1])
    path.write_bytes(path.read_bytes() + b'{"tried": 4, "rows"')
    read = Journal(path)
    assert (read.tried, read.rows, read.dropped) == (3, [{"text": "a"}], {"empty": 2})
    read.note(Wave(1))
    read.write(read.waves[-1])
    assert [wave.tried for wave in Journal(path).waves] == [3, 1]


def test_answers_are_refreshed_where_they_pass_and_kept_where_not(chat, tmp_path):
    """Gold answers are those of the file; a model's answer passes where its length is even."""
    import sys

    (tmp_path / "my_scores.py").write_text(
        "def even(answer, row, *, by):\n    assert row['id'] >= 0\n    return float(len(answer) % by == 0)\n"
    )
    earlier = tmp_path / "earlier.jsonl"
    turns = [("user", "abc"), ("assistant", "gold")]
    rows = [{"id": i, "messages": [{"role": r, "content": c} for r, c in turns]} for i in range(24)]
    rows[3]["messages"][0]["content"] = "abc" * 99  # too long to be asked
    earlier.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scoring = "evaluate.score={_target_: my_scores.even, by: 2}"
    run = run_of(chat, tmp_path, scoring, "trusted_packages=[my_scores]")
    given = selfmade.Source(path=str(earlier))
    order = selfmade.order_of(run).model_copy(update={"refresh": (given,), "score": run.evaluate.score})
    sys.path.insert(0, str(tmp_path))
    try:
        found = selfmade.make(order, making.inspect(order))
    finally:
        sys.path.remove(str(tmp_path))
    answers = [(row["made"]["answer"], row["messages"][-1]["content"]) for row in rows_of(found)]
    assert len(answers) == 24
    assert {text for by, text in answers if by == "gold"} == {"gold"}
    refreshed = [text for by, text in answers if by == "model"]
    assert refreshed
    assert all(len(text) % 2 == 0 for text in refreshed)
    dropped = found.notes["streams"]["refresh"]["dropped"]
    assert answers[3] == ("gold", "gold")
    assert dropped["request over-long"] == 1
    assert all(len(row["messages"]) == 2 for row in rows_of(found))
    assert dropped["not passed"] > 0
    assert sum(dropped.values()) == sum(by == "gold" for by, _ in answers)


def test_a_run_replays_what_its_start_model_writes(chat, tmp_path, monkeypatch):
    run = run_of(chat, tmp_path, "replay=synthesised", "synthesis.rows=12", "retain=none", "steps=2")
    prepared = build.prepare(run)
    assert [table.name for table in prepared.tables] == ["task", "self"]
    assert len(prepared.tables[1]) == 12
    monkeypatch.setattr(selfmade, "make", None)  # whoever is told asks no model
    told = record.unpacked(record.packed(run))
    assert build.prepare(told).identity == prepared.identity
    other = run.model_copy()
    other._rows.clear()
    selfmade.unpack(other, selfmade.packed(told))
    assert other._rows == told._rows


def test_a_machine_without_the_cache_is_told_the_text(chat, tmp_path):
    here = run_of(chat, tmp_path / "here", "replay=synthesised", "synthesis.rows=4")
    build.prepare(here)
    there = run_of(chat, tmp_path / "there", "replay=synthesised", "synthesis.rows=4")
    selfmade.unpack(there, selfmade.packed(here))
    path = Path(there._rows["self:"])
    assert path.is_relative_to(tmp_path / "there")
    assert path.read_bytes() == Path(here._rows["self:"]).read_bytes()


def test_what_a_probe_of_the_run_says_is_not_replayed(plain, tmp_path):
    rows = rows_of(made(plain, tmp_path, "synthesis.rows=10"))
    probe = tmp_path / "probe.jsonl"
    probe.write_text("".join(json.dumps({"text": row["text"].upper()}) + "\n" for row in rows[:2]))
    run = run_of(
        plain, tmp_path, "replay=synthesised", "synthesis.rows=10", f"evaluate.retention=[{{path: {probe}}}]"
    )
    (source,) = selfmade.sources_of(run, making.inspect(selfmade.order_of(run)))
    assert [json.loads(line) for line in Path(source.path).read_text().splitlines()] == rows[2:]


def test_only_a_run_that_replays_it_depends_on_it(chat, tmp_path):
    def same(first, second):
        return run_of(chat, tmp_path, *first).identity() == run_of(chat, tmp_path, *second).identity()

    assert same([], ["synthesis.rows=7"])
    assert not same(["replay=synthesised"], ["replay=synthesised", "synthesis.rows=7"])
    assert same(["replay=synthesised"], ["replay=synthesised", "synthesis.batch_size=7"])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (['data.eval=[{path: "self:"}]'], "data.eval: self:, text of the start model's own; .*replay=synth"),
        (["replay=fixed", 'replay.sources=[{path: "self:"},{path: "self:"}]'], "self: 2 times"),
        (["replay=synthesised", "model.init=random"], "which has nothing to say; .*model.init=pretrained"),
        (["replay=synthesised", "synthesis.max_new_tokens=256"], "type synthesis.max_new_tokens=128"),
        (["replay=synthesised", "stage=reward"], "in stage reward"),
    ],
)
def test_what_cannot_be_written_is_refused(more, told, chat, tmp_path):
    with pytest.raises(ConfigError, match=told):
        run_of(chat, tmp_path, *more)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["synthesis.kinds=[start,topics]"], "type synthesis.kinds=.start. or leave it out"),
        (["synthesis.kinds=[topics]"], "has no chat template, .* synthesis.prompts=FILE.jsonl"),
        (["synthesis.kinds=[header]"], "found header, and .* has no chat template"),
        (["synthesis.max_new_tokens=250"], "type synthesis.max_new_tokens=128"),
    ],
)
def test_what_a_model_cannot_write_is_refused(more, told, plain, tmp_path):
    order = selfmade.order_of(run_of(plain, tmp_path, *more))
    with pytest.raises(ConfigError, match=told):
        drafts.plans(order, making.inspect(order))


def test_a_model_that_says_too_little_is_given_up(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "TRIES", 1)
    monkeypatch.setattr(making, "FEWEST", 4)
    with pytest.raises(
        DataError, match=r"start: .* rows of use in \d+ tries; expected 60; left out: .*: synthesis.max"
    ):
        made(plain, tmp_path, "synthesis.rows=60", "synthesis.max_new_tokens=6")


def test_a_template_is_seen_through(chat):
    order = selfmade.order_of(run_of(chat, "unused"))
    words = making.inspect(order).tokenizer
    header = next(p for p in drafts.plans(_of_kinds(order, "header"), making.inspect(order)))
    assert words.decode(header.beginning.turn.opening) == "<bos><user>"
    assert header.beginning.turn.closing == "<eos>"
    assert set(header.marks) == {"<bos><user>", "<eos>"}


def _of_kinds(order, *kinds):
    return order.model_copy(update={"synthesis": order.synthesis.model_copy(update={"kinds": kinds})})


def test_small_models_are_given_requests(chat, plain, monkeypatch):
    def kinds(model):
        order = selfmade.order_of(run_of(model, "unused"))
        return [plan.kind for plan in drafts.plans(order, making.inspect(order))]

    assert kinds(chat) == ["topics"]
    assert kinds(plain) == ["start"]
    monkeypatch.setattr(drafts, "LARGE", 10)
    assert kinds(chat) == ["topics", "header"]
    assert kinds(plain) == ["start"]
