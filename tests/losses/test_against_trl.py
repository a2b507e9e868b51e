"""Values and gradients against TRL's own loss code, in fp64, without a model.

Its loss methods read a model's answer and their trainer's settings only, so a namespace stands for either.
Exceptions to fp64 are TRL's: where it computes in fp32 the tolerance says so.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from framework.losses.answers import answer_sums, wpo_weights
from framework.losses.aot import aot, aot_unpaired
from framework.losses.apo import apo_down, apo_zero
from framework.losses.bco import bco_pair, nca_pair
from framework.losses.discopop import discopop
from framework.losses.distill import generalised_jsd
from framework.losses.dpo import dpo, dpo_norm, hinge, robust
from framework.losses.exo import exo
from framework.losses.ipo import ipo
from framework.losses.kto import apo_zero_unpaired, kto, kto_baseline
from framework.losses.mixed import mixed
from framework.losses.orpo import orpo
from framework.losses.policy_gradient import cispo, gmpo, gspo, ppo, rloo, sapo
from framework.losses.reward import bradley_terry
from framework.losses.simpo import alphapo, cpo, simpo
from framework.losses.sppo import sppo

LENGTHS = (4, 2, 3, 5, 1, 2)  # tokens of the answers: chosen, rejected, chosen, ...
SEGMENTS = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
PAIRS = torch.ones(3, dtype=torch.float64)
CHOSEN_TOKENS = sum(LENGTHS[0::2]) / 3


def accelerator():
    return SimpleNamespace(
        device="cpu",
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        num_processes=1,
    )


def trainer(**settings):
    """What a loss method reads of its trainer: the settings given, and places for metrics."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


class Tokens:
    """Answers of random log-probabilities, flat as ours and as padded rows of TRL's."""

    def __init__(self, lengths=LENGTHS, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.segments = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
        self.places = torch.tensor([p for n in lengths for p in range(n)])

        def draw(scale=2.0):
            size = sum(lengths)
            return -scale * torch.rand(size, generator=generator, dtype=torch.float64) - 0.05

        self.logps = draw().requires_grad_()
        self.old, self.reference, self.collisions = draw(), draw(), draw(1.0)
        self.mask = self.padded(torch.ones(len(self.segments), dtype=torch.float64))

    def padded(self, flat):
        """[rows, longest + 0] with zeros after the end."""
        table = torch.zeros(len(self.lengths), max(self.lengths), dtype=flat.dtype)
        return table.index_put((self.segments, self.places), flat)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logps, retain_graph=True)[0]

    def agree(self, ours, theirs, tolerance=1e-12):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)
        one, other = self.gradient(ours), self.gradient(theirs)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def answer(log_probs, collisions=None):
    """The model's answer; what only metrics read is 0."""
    zeros = torch.zeros_like(log_probs.detach())
    return SimpleNamespace(
        log_probs=log_probs,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=zeros if collisions is None else collisions,
    )


# --- pairs

