"""The stream is a pure function of the seed and the index, and its shares are exact."""

import time

import numpy as np
import pytest

from framework.data.mixture import BLOCK, Group, Mixture


def tokens(n, low, high, seed=0):
    return np.random.default_rng(seed).integers(low, high, size=n).astype(np.int32)


TRAIN = [tokens(70, 1, 40), tokens(31, 5, 300, 1)]
REPLAY = [tokens(50, 100, 600, 2), tokens(9, 1, 4, 3)]


def trained_of(pick):
    return int((TRAIN + REPLAY)[pick.source][pick.row])


def test_without_weights_every_row_comes_once_per_epoch():
    mixture = Mixture(Group(TRAIN), seed=3)
    everything = {(source, row) for source, t in enumerate(TRAIN) for row in range(len(t))}
    orders = []
    for epoch in range(3):
        picks = mixture.picks(epoch * 101, (epoch + 1) * 101)
        assert {(p.source, p.row) for p in picks} == everything
        assert {p.epoch for p in picks} == {epoch}
        orders.append([(p.source, p.row) for p in picks])
    assert orders[0] != orders[1] != orders[2]
    other = [(p.source, p.row) for p in Mixture(Group(TRAIN), seed=4).picks(0, 101)]
    assert other != orders[0]


def test_without_shuffle_rows_keep_their_order():
    picks = Mixture(Group(TRAIN), seed=3, shuffle=False).picks(0, 103)
    expected = [(s, row) for s, t in enumerate(TRAIN) for row in range(len(t))]
    assert [(p.source, p.row) for p in picks] == [*expected, (0, 0), (0, 1)]


def test_the_order_is_fixed_forever():
    """Pinned: another order after an upgrade of numpy or of ours would break every resume."""
    picks = Mixture(Group([np.ones(6)]), seed=7).picks(0, 12)
    assert [p.row for p in picks] == [4, 2, 1, 3, 5, 0, 4, 0, 1, 5, 3, 2]


