"""The controller on synthetic plants: it keeps what can be kept, cheaply, and says what cannot."""

import itertools
import json
import math
import random
import statistics

import pytest

from framework.train.budget import GRID, Controller, Reading, Rules, resolvable


class Plant:
    """Forgetting that moves a fifth of the way to `harm * exp(-amount / relief)` in each look."""

    def __init__(self, harm, relief, *, half=0.0, noise=0.0, seed=0):
        self.harm, self.relief, self.half, self.noise = harm, relief, half, noise
        self.change, self.draw = 0.0, random.Random(seed)

    def look(self, amount):
        self.change += 0.2 * (self.harm * math.exp(-amount / self.relief) - self.change)
        seen = self.change + self.draw.gauss(0, self.noise)
        return Reading(seen, seen + self.half, self.noise, 64)


def steer(rules, plants, looks=80, controller=None):
    """(controller, amounts, last readings, decisions)."""
    controller = controller or Controller(rules)
    amounts, decisions, readings = [controller.state.amount], [], {}
    for _ in range(looks):
        readings = {name: plant.look(amounts[-1]) for name, plant in plants.items()}
        decisions.append(controller.decide(readings))
        amounts.append(decisions[-1].amount)
    return controller, amounts, readings, decisions


@pytest.mark.parametrize("budget", [0.00995, 0.05, 2.0], ids=["one percent", "nats", "another unit"])
def test_a_budget_is_kept_with_about_as_much_replay_as_it_takes(budget):
    """Harm of ten budgets that 8 % of replay divides by e: 8 * ln(12.5) % holds 0.8 of the budget."""
    rules = Rules(budget=budget, start=0.1, most=0.5)
    controller, amounts, readings, decisions = steer(rules, {"chat": Plant(10 * budget, 0.08)})
    assert controller.verdict(readings).status == "kept"
    needed = 0.08 * math.log(10 / 0.8)
    assert sum(amounts[-20:]) / 20 == pytest.approx(needed, rel=0.15)
    assert readings["chat"].change > 0.6 * budget  # no more than it takes
    assert not any(decision.infeasible for decision in decisions)


def test_the_worst_kind_decides_and_the_others_do_not_hinder():
    plants = {"easy": Plant(0.001, 0.1), "hard": Plant(0.1, 0.1), "none": Plant(0.0, 0.1)}
    controller, amounts, readings, decisions = steer(Rules(budget=0.02, start=0.2, most=0.6), plants, 120)
    assert controller.verdict(readings).status == "kept"
    assert amounts[-1] == pytest.approx(0.1 * math.log(0.1 / 0.016), rel=0.2)
    assert decisions[-1].binding == "hard"


def test_replay_is_let_go_where_nothing_is_forgotten():
    _, amounts, _, _ = steer(Rules(budget=0.01, start=0.2, most=0.5), {"chat": Plant(0.001, 0.1)}, 60)
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[5] > 0.1  # slowly
    assert amounts[-1] == 0.0


def test_noisy_looks_leave_the_amount_near_what_it_takes_and_the_dead_band_is_still():
    plant = Plant(0.1, 0.1, half=0.002, noise=0.003, seed=4)
    _, amounts, _, _ = steer(Rules(budget=0.02, start=0.1, most=0.5), {"chat": plant}, 200)
    assert plant.change < 0.02
    steady = amounts[100:]
    needed = 0.1 * math.log(0.1 / 0.014)  # the interval takes 0.002
    assert sum(steady) / 100 == pytest.approx(needed, rel=0.12)
    assert statistics.pstdev(steady) < 0.05
    quiet = Controller(Rules(budget=0.02, start=0.1, most=0.5))
    within = {"chat": Reading(0.016, 0.016, 0.003, 64)}
    assert not quiet.decide(within).moved


