"""The controller on synthetic plants: it keeps what can be kept, cheaply, and says what cannot."""

import itertools
import json
import math
import random
import statistics

import pytest

from framework.train.budget import (
    FEW,
    LOWEST,
    STEP,
    Controller,
    Landing,
    Reading,
    Rules,
    ShortLanding,
    landing,
    resolvable,
)


class Plant:
    """Forgetting that moves the share `lag` of the way to `harm * exp(-amount / relief)` in each look."""

    def __init__(self, harm, relief, *, half=0.0, noise=0.0, seed=0, lag=0.2):
        self.harm, self.relief, self.half, self.noise, self.lag = harm, relief, half, noise, lag
        self.change, self.draw = 0.0, random.Random(seed)

    def look(self, amount):
        self.change += self.lag * (self.harm * math.exp(-amount / self.relief) - self.change)
        seen = self.change + self.draw.gauss(0, self.noise)
        return Reading(seen, seen + self.half, self.noise, 64)


def steer(rules, plants, looks=80, controller=None, *, first=0, of=None):
    """(controller, amounts, last readings, decisions) of `looks` looks from `first` on of a run of `of`."""
    controller = controller or Controller(rules)
    amounts, decisions, readings = [controller.state.amount], [], {}
    for look in range(first, first + looks):
        readings = {name: plant.look(amounts[-1]) for name, plant in plants.items()}
        decisions.append(controller.decide(readings, progress=(look + 1) / ((of or looks) + 1)))
        amounts.append(decisions[-1].amount)
    return controller, amounts, readings, decisions


@pytest.mark.parametrize("budget", [0.00995, 0.05, 2.0], ids=["one percent", "nats", "another unit"])
def test_a_budget_is_used_and_kept_with_about_as_much_replay_as_it_takes(budget):
    """Harm of ten budgets that 8 % of replay divides by e: 8 * ln(10 / 0.95) % holds what is aimed at."""
    rules = Rules(budget=budget, start=0.1, most=0.5)
    controller, amounts, readings, decisions = steer(rules, {"chat": Plant(10 * budget, 0.08)})
    assert controller.verdict(readings).status == "kept"
    assert amounts[-1] == pytest.approx(0.08 * math.log(10 / 0.95), rel=0.1)
    assert statistics.mean(amounts) < 0.08 * math.log(10 / 0.95)  # less is needed before the end
    assert readings["chat"].high > 0.85 * budget
    assert not any(decision.infeasible for decision in decisions)


@pytest.mark.parametrize("harm", [0.02, 0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.0005])
@pytest.mark.parametrize(
    ("looks", "lag"),
    [(n, lag) for n in (8, 12, 20, 40, 200) for lag in (0.05, 0.1, 0.2, 0.5, 1.0) if n * lag >= 4],
)
def test_no_budget_that_can_be_met_is_missed_whatever_lag_and_harm_and_number_of_looks(
    looks, lag, harm, noise
):
    """Of the hardest, 39 % of replay is what it takes, of at most 50. The lag fits four times into a run."""
    plant = Plant(harm, 0.1, lag=lag, noise=noise, seed=looks)
    controller, *_, readings, decisions = steer(Rules(budget=0.02, start=0.1, most=0.5), {"a": plant}, looks)
    assert controller.verdict(readings).status == "kept"
    assert not any(decision.infeasible for decision in decisions)


