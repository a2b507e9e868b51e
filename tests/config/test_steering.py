"""A budget in words and deeds: what moves, what is said of it, what stands in the result."""

import json
import math
from types import SimpleNamespace

import pytest

from framework.config.replay import Replay
from framework.config.steering import Steering
from framework.rollout.intervals import fall, questions_needed
from framework.train.retain import Change, Fall, Found
from framework.train.schedule import schedule

WORLD = SimpleNamespace(rank=0, size=1, broadcast=lambda value: json.loads(json.dumps(value)))


def steering(*, steps=100, names=("chat", "code"), rate=None, landing_in=0, **changes):
    """(Steering, amounts it set)."""
    asked = dict(sources=({"path": "general.jsonl"},), fraction=0.1, scale=None, sequences=None)
    asked |= dict(share_of="trained_tokens", additive=None)
    asked |= dict(objective="text", likeliest=32, scale_by="raw", measure_every=50)
    asked |= dict(max_forgetting=0.02, unit="relative_loss", most=0.5, strata=None)
    asked |= dict(carry=None, stratum_tokens=1000, select="uniform", excluded=())
    amounts = []
    replay = Replay.model_validate_json(json.dumps(asked | changes))
    steer = amounts.append if replay.sources else None
    return Steering(replay, names, steer, WORLD, steps=steps, rate=rate, landing_in=landing_in), amounts


def changes(chat, code=0.0, half=0.001, rows=64):
    return {name: Change(2.0, value, half, rows, 900) for name, value in {"chat": chat, "code": code}.items()}


QUIET = {"chat": 0.0, "code": 0.0}


def look(steer, step, found, noise, divergences=None):
    """A look after `step` steps, where there is one every two."""
    steer.controller.state.progress = max(step - 2, 0) / steer.steps
    return steer(step, Found(found, noise, divergences or {}))


def test_nothing_moves_before_training_and_every_move_says_why():
    steer, amounts = steering()
    metrics, lines = look(steer, 0, changes(0.0), QUIET)
    assert (metrics, lines, amounts) == ({"replay/share": 0.1}, [], [])
    metrics, lines = look(steer, 70, changes(0.05), QUIET)
    assert metrics == {"replay/share": 0.1}  # what brought this about
    (kind, line), amount = lines[0], amounts[0]
    assert kind == "event"
    assert 0.1 < amount < 0.3
    for said in ("up from 10.00%", f"to {amount:.2%}", "chat has forgotten up to 5.23%", "budget is 2.00%"):
        assert said in line["message"]


def test_a_run_that_goes_back_at_its_end_is_steered_beyond_its_budget_and_judged_by_it():
    """A tenth above the budget: more replay where this is the end, less where there is a way back."""
    moved = {}
    for landing_in in (0, 8, 50):
        steer, amounts = steering(landing_in=landing_in)
        for step in range(90, 98, 2):
            look(steer, step, changes(0.021), QUIET)
        moved[landing_in] = amounts[-1]
        ((_, said),) = look(steer, 100, changes(0.021), QUIET)[1]
        assert said["verdict"] == "infeasible"
        assert ("where the way back begins" in said["message"]) is (landing_in > 0)
    _, last = steer.judge(Found(changes(0.021), QUIET, {}), share=1.0)  # no point on the way back keeps it
    assert "infeasible" in last["message"]
    assert "way back" not in last["message"]
    assert moved[8] < 0.1 < moved[0]
    assert moved[50] < 0.1


def test_what_cannot_be_met_is_said_while_there_is_time_and_at_the_end():
    steer, amounts = steering()
    said = []
    for step in range(70, 100, 2):
        said += [line["message"] for _, line in look(steer, step, changes(0.2, 0.01), QUIET)[1]]
    assert amounts[-1] == 0.5
    assert sum("cannot be met" in message for message in said) == 1
    _, ((_, line),) = look(steer, 100, changes(0.2, 0.01), QUIET)
    assert (line["verdict"], line["binding"]) == ("infeasible", "chat")
    for told in ("2.00% infeasible", "reached its most, 50.00%", "replay.sources", "optim.lr"):
        assert told in line["message"]
    assert steer.judged["forgotten"] == pytest.approx(math.expm1(0.201))


def test_a_kept_budget_says_by_how_much_and_with_how_much_replay():
    steer, _ = steering()
    look(steer, 0, changes(0.0), QUIET)
    look(steer, 50, changes(0.001), QUIET)
    _, ((_, line),) = look(steer, 100, changes(0.004, -0.5), QUIET)
    assert line["verdict"] == "kept"
    assert line["mean_replay"] == pytest.approx((0.1 * 50 + steer.controller.state.amount * 50) / 100)
    assert "chat has forgotten up to 0.50%" in line["message"]


def test_a_run_that_ends_too_soon_says_to_begin_with_more():
    steer, _ = steering()
    _, ((_, line),) = look(steer, 100, changes(0.2), QUIET)
    assert line["verdict"] == "infeasible"
    assert "on its way; begin with more" in line["message"]


