"""The first figures of a report: gain against forgetting, from whatever was measured."""

import re

import pytest

from framework.track import retention
from framework.track.report import render


def retain(step, chat, prose):
    line = {"kind": "retain", "step": step}
    for kind, value in {"chat": chat, "prose": prose}.items():
        line |= {f"{kind}/relative": value, f"{kind}/change": value, f"{kind}/units": 100.0}
        line |= {f"{kind}/low": value - 0.01, f"{kind}/high": value + 0.01, f"{kind}/loss": 2.0}
    return line


RETAINED = [retain(0, 0.0, 0.0), retain(10, 0.02, 0.03), retain(20, 0.08, 0.01)]
TRAIN = [{"kind": "train", "step": s, "loss": 3.0 - s / 10} for s in (1, 11, 21)]


def test_the_worst_kind_stands_against_the_fall_of_the_held_out_loss():
    evals = [{"kind": "eval", "step": s, "task/loss": 2.0 - s / 20, "chat/loss": 9.0 + s} for s in (0, 20)]
    drawn = retention.figures(RETAINED, evals, [], TRAIN, [], [])
    titles = re.findall(r"<title>(step [^<]*)</title>", drawn)[:3]
    assert titles == [
        "step 0: gained 0, forgot 0 %",
        "step 10: gained 0.5, forgot 3 %",
        "step 20: gained 1, forgot 8 %",
    ]
    assert "fall of task/loss" in drawn
    assert "+8.00%" in drawn


@pytest.mark.parametrize(
    ("evals", "rollouts", "train", "expected"),
    [
        ([{"step": 0, "q/accuracy": 0.1, "q/loss": 1.0}, {"step": 9, "q/accuracy": 0.4, "q/loss": 2.0}],
         [], TRAIN, ("rise of q/accuracy", 0.3)),
        ([], [{"step": 0, "reward": 1.0}, {"step": 9, "reward": 3.0}], TRAIN,
         ("rise of reward of rollouts", 2.0)),
        ([], [], TRAIN, ("fall of training loss", 2.0)),
        ([{"step": 9, "q/loss": 2.0}], [], [], ("", None)),
    ],
)  # fmt: skip
def test_a_gain_is_what_was_measured_twice_and_up_is_better(evals, rollouts, train, expected):
    what, points = retention.gain(evals, rollouts, train, {"chat"})
    assert what == expected[0]
    assert (points[-1][1] if points else None) == (
        None if expected[1] is None else pytest.approx(expected[1])
    )


def test_it_is_the_first_figure_of_a_report_and_absent_where_nothing_was_watched():
    page = render([*TRAIN, *RETAINED], config={}, status="done", name="run")
    assert re.findall(r"<figcaption>([^<]*?) ?<", page)[:2] == ["Learnt against forgotten", "Forgotten"]
    assert "Learnt and forgotten" not in render(TRAIN, config={}, status="done", name="run")


def test_a_diverged_model_is_drawn_as_far_as_it_goes():
    page = render([*TRAIN, *RETAINED, broken(30)], config={}, status="failed", name="run")
    assert "Learnt against forgotten" in page


def broken(step):
    return {key: ("NaN" if "/" in key else value) for key, value in retain(step, 0, 0).items()}


def test_a_budget_shows_what_became_of_it_and_how_replay_moved():
    steered = [line | {"replay/share": share} for line, share in zip(RETAINED, (0.1, 0.2, 0.15), strict=True)]
    judged = {"kind": "event", "step": 20, "message": "budget <of> 1%", "verdict": "infeasible"}
    page = render([*TRAIN, *steered, judged], config={}, status="done", name="run")
    assert '<div class="tile bad"><span>forgetting budget</span><b>infeasible</b>' in page
    assert "budget &lt;of&gt; 1%" in page
    assert "share, step 10: 0.2" in page
    assert "forgetting budget</span>" not in render([*TRAIN, *RETAINED], config={}, status="done", name="run")


def test_right_answers_are_drawn_and_a_verdict_on_them_is_shown_without_any_text():
    asked = [{"kind": "retain", "step": s, "facts/right": 0.9 - s / 100, "facts/fall": 0.0} for s in (0, 10)]
    verdict = {"kind": "event", "step": 10, "verdict": "kept", "message": "forgetting budget kept"}
    drawn = retention.figures(asked, [], [], TRAIN, [verdict], [])
    assert "Answered right" in drawn
    assert "forgetting budget kept" in drawn
    assert "general text" not in drawn
    assert "Answered right" not in retention.figures(RETAINED, [], [], TRAIN, [], [])