@pytest.mark.parametrize("harm", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("noise", [0.0, 0.002])
@pytest.mark.parametrize(
    ("looks", "lag"),
    [(n, lag) for n in (8, 12, 20, 40) for lag in (0.1, 0.2, 0.5, 1.0) if n * lag >= 4],
)
def test_where_the_end_goes_back_no_run_ends_below_its_budget_nor_far_above(looks, lag, harm, noise):
    """Noise of a tenth of the budget, in which a run without a way back leaves up to half of it unused."""
    plant = Plant(harm, 0.1, lag=lag, noise=noise, seed=looks)
    steer(Landing(budget=0.02, start=0.1, most=0.5), {"a": plant}, looks)
    assert 0.02 < plant.change < 3 * 0.02


def test_gentle_moves_are_for_runs_that_have_the_looks_for_them():
    assert (landing(FEW - 1), landing(FEW)) == (ShortLanding, Landing)
    for rules in (ShortLanding, Landing):
        assert rules(budget=0.01, start=0.1, most=0.5).aim > 1


@pytest.mark.parametrize("kind", [ShortLanding, Landing])
def test_what_the_way_back_is_there_for_is_not_called_infeasible(kind):
    """At the most, still: within what is aimed at nothing is said, above it once."""

    def told(budgets):
        controller = Controller(kind(budget=0.01, start=0.5, most=0.5))
        flat = {"a": Reading(0.01 * budgets, 0.01 * budgets, 0.0, 64)}
        return sum(controller.decide(flat, progress=0.9 + look / 400).infeasible for look in range(30))

    assert (told(1.2), told(2.0)) == (0, 1)


def test_near_the_end_a_fall_is_believed_at_once_where_it_is_too_low_that_cannot_be_mended():
    """Looks above the target, and then one a tenth below it: replay is let go, or a little of it."""

    def moved(kind):
        rules = kind(budget=0.01, start=0.1, most=0.5)
        controller = Controller(rules)
        for look in range(36):
            bound = 0.01 * rules.aim * (1.3 if look < 35 else 0.9)
            decided = controller.decide({"a": Reading(bound, bound, 0.0, 64)}, progress=0.9 + look / 400)
        return decided.amount / decided.before

    assert moved(Landing) < 0.5 < moved(Rules)


def test_a_budget_is_met_where_replay_loses_its_hold_as_the_learning_rate_falls():
    """The lag grows tenfold to the end, as the rate falls; forgetting itself falls by a half, or does not."""
    for calm in (0.0, 0.5):
        for seed in range(5):
            controller = Controller(Rules(budget=0.1, start=0.1, most=0.5))
            plant, amount, draw = Plant(1.0, 0.02), 0.1, random.Random(seed)
            for look in range(40):
                rate = 0.1 + 0.45 * (1 + math.cos(math.pi * look / 40))
                plant.lag = 0.3 * rate
                seen = (
                    plant.look(amount).change * (1 - calm * (1 - rate)) * math.exp(draw.gauss(0, 0.1) * rate)
                )
                reading = Reading(seen, seen, 0.0, 64)
                amount = controller.decide({"a": reading}, progress=(look + 1) / 41).amount
            assert controller.verdict({"a": reading}).status == "kept", (calm, seed)
            assert reading.high > 0.6 * 0.1, (calm, seed)


def test_the_worst_kind_decides_and_the_others_do_not_hinder():
    plants = {"easy": Plant(0.001, 0.1), "hard": Plant(0.1, 0.1), "none": Plant(0.0, 0.1)}
    controller, amounts, readings, decisions = steer(Rules(budget=0.02, start=0.2, most=0.6), plants, 120)
    assert controller.verdict(readings).status == "kept"
    assert amounts[-1] == pytest.approx(0.1 * math.log(0.1 / 0.019), rel=0.1)
    assert decisions[-1].binding == "hard"


def test_replay_is_let_go_fast_where_nothing_is_forgotten():
    _, amounts, _, _ = steer(Rules(budget=0.01, start=0.2, most=0.5), {"chat": Plant(0.001, 0.1)}, 60)
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[3] < 0.02  # by what it is inside, not by a fixed rate
    assert amounts[-1] == 0.0


def test_what_is_far_inside_lets_go_faster_than_what_is_near():
    def next_amount(bound):
        controller = Controller(Rules(budget=0.01, start=0.1, most=0.5, ease=1.0))
        return controller.decide({"chat": Reading(bound, bound, 0.0, 64)}, progress=0.02).amount

    assert next_amount(0.001) < next_amount(0.005) < next_amount(0.009) <= 0.1
    assert next_amount(0.001) == pytest.approx(0.1 / 4, rel=0.02)  # the limit


def test_noisy_looks_leave_the_amount_near_what_it_takes_and_the_dead_band_is_still():
    """Looks that jump keep room for the last of them; where all is within the noise nothing moves."""
    plant = Plant(0.1, 0.1, half=0.002, noise=0.003, seed=4)
    _, amounts, _, _ = steer(Rules(budget=0.02, start=0.1, most=0.5, ease=1.0), {"chat": plant}, 200)
    assert plant.change < 0.02
    steady = amounts[50:]
    needed = 0.1 * math.log(0.1 / 0.015)  # the interval takes 0.002, jumps some more
    assert sum(steady) / len(steady) == pytest.approx(needed, rel=0.15)
    quiet = Controller(Rules(budget=0.02, start=0.1, most=0.5))
    for look in range(90, 100):
        assert not quiet.decide({"chat": Reading(0.018, 0.018, 0.003, 64)}, progress=look / 100).moved


def test_looks_that_jump_keep_more_room_than_looks_that_do_not():
    def target(jump):
        controller = Controller(Rules(budget=0.02, start=0.1, most=0.5, ease=1.0))
        for look in range(60):
            bound = 0.016 * math.exp(jump * (-1) ** look)
            controller.decide({"chat": Reading(bound, bound, 0.0, 64)}, progress=(look + 1) / 100)
        return controller.state.amount

    assert target(0.0) < target(0.15)  # the same on average, of which less can be relied on


def test_what_replay_does_not_help_is_called_infeasible_once_and_stays_at_the_most():
    plants = {"covered": Plant(0.1, 0.05), "not covered": Plant(0.2, 50.0)}
    controller, amounts, readings, decisions = steer(Rules(budget=0.01, start=0.1, most=0.5), plants, 40)
    told = [at for at, decision in enumerate(decisions) if decision.infeasible]
    assert len(told) == 1
    assert told[0] < 20
    assert amounts[-1] == 0.5
    verdict = controller.verdict(readings)
    assert (verdict.status, verdict.binding) == ("infeasible", "not covered")


def test_a_bound_at_the_most_that_falls_fast_enough_to_be_met_in_time_is_not_called_infeasible():
    def told(falls):
        controller = Controller(Rules(budget=0.01, start=0.5, most=0.5))
        looks = [0.1 * falls**look for look in range(20)]
        return [
            controller.decide({"a": Reading(bound, bound, 0.0, 64)}, progress=0.5 + look / 50).infeasible
            for look, bound in enumerate(looks)
        ]

    assert not any(told(0.8))
    assert sum(told(0.99)) == 1


def test_an_infeasible_start_that_gets_better_is_let_go_of_without_delay():
    """No winding up: after thirty looks at the stop it takes three for the amount to fall."""
    rules = Rules(budget=0.01, start=0.1, most=0.5)
    controller, *_ = steer(rules, {"chat": Plant(0.2, 50.0)}, 30, of=60)
    assert controller.state.amount == 0.5
    calm = {"chat": Reading(0.0, 0.0, 0.0, 64)}
    assert [controller.decide(calm, progress=(31 + k) / 61).amount for k in range(3)][-1] < 0.25


def test_moves_are_limited_and_on_a_grid():
    rules = Rules(budget=0.01, start=0.1, most=0.5)
    low = Rules(budget=0.01, start=0.01, most=0.5, ease=1.0)
    _, amounts, _, _ = steer(low, {"chat": Plant(1.0, 0.3)}, 30)
    _, less, _, _ = steer(rules, {"chat": Plant(0.0, 0.3)}, 30)
    least = rules.most * math.exp(LOWEST)
    for before, after in itertools.pairwise(less):
        assert after == 0 or before / rules.fall / (1 + STEP) <= after <= before
    for look, (before, after) in enumerate(itertools.pairwise(amounts)):
        lowest = max(before, least)
        rise = max(rules.rise, (rules.most / lowest) ** (2 / max(29 - look, 1)))  # or the most in time
        assert before <= after <= lowest * rise * (1 + STEP)
    for before, after in [*itertools.pairwise(amounts), *itertools.pairwise(less)]:
        if after not in (0.0, before):
            point = math.log(after / rules.most) / STEP
            assert point == pytest.approx(round(point), abs=1e-6)
    assert max(b / a for a, b in itertools.pairwise(amounts)) > 1.75  # and the limits are reached
    assert less[-1] == 0.0


def test_from_nothing_the_amount_is_back_within_some_looks():
    rules = Rules(budget=0.01, start=0.1, most=0.5)
    controller, *_ = steer(rules, {"chat": Plant(0.0, 0.3)}, 30, of=60)
    _, amounts, *_ = steer(rules, {"chat": Plant(9.0, 0.3)}, 13, controller, first=30, of=60)
    assert amounts[0] == 0.0
    assert amounts[-1] == 0.5


def test_the_last_digits_of_a_loss_change_nothing():
    """Two world sizes differ by 1e-7 nats: the amounts are the same numbers."""
    one = steer(Rules(budget=0.02, start=0.1, most=0.5), {"a": Plant(0.1, 0.1), "b": Plant(0.07, 0.2)}, 60)
    other = steer(
        Rules(budget=0.02, start=0.1, most=0.5), {"a": Plant(0.1 + 1e-8, 0.1), "b": Plant(0.07, 0.2)}, 60
    )
    assert one[1] == other[1]


def test_going_on_from_a_saved_state_in_the_middle_of_a_move_repeats_every_amount():
    rules = Rules(budget=0.01, start=0.1, most=0.5)
    plant, again = Plant(0.3, 0.1), Plant(0.3, 0.1)
    _, whole, _, _ = steer(rules, {"chat": plant}, 40)
    for stop in (1, 3, 7, 20):
        again.change = 0.0
        first, head, _, _ = steer(rules, {"chat": again}, stop, of=40)
        second = Controller(rules)
        second.load(json.loads(json.dumps(first.state_dict())))
        _, tail, _, _ = steer(rules, {"chat": again}, 40 - stop, second, first=stop, of=40)
        assert head + tail[1:] == whole


def test_more_is_allowed_on_the_way_than_at_the_end():
    rules = Rules(budget=0.01, start=0.1, most=0.5, ease=10.0, settled=0.9)
    allowed = [rules.allowed(p) for p in (0.0, 0.45, 0.9, 1.0)]
    assert allowed == pytest.approx([0.1, 0.01 * math.sqrt(10), 0.01, 0.01])
    assert rules.allowed(0.5, spacing=0.1) == pytest.approx(0.01)  # the last five looks at least
    assert rules.allowed(0.4, spacing=0.1) > 0.01
    early, late = Controller(rules), Controller(rules)
    early.state.progress, late.state.progress = 0.08, 0.88  # of the looks before
    reading = {"chat": Reading(0.03, 0.03, 0.0, 64)}
    assert early.decide(reading, progress=0.1).amount < 0.1 < late.decide(reading, progress=0.9).amount


def test_what_a_falling_rate_is_yet_to_bring_back_is_allowed_and_no_more_than_three_budgets_of_it():
    """A rate four times the last allows 4^0.6 budgets; at a steady rate the budget rules as it did."""
    rules = Rules(budget=0.01, start=0.1, most=0.5, rate=lambda progress: 1 + 10 * (1 - progress))
    assert rules.allowed(0.7) == pytest.approx(0.01 * 4**0.6)
    assert rules.allowed(0.5) == pytest.approx(0.01 * 6**0.6)  # 2.93 budgets, by the path alone 2.78
    assert rules.calms(0.0) == 3.0
    assert rules.allowed(1.0) == pytest.approx(0.01)
    assert Rules(budget=0.01, start=0.1, most=0.5).allowed(0.9) == pytest.approx(0.01)


def test_what_is_being_learnt_again_asks_for_less_and_what_goes_on_being_lost_for_more():
    """Over the path and falling, over it and still, over it and rising: the last bound is the same."""

    def amount(falls):
        controller = Controller(Rules(budget=0.01, start=0.1, most=0.9, ease=1.0))
        for look in range(8):
            bound = 0.011 * falls ** (look - 7)
            decided = controller.decide({"a": Reading(bound, bound, 0.0, 64)}, progress=(look + 1) / 50)
        return decided.amount / decided.before

    assert amount(0.7) <= 1 < amount(1.0) < amount(1.4)


def test_the_same_distance_asks_for_more_the_fewer_looks_are_left():
    def moved(bound, left):
        controller = Controller(Rules(budget=0.01, start=0.1, most=0.5, ease=1.0))
        progress = 1 / (left + 1)  # a first look after which `left` are left
        return controller.decide({"a": Reading(bound, bound, 0.0, 64)}, progress=progress).amount / 0.1

    assert moved(0.011, 60) < moved(0.011, 20) < moved(0.011, 5)
    assert moved(0.008, 60) == pytest.approx(moved(0.008, 12), rel=0.021)  # to let go there is no hurry
    assert moved(0.008, 12) > moved(0.008, 3)


def test_without_a_reading_nothing_moves_and_a_kind_may_come_and_go():
    controller = Controller(Rules(budget=0.01, start=0.1, most=0.5))
    assert not controller.decide({}, progress=0.1).moved
    calm, bad = Reading(0.0, 0.0, 0.0, 9), Reading(0.1, 0.1, 0.0, 9)
    controller.decide({"a": calm}, progress=0.2)
    controller.decide({"b": bad}, progress=0.3)
    assert controller.decide({"a": calm, "b": bad}, progress=0.4).binding == "b"
    assert controller.verdict({}).status == "kept"


def test_a_diverged_model_counts_as_far_over_the_budget():
    controller = Controller(Rules(budget=0.01, start=0.1, most=0.5))
    broken = {"chat": Reading(math.nan, math.nan, 0.0, 9)}
    assert controller.decide(broken, progress=0.5).amount > 0.1
    assert controller.verdict(broken).status == "infeasible"


@pytest.mark.parametrize(
    ("change", "high", "status"),
    [
        (0.005, 0.009, "kept"),
        (0.005, 0.0105, "kept"),
        (0.005, 0.02, "unresolvable"),
        (0.005, math.inf, "unresolvable"),
        (0.02, 0.03, "infeasible"),
    ],
)
def test_a_verdict_goes_by_the_bound_and_says_when_the_probe_is_too_small(change, high, status):
    controller = Controller(Rules(budget=0.01, start=0.1, most=0.5))
    verdict = controller.verdict({"chat": Reading(change, high, 0.001, 64), "fine": Reading(0, 0, 0, 64)})
    assert verdict.status == status


def test_seven_rows_are_the_fewest_that_bound_a_change_of_their_own_spread():
    from framework.train.retain import quantile

    for rows in (3, 6, 7, 24):
        assert resolvable(rows) == (quantile(rows - 1) / math.sqrt(rows) < 1)


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"start": 0.0}, {"start": 0.6}])
def test_rules_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(ValueError, match="not in order"):
        Rules(**{"budget": 0.01, "start": 0.1, "most": 0.5, **wrong})
