"""Steps of judged answers: the same pairs for every world, packed, padded and shared; the right targets."""

import json
import math

import pytest
import torch

from framework.batch import LabelledBatch, PairBatch
from framework.data import answers
from framework.data.loader import Cut, Loader, held_out, whole
from framework.data.mixture import Group, Mixture
from framework.data.pairs import Labelled, Mismatched, Pairs
from framework.data.sources import Source

PAD = 1
SHARED, REPEATED, SCORED = Pairs(sharing=True), Pairs(sharing=False), Pairs(sharing=True, scored=True)


def words(n, i):
    return " yes" * (1 + (7 * i) % n)


@pytest.fixture(scope="module")
def compared(tokenizer, tmp_path_factory):
    """[17 pairs, some with margins; 5 rankings of 2 to 4 answers]."""
    root = tmp_path_factory.mktemp("pairs")
    rows = {
        "duels": [
            {
                "prompt": f"pair {i} is{words(5, i)}",
                "chosen": f" a{words(9, i)}",
                "rejected": f" b{words(4, i)}",
                "margin": i % 3,
            }
            for i in range(17)
        ],
        "ranked": [
            {"prompt": f"rank {i}", "responses": [f" {k}{words(6, i + k)}" for k in range(2 + i % 3)]}
            for i in range(5)
        ],
    }
    return _prepare(root, rows, answers.prepare_comparisons, tokenizer)


@pytest.fixture(scope="module")
def liked(tokenizer, tmp_path_factory):
    """[13 answers, every third of them desirable]."""
    root = tmp_path_factory.mktemp("liked")
    rows = [
        {"prompt": f"ask {i}{words(5, i)}", "completion": words(9, i), "label": i % 3 == 0} for i in range(13)
    ]
    return _prepare(root, {"liked": rows}, answers.prepare_labelled, tokenizer)


def _prepare(root, files, prepare, tokenizer):
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = [Source(str(root / f"{name}.jsonl")) for name in files]
    return prepare(wanted, tokenizer=tokenizer, max_length=64, cache_dir=root / "cache")


def make(tables, kind, *, rank=0, world_size=1, packing=True, sequences=9, mismatched=None):
    return Loader(
        tables,
        Mixture(Group([table.trained for table in tables]), seed=0),
        sequences=sequences,
        tokens_per_micro=90,
        packing=packing,
        rank=rank,
        world_size=world_size,
        pad_id=PAD,
        kind=kind,
        mismatched=mismatched,
    )


def segments(batch):
    """(source, all its tokens, [(position, target)]) of each segment, read like attention reads the row."""
    flat, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    found = []
    for s, source in enumerate(batch.sources.tolist()):
        start, stop = batch.boundaries[s : s + 2].tolist()
        if not batch.packed:
            places = torch.arange(stop - start) + s * batch.input_ids.shape[1]
        elif batch.places is None:
            places = torch.arange(start, stop)
        else:
            places = batch.places[start:stop]
        assert positions[places].tolist() == list(range(stop - start))
        assert stop - start <= batch.max_length
        of = batch.segments == s
        trained = batch.trained[of]
        assert torch.isin(trained, places).all()
        marks = zip(positions[trained].tolist(), batch.targets[of].tolist(), strict=True)
        found.append((source, tuple(flat[places].tolist()), tuple(marks)))
    return found


def duels(batch):
    """(weight, margin, chosen segment, rejected segment) of every pair of a batch, fills left out."""
    assert isinstance(batch, PairBatch)
    both = segments(batch)
    assert len(both) == 2 * len(batch.pair_weights) == 2 * len(batch.margins)
    assert batch.units == pytest.approx(float(batch.pair_weights.sum()))
    assert batch.segments.tolist() == sorted(batch.segments.tolist())
    rows = zip(batch.pair_weights.tolist(), batch.margins.tolist(), both[0::2], both[1::2], strict=True)
    return [row for row in rows if row[2][0] >= 0]


