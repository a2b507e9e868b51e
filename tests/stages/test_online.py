import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from online_toys import FixedEngine, Scripted, judged, packing, prompts

from framework.errors import ConfigError, SapwoodError
from framework.losses.correction import sampler_correction
from framework.losses.items import Items
from framework.losses.policy_gradient import ppo
from framework.rollout.base import Completion, Prompt, Sampling
from framework.rollout.experience import Experience, Shaping
from framework.stages import measures
from framework.stages.online import Online, Plan
from framework.stages.policy_objective import PolicyObjective
from framework.strategy.world import Solo

WORLD = Solo(0, 1, 0, torch.device("cpu"))


def reinforce(logps, advantages, weight):
    return Items(-advantages * logps, weight)


class Plain:
    """Each token's advantage is its answer's reward; remembers how often it was asked."""

    def __init__(self, *, needs=frozenset(), wants_reference=False, loss=reinforce):
        self.needs, self.wants_reference = needs, wants_reference
        self.calls = 0
        self._objective = PolicyObjective(loss, temperature=0.7)

    def objective(self, iteration):
        return self._objective

    def estimate(self, experience):
        self.calls += 1
        scores = experience.scores.nan_to_num(0.0)
        return replace(experience, advantages=scores[experience.owners]), {"plain": 1.0}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def length_reward(prompts, completions):
    return judged([float(len(c.ids)) for c in completions], judge=0.5)


def stage(plan=None, *, rollout=None, reward=length_reward, method=None, samples=2, **others):
    return Online(
        FixedEngine(WORLD),
        method or Plain(),
        plan or Plan(prompts=4, sequences=4),
        prompts=prompts,
        rollout=rollout or Scripted(),
        reward=reward,
        sampling=Sampling(4, temperature=0.7, samples=samples),
        packing=packing(WORLD),
        seed=5,
        **others,
    )


def stepped(rl, number):
    """What the trainer does with a step, short of learning from it."""
    (term,) = rl.next(number)
    for batch in term.micros:
        term.objective(rl.engine, batch)
    return [term]


def tokens(terms):
    return sorted(t for batch in terms[0].micros for t in batch.targets.tolist())