def test_budgets_that_a_probe_cannot_resolve_are_named_before_training():
    steer, _ = steering()
    _, lines = look(steer, 0, changes(0.0, rows=5), {"chat": 0.0, "code": 0.0})
    assert [line["message"].split(": ")[0] for _, line in lines] == [
        "a budget of 2.00% cannot be resolved on chat",
        "a budget of 2.00% cannot be resolved on code",
    ]
    _, lines = look(steer, 0, changes(0.0), {"chat": 0.03, "code": 0.0})
    assert "measured twice differs by 3.05%" in lines[0][1]["message"]
    _, ((_, line),) = look(steer, 100, changes(0.005, half=0.1, rows=20), QUIET)
    assert line["verdict"] == "unresolvable"
    assert f"about {math.ceil(20 * (0.1 / (math.log(1.02) - 0.005)) ** 2)} rows" in line["message"]


def test_a_kind_of_text_that_cannot_be_scored_is_not_called_kept():
    steer, _ = steering(names=("chat", "lost"))
    _, ((_, line),) = look(steer, 100, changes(0.0), QUIET)
    assert (line["verdict"], line["binding"]) == ("unresolvable", "lost")


def test_a_coefficient_is_steered_like_a_share():
    steer, amounts = steering(fraction=0.0, scale=1.0, sequences=8, most=10.0)
    metrics, lines = look(steer, 70, changes(0.05), QUIET)
    assert metrics == {"replay/coefficient": 1.0}
    assert 1.0 < amounts[0] < 5.0
    assert "the coefficient of replay goes up from 1 to" in lines[0][1]["message"]


def test_all_ranks_get_what_rank_0_decided():
    told = []
    other, amounts = steering()
    first, _ = steering()
    first.world = SimpleNamespace(rank=0, broadcast=lambda value: told.append(value) or value)
    look(first, 70, changes(0.05), QUIET)
    other.world = SimpleNamespace(rank=1, broadcast=lambda value: told[0])
    look(other, 70, changes(0.0), QUIET)  # whatever this rank has measured itself
    assert other.controller.state == first.controller.state
    assert amounts == [first.controller.state.amount]


def test_its_state_goes_through_json_and_repeats_every_move():
    whole, amounts = steering()
    half, before = steering()
    plan = [(60, 0.05), (64, 0.08), (68, 0.04), (72, 0.01), (76, 0.005)]
    for at, value in plan:
        look(whole, at, changes(value), QUIET)
    for at, value in plan[:2]:
        look(half, at, changes(value), QUIET)
    again, after = steering()
    again.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for at, value in plan[2:]:
        look(again, at, changes(value), QUIET)
    assert before + after == amounts
    assert again.state_dict() == whole.state_dict()


def test_more_is_allowed_where_the_learning_rate_is_yet_to_fall():
    """A cosine to nothing: below a tenth of the highest the rate counts as a tenth."""
    cosine = schedule("cosine", lr=1e-3, total=100, warmup=3)
    rules = [steering(rate=rate)[0].controller.rules for rate in (cosine, lambda step: 1e-3, None)]
    falling, steady, unknown = ([one.rate(p) for p in (0.5, 0.8, 0.9, 1.0)] for one in rules)
    assert falling == [pytest.approx(10 * cosine(s) / 1e-3, rel=0.01) for s in (50, 80)] + [1.0, 1.0]
    assert steady == unknown == [1.0, 1.0, 1.0, 1.0]


def test_a_budget_of_kl_goes_by_divergence_and_says_so():
    steer, amounts = steering(unit="kl", max_forgetting=0.01)
    _, lines = look(steer, 70, changes(5.0), QUIET, changes(0.03, half=0.002))
    assert amounts[0] > 0.1
    assert (
        "chat has forgotten up to 0.032 nats of KL, the budget is 0.01 nats of KL" in lines[0][1]["message"]
    )
    _, ((_, line),) = look(steer, 100, changes(5.0), QUIET, changes(0.003, half=0.002))
    assert (line["verdict"], line["forgotten"]) == ("kept", pytest.approx(0.005))


def test_a_budget_without_replay_is_judged_and_nothing_else():
    steer, amounts = steering(sources=(), fraction=0.0, most=None)
    assert look(steer, 0, changes(0.0), QUIET) == ({}, [])
    assert look(steer, 70, changes(0.2), QUIET) == ({}, [])
    metrics, ((_, line),) = look(steer, 100, changes(0.2), QUIET)
    assert (metrics, amounts) == ({}, [])
    assert (line["verdict"], line["mean_replay"]) == ("infeasible", 0.0)
    assert "nothing was replayed" in line["message"]


