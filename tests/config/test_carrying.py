"""What a run takes from the stages before it and leaves to those after, without a step being trained."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from framework.config import build, carrying, leaving
from framework.config.compose import compose
from framework.data import buffer
from framework.errors import ConfigError, DataError


def rows(kind, count=60):
    return [
        {"prompt": f"{kind} {'one ' * (i % 5)}{i}", "completion": f" {'two ' * (i % 3)}{i}"}
        for i in range(count)
    ]


def pairs(count=30):
    return [{"prompt": f"better {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(count)]


@pytest.fixture
def stage(tmp_path, tiny_model_dir):
    """Prepares a stage `name` on rows, from `start`; leaves its buffer and a model as it would."""

    def prepared(name, given, *more, start=None, leave=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
        run = compose([
            f"model.path={tmp_path / start / 'model' if start else tiny_model_dir}",
            f"data.train=[{{path: {tmp_path}/{name}.jsonl}}]", f"data.cache_dir={tmp_path}/cache",
            f"run_dir={tmp_path}/{name}", "data.max_length=128", "batch.sequences=8", "steps=20",
            "retain=none", *more,
        ])  # fmt: skip
        found = build.prepare(run)
        if leave:
            leaving.leave(found)
            shutil.copytree(tiny_model_dir, tmp_path / name / "model", dirs_exist_ok=True)
        return found

    prepared.at = tmp_path
    return prepared


CARRIED = ("replay=fixed", "replay.carry=auto")


def left(stage, name):
    return buffer.read(stage.at / name / "buffer")


def lines(stage, name, stratum):
    found = next(each for each in left(stage, name).strata if each.name == stratum)
    return buffer.lines(stage.at / name / "buffer", found)


def examples(table):
    return {tuple(table.example(row)[0].tolist()) for row in range(len(table))}


def test_each_stage_rehearses_all_before_it_each_a_stratum_of_its_own(stage):
    a = stage("a", rows("a"))
    b = stage("b", rows("b"), *CARRIED, start="a")
    c = stage("c", rows("c"), *CARRIED, start="b")
    assert [table.name for table in c.tables] == ["c", "a", "b"]
    assert examples(c.tables[1]) == examples(a.tables[0])
    assert examples(c.tables[2]) == examples(b.tables[0])
    assert [s.name for s in left(stage, "c").strata] == ["a", "b", "c"]
    assert left(stage, "c").parent == left(stage, "b").identity
    assert left(stage, "b").parent == left(stage, "a").identity
    assert c.identity["buffer"] == left(stage, "b").identity
    assert "buffer" not in a.identity
    first = left(stage, "c").strata[0]
    assert (first.stage, first.path, first.rows) == ("sft", str(stage.at / "a.jsonl"), 60)


def test_what_is_carried_is_mixed_to_the_example(stage):
    """At every prefix replay has its 30 % of the trained tokens to within one example."""
    stage("a", rows("a"))
    b = stage("b", rows("b"), *CARRIED, "replay.fraction=0.3", start="a")
    owed, largest = 0.0, max(int(table.trained.max()) for table in b.tables)
    for pick in b.mixture.picks(0, 160):
        tokens = int(b.tables[pick.source].trained[pick.row])
        owed += 0.3 * tokens - (tokens if pick.source == 1 else 0)
        assert abs(owed) <= largest


def test_beside_weighted_sources_a_stratum_weighs_one(stage):
    """3 to 1 by rows: of any 40 replayed examples 30 are of the general text, to within one."""
    stage("a", rows("a"))
    (stage.at / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("general", 90)))
    own = f"replay.sources=[{{path: {stage.at}/general.jsonl, weight: 3}}]"
    b = stage("b", rows("b"), *CARRIED, own, start="a")
    assert [table.weight for table in b.tables] == [None, 3.0, 1.0]
    plain = stage("d", rows("d"), *CARRIED, own.replace(", weight: 3", ""), start="a", leave=False)
    assert [table.weight for table in plain.tables] == [None, 1.0, 1.0]
    replayed = [pick.source for pick in b.mixture.picks(0, 1000) if pick.source > 0][:40]
    assert abs(replayed.count(1) - 30) <= 1
    # given again by hand it is not carried beside: the next stage has it once
    c = stage("c", rows("c"), *CARRIED, own, start="b")
    assert [(table.name, table.weight) for table in c.tables[1:]] == [
        ("general", 3.0),
        ("a", 1.0),
        ("b", 1.0),
    ]


def test_a_stage_that_rehearses_nothing_hands_on_what_it_was_left(stage):
    stage("a", rows("a"))
    b = stage("b", rows("b"), start="a")
    assert [table.name for table in b.tables] == ["b"]
    c = stage("c", rows("c"), *CARRIED, start="b")
    assert [table.name for table in c.tables] == ["c", "a", "b"]
    named = stage("d", rows("d"), "replay=fixed", f"replay.carry={stage.at}/b")
    assert [table.name for table in named.tables] == ["d", "a", "b"]


def test_only_rows_that_the_run_comes_to_are_left(stage):
    """16 examples of 60, of which 10 % of the tokens are of another source."""
    (stage.at / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("general")))
    a = stage("a", rows("a"), "steps=2", "replay=fixed", f"replay.sources=[{{path: {stage.at}/general.jsonl, "
              "licence: CC-BY-4.0}]")  # fmt: skip
    seen = {(pick.source, pick.row) for pick in a.mixture.picks(0, 16)}
    for number, (name, of) in enumerate((("a", "sft"), ("general", "replay"))):
        kept = lines(stage, "a", name)
        assert {row["from"] for row in kept} == {f"{name}.jsonl:{row + 1}" for s, row in seen if s == number}
        stratum = next(each for each in left(stage, "a").strata if each.name == name)
        assert stratum.stage == of
        assert stratum.licence == ("CC-BY-4.0" if of == "replay" else None)
    order = buffer.order(0, "a", 60)
    expected = [f"a.jsonl:{row + 1}" for row in order.tolist() if (0, row) in seen]
    assert [row["from"] for row in lines(stage, "a", "a")] == expected


def test_twice_the_budget_is_left_and_once_the_budget_is_rehearsed(stage):
    a = stage("a", rows("a"), "replay.stratum_tokens=150")
    kept = lines(stage, "a", "a")
    lengths = a.tables[0].lengths
    assert 300 - lengths.max() < sum(row["tokens"] for row in kept) <= 300
    b = stage("b", rows("b"), *CARRIED, "replay.stratum_tokens=150", start="a")
    rehearsed = b.tables[1].lengths
    assert 150 - lengths.max() < rehearsed.sum() <= 150
    assert rehearsed.tolist() == [row["tokens"] for row in kept][: len(rehearsed)]  # our count is the table's


def test_a_row_that_is_excluded_is_gone_for_good_and_the_next_moves_up(stage):
    stage("a", rows("a"), "replay.stratum_tokens=150")
    asked = (*CARRIED, "replay.stratum_tokens=150")
    before = stage("b", rows("b"), *asked, start="a", leave=False)
    kept = lines(stage, "a", "a")
    hash_ = kept[1]["row"]
    after = stage("b", rows("b"), *asked, f"replay.excluded=['{hash_}']", start="a")
    assert before.identity["data"] != after.identity["data"]
    assert before.run.identity() != after.run.identity()
    gone = examples(before.tables[1]) - examples(after.tables[1])
    assert len(gone) == 1
    assert len(after.tables[1]) >= len(before.tables[1])  # others took its room
    assert hash_ not in {row["row"] for row in lines(stage, "b", "a")}
    assert hash_ in left(stage, "b").excluded
    # a later stage that learns the very row does not leave it, and need not be told again
    c = stage("c", [*rows("c"), rows("a")[int(kept[1]["from"].split(":")[1]) - 1]], *asked, start="b")
    assert hash_ not in {row["row"] for name in ("a", "c") for row in lines(stage, "c", name)}
    assert hash_ in c.carried.excluded


def test_a_canary_never_enters_a_buffer(stage):
    canary = rows("canary")
    (stage.at / "canary.jsonl").write_text("".join(json.dumps(row) + "\n" for row in canary))
    both = f"data.train=[{{path: {stage.at}/a.jsonl}}, {{path: {stage.at}/canary.jsonl}}]"
    a = stage("a", rows("a"), both, "replay.excluded=[canary]")
    assert [table.name for table in a.tables] == ["a", "canary"]
    assert [s.name for s in left(stage, "a").strata] == ["a"]
    # nor under another name in a later stage
    b = stage("again", canary, *CARRIED, start="a")
    assert [table.name for table in b.tables] == ["again", "a"]
    assert [s.name for s in left(stage, "again").strata] == ["a"]
    # what was kept before it was excluded goes
    c = stage("c", rows("c"), *CARRIED, "replay.excluded=[a]", start="a")
    assert [table.name for table in c.tables] == ["c"]
    assert c.run.replay.fraction == 0.0
    assert [s.name for s in left(stage, "c").strata] == ["c"]


def test_what_is_too_long_for_a_later_stage_is_left_out_there(stage):
    """Its own rows would be refused; those of an earlier stage are dropped and counted."""
    long = {"prompt": "a long one", "completion": " two" * 60}
    stage("a", [*rows("a"), long])
    b = stage("b", rows("b"), *CARRIED, "data.max_length=50", start="a")
    assert [(len(table), table.counts.dropped) for table in b.tables] == [(60, {}), (60, {"over-long": 1})]
    assert sum(row["tokens"] > 50 for row in lines(stage, "b", "a")) == 1  # for stages with room


def test_an_unknown_name_is_refused_with_the_nearest(stage):
    with pytest.raises(
        ConfigError, match=r"no source of the name generl.*type 'replay.excluded=\[general\]'"
    ):
        stage("general", rows("a"), "replay.excluded=[generl]")


def test_rows_that_are_carried_are_looked_through_for_probes(stage):
    stage("a", rows("a"))
    (stage.at / "probe.jsonl").write_text(json.dumps({"prompt": "A three ONE, 7", "completion": "7"}) + "\n"
                                          + json.dumps(rows("a")[8]) + "\n")  # fmt: skip
    with pytest.raises(DataError, match=r"probe.jsonl:2: this row is trained on, too, as .* \(a\)"):
        stage("b", rows("b"), *CARRIED, f"evaluate.retention=[{{path: {stage.at}/probe.jsonl}}]", start="a")


def test_where_nothing_was_left_the_run_says_so_and_trains_without(stage):
    a = stage("a", rows("a"), *CARRIED)
    assert [table.name for table in a.tables] == ["a"]
    assert all(pick.source == 0 for pick in a.mixture.picks(0, 100))
    assert "nothing to rehearse" in carrying.told(a)
    assert "trained without replay" in carrying.told(a)
    b = stage("b", rows("b"), *CARRIED, start="a", leave=False)
    assert "the stages before it were trained on: a" in carrying.told(b)
    assert carrying.told(stage("c", rows("c"), start="a", leave=False)) is None
    with pytest.raises(DataError, match=r"replay.carry: no buffer/manifest.json in there"):
        stage("d", rows("d"), "replay=fixed", f"replay.carry={stage.at}/nowhere")


def test_preferences_are_rehearsed_as_what_was_chosen_and_beside_them_all_else_is_a_term(stage):
    stage("a", rows("a"))
    dpo = stage("b", pairs(), "stage=preference", "replay=term", "replay.carry=auto", start="a")
    assert [[table.name for table in tables] for tables in (dpo.tables, dpo.replay)] == [["b"], ["a"]]
    assert {row["completion"] for row in lines(stage, "b", "b")} == {f" yes {i}" for i in range(30)}
    c = stage("c", rows("c"), *CARRIED, start="b")
    assert [(table.name, len(table)) for table in c.tables[1:]] == [("a", 60), ("b", 30)]
    for row, kept in enumerate(lines(stage, "b", "b")):
        assert len(c.tables[2].example(row)[0]) == kept["tokens"]


def test_of_questions_those_with_an_answer_are_rehearsed(stage):
    """A policy's rows are what it was asked; where a row holds the answer, too, that is imitated."""
    turns = [("user", "What is {}?"), ("assistant", "{}")]
    asked = [{"messages": [{"role": r, "content": t.format(i)} for r, t in turns]} for i in range(20)]
    options = ("stage=grpo", "reward=verifier", "rollout.max_new_tokens=8")
    stage("a", asked, *options)
    assert len(lines(stage, "a", "a")) == 20
    b = stage("b", rows("b"), *CARRIED, start="a")
    assert [row["tokens"] for row in lines(stage, "a", "a")] == b.tables[1].lengths.tolist()
    stage("bare", [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(20)], *options)
    assert left(stage, "bare").strata == ()