def test_what_replay_does_not_help_is_called_infeasible_once_and_stays_at_the_most():
    plants = {"covered": Plant(0.1, 0.05), "not covered": Plant(0.2, 50.0)}
    controller, amounts, readings, decisions = steer(Rules(budget=0.01, start=0.1, most=0.5), plants, 40)
    told = [at for at, decision in enumerate(decisions) if decision.infeasible]
    assert len(told) == 1
    assert told[0] < 20
    assert amounts[-1] == 0.5
    verdict = controller.verdict(readings)
    assert (verdict.status, verdict.binding) == ("infeasible", "not covered")


def test_an_infeasible_start_that_gets_better_is_let_go_of_without_delay():
    """No winding up: after thirty looks at the stop it takes five for the old readings to be forgotten."""
    rules = Rules(budget=0.01, start=0.1, most=0.5)
    controller, *_ = steer(rules, {"chat": Plant(0.2, 50.0)}, 30)
    calm = {"chat": Reading(0.0, 0.0, 0.0, 64)}
    assert [controller.decide(calm).amount for _ in range(5)][-1] < 0.5


def test_moves_are_limited_and_on_a_grid():
    rules = Rules(budget=0.01, start=0.1, most=0.5)
    _, amounts, _, _ = steer(rules, {"chat": Plant(1.0, 0.3)}, 30)
    for before, after in itertools.pairwise(amounts):
        assert (
            -rules.fall * before - 2 * rules.most / GRID <= after - before <= rules.rise * rules.most + 1e-9
        )
        assert after / rules.most * GRID == pytest.approx(round(after / rules.most * GRID), abs=1e-9)


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
        first, head, _, _ = steer(rules, {"chat": again}, stop)
        second = Controller(rules)
        second.load(json.loads(json.dumps(first.state_dict())))
        _, tail, _, _ = steer(rules, {"chat": again}, 40 - stop, second)
        assert head + tail[1:] == whole


def test_more_is_allowed_on_the_way_than_at_the_end():
    rules = Rules(budget=0.01, start=0.1, most=0.5, ease=9.0, settled=0.6)
    assert [rules.allowed(p) for p in (0.0, 0.3, 0.6, 1.0)] == pytest.approx([0.1, 0.055, 0.01, 0.01])
    early, late = Controller(rules), Controller(rules)
    reading = {"chat": Reading(0.05, 0.05, 0.0, 64)}
    assert early.decide(reading, progress=0.1).amount < 0.1 < late.decide(reading, progress=0.7).amount


def test_what_is_being_learnt_again_asks_for_less_than_smoothing_alone_would_give_it():
    def amounts(**options):
        controller = Controller(Rules(budget=0.01, start=0.1, most=0.9, **options))
        return [
            controller.decide({"chat": Reading(0.1 * 0.7**k, 0.1 * 0.7**k, 0.0, 64)}).amount
            for k in range(16)
        ]

    ahead, behind = amounts(), amounts(foresight=0.0)
    assert sum(ahead) < 0.95 * sum(behind)
    assert ahead.index(max(ahead)) <= behind.index(max(behind))
    assert ahead[-1] < max(ahead)


def test_without_a_reading_nothing_moves_and_a_kind_may_come_and_go():
    controller = Controller(Rules(budget=0.01, start=0.1, most=0.5))
    assert not controller.decide({}).moved
    controller.decide({"a": Reading(0.0, 0.0, 0.0, 9)})
    controller.decide({"b": Reading(0.1, 0.1, 0.0, 9)})
    assert controller.decide({"a": Reading(0.0, 0.0, 0.0, 9), "b": Reading(0.1, 0.1, 0.0, 9)}).binding == "b"
    assert controller.verdict({}).status == "kept"


def test_a_diverged_model_counts_as_far_over_the_budget():
    controller = Controller(Rules(budget=0.01, start=0.1, most=0.5))
    broken = {"chat": Reading(math.nan, math.nan, 0.0, 9)}
    assert controller.decide(broken).amount > 0.1
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