def expected(tables, where):
    pairs = []
    for source, row in where:
        found = tables[source].judged(row)

        def segment(k, found=found, source=source):
            p, ids = len(found.prompt), found.ids[k].tolist()
            marks = tuple((p + t - 1, ids[t]) for t in range(len(ids)) if found.trained[k][t])
            return source, (*found.prompt.tolist(), *ids), marks

        weight = pytest.approx(1 / math.comb(len(found.ids), 2))
        for (better, worse), margin in zip(found.pairs.tolist(), found.margins.tolist(), strict=True):
            pairs.append((weight, margin, segment(better), segment(worse)))
    return pairs


def by_tokens(pairs):
    return sorted(pairs, key=lambda pair: (pair[2], pair[3]))


@pytest.mark.parametrize("kind", [SHARED, REPEATED])
@pytest.mark.parametrize("packing", [True, False])
def test_pairs_of_a_step_do_not_depend_on_the_world_nor_on_sharing(compared, kind, packing):
    """World sizes 1 to 3: the same pairs, weights, margins and targets, rankings whole in one micro-batch."""
    for size in (1, 2, 3):
        ranks = [make(compared, kind, rank=r, world_size=size, packing=packing) for r in range(size)]
        for _ in range(3):
            picks = ranks[0].mixture.picks(ranks[0].index, ranks[0].index + 9)
            steps = [loader.next() for loader in ranks]
            assert len({len(step.micros) for step in steps}) == 1
            assert all(step.stats == steps[0].stats for step in steps)
            found = [pair for step in steps for batch in step.micros for pair in duels(batch)]
            wanted = expected(compared, [(pick.source, pick.row) for pick in picks])
            assert by_tokens(found) == by_tokens(wanted)
            assert sum(b.units for step in steps for b in step.micros) == pytest.approx(9)
            for batch in (b for step in steps for b in step.micros):
                assert batch.packed == packing
                assert (batch.places is not None) == (packing and kind.sharing and batch.units > 0)
                one_example = batch.units == pytest.approx(1)
                assert batch.input_ids.numel() <= 90 or one_example


def test_sharing_stores_each_prompt_and_answer_once(compared):
    step = make(compared, SHARED, sequences=22).next()
    assert sum(batch.tokens for batch in step.micros) == step.stats["tokens"]
    assert step.stats["tokens"] == sum(table.lengths.sum() for table in compared)
    repeated = make(compared, REPEATED, sequences=22).next()
    assert sum(batch.tokens for batch in repeated.micros) == repeated.stats["tokens"]
    assert repeated.stats["tokens"] > 1.3 * step.stats["tokens"]
    padded = make(compared, REPEATED, sequences=22, packing=False).next()
    assert padded.stats["tokens"] == repeated.stats["tokens"]


def test_facts_of_a_step_are_global_and_by_source(compared):
    """A ranking counts as one pair, and its chosen answers' tokens by their weight."""
    stats = make(compared, SHARED, rank=1, world_size=2, sequences=22).next().stats
    assert (stats["sequences"], stats["data_index"]) == (22, 22)
    assert (stats["pairs"], stats["pairs/duels"], stats["pairs/ranked"]) == pytest.approx((22, 17, 5))
    chosen = sum(
        weight.expected * len(chosen[2])
        for source, table in enumerate(compared)
        for weight, _, chosen, _ in expected(compared, [(source, row) for row in range(len(table))])
    )
    assert stats["chosen_tokens"] == pytest.approx(chosen)
    assert stats["trained_tokens"] == sum(table.trained.sum() for table in compared)
    assert stats["trained_tokens/ranked"] == compared[1].trained.sum()


@pytest.mark.parametrize("packing", [True, False])
def test_scored_pairs_train_the_last_token_of_each_segment_in_order(compared, packing):
    step = make(compared, SCORED, packing=packing, world_size=2, sequences=22).next()
    for batch in step.micros:
        count = len(batch.sources)
        assert batch.segments.tolist() == list(range(count))
        lengths = batch.boundaries.diff()
        assert (batch.position_ids.flatten()[batch.trained] + 1).tolist() == lengths.tolist()
        last = [tokens[-1] for _, tokens, _ in segments(batch)]
        assert batch.input_ids.flatten()[batch.trained].tolist() == last
    assert step.stats["trained_tokens"] == sum(table.answers.sum() for table in compared)