BETA = {"beta": 0.3}
DPO = {
    "sigmoid": (dpo, BETA, {}),
    "hinge": (hinge, BETA, {}),
    "ipo": (ipo, {**BETA, "normalisation": "token"}, {}),
    "exo_pair": (exo, {**BETA, "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "nca_pair": (nca_pair, BETA, {}),
    "robust": (robust, {**BETA, "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "bco_pair": (bco_pair, BETA, {}),
    "sppo_hard": (sppo, BETA, {}),
    "apo_zero": (apo_zero, BETA, {}),
    "apo_down": (apo_down, BETA, {}),
    "discopop": (discopop, {**BETA, "tau": 0.05}, {}),
    "sigmoid_norm": (dpo_norm, BETA, {}),
    "forward_kl": (dpo, {**BETA, "divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "js": (dpo, {**BETA, "divergence": "js"}, {"f_divergence_type": "js_divergence"}),
}
IN_FP32 = {"exo_pair"}  # TRL's epsilon


def trl_dpo(tokens, loss_types, **settings):
    """TRL's batch is all chosen answers, then all rejected ones, each after a prompt of one token."""
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = [*range(0, len(LENGTHS), 2), *range(1, len(LENGTHS), 2)]
    mask = torch.nn.functional.pad(tokens.mask[rows], (1, 0)).long()
    policy = answer(tokens.padded(tokens.logps)[rows], tokens.padded(tokens.collisions)[rows])
    reference = answer(tokens.padded(tokens.reference)[rows])
    fake = trainer(
        **{
            "ld_alpha": None,
            "precompute_ref_logps": False,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "beta": 0.3,
            "label_smoothing": 0.0,
            "loss_types": loss_types,
            "loss_weights": [1.0] * len(loss_types),
            "use_weighting": False,
            "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
            "ref_model": lambda **_: reference,
        }
        | settings
    )
    model = Model(policy)
    fake.model = model
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    return DPOTrainer._compute_loss(fake, model, inputs, False)


class Model(torch.nn.Module):
    """Answers with what it was given."""

    is_gradient_checkpointing = False

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, **_):
        return self.result


def pair_answers(tokens, ld_alpha=1.0):
    return (
        answer_sums(tokens.logps, tokens.segments, len(LENGTHS), ld_alpha=ld_alpha),
        answer_sums(tokens.reference, tokens.segments, len(LENGTHS), ld_alpha=ld_alpha),
    )


@pytest.mark.parametrize("name", DPO)
def test_dpo_and_its_kin(name):
    """Where TRL divides by lengths it counts the mask before the causal shift; the prompt has one token."""
    tokens = Tokens()
    loss, settings, theirs = DPO[name]
    loss_type = "sigmoid" if "f_divergence_type" in theirs else name
    ours = loss(*pair_answers(tokens), PAIRS, **settings).total() / 3
    tokens.agree(ours, trl_dpo(tokens, [loss_type], **theirs), 1e-6 if name in IN_FP32 else 1e-12)


def test_weights_of_wpo():
    tokens = Tokens()
    factor = wpo_weights(tokens.logps, tokens.collisions, tokens.segments, len(LENGTHS))
    items = dpo(*pair_answers(tokens), PAIRS, **BETA)
    tokens.agree((items.loss * factor).mean(), trl_dpo(tokens, ["sigmoid"], use_weighting=True))


def test_a_tail_that_counts_for_less():
    tokens = Tokens()
    ours = dpo(*pair_answers(tokens, ld_alpha=0.4), PAIRS, **BETA).total() / 3
    tokens.agree(ours, trl_dpo(tokens, ["sigmoid"], ld_alpha=0.4))


def test_mpo():
    tokens = Tokens()
    policy, reference = pair_answers(tokens)
    ours = mixed(
        policy,
        PAIRS,
        reference,
        tokens_per_pair=CHOSEN_TOKENS,
        losses={"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0},
        keywords={"dpo": BETA, "bco_pair": BETA},
    )
    names = ["sigmoid", "bco_pair", "sft"]
    tokens.agree(ours.total() / 3, trl_dpo(tokens, names, loss_weights=[0.8, 0.2, 1.0]))


def of_rank(ours, theirs):
    matched = torch.empty_like(theirs)
    matched[ours.argsort()] = theirs.sort().values
    return matched.detach()


def test_optimal_transport():
    tokens = Tokens()
    policy, reference = pair_answers(tokens)
    matched = of_rank(policy.chosen - policy.rejected, reference.chosen - reference.rejected)
    settings = {**BETA, "label_smoothing": 0.1}
    paired = aot(policy, reference, PAIRS, matched, **settings).total() / 3
    tokens.agree(paired, trl_dpo(tokens, ["aot"], label_smoothing=0.1))
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    below, above = of_rank(chosen, rejected), of_rank(rejected, chosen)
    unpaired = aot_unpaired(policy, reference, PAIRS, below, above, **settings).total() / 3
    tokens.agree(unpaired, trl_dpo(tokens, ["aot_unpaired"], label_smoothing=0.1))


@pytest.mark.parametrize("loss_type", ["simpo", "alphapo", "sigmoid"])
def test_losses_without_a_reference(loss_type):
    """TRL's gamma is not multiplied by beta, and ours neither: -log s(b d - g)."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    tokens = Tokens()
    policy, _ = pair_answers(tokens)
    chosen, rejected = policy.chosen, policy.rejected
    if loss_type != "sigmoid":
        chosen, rejected = chosen / policy.chosen_tokens, rejected / policy.rejected_tokens
    fake = trainer(
        alpha=0.25 if loss_type == "alphapo" else 0.0,
        loss_type="sigmoid" if loss_type == "sigmoid" else "simpo",
        simpo_gamma=0.5,
        beta=2.0,
        label_smoothing=0.0,
    )
    theirs = CPOTrainer.cpo_loss(fake, chosen, rejected)[0].mean()
    ours = {
        "simpo": lambda: simpo(policy, PAIRS, beta=2.0, gamma=0.5),
        "alphapo": lambda: alphapo(policy, PAIRS, beta=2.0, gamma=0.5, alpha=0.25),
        "sigmoid": lambda: cpo(policy, PAIRS, CHOSEN_TOKENS, beta=2.0, nll=0.0),
    }[loss_type]()
    tokens.agree(ours.total() / 3, theirs)


def test_odds_ratio():
    """TRL computes it in fp32 and subtracts it from the cross-entropy of the chosen answers."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    tokens = Tokens()
    policy, _ = pair_answers(tokens)
    means = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    theirs = ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), *means)[0]
    nll = -policy.chosen.sum() / (3 * CHOSEN_TOKENS)
    ours = orpo(policy, PAIRS, CHOSEN_TOKENS, beta=0.1).total() / 3
    tokens.agree(ours, nll - theirs.double().mean(), 1e-6)


# --- reward model and single answers


def test_reward_model():
    from trl.trainer.reward_trainer import RewardTrainer

    torch.manual_seed(0)
    scores = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    margin = torch.rand(4, dtype=torch.float64)
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=0.05))
    answered = SimpleNamespace(logits=scores.reshape(8, 1))
    inputs = {"attention_mask": torch.ones(8, 3), "margin": margin}
    theirs = RewardTrainer.compute_loss(fake, lambda **_: answered, inputs)
    ours = bradley_terry(scores[0], scores[1], torch.ones(4), margin, centring=0.05).total() / 4
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_single_answers(loss_type):
    from trl.trainer.kto_trainer import KTOTrainer

    tokens, others = Tokens(), Tokens(seed=1)
    labels = torch.tensor([True, False, True, True, False, False])
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.3}
    sums = [answer_sums(x, tokens.segments, len(LENGTHS)) for x in (tokens.logps, tokens.reference)]
    policy, reference = (torch.stack([s.chosen, s.rejected], 1).flatten() for s in sums)
    mismatched = (others.padded(others.logps) - others.padded(others.reference)).sum(1).detach()
    z = torch.tensor(kto_baseline(float(mismatched.sum()), len(LENGTHS)), dtype=torch.float64)
    mask = torch.nn.functional.pad(tokens.mask, (1, 0)).long()
    own = Model(answer(tokens.padded(tokens.logps)))
    fake = trainer(
        beta=0.3,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
        _compute_kl_logps=lambda model, batch: mismatched if loss_type == "kto" else None,
        **weights,
    )
    fake.model = own
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": labels}
    batch |= {"ref_logps": reference.detach(), "ref_KL_logps": torch.zeros(1, dtype=torch.float64)}
    theirs = KTOTrainer._compute_loss(fake, own, batch, False)
    inputs = (policy, reference, labels, torch.ones(len(LENGTHS), dtype=torch.float64))
    if loss_type == "kto":
        ours = kto(*inputs, z, **BETA, **weights)
    else:
        ours = apo_zero_unpaired(*inputs, **BETA, **weights)
    tokens.agree(ours.total() / len(LENGTHS), theirs)


# --- the GRPO family

ROWS = (3, 5, 2, 1)
ADVANTAGES = torch.tensor([0.9, -1.1, 0.4, -0.3], dtype=torch.float64)
BOUNDS = {"clip_low": 0.2, "clip_high": 0.28}


def trl_grpo(tokens, trainer_class, **settings):
    """`settings` go to the trainer's arguments and attributes alike."""
    args = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "steps_per_generation": 1,
    } | settings
    zeros = torch.zeros_like(tokens.mask)
    fake = trainer(
        args=SimpleNamespace(**args),
        _get_per_token_logps_and_entropies=lambda *_, **__: (tokens.padded(tokens.logps), zeros, None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        loss_type=settings.get("loss_type", "grpo"),
        beta=settings.get("beta", 0.0),
        epsilon_low=settings.get("epsilon_low", 0.2),
        epsilon_high=settings.get("epsilon_high", 0.28),
        max_completion_length=7,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
    )
    rows = len(tokens.lengths)
    nothing = torch.zeros(rows, 1, dtype=torch.long)
    old = tokens.padded(tokens.old)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": tokens.mask.long(),
        "completion_mask": tokens.mask.long(),
        "advantages": ADVANTAGES,
        "old_per_token_logps": old,
        "old_logps": old.sum(1),
        "ref_per_token_logps": tokens.padded(tokens.reference),
        "num_items_in_batch": tokens.mask.sum(),
    }
    return trainer_class._compute_loss(fake, None, inputs)


