"""The losses of TRL's DPO, KTO, CPO and ORPO trainers, step by step, through the composed configuration.

Model, rows and order are the same and tokens are compared first. Losses and norms of the gradient agree
to 2e-5, five steps long, so the updates are tested too.
"""

import pytest
import torch
import trl_recipes

pytest.importorskip("trl")

# name -> (TRL's loss types and settings, our overrides)
BETA = {"loss__beta": trl_recipes.BETA}
VARIANTS = {
    "sigmoid": (["sigmoid"], {}, {"loss": "dpo", **BETA}),
    "hinge": (["hinge"], {}, {"loss": "hinge", **BETA}),
    "ipo": (["ipo"], {}, {"loss": "ipo", **BETA, "loss__normalisation": "token"}),
    "exo": (["exo_pair"], {"label_smoothing": 0.1}, {"loss": "exo", **BETA, "loss__label_smoothing": 0.1}),
    "nca": (["nca_pair"], {}, {"loss": "nca", **BETA}),
    "robust": (
        ["robust"],
        {"label_smoothing": 0.1},
        {"loss": "robust", **BETA, "loss__label_smoothing": 0.1},
    ),
    "bco_pair": (["bco_pair"], {}, {"loss": "bco_pair", **BETA}),
    "sppo": (["sppo_hard"], {}, {"loss": "sppo", **BETA}),
    "aot": (["aot"], {"label_smoothing": 0.1}, {"loss": "aot", **BETA, "loss__label_smoothing": 0.1}),
    "aot_unpaired": (
        ["aot_unpaired"],
        {"label_smoothing": 0.1},
        {"loss": "aot_unpaired", **BETA, "loss__label_smoothing": 0.1},
    ),
    "apo_zero": (["apo_zero"], {}, {"loss": "apo_zero", **BETA}),
    "apo_down": (["apo_down"], {}, {"loss": "apo_down", **BETA}),
    "discopop": (["discopop"], {}, {"loss": "discopop", **BETA, "loss__tau": 0.05}),
    "dpo_norm": (["sigmoid_norm"], {}, {"loss": "dpo_norm", **BETA}),
    "forward_kl": (
        ["sigmoid"],
        {"f_divergence_type": "forward_kl"},
        {"loss": "fdpo", **BETA, "loss__divergence": "forward_kl"},
    ),
    "js": (
        ["sigmoid"],
        {"f_divergence_type": "js_divergence"},
        {"loss": "fdpo", **BETA, "loss__divergence": "js"},
    ),
    "alpha": (
        ["sigmoid"],
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"loss": "fdpo", **BETA, "loss__divergence": "alpha", "loss__alpha": 0.5},
    ),
    "ld": (["sigmoid"], {"ld_alpha": 0.4}, {"loss": "dpo", **BETA, "stage__ld_alpha": 0.4}),
    "wpo": (["sigmoid"], {"use_weighting": True}, {"loss": "dpo", **BETA, "stage__wpo": "true"}),
    "mpo": (
        ["sigmoid", "bco_pair", "sft"],
        {"loss_weights": [0.8, 0.2, 1.0]},
        {"loss": "mpo", "loss__keywords__dpo__beta": 0.3, "loss__keywords__bco_pair__beta": 0.3},
    ),
}
PLAIN = {
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "loss_weights": None,
}