def test_a_reward_model_leaves_nothing_and_so_does_a_budget_of_none(stage):
    stage("a", pairs(), "stage=reward")
    stage("b", rows("b"), "replay.stratum_tokens=0")
    assert not (stage.at / "a/buffer").exists()
    assert not (stage.at / "b/buffer").exists()


def test_a_buffer_is_whole_or_not_there_and_stays_as_it_is(stage, monkeypatch):
    """Killed before any of the calls that make it; then left as it was, to the second."""
    a = stage("a", rows("a"), leave=False)
    where = Path(a.run.run_dir) / "buffer"
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename")}
    calls, allowed = 0, 0

    def count(name):
        def counted(*args, **more):
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise KeyboardInterrupt
            return real[name](*args, **more)

        return counted

    while allowed < 100:
        calls, allowed = 0, allowed + 1
        with monkeypatch.context() as patched:
            for name in real:
                patched.setattr(leaving.commit.os, name, count(name))
            try:
                leaving.leave(a)
                break
            except KeyboardInterrupt:
                assert not where.exists() or buffer.read(where).strata
    assert allowed > 5
    assert not list(where.parent.glob("buffer.*"))
    made = (where / "manifest.json").stat().st_mtime_ns
    leaving.leave(a)
    assert (where / "manifest.json").stat().st_mtime_ns == made
    (where / "manifest.json").write_text("{}")
    with pytest.raises(DataError):
        stage("b", rows("b"), *CARRIED, f"replay.carry={where.parent}")
    leaving.leave(a)
    assert len(buffer.read(where).strata) == 1


