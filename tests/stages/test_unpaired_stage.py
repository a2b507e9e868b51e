"""KTO and BCO with answers fixed by hand: where their baselines come from."""

from dataclasses import replace
from functools import partial

import judged
import pytest

from framework.losses.bco import bco
from framework.losses.kto import apo_zero_unpaired, kto
from framework.stages.unpaired import AnswerObjective, Asked, Unpaired

ROWS = [([1], [3, 4], True), ([1, 2], [5], False), ([2], [6, 6], True)]


def by_token(batch):
    """-0.1 nats times the target's id."""
    return -0.1 * batch.targets.float()


def thrice(batches):
    """A reference three times as surprised: log-ratios of 0.2 times the ids' sum."""
    return [3 * by_token(batch) for batch in batches]


def others(rows):
    """Every prompt with the answer of the row before it, and 10 after it."""
    return [(prompt, [*answer, 10], liked) for prompt, answer, liked in judged.rotated(rows)]


class Filled(judged.Steps):
    """Adds a fill to what a step gives, as a rank has that is left with fewer micro-batches."""

    def next(self):
        taken = super().next()
        taken.micros.append(judged.labelled([]))
        taken.mismatched.append(judged.labelled([]))
        return taken


def stage_of(loss, *, reference=thrice, at_once=2, **options):
    loader = Filled([ROWS, ROWS[:1]], judged.labelled, mismatch=others, at_once=at_once)
    held = Asked([judged.labelled(ROWS[:2])], [judged.labelled(others(ROWS[:2]))])
    engine = judged.Fixed(by_token)
    return Unpaired(
        loader, AnswerObjective(loss), {"held": held}, engine=engine, reference=reference, **options
    )


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_kto_measures_from_the_mean_over_mismatched_answers_of_both_classes(at_once):
    """The others have ids 22, 17 and 15: mean log-ratio 0.2 * 54 / 3 = 3.6. Fills do not count."""
    stage = stage_of(partial(kto, beta=0.1), at_once=at_once)
    (term,) = stage.next(0)
    assert [micro.baseline for micro in term.micros] == [pytest.approx(3.6)] * len(term.micros)


def test_ktos_baseline_is_not_below_zero():
    def surer(batches):
        return [0.5 * by_token(batch) for batch in batches]

    (term,) = stage_of(partial(kto, beta=0.1), reference=surer).next(0)
    assert term.micros[0].baseline == 0.0


def test_a_held_out_set_has_a_kto_baseline_of_its_own():
    """Its others have ids 15 and 17: 0.2 * 32 / 2 = 3.2. The loss of an answer with r = 1.4 is
    1 - s(0.1 (1.4 - 3.2)) = 0.5448789."""
    stage = stage_of(partial(kto, beta=0.1))
    term = stage.held_out()["held"]
    assert len(term.micros) == 1
    (micro,) = term.micros
    items = term.objective(stage.engine, micro)
    assert micro.baseline == pytest.approx(3.2)
    assert items.metrics["baseline"].tolist() == pytest.approx([3.2, 3.2])
    assert float(items.loss[0]) == pytest.approx(0.5448789, rel=1e-5)


def test_bco_measures_from_the_mean_reward_so_far_this_step_included():
    """Step 0: b * 0.2 * (7 + 5 + 12) / 3 = 1.6 b. Step 1 adds one answer of 1.4 b: 6.2 b / 4. b = 0.5."""
    stage = stage_of(partial(bco, beta=0.5), baseline="running", beta=0.5)
    (term,) = stage.next(0)
    assert term.micros[0].baseline == pytest.approx(0.8)
    assert stage.state_dict() == {"index": 1, "mean": pytest.approx(0.8), "seen": 3.0}
    (term,) = stage.next(1)
    assert term.micros[0].baseline == pytest.approx(0.775)
    (micro,) = stage.held_out()["held"].micros
    assert micro.baseline == pytest.approx(0.775)
    assert stage.state_dict()["seen"] == 4.0, "measuring is not training"


def test_bco_goes_on_after_a_resume():
    whole = stage_of(partial(bco, beta=0.5), baseline="running", beta=0.5)
    whole.next(0)
    state = whole.state_dict()
    resumed = stage_of(partial(bco, beta=0.5), baseline="running", beta=0.5)
    resumed.load_state_dict(state)
    assert resumed.next(1)[0].micros[0].baseline == whole.next(1)[0].micros[0].baseline


def test_bcos_reference_is_asked_about_no_mismatched_answer():
    """Which are not in the data, so that columns on disk do for BCO."""
    asked = []

    def remembering(batches):
        asked.append(len(batches))
        return thrice(batches)

    stage = stage_of(partial(bco, beta=0.5), reference=remembering, baseline="running", beta=0.5)
    stage.next(0)
    assert asked == [3]


def test_a_loss_without_a_baseline_costs_no_pass_of_the_policy():
    stage = stage_of(partial(apo_zero_unpaired, beta=0.1))
    (term,) = stage.next(0)
    assert term.micros[0].baseline is None
    assert not stage.engine.asked


def test_a_loss_gets_its_inputs_by_name():
    got = {}

    def loss(policy, desirable, weight, reference, baseline):
        got.update(policy=policy, desirable=desirable, reference=reference, baseline=baseline)
        return bco(policy, reference, desirable, weight, baseline, beta=1.0)

    batch = judged.labelled(ROWS)
    batch = replace(batch, reference_logps=thrice([batch])[0], baseline=0.25)
    AnswerObjective(loss)(judged.Fixed(by_token), batch)
    assert got["policy"].tolist() == pytest.approx([-0.7, -0.5, -1.2])
    assert got["reference"].tolist() == pytest.approx([-2.1, -1.5, -3.6])
    assert got["desirable"].tolist() == [True, False, True]
    assert got["baseline"].ndim == 0
    assert float(got["baseline"]) == 0.25


def test_a_loss_with_a_reference_needs_one():
    with pytest.raises(ValueError, match="reference"):
        stage_of(partial(kto, beta=0.1), reference=None)
