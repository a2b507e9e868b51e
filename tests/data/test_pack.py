"""Every example in one micro-batch, within the budget, as many micro-batches on every rank."""

import numpy as np
import pytest

from framework.data import pack


def worlds():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 7, 40, 200):
        for high in (20, 100, 150):  # the last: some examples are over the budget of 100
            yield rng.integers(2, high, n).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("packing", [True, False])
def test_plans_are_complete_within_budget_and_even(ranks, packing):
    for lengths in worlds():
        planned = pack.plan(lengths, tokens_per_micro=100, ranks=ranks, packing=packing)
        assert len(planned) == ranks
        assert len({len(micros) for micros in planned}) == 1
        assert sorted(i for micros in planned for micro in micros for i in micro) == list(range(len(lengths)))
        for micros in planned:
            for micro in micros:
                assert len(micro) <= 1 or pack.cost_of([lengths[i] for i in micro], packing) <= 100
        assert any(planned[0]) or any(map(any, planned))
        assert planned == pack.plan(list(lengths), tokens_per_micro=100, ranks=ranks, packing=packing)


def test_best_fit_decreasing_by_hand():
    """Budget 10, lengths 6 5 4 3 2: 6 and 4 fill a bin, 5 3 2 another. First fit in order needs three."""
    planned = pack.plan([6, 5, 4, 3, 2], tokens_per_micro=10, ranks=1, packing=True)
    assert planned == [[[0, 2], [1, 3, 4]]]


def test_few_bins_are_evened_out_over_ranks():
    """All of 8 7 6 5 4 fits into one bin of 30; on two ranks 8 5 4 and 7 6: longest first to the emptiest."""
    [[first], [second]] = pack.plan([8, 7, 6, 5, 4], tokens_per_micro=30, ranks=2, packing=True)
    assert {tuple(first), tuple(second)} == {(0, 3, 4), (1, 2)}


def test_an_example_over_the_budget_is_alone():
    planned = pack.plan([50, 3, 200, 4], tokens_per_micro=100, ranks=1, packing=True)
    assert [2] in planned[0]
    planned = pack.plan([50, 3, 200, 4], tokens_per_micro=100, ranks=1, packing=False)
    assert [2] in planned[0]


def test_padded_rows_are_of_similar_length():
    """Short with short: 9 9 | 3 3 3 at a budget of 18 pads nothing."""
    planned = pack.plan([3, 9, 3, 9, 3], tokens_per_micro=18, ranks=1, packing=False)
    assert planned == [[[1, 3], [0, 2, 4]]]


def test_ranks_without_an_example_get_empty_micro_batches():
    planned = pack.plan([5], tokens_per_micro=10, ranks=3, packing=True)
    assert planned == [[[0]], [[]], [[]]]


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_are_balanced_where_they_wait_for_each_other(packing):
    """64 chat-like examples on 4 ranks: at every micro-batch the emptiest has over 80 % of the fullest."""
    lengths = np.clip(np.random.default_rng(1).lognormal(4.5, 0.8, 64), 8, 1000).astype(int).tolist()
    planned = pack.plan(lengths, tokens_per_micro=1500, ranks=4, packing=packing)
    for micros in zip(*planned, strict=True):
        loads = [pack.cost_of([lengths[i] for i in micro], packing) for micro in micros]
        assert min(loads) > (0.8 if packing else 0.4) * max(loads), loads


def test_packing_is_close_to_the_best_possible():
    """No more bins than 5 % over what the tokens alone would need."""
    lengths = np.clip(np.random.default_rng(2).lognormal(5, 0.9, 512), 8, 2048).astype(int).tolist()
    planned = pack.plan(lengths, tokens_per_micro=4096, ranks=1, packing=True)
    assert len(planned[0]) <= 1.05 * sum(lengths) / 4096 + 1
