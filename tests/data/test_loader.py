"""The same examples in every step for every world size, and the same training signal packed and padded."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from framework.data import tables
from framework.data.collate import collate, fill
from framework.data.loader import Loader, held_out
from framework.data.mixture import Group, Mixture
from framework.data.sources import Source

PAD = 1


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory):
    """[training, replay]: 23 and 11 examples of different lengths."""
    import json

    root = tmp_path_factory.mktemp("loader")
    wanted = []
    for name, n, words in (("task", 23, 9), ("general", 11, 30)):
        rows = [{"prompt": f"{name} {i} is", "completion": " yes" * (1 + (7 * i) % words)} for i in range(n)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        wanted.append(Source(str(root / f"{name}.jsonl")))
    return tables.prepare(wanted, tokenizer=tokenizer, max_length=128, cache_dir=root / "cache")


def make(prepared, *, rank=0, world_size=1, packing=True, sequences=10, tokens_per_micro=60, fraction=0.2):
    train, replay = (Group([table.trained]) for table in prepared)
    return Loader(
        prepared,
        Mixture(train, replay, fraction=fraction, seed=0),
        sequences=sequences,
        tokens_per_micro=tokens_per_micro,
        packing=packing,
        rank=rank,
        world_size=world_size,
        pad_id=PAD,
    )


def segments(batch):
    """(source, token ids, {target position: target}) of each segment of a batch, fills left out."""
    found = []
    starts = (
        batch.boundaries[:-1] if batch.packed else torch.arange(len(batch.sources)) * batch.input_ids.shape[1]
    )
    flat = batch.input_ids.flatten()
    for s, source in enumerate(batch.sources.tolist()):
        n = int(batch.boundaries[s + 1] - batch.boundaries[s])
        ids = flat[starts[s] : starts[s] + n].tolist()
        of = batch.segments == s
        targets = dict(zip((batch.trained[of] - starts[s]).tolist(), batch.targets[of].tolist(), strict=True))
        positions = batch.position_ids.flatten()[starts[s] : starts[s] + n].tolist()
        assert positions == list(range(n))
        if source >= 0:
            found.append((source, tuple(ids), tuple(sorted(targets.items()))))
    return found


def test_targets_are_the_next_tokens_of_their_own_segment(prepared):
    """The shift, by hand: trained token t of an example is the target at position t - 1."""
    [batch] = make(prepared, sequences=3, tokens_per_micro=500).next().micros
    picks = make(prepared).mixture.picks(0, 3)
    assert len(batch.sources) == 3
    expected = []
    for pick in picks:
        ids, trained = prepared[pick.source].example(pick.row)
        targets = tuple((int(t) - 1, int(ids[t])) for t in np.flatnonzero(trained))
        assert targets
        expected.append((pick.source, tuple(ids.tolist()), targets))
    assert sorted(segments(batch)) == sorted(expected)
    assert batch.units == len(batch.targets) == sum(len(e[2]) for e in expected)
    assert batch.trained.tolist() == sorted(batch.trained.tolist())


@pytest.mark.parametrize("packing", [True, False])
def test_examples_of_a_step_do_not_depend_on_the_world(prepared, packing):
    """World sizes 1 to 4, packed and padded: same segments, targets, facts and number of micro-batches."""
    alone = make(prepared)
    groups = {
        size: [make(prepared, rank=r, world_size=size, packing=packing) for r in range(size)]
        for size in (1, 2, 3, 4)
    }
    for _ in range(6):
        expected = alone.next()
        wanted = sorted(s for batch in expected.micros for s in segments(batch))
        for ranks in groups.values():
            steps = [loader.next() for loader in ranks]
            assert len({len(step.micros) for step in steps}) == 1
            assert sorted(s for step in steps for b in step.micros for s in segments(b)) == wanted
            assert sum(b.units for step in steps for b in step.micros) == expected.stats["trained_tokens"]
            for step in steps:
                assert step.stats == steps[0].stats
                same = {"tokens", "trained_tokens", "data_index", "epoch", "trained_tokens/general"}
                assert {k: step.stats[k] for k in same} == {k: expected.stats[k] for k in same}
                for batch in step.micros:
                    assert batch.packed == packing
                    assert batch.input_ids.numel() <= 60 or len(batch.sources) == 1


def test_resume_needs_the_index_only_and_gives_identical_batches(prepared):
    for size in (1, 2):
        run = make(prepared, world_size=size)
        for _ in range(4):
            run.next()
        state = run.state_dict()
        assert state == {"index": 40}
        later = [run.next() for _ in range(3)]
        resumed = make(prepared, world_size=size)
        resumed.load_state_dict(state)
        for step in later:
            again = resumed.next()
            assert again.stats == step.stats
            for one, other in zip(again.micros, step.micros, strict=True):
                for field in fields(one):
                    a, b = getattr(one, field.name), getattr(other, field.name)
                    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_stats_are_facts_of_the_global_step(prepared):
    step = make(prepared, rank=1, world_size=2, tokens_per_micro=130).next()
    picks = make(prepared).mixture.picks(0, 10)
    for source, table in enumerate(prepared):
        rows = [p.row for p in picks if p.source == source]
        assert step.stats[f"tokens/{table.name}"] == table.lengths[rows].sum()
        assert step.stats[f"trained_tokens/{table.name}"] == table.trained[rows].sum()
    assert step.stats["tokens"] == step.stats["tokens/task"] + step.stats["tokens/general"]
    assert (step.stats["sequences"], step.stats["data_index"]) == (10, 10)
    assert step.stats["epoch"] == sum(p.source == 0 for p in picks) / 23
    assert step.stats["packing_efficiency"] == pytest.approx(
        step.stats["tokens"] / (2 * len(step.micros) * 130)
    )


def test_replay_keeps_its_share_over_a_run(prepared):
    loader = make(prepared)
    total = replayed = 0
    longest = max(table.trained.max() for table in prepared)
    for _ in range(100):
        stats = loader.next().stats
        total += stats["trained_tokens"]
        replayed += stats["trained_tokens/general"]
        assert abs(replayed - 0.2 * total) <= longest


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_held_out_rows_come_once_over_all_ranks(prepared, size, packing):
    passes = [
        held_out(
            prepared[0],
            tokens_per_micro=60,
            packing=packing,
            rank=r,
            world_size=size,
            pad_id=PAD,
        )
        for r in range(size)
    ]
    assert len({len(batches) for batches in passes}) == 1
    seen = sorted(s[1] for batches in passes for b in batches for s in segments(b))
    assert seen == sorted(tuple(prepared[0].example(row)[0].tolist()) for row in range(23))
    assert sum(b.units for batches in passes for b in batches) == prepared[0].counts.trained_tokens


def test_a_fill_counts_nothing_and_fits_its_own_shapes():
    for packing in (True, False):
        batch = fill(packing=packing, pad_id=PAD)
        assert (batch.units, float(batch.weights.sum()), batch.packed) == (0.0, 0.0, packing)
        assert batch.trained.max() < batch.input_ids.numel() - 1
        assert batch.sources.tolist() == [-1]


def test_dtypes_and_padding_are_as_the_contract_says():
    one = (np.array([5, 6, 7], dtype=np.int32), np.array([False, False, True]))
    two = (np.array([8, 9], dtype=np.int32), np.array([True, True]))  # a mark on token 0 is nobody's target
    packed = collate([one, two], [0, 3], packing=True, pad_id=PAD)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert packed.boundaries.tolist() == [0, 3, 5]
    assert (packed.trained.tolist(), packed.targets.tolist()) == ([1, 3], [7, 9])
    assert (packed.segments.tolist(), packed.sources.tolist()) == ([0, 1], [0, 3])
    padded = collate([one, two], [0, 3], packing=False, pad_id=PAD)
    assert padded.input_ids.tolist() == [[5, 6, 7], [8, 9, PAD]]
    assert (padded.trained.tolist(), padded.targets.tolist()) == ([1, 3], [7, 9])
    for batch in (packed, padded, fill(packing=True, pad_id=PAD)):
        assert batch.tokens == int(batch.boundaries[-1])
        assert (batch.boundaries.dtype, batch.weights.dtype) == (torch.int32, torch.float32)
        for name in ("input_ids", "position_ids", "trained", "targets", "segments", "sources"):
            assert getattr(batch, name).dtype == torch.int64


def test_a_share_that_changes_on_the_way_is_exact_and_alike_on_one_and_two_ranks(prepared):
    """Replay's trained tokens after every step, packed: within one example of the shares asked for."""
    shares, longest = [0.2, 0.5, 0.05, 0.35, 0.0, 0.6], max(int(t.trained.max()) for t in prepared)
    one, ranks = make(prepared), [make(prepared, rank=rank, world_size=2) for rank in (0, 1)]
    owed = 0.0
    for share in shares:
        for loader in (one, *ranks) if share != 0.2 else ():
            loader.change_share(share)
        for _ in range(4):
            stats = one.next().stats
            steps = [loader.next() for loader in ranks]
            assert all(
                step.stats["trained_tokens/general"] == stats["trained_tokens/general"] for step in steps
            )
            trained = [sum(float(micro.weights.sum()) for micro in step.micros) for step in steps]
            assert sum(trained) == stats["trained_tokens"]
            owed += share * stats["trained_tokens"] - stats["trained_tokens/general"]
            assert abs(owed) <= longest or share == 0.0
    resumed = make(prepared, rank=1, world_size=4)
    resumed.load_state_dict(one.state_dict())
    assert resumed.next().stats["trained_tokens/general"] == one.next().stats["trained_tokens/general"]
    assert make(prepared).state_dict() == {"index": 0}  # what never changed says nothing of it