def averaged(loss, tokens, averaging, *more, **settings):
    """Our items with the weights and units that a stage fills in."""
    n = tokens.segments.bincount().double()
    weights = {
        "token": torch.ones(len(tokens.segments), dtype=torch.float64),
        "sequence": 1 / n[tokens.segments],
        "constant": torch.full((len(tokens.segments),), 1 / 7, dtype=torch.float64),
    }
    units = {"token": n.sum(), "sequence": len(n), "constant": len(n)}
    advantages = ADVANTAGES[tokens.segments]
    items = loss(tokens.logps, tokens.old, advantages, weights[averaging], *more, **settings)
    return items.total() / units[averaging]


@pytest.mark.parametrize(
    ("loss", "averaging", "ours", "theirs"),
    [
        (ppo, "sequence", BOUNDS, {"loss_type": "grpo"}),
        (ppo, "token", BOUNDS, {"loss_type": "dapo"}),
        (ppo, "constant", BOUNDS, {"loss_type": "dr_grpo"}),
        (ppo, "token", {**BOUNDS, "dual_clip": 1.5}, {"loss_type": "dapo", "delta": 1.5}),
        (cispo, "token", {"ratio_low": 0.0, "ratio_high": 1.5}, {"loss_type": "cispo", "epsilon_high": 1.5}),
        (sapo, "sequence", {"tau_positive": 1.0, "tau_negative": 1.05}, {"loss_type": "sapo"}),
    ],
    ids=["grpo", "dapo", "dr_grpo", "two-sided", "cispo", "sapo"],
)
def test_token_losses(loss, averaging, ours, theirs):
    from trl import GRPOTrainer

    tokens = Tokens(ROWS)
    tolerance = 1e-6 if loss is sapo else 1e-12  # TRL's temperatures are fp32
    tokens.agree(
        averaged(loss, tokens, averaging, **ours), trl_grpo(tokens, GRPOTrainer, **theirs), tolerance
    )


