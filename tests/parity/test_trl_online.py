"""The losses of TRL's GRPO and RLOO trainers, step by step, on the same scripted answers and rewards.

Two updates to each batch of answers, so ratios leave 1; sampling at a temperature other than 1. Everything
but the answers and what they are worth is real: tokenising, references, old log-probabilities, advantages,
minibatches, averaging, clipping, KL, the optimizer.
"""

import random
from dataclasses import replace

import pytest
import torch
import trl_recipes
import workers

pytest.importorskip("trl")

PROMPTS, SAMPLES, LONGEST, TEMPERATURE = 3, 4, 9, 0.9
GROUPED = {"stage__averaging": "sequence", "stage__advantages": "group_normalised"}
BOTH = {"clip_low": 0.1, "clip_high": 0.15}


def ours_clipped(**more):
    return {f"loss__{name}": value for name, value in {**BOTH, **more}.items()}


def theirs_clipped(**more):
    return {"epsilon_low": BOTH["clip_low"], "epsilon_high": BOTH["clip_high"], **more}


# name -> (attributes of TRL's trainer, of its arguments, our overrides)
VARIANTS = {
    "grpo": (
        theirs_clipped(loss_type="grpo", beta=0.04),
        {},
        {"loss": "grpo", **GROUPED, **ours_clipped(kl=0.04, kl_estimator="k3")},
    ),
    "kl_importance": (
        theirs_clipped(loss_type="grpo", beta=0.4),
        {"use_bias_correction_kl": True},
        {
            "loss": "grpo",
            **GROUPED,
            **ours_clipped(kl=0.4, kl_estimator="k3", kl_importance="true"),
        },
    ),
    "dapo": (
        theirs_clipped(loss_type="dapo"),
        {},
        {"loss": "dapo", **GROUPED, "stage__averaging": "token", **ours_clipped()},
    ),
    "entropy": (
        theirs_clipped(loss_type="dapo", _entropy_bonus_enabled=True, entropy_coef=0.05),
        {},
        {"loss": "dapo", **GROUPED, "stage__averaging": "token", **ours_clipped(entropy=0.05)},
    ),
    "two_sided": (
        theirs_clipped(loss_type="dapo"),
        {"delta": 1.2},
        {"loss": "dapo", **GROUPED, "stage__averaging": "token", **ours_clipped(dual_clip=1.2)},
    ),
    "dr_grpo": (
        theirs_clipped(loss_type="dr_grpo", scale_rewards="none"),
        {},
        {
            "loss": "dr_grpo",
            "stage__averaging": "constant",
            "stage__advantages": "group_centred",
            **ours_clipped(),
        },
    ),
    "batch_scaled": (
        theirs_clipped(loss_type="grpo", scale_rewards="batch"),
        {},
        {"loss": "grpo", **GROUPED, "stage__advantages": "batch_scaled", **ours_clipped(kl=0)},
    ),
    "gspo": (
        theirs_clipped(loss_type="grpo", importance_sampling_level="sequence"),
        {},
        {"loss": "gspo", **GROUPED, **ours_clipped()},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {},
        {"loss": "cispo", **GROUPED, "stage__averaging": "token", "loss__ratio_high": 1.1},
    ),
    "sapo": ({"loss_type": "sapo"}, {}, {"loss": "sapo", **GROUPED}),
}
PLAIN = {
    "loss_type": "grpo",
    "beta": 0.0,
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "_entropy_bonus_enabled": False,
    "entropy_coef": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
}
PLAIN_ARGS = {"delta": None, "use_bias_correction_kl": False}


def answers(prompt, end):
    """Token ids of all answers to a prompt of token ids; every other one ends by itself."""
    draw = random.Random(str(list(prompt)))
    found = []
    for sample in range(SAMPLES):
        body = [draw.randrange(3, 380) for _ in range(draw.randint(1, LONGEST - 1))]
        found.append([*body, end] if sample % 2 else (body * LONGEST)[:LONGEST])
    return found


def worth(answer):
    """Something between 0 and 1 that differs from answer to answer."""
    return random.Random(str(list(answer))).random()


def prompts():
    return [
        {"prompt": f"{trl_recipes.BEGIN}Reverse {' '.join(trl_recipes.WORDS[: 1 + i % 4])} {i}:"}
        for i in range(PROMPTS * trl_recipes.STEPS)
    ]


class Scripted:
    """A rollout engine that says what was written for it."""

    def __init__(self, end):
        self.end = end

    def update(self, weights, *, version):
        for _ in weights:
            pass

    def generate(self, prompts, sampling):
        from framework.rollout.base import Completion

        return [
            [Completion("", tuple(ids), ids[-1] == self.end) for ids in answers(p.ids, self.end)]
            for p in prompts
        ]


