"""Rows left for later stages because they surprise the start model, however their run is spread."""

import json
from itertools import pairwise

import pytest
import recipes
import torch
import workers
from transformers import AutoModelForCausalLM

from framework.config import build, compose, leaving, tabled
from framework.config.work import work
from framework.data import buffer
from framework.data.sources import Source

WORDS = "one two three four five six seven".split()
KINDS = {
    "sft": [],
    "dpo": ["stage=preference"],
    "ppo": ["stage=ppo", "rollout.max_new_tokens=8", "reward=verifier"],
}


def rows(kind):
    for i in range(120):
        asked, said = " ".join(WORDS[: 1 + i % 7]), " ".join(WORDS[i % 5 :] * (1 + i % 3)) + f" {i}"
        if kind == "sft":
            yield {"prompt": asked, "completion": said}
        elif kind == "dpo":
            yield {"prompt": asked, "chosen": said, "rejected": f"no {i}"}
        else:
            turns = [("user", asked), ("assistant", said)]
            yield {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture(scope="module")
def line(tmp_path_factory, tiny_model_dir):
    """A command line whose run has a directory and a cache of its own, so that each asks for itself."""
    place = tmp_path_factory.mktemp("left")
    for kind in KINDS:
        (place / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))

    def made(kind, name, *more, **changes):
        own = recipes.overrides(tiny_model_dir, place / f"{kind}.jsonl", place / name, steps=20, **changes)
        return place / name / "run", [*KINDS[kind], *own, "retain=none", "tracker.report=false", *more]

    return made


def leaves(world, arguments):
    """What `work` does of it."""
    prepared = build.prepare(compose.compose(arguments))
    leaving.leave_surprising(prepared, build.build_engine(prepared, world))


@pytest.fixture(scope="module")
def all_rows(line):
    """kind -> every row as it would be left with what plain transformers loses on it, nats a token; and what
    to type for some of them to be chosen of all."""
    made = {}

    def get(kind):
        if kind not in made:
            where, arguments = line(kind, f"{kind}-all")
            prepared = build.prepare(compose.compose(arguments))
            leaving.leave(prepared)
            (stratum,) = buffer.read(where / "buffer").strata
            file = Source(str(where / "buffer" / f"{stratum.shard}.jsonl"), format=stratum.format)
            (table,) = tabled.tokenised.prepare([file], train_on="assistant", **tabled.options(prepared))
            lm = AutoModelForCausalLM.from_pretrained(prepared.run.model.path).float()
            lost = {}
            for row, text in enumerate(buffer.lines(where / "buffer", stratum)):
                ids, trained = (torch.tensor(part) for part in table.example(row))
                with torch.no_grad():
                    logps = lm(ids[None].long()).logits[0, :-1].log_softmax(-1)
                each = logps.gather(1, ids[1:, None].long())[trained[1:], 0]
                lost[text["row"]] = -each.double().mean().item()
            tokens = max(stratum.tokens, int(prepared.tables[0].lengths.sum()))  # of pairs: both answers
            made[kind] = lost, ["replay.select=surprise", f"replay.stratum_tokens={-(-tokens // 8)}"]
        return made[kind]

    return get


@pytest.fixture(scope="module")
def alone(line, all_rows):
    """kind -> the rows that a run of one process leaves; the whole of it where it is supervised."""
    made = {}

    def get(kind):
        if kind not in made:
            where, arguments = line(kind, f"{kind}-alone", *all_rows(kind)[1])
            if kind == "sft":
                assert work(compose.compose(arguments)) == 0
            else:
                workers.run(1, leaves, arguments, timeout_s=120)
            made[kind] = left(where)
        return made[kind]

    return get


def left(where):
    (stratum,) = buffer.read(where / "buffer").strata
    return [row["row"] for row in buffer.lines(where / "buffer", stratum)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_what_plain_transformers_loses_most_on(kind, alone, all_rows):
    """In the order of the loss, and all that is left out below it but for the one row at the top."""
    (lost, _), rows = all_rows(kind), alone(kind)
    nats = [lost[row] for row in rows]
    others = sorted((each for row, each in lost.items() if row not in rows), reverse=True)
    assert len(lost) == 120
    assert 15 < len(rows) < 80
    assert max(nats) - min(nats) > 0.01
    assert all(later < earlier + 1.1e-3 for earlier, later in pairwise(nats))
    assert others[0] > nats[0] - 1.1e-3
    assert others[1] < nats[-1] + 1.1e-3


@pytest.mark.parametrize(
    ("kind", "size", "strategy", "adapter"),
    [
        ("sft", 2, "fsdp", "lora"),
        ("sft", 2, "zero3", "full"),
        ("sft", 4, "ddp", "full"),
        ("dpo", 2, "fsdp", "full"),
        ("ppo", 2, "zero3", "full"),
    ],
)
def test_the_same_rows_are_left_however_a_run_is_spread(kind, size, strategy, adapter, line, alone, all_rows):
    name = f"{kind}-{size}-{strategy}-{adapter}"
    where, arguments = line(kind, name, *all_rows(kind)[1], strategy=strategy, adapter=adapter)
    workers.run(size, leaves, arguments, timeout_s=180)
    assert left(where) == alone(kind)