@pytest.mark.parametrize("importance", [False, True])
def test_kl_in_the_loss(importance):
    from trl import GRPOTrainer

    tokens = Tokens(ROWS)
    settings = {"kl": 0.04, "kl_importance": importance, "reference_logps": tokens.reference}
    ours = averaged(ppo, tokens, "sequence", **BOUNDS, **settings)
    theirs = trl_grpo(tokens, GRPOTrainer, loss_type="grpo", beta=0.04, use_bias_correction_kl=importance)
    tokens.agree(ours, theirs)


def test_sequence_losses():
    from trl import GRPOTrainer, RLOOTrainer
    from trl.experimental.gmpo import GMPOTrainer

    tokens = Tokens(ROWS)
    given = (tokens, "sequence", tokens.segments)
    ours = averaged(gspo, *given, **BOUNDS)
    tokens.agree(ours, trl_grpo(tokens, GRPOTrainer, importance_sampling_level="sequence"))
    tokens.agree(averaged(rloo, *given, **BOUNDS), trl_grpo(tokens, RLOOTrainer))
    tokens.agree(averaged(gmpo, *given, **BOUNDS), trl_grpo(tokens, GMPOTrainer))


# --- distillation


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation(beta):
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(0)
    student = torch.randn(1, 5, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 5, 11, dtype=torch.float64)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, num_items_in_batch=5)
    rows = student[0].log_softmax(-1), teacher[0].log_softmax(-1)
    ours = generalised_jsd(*rows, torch.ones(5, dtype=torch.float64), beta=beta).total() / 5
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)