def curve(world, arguments, end):
    """What is minimised and the size of what it adds up, norms and prompts of five steps."""
    from framework.config import build, compose, stages
    from framework.stages.judge import Scored
    from framework.train.meter import Meter
    from framework.train.trainer import accumulate, denominators

    def reward(prompts, completions):
        return Scored(torch.tensor([worth(c.ids) for c in completions], dtype=torch.float64))

    run = compose.compose(arguments)
    prepared = build.prepare(run)
    engine = build.build_engine(prepared, world)
    stage = stages.build_stage(prepared, world, engine, Scripted(end))
    stage.reward = reward
    rate, meter = build.learning_rate(prepared), Meter(world)
    found = {"losses": [], "sizes": [], "norms": [], "moved": []}
    for step in range(trl_recipes.STEPS):
        (term,) = stage.next(step)
        units = denominators(world, [term])[0]
        parts = []

        def objective(engine, batch, term=term, units=units, parts=parts):
            items = term.objective(engine, batch)
            size = (items.weight * items.loss).detach().abs().sum()
            parts.append((items.total().item() / units, size.item() / units))
            return items

        accumulate(engine, [replace(term, objective=objective)], seed=0, step=step, meter=meter)
        found["norms"].append(engine.step(lr=rate(step), max_grad_norm=run.optim.max_grad_norm))
        found["losses"].append(sum(loss for loss, _ in parts))
        found["sizes"].append(sum(size for _, size in parts))
        found["moved"].append(meter.line()["approx_kl"])
    found["prompts"] = [list(p.ids) for p in stage.prompts(0, 2 * PROMPTS)]
    return found


def ours(place, model, end, **changes):
    data = trl_recipes.write(place / "prompts.jsonl", prompts())
    values = trl_recipes.OURS | {
        "stage": "grpo",
        "model.path": model,
        "data.train": f"[{{path: {data}}}]",
        "data.cache_dir": place / "cache",
        "run_dir": place / "run",
        "reward": "verifier",
        "stage.prompts": PROMPTS,
        "stage.epochs": 2,
        "batch.sequences": PROMPTS * SAMPLES,
        "rollout.samples": SAMPLES,
        "rollout.max_new_tokens": LONGEST,
        "rollout.temperature": TEMPERATURE,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    (found,) = workers.run(1, curve, [f"{name}={value}" for name, value in values.items()], end)
    return found


class Trl(trl_recipes.Theirs):
    """A TRL trainer whose answers and rewards are scripted, beside the prompts it was given."""

    def __init__(self, trainer, words, *, tools):
        super().__init__(trainer)
        self.seen = []

        def generate(rows):
            ids = [words(row)["input_ids"] for row in rows]
            self.seen += ids[::SAMPLES]
            said = [answers(p, words.eos_token_id)[i % SAMPLES] for i, p in enumerate(ids)]
            texts = [""] * len(rows)
            return (ids, said, None, texts, None, {}, None, None) if tools else (ids, said, texts)

        def rewards(inputs, prompts, completions, ids):
            return torch.tensor([[worth(answer)] for answer in ids])

        trainer._generate, trainer._calculate_rewards = generate, rewards

    def train(self):
        self.seen.clear()
        self.trainer._step, self.trainer._buffered_inputs = 0, None
        return super().train()


def settings(place, **more):
    return trl_recipes.THEIRS | {
        "output_dir": str(place / "trl"),
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "num_generations": SAMPLES,
        "num_iterations": 2,
        "max_completion_length": LONGEST,
        "temperature": TEMPERATURE,
        "shuffle_dataset": False,
        **more,
    }


def pieces(model):
    from datasets import Dataset

    return {
        "model": trl_recipes.causal(model),
        "reward_funcs": lambda completions, **_: [0.0] * len(completions),
        "train_dataset": Dataset.from_list(prompts()),
        "processing_class": trl_recipes.tokenizer(model),
    }


def agree(found, trained):
    """To 2e-5; where advantages cancel to fp32's rounding, 2e-7 of the mean size of the terms is enough."""
    losses, norms = trained
    assert max(found["moved"][1::2]) > 1e-3
    for ours, theirs, size in zip(found["losses"], losses, found["sizes"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-7 * size)
    assert found["norms"] == pytest.approx(norms, rel=2e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("trl-online")


@pytest.fixture(scope="module")
def grpo(place, tiny_model_dir):
    """TRL's trainer, made once with a reference: its variants differ in attributes only."""
    import trl

    config = trl.GRPOConfig(beta=0.04, **settings(place))
    given = pieces(tiny_model_dir)
    return Trl(trl.GRPOTrainer(args=config, **given), given["processing_class"], tools=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_grpo_and_its_kin(name, grpo, place, tiny_model_dir, monkeypatch):
    attributes, arguments, changes = VARIANTS[name]
    for target, values in ((grpo.trainer, PLAIN | attributes), (grpo.trainer.args, PLAIN_ARGS | arguments)):
        for key, value in values.items():
            assert hasattr(target, key), key
            monkeypatch.setattr(target, key, value)
    end = grpo.trainer.processing_class.eos_token_id
    found = ours(place, tiny_model_dir, end, **changes)
    theirs = grpo.train()
    assert grpo.seen[: 2 * PROMPTS] == found["prompts"]
    agree(found, theirs)


def test_leave_one_out_with_kl_in_the_reward(place, tiny_model_dir):
    import trl

    config = trl.RLOOConfig(beta=0.05, epsilon=0.2, **settings(place))
    given = pieces(tiny_model_dir)
    words = given["processing_class"]
    rloo = Trl(trl.RLOOTrainer(args=config, **given), words, tools=False)
    found = ours(
        place,
        tiny_model_dir,
        words.eos_token_id,
        loss="rloo",
        stage__averaging="sequence",
        stage__advantages="leave_one_out",
        stage__kl_coefficient=0.05,
    )
    agree(found, rloo.train())
    assert rloo.seen[: 2 * PROMPTS] == found["prompts"]