def test_resume_needs_the_index_only(compared):
    run = make(compared, SHARED)
    run.next()
    state = run.state_dict()
    assert state == {"index": 9}
    again = make(compared, SHARED)
    again.load_state_dict(state)
    one, other = run.next(), again.next()
    assert one.stats == other.stats
    assert [duels(batch) for batch in one.micros] == [duels(batch) for batch in other.micros]


def test_held_out_pairs_come_once_over_all_ranks(compared):
    settings = {"tokens_per_micro": 90, "packing": True, "world_size": 3, "pad_id": PAD, "kind": SHARED}
    passes = [held_out(compared[0], rank=r, **settings) for r in range(3)]
    assert len({len(batches) for batches in passes}) == 1
    found = [pair for batches in passes for batch in batches for pair in duels(batch)]
    assert by_tokens(found) == by_tokens(expected(compared[:1], [(0, row) for row in range(17)]))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_liked_answers_and_mismatched_ones_do_not_depend_on_the_world(liked, packing, size):
    """Example i of 5 keeps its prompt and takes the answer of example i + 1, the last that of the first."""
    loaders = [
        make(
            liked,
            Labelled(),
            rank=r,
            world_size=size,
            packing=packing,
            sequences=5,
            mismatched=Mismatched(max_length=64),
        )
        for r in range(size)
    ]
    [table] = liked
    for _ in range(3):
        index = loaders[0].index
        rows = [pick.row for pick in loaders[0].mixture.picks(index, index + 5)]
        steps = [loader.next() for loader in loaders]
        for name, shift in (("micros", 0), ("mismatched", 1)):
            batches = [batch for step in steps for batch in getattr(step, name)]
            assert len({len(getattr(step, name)) for step in steps}) == 1
            found, wanted = [], []
            for batch in batches:
                assert isinstance(batch, LabelledBatch)
                assert batch.units == float(batch.segment_weights.sum())
                labels = zip(segments(batch), batch.desirable.tolist(), strict=True)
                found += [(segment[1:], label) for segment, label in labels if segment[0] >= 0]
            for i, row in enumerate(rows):
                own, other = table.judged(row), table.judged(rows[(i + shift) % 5])
                p, ids = len(own.prompt), other.ids[0].tolist()
                marks = tuple((p + t - 1, ids[t]) for t in range(len(ids)))
                wanted.append((((*own.prompt.tolist(), *ids), marks), own.desirable))
            assert sorted(found) == sorted(wanted)
        stats = steps[0].stats
        assert all(step.stats == stats for step in steps)
        assert stats["desirable"] == sum(table.judged(row).desirable for row in rows)
        assert stats["tokens"] == table.lengths[rows].sum()


def test_mismatched_answers_are_cut_to_fit(liked):
    cut = Cut(tokens_per_micro=90, packing=True, rank=0, world_size=1, pad_id=PAD)
    longest = int(liked[0].lengths.max())
    step = whole(liked[0], cut, kind=Labelled(), mismatched=Mismatched(max_length=longest))
    assert len(step.micros) > 1
    lengths = torch.cat([batch.boundaries.diff() for batch in step.mismatched])
    assert lengths.max() == longest
    assert sum(len(batch.sources) for batch in step.mismatched) == 13


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", [SHARED, REPEATED, SCORED, Labelled(), Mismatched(max_length=9)])
def test_a_fill_runs_everything_and_counts_nothing(kind, packing):
    batch = kind.collate([], [], [], packing=packing, pad_id=PAD)
    assert (batch.units, float(batch.weights.sum()), batch.packed) == (0.0, 0.0, packing)
    assert set(batch.sources.tolist()) == {-1}
    assert len(batch.trained) == len(batch.targets) == len(batch.segments) == len(batch.sources)
    weights = batch.pair_weights if isinstance(batch, PairBatch) else batch.segment_weights
    assert weights.tolist() == [0.0]
    assert batch.boundaries.tolist() == [2 * s for s in range(len(batch.sources) + 1)]