def agree(found, theirs):
    losses, norms = theirs
    assert found["losses"] == pytest.approx(losses, rel=2e-5)
    assert found["norms"] == pytest.approx(norms, rel=2e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("trl-preference")


@pytest.fixture(scope="module")
def dpo(place, tiny_model_dir):
    """TRL's trainer, made once: its variants differ in attributes only."""
    import trl
    from datasets import Dataset

    config = trl.DPOConfig(
        output_dir=str(place / "dpo"),
        beta=trl_recipes.BETA,
        use_weighting=True,  # else the model is patched not to say what WPO asks for
        max_length=None,
        train_sampling_strategy="sequential",
        **trl_recipes.THEIRS,
    )
    return trl_recipes.Theirs(
        trl.DPOTrainer(
            model=trl_recipes.causal(tiny_model_dir),
            ref_model=trl_recipes.causal(tiny_model_dir),
            args=config,
            train_dataset=Dataset.from_list(trl_recipes.pairs()),
            processing_class=trl_recipes.tokenizer(tiny_model_dir),
        )
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_dpo_and_its_kin(name, dpo, place, tiny_model_dir, monkeypatch):
    """TRL sorts (aot) and averages (sft in mpo) per micro-batch, which is the whole step here."""
    loss_types, settings, changes = VARIANTS[name]
    settings = PLAIN | settings
    settings["loss_weights"] = settings["loss_weights"] or [1.0] * len(loss_types)
    for key, value in (settings | {"loss_types": loss_types}).items():
        assert hasattr(dpo.trainer, key)
        monkeypatch.setattr(dpo.trainer, key, value)
    data = trl_recipes.write(place / "pairs.jsonl", trl_recipes.pairs())
    found = trl_recipes.ours(tiny_model_dir, data, stage="preference", **changes)
    rows = dpo.trainer.train_dataset
    assert found["tokens"] == [[r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]] for r in rows]
    losses, norms = dpo.train()
    assert max(abs(loss / losses[0] - 1) for loss in losses[1:]) > 0.01
    agree(found, (losses, norms))


def test_what_is_compared_would_notice_another_beta(dpo, place, tiny_model_dir):
    """Guards the guard: a tenth of a per cent of beta is far outside of the tolerance."""
    data = trl_recipes.write(place / "pairs.jsonl", trl_recipes.pairs())
    found = trl_recipes.ours(tiny_model_dir, data, stage="preference", loss__beta=0.3003)
    assert found["losses"][1:] != pytest.approx(dpo.train()[0][1:], rel=1e-4)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_single_answers(name, place, tiny_model_dir):
    """KTO's baseline: TRL pairs a prompt with the answer before, we with the one after, so each step's rows
    are handed to TRL from the last to the first."""
    import trl
    from datasets import Dataset

    rows = [
        {"prompt": r["prompt"], "completion": r["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, r in enumerate(trl_recipes.pairs())
    ]
    config = trl.KTOConfig(
        output_dir=str(place / name),
        beta=trl_recipes.BETA,
        loss_type=name,
        max_length=None,
        desirable_weight=1.0,
        undesirable_weight=1.3,
        **trl_recipes.THEIRS,
    )
    size = trl_recipes.ROWS
    backwards = [row for i in range(0, len(rows), size) for row in rows[i : i + size][::-1]]
    theirs = trl_recipes.Theirs(
        trl.KTOTrainer(
            model=trl_recipes.causal(tiny_model_dir),
            ref_model=trl_recipes.causal(tiny_model_dir),
            args=config,
            train_dataset=Dataset.from_list(backwards),
            processing_class=trl_recipes.tokenizer(tiny_model_dir),
        )
    )
    data = trl_recipes.write(place / f"{name}.jsonl", rows)
    changes = {"loss": name, **BETA, "loss__undesirable_weight": 1.3}
    found = trl_recipes.ours(tiny_model_dir, data, stage="preference", **changes)
    seen = {(*r["prompt_ids"], *r["completion_ids"]) for r in theirs.trainer.train_dataset}
    assert {(*prompt, *answer) for prompt, answer in found["tokens"]} == seen
    agree(found, theirs.train())


ALONE = {
    "simpo": (
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0},
        {"loss": "simpo", "loss__beta": 2.0, "loss__gamma": 0.5},
    ),
    "alphapo": (
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0, "alpha": 0.25},
        {"loss": "alphapo", "loss__beta": 2.0, "loss__gamma": 0.5, "loss__alpha": 0.25},
    ),
    "cpo": (
        {"loss_type": "sigmoid", "cpo_alpha": 0.7, "beta": 0.3},
        {"loss": "cpo", "loss__beta": 0.3, "loss__nll": 0.7},
    ),
    "orpo": ({"beta": 0.3}, {"loss": "orpo", "loss__beta": 0.3}),
}


@pytest.mark.parametrize("name", ALONE)
def test_losses_without_a_reference(name, place, tiny_model_dir, monkeypatch):
    """ORPO's cross-entropy is over prompt and answer in TRL and over the answer in ours: its prompts are one
    token long, which nothing predicts."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    if name == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

    settings, changes = ALONE[name]
    rows = trl_recipes.pairs(bare_prompts=name == "orpo")
    theirs = trl_recipes.Theirs(
        Trainer(
            model=trl_recipes.causal(tiny_model_dir),
            args=Config(output_dir=str(place / name), max_length=256, **trl_recipes.THEIRS, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=trl_recipes.tokenizer(tiny_model_dir),
        )
    )
    sampler = SequentialSampler(theirs.trainer.train_dataset)
    monkeypatch.setattr(theirs.trainer, "_get_train_sampler", lambda *_: sampler)
    data = trl_recipes.write(place / f"{name}.jsonl", rows)
    found = trl_recipes.ours(tiny_model_dir, data, stage="preference", **changes)
    seen = [[r["chosen_input_ids"], r["rejected_input_ids"]] for r in theirs.trainer.train_dataset]
    assert [[prompt + one, prompt + other] for prompt, one, other in found["tokens"]] == seen
    agree(found, theirs.train())


def test_reward_model(place, tiny_model_dir, tmp_path):
    """A margin in every row, and centring; the head is in the model's directory."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_dir, num_labels=1, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "model")
    words = trl_recipes.tokenizer(tiny_model_dir)
    words.save_pretrained(tmp_path / "model")
    rows = [row | {"margin": 0.1 * (i % 3)} for i, row in enumerate(trl_recipes.pairs())]
    config = trl.RewardConfig(
        output_dir=str(tmp_path / "out"),
        max_length=None,
        center_rewards_coefficient=0.05,
        train_sampling_strategy="sequential",
        **trl_recipes.THEIRS,
    )
    theirs = trl_recipes.Theirs(
        trl.RewardTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=words
        )
    )
    data = trl_recipes.write(tmp_path / "pairs.jsonl", rows)
    found = trl_recipes.ours(tmp_path / "model", data, stage="reward", loss__centring=0.05)
    seen = [[r["chosen_ids"], r["rejected_ids"]] for r in theirs.trainer.train_dataset]
    assert [[prompt + one, prompt + other] for prompt, one, other in found["tokens"]] == seen
    agree(found, theirs.train())