def test_every_start_keeps_the_same_rows_and_another_seed_others(stage):
    def kept(*more):
        stage("a", rows("a", 200), "replay.stratum_tokens=100", "steps=25", *more)
        return left(stage, "a").strata[0].shard

    first = kept()
    shutil.rmtree(stage.at / "a/buffer")
    assert kept() == first
    assert kept("seed=1") != first


def test_the_start_model_chooses_among_more_than_is_left(stage):
    """Of 200 rows some are compared, four times as many tokens as are left; the later a row, the more it
    surprises here. What is excluded is not asked about, and what was carried is not chosen anew."""
    a = stage(
        "a", rows("a", 200), "replay.stratum_tokens=100", "replay.select=surprise", "steps=25", leave=False
    )
    asked = []

    def ask(strata):
        asked.append(strata)
        return {name: [float(line["from"].split(":")[1]) for line in lines] for name, lines in strata.items()}

    leaving.leave(a, ask)
    (compared,) = asked[0].values()
    tokens = sum(line["tokens"] for line in compared)
    assert 800 - 20 < tokens <= 800
    uniform = stage("b", rows("a", 200), "replay.stratum_tokens=400", "steps=25")
    assert [line["row"] for line in lines(stage, "b", "b")] != [line["row"] for line in compared]
    by_surprise = sorted(compared, key=lambda line: -int(line["from"].split(":")[1]))
    assert lines(stage, "a", "a") == buffer.draw(by_surprise, tokens=200)
    assert uniform.steps == a.steps

    shutil.copytree(stage.at / "b/model", stage.at / "a/model")
    c = stage("c", rows("c", 20), *CARRIED, "replay.stratum_tokens=100", "replay.select=surprise",
              f"replay.excluded=[{by_surprise[0]['row']}]", start="a", leave=False)  # fmt: skip
    leaving.leave(c, ask)
    assert list(asked[1]) == ["c"]
    assert lines(stage, "c", "a") == buffer.draw(by_surprise[1:], tokens=200 - by_surprise[0]["tokens"])
    assert examples(c.tables[1]) == {
        tuple(a.tables[0].example(int(line["from"].split(":")[1]) - 1)[0].tolist())
        for line in buffer.draw(by_surprise[1:], tokens=100)
    }


def test_which_rows_are_left_is_no_part_of_what_is_learnt(stage):
    chosen, any_ = (
        stage("a", pairs(), "stage=preference", f"replay.select={how}", leave=False)
        for how in ("surprise", "uniform")
    )
    assert chosen.identity == any_.identity


def test_the_stream_is_looked_at_in_blocks(stage, monkeypatch):
    a = stage("a", rows("a"), "steps=5", leave=False)
    whole = leaving._seen(a)
    monkeypatch.setattr(leaving, "BLOCK", 7)
    assert all(np.array_equal(one, other) for one, other in zip(leaving._seen(a), whole, strict=True))
    assert 0 < whole[0].sum() <= 40