def test_a_point_on_the_way_back_is_judged_by_what_was_measured_there():
    steer, _ = steering()
    look(steer, 100, changes(0.2), QUIET)
    assert not steer.keeps(Found(changes(0.2), QUIET))
    assert steer.keeps(Found(changes(0.01), QUIET))
    _, line = steer.judge(Found(changes(0.01), QUIET), share=0.4)
    assert (line["verdict"], line["interpolated"]) == ("kept by interpolation", 0.4)
    assert "2.00% kept by interpolating with the start weights by 0.4: chat" in line["message"]
    assert "Without: forgetting budget of 2.00% infeasible" in line["message"]
    assert steer.judged["forgotten"] == pytest.approx(math.expm1(0.011))


def test_tuned_weights_that_are_handed_out_after_all_keep_their_verdict():
    steer, _ = steering()
    look(steer, 100, changes(0.2), QUIET)
    _, line = steer.judge(Found(changes(0.2), QUIET), share=1.0)
    assert (line["verdict"], line["interpolated"]) == ("infeasible", 1.0)


def test_each_kind_of_text_has_a_budget_of_its_own():
    """4 % of code is within its 5 %, 3 % of chat is not within its 2 %, so that is what asks for replay."""
    steer, amounts = steering(max_forgetting={"chat": 0.02, "code": 0.05}, names=("chat", "code"))
    found = changes(math.log(1.03), math.log(1.04), half=0.0)
    _, lines = look(steer, 90, found, QUIET)
    assert amounts[0] > 0.1
    assert "chat has forgotten up to 3.00%, the budget is 2.00%" in lines[0][1]["message"]
    _, ((_, line),) = look(steer, 100, found, QUIET)
    assert (line["verdict"], line["binding"], line["budget"]) == ("infeasible", "chat", 0.02)
    assert line["budgets"] == {"chat": 0.02, "code": 0.05}
    assert line["forgotten"] == pytest.approx(0.03)
    assert "forgetting budget of 2.00% on chat, 5.00% on code infeasible" in line["message"]
    assert steer.keeps(Found(changes(math.log(1.01), math.log(1.04), half=0.0), QUIET))
    assert not steer.keeps(Found(changes(math.log(1.01), math.log(1.06), half=0.0), QUIET))


def test_budgets_of_one_size_are_one_budget():
    alike, same = steering(max_forgetting={"chat": 0.02, "code": 0.02}), steering()
    for step in range(60, 100, 4):
        for steer, _ in (alike, same):
            look(steer, step, changes(0.03 - step / 5000, 0.01), QUIET)
    assert alike[1] == same[1]
    assert len(same[1]) > 5


def answers(lost, gained=0, questions=1000, right=0.9, noise=0.0):
    _, low, high = fall(lost, gained, questions)
    return {"chat": Fall(right, lost, gained, questions, low, high, noise)}


def ask(steer, step, falls, every=2):
    steer.controller.state.progress = max(step - every, 0) / steer.steps
    return steer(step, Found(changes(5.0), QUIET, {}, falls))


def test_a_budget_of_accuracy_goes_by_answers_and_only_where_there_are_new_ones():
    steer, amounts = steering(unit="accuracy", names=("chat",))
    assert ask(steer, 0, answers(0)) == ({"replay/share": 0.1}, [])
    assert ask(steer, 70, {}) == ({"replay/share": 0.1}, [])
    assert (amounts, steer.controller.state.tracks) == ([], {})
    _, lines = ask(steer, 72, answers(60, 10))
    assert 0.1 < amounts[0] < 0.3
    bound = 100 * fall(60, 10, 1000).high
    told = f"chat has forgotten up to {bound:.2f} points of accuracy, the budget is 2.00 points of accuracy"
    assert told in lines[0][1]["message"]
    _, ((_, line),) = ask(steer, 100, answers(12, 10))
    assert (line["verdict"], line["unit"]) == ("kept", "accuracy")
    assert line["forgotten"] == fall(12, 10, 1000).high
    assert steer.spent == pytest.approx(0.1 * 72 + amounts[0] * 28)


def test_questions_that_are_too_few_say_how_many_would_do():
    steer, _ = steering(unit="accuracy", names=("chat",))
    _, ((_, line),) = ask(steer, 100, answers(3, 2, questions=100))
    assert line["verdict"] == "unresolvable"
    assert "chat has changed by 1.00 points of accuracy, which its 100 questions only" in line["message"]
    needed = questions_needed(0.02, 0.03, 0.02)
    assert f"about {needed} questions of that kind in retain.prompts would do" in line["message"]
    _, ((_, line),) = ask(steer, 100, answers(0, questions=0, right=math.nan))
    assert line["verdict"] == "unresolvable"


def test_answers_that_differ_by_themselves_or_are_all_wrong_are_named_before_training():
    steer, _ = steering(unit="accuracy", names=("chat",))
    _, ((_, line),) = ask(steer, 0, answers(0, noise=0.03))
    assert "the start model measured twice differs by 3.00 points of accuracy on it" in line["message"]
    _, ((_, line),) = ask(steer, 0, answers(0, right=0.0))
    assert "none of its questions right" in line["message"]
