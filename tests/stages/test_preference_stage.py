"""Preference optimisation with answers fixed by hand: what a loss gets by name, and what couples a step."""

import math
from dataclasses import replace
from functools import partial

import judged
import pytest
import torch

from framework.losses.aot import aot, aot_unpaired
from framework.losses.dpo import dpo
from framework.losses.items import Items
from framework.losses.orpo import orpo
from framework.losses.simpo import simpo
from framework.stages.coupling import same_rank
from framework.stages.preference import PairObjective, Preference

ROWS = [([1, 2], [3, 4, 5], [6]), ([1], [7, 8], [9, 3])]


def by_token(batch):
    """-0.1 nats times the target's id."""
    return -0.1 * batch.targets.float()


def halved(batches):
    """A reference that finds every token twice as likely in nats."""
    return [0.5 * by_token(batch) for batch in batches]


def test_a_loss_gets_sums_and_counts_of_chosen_and_rejected_answers():
    """Pair 0: 3 + 4 + 5 = 12 and 6; pair 1: 7 + 8 = 15 and 9 + 3 = 12; all times -0.1."""
    got = {}

    def loss(policy, reference, weight, margin):
        got.update(policy=policy, reference=reference, weight=weight, margin=margin)
        return Items(policy.chosen, weight)

    batch = judged.pairs(ROWS, weights=[1.0, 0.5], margins=[0.0, 2.0])
    batch = replace(batch, reference_logps=halved([batch])[0])
    items = PairObjective(loss)(judged.Fixed(by_token), batch)
    torch.testing.assert_close(got["policy"].chosen, torch.tensor([-1.2, -1.5]))
    torch.testing.assert_close(got["policy"].rejected, torch.tensor([-0.6, -1.2]))
    torch.testing.assert_close(got["reference"].chosen, torch.tensor([-0.6, -0.75]))
    assert got["policy"].chosen_tokens.tolist() == [3, 2]
    assert got["policy"].rejected_tokens.tolist() == [1, 2]
    assert got["weight"].tolist() == [1.0, 0.5]
    assert got["margin"].tolist() == [0.0, 2.0]
    assert items.metrics["logps/accuracy"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("packed", [True, False])
def test_dpo_of_one_pair_by_hand(packed):
    """D = (c - r) = (-1.2 + 0.6) - (-0.6 + 0.3) = -0.3 for pair 0, so -log s(-0.3 b) at b = 1."""
    batch = judged.pairs(ROWS[:1], packed=packed)
    stage = Preference(
        judged.Steps([ROWS[:1]], partial(judged.pairs, packed=packed)),
        PairObjective(partial(dpo, beta=1.0)),
        {"held": [batch]},
        engine=judged.Fixed(by_token),
        reference=halved,
    )
    (term,) = stage.next(0)
    items = term.objective(stage.engine, term.micros[0])
    assert float(items.loss) == pytest.approx(math.log(1 + math.exp(0.3)), rel=1e-6)
    assert float(items.metrics["rewards/margin"]) == pytest.approx(-0.3, rel=1e-6)
    (held,) = stage.held_out()["held"].micros
    assert float(term.objective(stage.engine, held).loss) == pytest.approx(float(items.loss))


def test_a_loss_without_a_reference_asks_none():
    def never(batches):
        raise AssertionError("the reference was asked")

    engine = judged.Fixed(by_token)
    objective = PairObjective(partial(simpo, beta=2.0, gamma=0.5))
    stage = Preference(judged.Steps([ROWS], judged.pairs), objective, {}, engine=engine, reference=never)
    (term,) = stage.next(0)
    assert [micro.reference_logps for micro in term.micros] == [None]
    assert not engine.asked, "nothing is computed before the step"


def test_a_loss_with_a_reference_needs_one():
    with pytest.raises(ValueError, match="reference"):
        Preference(
            judged.Steps([ROWS], judged.pairs),
            PairObjective(partial(dpo, beta=1.0)),
            {},
            engine=judged.Fixed(by_token),
        )


def test_tokens_per_pair_is_of_the_whole_step():
    """3 + 2 trained tokens of chosen answers over 2 pairs, cut into one pair a micro-batch or not."""
    for at_once in (1, 2):
        loader = judged.Steps([ROWS], judged.pairs, at_once=at_once)
        objective = PairObjective(partial(orpo, beta=0.1))
        stage = Preference(loader, objective, {}, engine=judged.Fixed(by_token))
        (term,) = stage.next(0)
        assert {micro.tokens_per_pair for micro in term.micros} == {2.5}
        likelihood = sum(float(objective(stage.engine, m).metrics["nll"].sum()) for m in term.micros) / 2
        assert likelihood == pytest.approx((1.2 + 1.5) / 5, rel=1e-6)


def test_rows_of_a_ranking_count_by_their_weight():
    """Pairs of weight 1/2 and 1 with units of the pairs' weights: (0.5 * 3 + 1 * 2) / 1.5 tokens a pair."""

    def make(rows):
        return replace(judged.pairs(rows, weights=[0.5, 1.0]), units=1.5)

    stage = Preference(
        judged.Steps([ROWS], make),
        PairObjective(partial(orpo, beta=0.1)),
        {},
        engine=judged.Fixed(by_token),
    )
    (term,) = stage.next(0)
    assert term.micros[0].tokens_per_pair == pytest.approx(3.5 / 1.5)


def test_the_tail_of_the_longer_answer_counts_by_ld_alpha():
    """Pair 0 shares one token: 3 + 0.5 * (4 + 5) = 7.5, times -0.1. Pair 1 has answers of one length."""
    batch = judged.pairs(ROWS)
    answers = PairObjective(partial(simpo, beta=1.0, gamma=0.0), ld_alpha=0.5).answers(by_token(batch), batch)
    torch.testing.assert_close(answers.chosen, torch.tensor([-0.75, -1.5]))
    assert answers.chosen_tokens.tolist() == [3, 2]


def test_wpo_scales_each_loss_by_how_likely_its_answers_are():
    """Collisions of -0.2 at every token: means of chosen -0.4 + 0.2 and rejected -0.6 + 0.2 for pair 0."""

    def loss(policy, weight):
        return Items(torch.ones_like(policy.chosen), weight)

    engine = judged.Fixed(by_token, collisions=lambda batch: torch.full((len(batch.targets),), -0.2))
    items = PairObjective(loss, wpo=True)(engine, judged.pairs(ROWS))
    assert engine.asked == [{"needs": {"collisions"}}]
    expected = [math.exp(-0.4 + 0.2 - 0.6 + 0.2), math.exp(-0.75 + 0.2 - 0.6 + 0.2)]
    assert items.loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert items.weight.tolist() == [1.0, 1.0]


def test_a_loss_may_ask_for_entropies():
    def loss(policy, weight, entropies):
        return Items(-entropies.chosen, weight)

    engine = judged.Fixed(by_token, entropies=lambda batch: torch.ones(len(batch.targets)))
    assert PairObjective(loss)(engine, judged.pairs(ROWS)).loss.tolist() == [-3.0, -2.0]


def test_numbers_of_the_same_rank_are_matched():
    """0.3, 0.1, 0.2 are third, first and second; so are 30, 10 and 20 of [20, 30, 10]."""
    matched = same_rank(judged.One(), torch.tensor([0.3, 0.1, 0.2]), torch.tensor([20.0, 30.0, 10.0]))
    assert matched.tolist() == [30.0, 10.0, 20.0]


DIFFERENCES = [3.0, 1.0, 2.0]  # policy, of three pairs with one token an answer
REFERENCE = [0.2, 0.3, 0.1]


def transport(at_once):
    """Three pairs whose chosen answers are tokens 11, 12, 13 and whose rejected ones are worth nothing."""
    rows = [([1], [11 + n], [2]) for n in range(3)]

    def answers(values):
        table = torch.zeros(20)
        table[11:14] = torch.tensor(values)
        return lambda batch: table[batch.targets]

    engine, other = judged.Fixed(answers(DIFFERENCES)), answers(REFERENCE)
    loader = judged.Steps([rows], judged.pairs, at_once=at_once)
    return engine, loader, lambda batches: [other(batch) for batch in batches]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_aot_matches_over_the_whole_step_however_it_is_cut(at_once):
    """Policy differences rank 3, 1, 2, so the reference's sorted 0.1, 0.2, 0.3 come as 0.3, 0.1, 0.2."""
    engine, loader, reference = transport(at_once)
    objective = PairObjective(partial(aot, beta=1.0))
    stage = Preference(loader, objective, {"held": loader.next().micros}, engine=engine, reference=reference)
    for micros in (stage.next(0)[0].micros, stage.held_out()["held"].micros):
        matched = torch.cat([micro.matched[micro.pair_weights > 0] for micro in micros])
        torch.testing.assert_close(matched, torch.tensor([0.3, 0.1, 0.2]))


def test_unpaired_aot_gets_the_log_ratio_of_the_same_rank():
    """c = 2.8, 0.7, 1.9 (third, first, second) and r = 0 three times."""
    engine, loader, reference = transport(3)
    stage = Preference(
        loader, PairObjective(partial(aot_unpaired, beta=1.0)), {}, engine=engine, reference=reference
    )
    (micro,) = stage.next(0)[0].micros
    assert micro.matched_rejected.tolist() == [0.0, 0.0, 0.0]
    assert sorted(micro.matched_chosen.tolist()) == pytest.approx([0.7, 1.9, 2.8])


def test_a_fill_adds_nothing():
    batch = judged.pairs([])
    batch = replace(batch, reference_logps=by_token(batch))
    items = PairObjective(partial(dpo, beta=1.0))(judged.Fixed(by_token), batch)
    assert float(items.total()) == 0.0


def test_the_stage_is_where_its_loader_is():
    stage = Preference(
        judged.Steps([ROWS], judged.pairs),
        PairObjective(partial(dpo, beta=1.0)),
        {},
        engine=judged.Fixed(by_token),
        reference=halved,
    )
    (term,) = stage.next(0)
    assert term.stats == {"pairs": 2.0}
    assert stage.state_dict() == {"index": 1}
    stage.load_state_dict({"index": 5})
    assert stage.state_dict() == {"index": 5}
    assert stage.resting
    assert not stage.reports()