def test_weights_are_shares_of_rows_and_sources_keep_epochs_of_their_own():
    """Weights 3 : 1 over 70 and 31 rows: after j picks 3j/4 and j/4, off by less than one."""
    mixture = Mixture(Group(TRAIN, weights=[3, 1]), seed=0)
    picks = mixture.picks(0, 2000)
    given = [0, 0]
    for j, pick in enumerate(picks, start=1):
        assert pick.epoch == given[pick.source] // len(TRAIN[pick.source])
        given[pick.source] += 1
        assert abs(given[0] - 0.75 * j) < 1
    for source, t in enumerate(TRAIN):
        rows = [p.row for p in picks if p.source == source]
        for epoch in range(len(rows) // len(t)):
            assert sorted(rows[epoch * len(t) : (epoch + 1) * len(t)]) == list(range(len(t)))


@pytest.mark.parametrize(
    "weights", [[1, 1, 1], [0.7, 0.2, 0.1], [5, 3, 1, 1, 1, 1, 1], [1e-3, 1, 1], [9] + [1] * 12]
)
def test_turns_stay_near_their_share_and_start_anywhere(weights):
    mixture = Mixture(Group([np.ones(5)] * len(weights), weights), seed=0)
    picks = mixture.picks(0, 5000)
    given = np.cumsum([[p.source == s for s in range(len(weights))] for p in picks], axis=0)
    due = np.arange(1, 5001)[:, None] * np.array(weights) / sum(weights)
    bound = (1 + np.array(weights) / sum(weights) * len(weights)) / 2
    assert (np.abs(given - due) <= bound).all()
    for at in (*range(200), 999, 4321):
        assert mixture.picks(at, at + 3) == picks[at : at + 3]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_replay_has_its_share_of_trained_tokens_at_every_prefix(fraction, weights):
    """Off by less than one example: behind by at most f * a train row, ahead by (1 - f) * a replay row."""
    mixture = Mixture(Group(TRAIN, weights), Group(REPLAY, weights), fraction=fraction, seed=1)
    replayed = total = 0
    longest = {False: max(t.max() for t in TRAIN), True: max(t.max() for t in REPLAY)}
    for pick in mixture.picks(0, 3000):
        is_replay = pick.source >= len(TRAIN)
        replayed += trained_of(pick) * is_replay
        total += trained_of(pick)
        assert -fraction * longest[False] <= replayed - fraction * total <= (1 - fraction) * longest[True]
    assert replayed / total == pytest.approx(fraction, abs=700 / total)


@pytest.mark.parametrize("fraction", [0.0, 0.3, [(0, 0.5), (7, 0.0), (400, 0.2), (401, 0.9), (3000, 0.05)]])
def test_any_place_is_the_same_whatever_was_asked_before(fraction):
    def make():
        return Mixture(Group(TRAIN), Group(REPLAY, [1, 5]), fraction=fraction, seed=2)

    whole = make().picks(0, 5000)
    stepwise = make()
    assert [stepwise[i] for i in range(0, 5000, 37)] == whole[::37]
    for at in (4990, 3001, 2999, 401, 400, 6, 0):
        assert make().picks(at, at + 10) == whole[at : at + 10]


def test_blocks_are_laid_out_by_the_rule_one_example_at_a_time():
    """Fractions that floats hold exactly, over several blocks, with entries that begin inside them."""
    rng = np.random.default_rng(0)
    train, replay = rng.integers(1, 9, 997), rng.integers(1, 30, 101)
    entries = [(0, 0.25), (1000, 0.5), (BLOCK + 500, 0.0), (BLOCK + 600, 0.125)]
    n = 3 * BLOCK
    mixture = Mixture(Group([train]), Group([replay]), fraction=entries, seed=0, shuffle=False)
    picks = mixture.picks(0, n)
    owed, share, cursors = 0.0, 0.0, [0, 0]
    shares = dict(entries)
    for i, pick in enumerate(picks):
        share = shares.get(i, share)
        which = int(owed > 0)
        if share == 0:
            which = 0
        expected = cursors[which] % len((train, replay)[which])
        assert (pick.source, pick.row) == (which, expected), i
        tokens = int((train, replay)[which][expected])
        owed += -(1 - share) * tokens if which else share * tokens
        cursors[which] += 1


def test_a_huge_row_against_tiny_replay_rows():
    """One training row of 5 000 tokens at a share of a half asks for as many replay rows of one."""
    mixture = Mixture(Group([np.array([5_000])]), Group([np.ones(3)]), fraction=0.5, seed=0)
    picks = mixture.picks(0, 3)
    assert [p.source for p in picks] == [0, 1, 1]
    assert mixture[5_000].source == 1
    assert mixture[5_001].source == 0


def test_epochs_and_steps_count_the_training_data_only():
    """101 rows at 64 a step: two epochs are 202 examples, 4 steps. With replay the stream is longer."""
    plain = Mixture(Group(TRAIN), seed=1)
    assert plain.examples_for(2) == 202
    assert plain.steps_for(2, 64) == 4
    assert plain.steps_for(2, 101) == 2
    assert [plain.epochs(i) for i in (0, 101, 202)] == [0.0, 1.0, 2.0]
    mixed = Mixture(Group(TRAIN), Group(REPLAY), fraction=0.3, seed=1)
    n = mixed.examples_for(2)
    assert sum(p.source < 2 for p in mixed.picks(0, n)) == 202
    assert mixed[n - 1].source < 2
    for i in (1, 5, 50, n - 1, n, n + 3):
        assert mixed.epochs(i) == sum(p.source < 2 for p in mixed.picks(0, i)) / 101
    many = Mixture(Group(TRAIN), Group(REPLAY), fraction=0.3, seed=1)
    n = many.examples_for(500)  # over several blocks
    assert n > 2 * BLOCK
    assert sum(p.source < 2 for p in many.picks(0, n)) == 50500


def test_far_places_are_near():
    """A million examples into a stream with replay and weights: seconds would be felt at every resume."""
    train, replay = tokens(200_000, 1, 400), tokens(50_000, 1, 900)
    mixture = Mixture(Group([train, replay], [2, 1]), Group([replay]), fraction=0.1, seed=0)
    begun = time.process_time()
    mixture[1_000_000]
    assert time.process_time() - begun < 3


def test_impossible_mixtures_are_refused():
    for arguments, message in [
        ({"train": Group(TRAIN), "fraction": 0.1}, "needs a replay group"),
        ({"train": Group(TRAIN), "replay": Group(REPLAY), "fraction": 1.0}, "must lie in"),
        (
            {"train": Group(TRAIN), "replay": Group(REPLAY), "fraction": [(3, 0.1)]},
            "ascending indices from 0",
        ),
        ({"train": Group(TRAIN, [1.0])}, "as many positive weights"),
        ({"train": Group(TRAIN, [1.0, 0.0])}, "as many positive weights"),
        ({"train": Group([np.array([3, 0])])}, "every row a trained token"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mixture(**arguments, seed=0)


def test_a_change_on_the_way_is_an_entry_known_from_the_start():
    """Changes inside a block, at its edge, twice at one place and back to nothing, after reading ahead."""
    entries = [(0, 0.25), (64, 0.5), (BLOCK + 8, 0.0), (BLOCK + 16, 0.125)]
    whole = Mixture(Group(TRAIN), Group(REPLAY), fraction=entries, seed=3)
    moved = Mixture(Group(TRAIN), Group(REPLAY), fraction=0.25, seed=3)
    picks = []
    for at, share in [*entries[1:], (2 * BLOCK, None)]:
        picks += moved.picks(len(picks), at)
        moved.picks(at, at + 3 * BLOCK)  # a reader that looked ahead does not fix what comes
        if share is not None:
            moved.change(at, 0.75)
            moved.change(at, share)
    assert picks == whole.picks(0, 2 * BLOCK)
    assert moved.shares == entries
    resumed = Mixture(Group(TRAIN), Group(REPLAY), fraction=0.25, seed=3)
    resumed.restore(moved.shares)
    assert resumed.picks(BLOCK - 3, BLOCK + 40) == whole.picks(BLOCK - 3, BLOCK + 40)


def test_a_hundred_changes_leave_replay_within_one_example_of_its_share():
    """Eight examples between changes: shares counted anew each time would be off by dozens of examples."""
    mixture = Mixture(Group(TRAIN), Group(REPLAY), fraction=0.1, seed=0)
    tables, longest = [*TRAIN, *REPLAY], max(int(t.max()) for t in (*TRAIN, *REPLAY))
    owed, share = 0.0, 0.1
    for number in range(100):
        for pick in mixture.picks(8 * number, 8 * number + 8):
            tokens = int(tables[pick.source][pick.row])
            owed += share * tokens - tokens * (pick.source >= len(TRAIN))
            assert abs(owed) < longest
        share = 0.05 + 0.3 * ((number * 7) % 10) / 10
        mixture.change(8 * number + 8, share)


def test_a_change_cannot_reach_back():
    mixture = Mixture(Group(TRAIN), Group(REPLAY), fraction=0.1, seed=0)
    mixture.change(40, 0.2)
    with pytest.raises(ValueError, match="last changed at 40"):
        mixture.change(39, 0.3)
    with pytest.raises(ValueError, match="must lie in"):
        mixture.change(50, 1.0)