def test_an_iteration_is_rolled_out_once_and_used_for_every_epoch():
    """4 prompts x 2 answers in steps of 4 answers, 3 epochs: 6 steps an iteration."""
    rl = stage(Plan(prompts=4, sequences=4, epochs=3))
    seen = []
    for step in range(7):
        assert rl.resting == (step in (0, 6))
        seen.append(tokens(rl.next(step)))
    assert rl.rollout.versions == [0, 6]
    assert rl.rollout.asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    epochs = [sorted(seen[2 * e] + seen[2 * e + 1]) for e in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len({tuple(part) for part in seen[:6:2]}) > 1  # shuffled anew
    kinds = [kind for kind, _ in rl.reports()]
    assert kinds == ["rollout", "samples"] * 2
    assert rl.reports() == []


def test_a_killed_iteration_is_repeated_with_the_same_numbers():
    rl = stage(Plan(prompts=3, sequences=2, epochs=2))
    for step in range(6):
        rl.next(step)
    state = rl.state_dict()
    nothing = {"count": 0.0, "mean": 0.0, "squares": 0.0}
    assert state == {"index": 3, "iteration": 1, "scores": nothing, "method": {"calls": 1}}
    after = [tokens(rl.next(step)) for step in range(6, 12)]
    again = stage(Plan(prompts=3, sequences=2, epochs=2))
    again.next(0)  # whatever it did before the load is forgotten
    again.load_state_dict(state)
    assert again.resting
    assert [tokens(again.next(step)) for step in range(6, 12)] == after
    assert again.state_dict() == rl.state_dict()


def test_the_trainer_asks_at_the_sampling_temperature_for_everybody():
    asked = []

    def reference(batch, *, temperature):
        asked.append(temperature)
        return engine(batch, adapter=False)

    engine = FixedEngine(WORLD)
    rl = stage(method=Plain(wants_reference=True), reference=reference)
    terms = stepped(rl, 0)
    terms[0].objective(rl.engine, terms[0].micros[0])
    assert rl.engine.temperatures == {0.7}
    assert set(asked) == {0.7}
    batch = terms[0].micros[0]
    torch.testing.assert_close(batch.old_logps, -batch.targets / 100)
    torch.testing.assert_close(batch.reference_logps, -batch.targets / 100 - 0.5)
    (_, metrics), _ = rl.reports()
    assert metrics["kl"] == pytest.approx(0.5)
    assert metrics["kl_k3"] == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert metrics["entropy"] == 1.0


def test_a_reference_is_not_asked_when_nobody_wants_it_and_missed_when_somebody_does():
    def never(batch, **options):
        raise AssertionError("asked")

    stage(reference=never).next(0)
    with pytest.raises(ConfigError, match="reference"):
        stage(method=Plain(wants_reference=True))


class Listening(FixedEngine):
    """Remembers what it said."""

    def __init__(self, world):
        super().__init__(world)
        self.said = []

    def __call__(self, batch, **options):
        self.said.append(super().__call__(batch, **options))
        return self.said[-1]


def test_answers_that_one_step_takes_are_read_by_that_step_alone_and_reported_after_it():
    """As if they had been read before: the same line, the same loss, the same gradient."""
    found, read = [], []
    clipped = partial(ppo, clip_low=0.2, clip_high=0.2)
    for needs in (frozenset(), frozenset({"logps"})):
        method = Plain(needs=needs, loss=clipped, wants_reference=True)
        reference = partial(FixedEngine(WORLD), adapter=False)
        rl = stage(Plan(prompts=4, sequences=8, shown=0), method=method, reference=reference)
        rl.engine = Listening(WORLD)
        (term,) = rl.next(0)
        early = rl.reports()
        assert bool(early) == bool(needs)
        losses = [term.objective(rl.engine, batch).total() for batch in term.micros]
        sum(losses).backward()
        ((_, line),) = [*early, *rl.reports()]
        assert rl.reports() == []
        read.append(len(rl.engine.said))
        line = {name: value for name, value in line.items() if not name.startswith("seconds")}
        gradients = [said.logps.grad.tolist() for said in rl.engine.said if said.logps.grad is not None]
        found.append((line, [loss.item() for loss in losses], gradients))
    assert found[0] == found[1]
    assert found[0][0]["kl"] == pytest.approx(0.5)
    assert {"entropy", "mismatch/mean", "kl_k3"} <= found[0][0].keys()
    assert 2 * read[0] == read[1]


@pytest.mark.parametrize(
    "why",
    [
        {"plan": Plan(prompts=4, sequences=8, epochs=2)},
        {"plan": Plan(prompts=4, sequences=4)},
        {"plan": Plan(prompts=4, sequences=8), "correction": lambda old, sampler, owners: old.exp()},
        {"plan": Plan(prompts=4, sequences=8), "method": Plain(needs=frozenset({"values"}))},
    ],
    ids=["epochs", "minibatches", "correction", "values"],
)
def test_answers_that_are_trained_on_again_or_weighed_are_read_before(why):
    rl = stage(**why)
    (term,) = rl.next(0)
    assert [kind for kind, _ in rl.reports()] == ["rollout", "samples"]
    assert term.micros[0].old_logps is not None


def test_a_step_that_was_not_taken_leaves_nothing_to_report():
    rl = stage(Plan(prompts=4, sequences=8))
    state = rl.state_dict()
    rl.next(0)
    rl.load_state_dict(state)
    assert rl.reports() == []
    stepped(rl, 0)
    assert [kind for kind, _ in rl.reports()] == ["rollout", "samples"]


def test_sampling_without_chance_is_refused():
    with pytest.raises(ConfigError, match="temperature"):
        Online(
            FixedEngine(WORLD),
            Plain(),
            Plan(prompts=1, sequences=1),
            prompts=prompts,
            rollout=Scripted(),
            reward=length_reward,
            sampling=Sampling(4, temperature=0.0),
            packing=packing(WORLD),
            seed=0,
        )


def test_a_failed_reward_is_left_out_and_never_a_zero():
    """Rewards 1 and NaN in turn: mean 1, half failed, and only half of the tokens count."""

    def hostile(prompts, completions):
        return judged([1.0 if i % 2 == 0 else math.nan for i in range(len(completions))])

    rl = stage(Plan(prompts=4, sequences=8), reward=hostile)
    (term,) = stepped(rl, 0)
    (_, metrics), _ = rl.reports()
    assert (metrics["reward"], metrics["reward_failed_share"], metrics["counted_share"]) == (1.0, 0.5, 0.5)
    counted = sum(int((batch.weights > 0).sum()) for batch in term.micros)
    assert counted == sum(batch.units for batch in term.micros) == term.stats["trained_tokens"]
    assert 0 < counted < sum(len(batch.trained) for batch in term.micros)
    for batch in term.micros:
        items = term.objective(rl.engine, batch)
        items.total().backward()
        assert torch.isfinite(items.loss).all()
        assert (batch.advantages[batch.weights == 0] == 0).all()


def test_a_reward_that_keeps_failing_stops_the_run():
    def hostile(prompts, completions):
        return judged([1.0 if i % 4 == 0 else math.inf for i in range(len(completions))])

    with pytest.raises(SapwoodError, match="failed on 75%"):
        stage(reward=hostile).next(0)
    stage(Plan(prompts=4, sequences=4, max_failed_share=0.75), reward=hostile).next(0)


def test_an_iteration_in_which_every_reward_failed_trains_on_nothing():
    rl = stage(
        Plan(prompts=4, sequences=4, max_failed_share=1.0),
        reward=lambda p, c: judged([math.nan] * len(c)),
    )
    (term,) = stepped(rl, 0)
    assert sum(batch.units for batch in term.micros) == 0
    (_, metrics), _ = rl.reports()
    assert metrics["reward_failed_share"] == 1.0
    assert "reward" not in metrics


def alike_on_even_prompts(prompts, completions):
    return judged([float(p.index % 2 * len(c.ids)) for p, c in zip(prompts, completions, strict=True)])


def test_groups_that_scored_alike_are_replaced_up_to_a_bound():
    """Of prompts 0 to 3 only 1 and 3 have spread; two more are drawn (4, 5), then one (6), then 7."""
    rl = stage(Plan(prompts=4, sequences=8, extra_prompts=8), reward=alike_on_even_prompts)
    stepped(rl, 0)
    assert rl.rollout.asked == [[0, 1, 2, 3], [4, 5], [6], [7]]
    (_, metrics), _ = rl.reports()
    assert metrics["prompts_drawn"] == 8
    assert metrics["groups_without_spread_share"] == 0.5
    assert metrics["sequences"] == 8
    assert rl.state_dict()["index"] == 8

    rl = stage(Plan(prompts=4, sequences=8, extra_prompts=3), reward=alike_on_even_prompts)
    (term,) = stepped(rl, 0)
    assert rl.rollout.asked == [[0, 1, 2, 3], [4, 5], [6]]
    assert term.stats["sequences"] == 6  # three groups: one short


def test_when_nothing_has_spread_the_first_groups_stay():
    rl = stage(Plan(prompts=2, sequences=4, extra_prompts=2), reward=lambda p, c: judged([1.0] * len(c)))
    (term,) = stepped(rl, 0)
    assert rl.rollout.asked == [[0, 1], [2, 3]]
    assert term.stats["sequences"] == 4
    assert rl.state_dict()["index"] == 4


def test_truncated_answers_can_be_judged_without_being_trained_on():
    """The script's answers of four tokens did not end by themselves."""
    for mask, counted in ((False, 20), (True, 12)):
        rl = stage(Plan(prompts=4, sequences=8, mask_truncated=mask))
        (term,) = stepped(rl, 0)
        assert term.stats["trained_tokens"] == counted
        (_, metrics), _ = rl.reports()
        assert metrics["reward"] == 20 / 8


def test_epochs_end_when_the_policy_has_moved_too_far():
    """The engine's answers move by 1 nat after the first step: k3 is e - 2 per token."""
    rl = stage(Plan(prompts=4, sequences=8, epochs=5, stop_kl=0.5))
    (term,) = rl.next(0)
    plain = rl.engine.__class__.__call__
    term.objective(rl.engine, term.micros[0])
    assert not rl.resting
    (term,) = rl.next(1)

    def moved(batch, **options):
        outputs = plain(rl.engine, batch, **options)
        return outputs._replace(logps=outputs.logps + 1.0)

    moved.world = WORLD
    term.objective(moved, term.micros[0])
    assert term.objective.distance(WORLD) == pytest.approx(math.e - 2)
    term.objective(moved, term.micros[0])
    assert rl.resting
    assert [kind for kind, _ in rl.reports()][-1] == "event"
    rl.next(2)
    assert rl.rollout.versions == [0, 2]
    assert rl.state_dict()["iteration"] == 2


def test_the_difference_between_sampler_and_trainer_by_hand():
    """Log ratios 0 and ln 3: mean (ln 3) / 2, KL ((1 - 1) + (3 - 1 - ln 3)) / 2, ESS 16 / (2 * 10)."""
    got = measures.mismatch(torch.tensor([0.0, math.log(3.0)], dtype=torch.float64))
    assert got["mismatch/mean"] == pytest.approx(math.log(3) / 2)
    assert got["mismatch/max"] == pytest.approx(math.log(3))
    assert got["mismatch/kl"] == pytest.approx((2 - math.log(3)) / 2)
    assert got["mismatch/ess"] == pytest.approx(0.8)


def test_samples_are_rows_for_people():
    e = Experience.of(
        [Prompt((1, 2), 0)],
        [[Completion("hi", (3,), True), Completion("", (4,), False)]],
        torch.tensor([1.0, math.nan]),
    )
    rows = measures.rows(e, 5, lambda ids: " ".join(map(str, ids)))
    assert rows == [
        {"prompt": "1 2", "answer": "hi", "reward": 1.0, "tokens": 1, "finished": True},
        {"prompt": "1 2", "answer": "", "reward": None, "tokens": 1, "finished": False},
    ]


def test_weights_for_what_the_sampler_saw_differently():
    """The script says -1 nat a token, the trainer -t / 100: ratios e^(1 - t / 100), at most 2."""
    correction = partial(sampler_correction, level="token", outside="truncate", low=0.0, high=2.0)
    (term,) = stage(Plan(prompts=4, sequences=8), correction=correction).next(0)
    for batch in term.micros:
        expected = (1 - batch.targets / 100).exp().clamp(max=2.0)
        torch.testing.assert_close(batch.correction, expected)


def test_a_correction_needs_a_sampler_that_keeps_its_log_probabilities():
    class Silent(Scripted):
        def _answer(self, prompt, sample):
            return replace(super()._answer(prompt, sample), logps=())

    rl = stage(rollout=Silent())
    stepped(rl, 0)
    assert not [name for name in rl.reports()[0][1] if name.startswith("mismatch")]
    with pytest.raises(SapwoodError, match=r"correction\.level=none"):
        stage(rollout=Silent(), correction=partial(sampler_correction, level="token")).next(0)


def test_scores_are_shaped_before_they_are_learnt_from():
    """Answers of 3, 1, 2 and 4 tokens, one a token; those of 4 did not end and lose 10."""
    rl = stage(Plan(prompts=4, sequences=8), shaping=Shaping(missing_eos_penalty=10.0, running=True))
    stepped(rl, 0)
    (_, metrics), _ = rl.reports()
    assert metrics["reward"] == 2.5  # as the reward gave it
    assert metrics["score"] == pytest.approx(-10 * 2 / 8)  # normalised to mean 0, then punished
    assert rl.state_dict()["scores"] == {"count": 8.0, "mean": 2.5, "squares": 10.0}
    again = stage()
    again.load_state_dict(rl.state_dict())
    assert again.seen == rl.seen


def test_a_loss_gets_what_it_names_and_no_more():
    asked = {}

    def greedy(logps, old_logps, weight, segments, entropies, advantages, correction=None, *, scale=1.0):
        asked.update(segments=segments, entropies=entropies, correction=correction)
        return Items(-scale * logps, weight)

    rl = stage()
    (term,) = stepped(rl, 0)
    objective = PolicyObjective(greedy, temperature=0.7)
    assert objective.needs == {"entropies"}
    objective(rl.engine, term.micros[0])
    assert asked["segments"] is not None
    assert asked["entropies"].tolist() == [1.0] * len(term.micros[0].trained)
    assert asked["correction"] is None
    assert objective.distance(WORLD) == 0.0
