"""Every number of `losses.json`, in fp64 to 1e-12 and in fp32 to 1e-6, values and gradients.

The file says how each number comes about; the cases were compared with public code where there is some. A
number without a line here fails, so nothing in the file goes untested.
"""

import json
from pathlib import Path

import pytest
import torch

from framework.losses import advantages as adv
from framework.losses.answers import Answers, answer_sums, wpo_weights
from framework.losses.aot import aot, aot_unpaired
from framework.losses.apo import apo_down, apo_zero
from framework.losses.bco import bco, bco_baseline, bco_pair, nca_pair
from framework.losses.discopop import discopop
from framework.losses.dpo import dpo, dpo_norm, hinge, robust
from framework.losses.exo import exo
from framework.losses.ipo import ipo
from framework.losses.items import Items
from framework.losses.kl import adaptive_kl, k1, k2, k3
from framework.losses.kto import apo_zero_unpaired, kto, kto_baseline
from framework.losses.logprobs import token_logps
from framework.losses.mixed import mixed
from framework.losses.policy_gradient import cispo, gmpo, gspo, ppo, sapo
from framework.losses.reward import bradley_terry
from framework.losses.sft import chosen_sft, dft, sft
from framework.losses.sppo import sppo
from framework.losses.value import value_loss
from framework.rollout.experience import Shaping, token_rewards
from framework.rollout.rewards import overlong

CASES = {
    case["name"]: case for case in json.loads((Path(__file__).parent / "losses.json").read_text())["cases"]
}
CHECKS = {}


def check(case, *keys):
    """The function below gives what the file calls `keys` of `case`: one value, or one for each key."""

    def register(function):
        for key in keys:
            CHECKS[case, key] = (function, key if len(keys) > 1 else None)
        return function

    return register


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("case", "key"), [(name, key) for name in CASES for key in CASES[name]["expected"]])
def test_number(case, key, dtype):
    assert (case, key) in CHECKS, "no code of ours is held against this number"
    function, pick = CHECKS[case, key]
    found = function(CASES[case]["inputs"], Tensors(dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    compare(found[pick] if pick else found, CASES[case]["expected"][key], tolerance)


def compare(found, expected, tolerance):
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            compare(found[key], expected[key], tolerance)
    elif isinstance(expected, list) and isinstance(expected[0], list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compare(one, other, tolerance)
    else:
        found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Tensors:
    """Makes the tensors of one precision."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, values, *, grad=False):
        return torch.tensor(values, dtype=self.dtype, requires_grad=grad)

    def flat(self, rows, *, grad=False):
        """Rows of unequal length end to end, and the row of each entry."""
        segments = torch.tensor([i for i, row in enumerate(rows) for _ in row])
        return self([value for row in rows for value in row], grad=grad), segments


def ones(like):
    return torch.ones_like(like, requires_grad=False)


def mean(items):
    assert isinstance(items, Items)
    return items.total() / (items.weight > 0).sum()


def rows(flat, like):
    """Cut a flat tensor into rows as long as those of `like`."""
    return [part.tolist() for part in flat.split([len(row) for row in like])]


# --- supervised fine-tuning


@check(
    "sft_normalisation",
    "global_token_mean",
    "mean_of_microbatch_means",
    "mean_of_rank_means",
    "backward_loss_per_microbatch",
    "sum_over_microbatches_mean_over_ranks",
)
def _sft(given, tensor):
    """The two means of means are what the same items give when they are averaged wrongly."""
    ranks = given["per_token_nll"]
    parts = {rank: [sft(-tensor(m), ones(tensor(m))) for m in micros] for rank, micros in ranks.items()}
    items = [item for part in parts.values() for item in part]
    units = sum(float(item.weight.sum()) for item in items)
    world = given["world_size"]
    shares = {rank: [float(i.total()) * world / units for i in part] for rank, part in parts.items()}
    of_ranks = [
        sum(float(i.total()) for i in part) / sum(float(i.weight.sum()) for i in part)
        for part in parts.values()
    ]
    return {
        "global_token_mean": sum(float(item.total()) for item in items) / units,
        "mean_of_microbatch_means": sum(float(mean(item)) for item in items) / len(items),
        "mean_of_rank_means": sum(of_ranks) / world,
        "backward_loss_per_microbatch": shares,
        "sum_over_microbatches_mean_over_ranks": sum(map(sum, shares.values())) / world,
    }


@check("sft_normalisation", "label_smoothed_loss", "plain_nll")
def _smoothed(given, tensor):
    """The identity as weight makes the rows of `hidden` the logits."""
    case = given["label_smoothing"]
    logits = tensor(case["logits"])
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    answer = token_logps(logits, eye, torch.tensor(case["targets"]), means=True)
    smooth = sft(answer[0], ones(answer[0]), answer[2], label_smoothing=case["eps"])
    return {"label_smoothed_loss": mean(smooth), "plain_nll": smooth.metrics["nll"].mean()}


@check("sft_normalisation", "dft_loss", "dft_grad_wrt_each_logprob")
def _dft(given, tensor):
    logps = tensor(given["dft"]["token_logprobs"], grad=True)
    loss = mean(dft(logps, ones(logps)))
    (grad,) = torch.autograd.grad(loss, logps)
    return {"dft_loss": loss.detach(), "dft_grad_wrt_each_logprob": grad}


# --- reward model


@check(
    "reward_model",
    "bt_per_pair",
    "bt",
    "bt_margin",
    "centering_mean",
    "bt_margin_plus_centering",
    "accuracy",
    "grad_chosen_bt",
    "grad_chosen_full",
)
def _reward(given, tensor):
    chosen, rejected = tensor(given["chosen"], grad=True), tensor(given["rejected"])
    margin, weight = tensor(given["margin"]), ones(chosen)
    plain = bradley_terry(chosen, rejected, weight)
    with_margin = bradley_terry(chosen, rejected, weight, margin)
    full = bradley_terry(chosen, rejected, weight, margin, centring=given["center_coefficient"])
    centring = bradley_terry(chosen, rejected, weight, centring=1.0).loss - plain.loss
    return {
        "bt_per_pair": plain.loss.detach(),
        "bt": mean(plain).detach(),
        "bt_margin": mean(with_margin).detach(),
        "centering_mean": centring.mean().detach(),
        "bt_margin_plus_centering": mean(full).detach(),
        "accuracy": plain.metrics["rewards/accuracy"].mean(),
        "grad_chosen_bt": torch.autograd.grad(mean(plain), chosen)[0],
        "grad_chosen_full": torch.autograd.grad(mean(full), chosen)[0],
    }


# --- the DPO family


class Pairs:
    """The case as policy and reference answers, chosen and rejected interleaved as in a batch."""

    def __init__(self, given, tensor, *, ld_alpha=1.0):
        both = zip(given["policy_token_logps_chosen"], given["policy_token_logps_rejected"], strict=True)
        answers = [answer for pair in both for answer in pair]
        self.logps, self.segments = tensor.flat(answers, grad=True)
        self.policy = answer_sums(self.logps, self.segments, 4, ld_alpha=ld_alpha)
        sums = zip(given["ref_logps_chosen"], given["ref_logps_rejected"], strict=True)
        totals = [total for pair in sums for total in pair]
        spread = [[total / len(answer)] * len(answer) for total, answer in zip(totals, answers, strict=True)]
        self.reference = answer_sums(tensor.flat(spread)[0], self.segments, 4, ld_alpha=ld_alpha)
        collisions = zip(given["log_sum_sq_probs_chosen"], given["log_sum_sq_probs_rejected"], strict=True)
        self.collisions = tensor.flat([answer for pair in collisions for answer in pair])[0]
        self.weight = ones(self.policy.chosen)
        self.tokens_per_pair = float(self.policy.chosen_tokens.mean())

    def __call__(self, loss, **settings):
        return loss(self.policy, self.reference, self.weight, **settings)


def _pair_loss(key, loss, *names, **more):
    """`key` is the mean of `loss` with the settings `names` of the case and `more`."""

    @check("dpo_family", key)
    def _found(given, tensor):
        return mean(Pairs(given, tensor)(loss, **{name: given[name] for name in names}, **more)).detach()


_pair_loss("sigmoid", dpo, "beta")
_pair_loss("cdpo_label_smoothing", dpo, "beta", "label_smoothing")
_pair_loss("robust", robust, "beta", "label_smoothing")
_pair_loss("hinge", hinge, "beta")
_pair_loss("ipo_length_normalised", ipo, "beta", normalisation="token")
_pair_loss("ipo_paper_sum", ipo, "beta", normalisation="sum")
_pair_loss("sigmoid_norm", dpo_norm, "beta")
_pair_loss("exo_pair", exo, "beta", "label_smoothing")
_pair_loss("nca_pair", nca_pair, "beta")
_pair_loss("bco_pair_no_shift", bco_pair, "beta")
_pair_loss("sppo_hard", sppo, "beta")
_pair_loss("apo_zero", apo_zero, "beta")
_pair_loss("apo_down", apo_down, "beta")
_pair_loss("discopop", discopop, "beta", tau=CASES["dpo_family"]["inputs"]["discopop_tau"])
_pair_loss("f_forward_kl", dpo, "beta", divergence="forward_kl")
_pair_loss("f_js", dpo, "beta", divergence="js")
_pair_loss("f_alpha_0.5", dpo, "beta", divergence="alpha", alpha=0.5)


@check("dpo_family", "sft_chosen_token_mean")
def _chosen(given, tensor):
    pairs = Pairs(given, tensor)
    return mean(chosen_sft(pairs.policy, pairs.weight, pairs.tokens_per_pair)).detach()


@check("dpo_family", "mpo_0.8sigmoid_0.2bco_1.0sft")
def _mpo(given, tensor):
    pairs = Pairs(given, tensor)
    settings = {"beta": given["beta"]}
    items = mixed(
        pairs.policy,
        pairs.weight,
        pairs.reference,
        tokens_per_pair=pairs.tokens_per_pair,
        losses={"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0},
        keywords={"dpo": settings, "bco_pair": settings},
    )
    return mean(items).detach()


def same_rank(ours, theirs):
    """For each of `ours` the one of `theirs` of its rank, as a stage finds it over the world."""
    matched = torch.empty_like(theirs)
    matched[ours.argsort()] = theirs.sort().values
    return matched.detach()


@check("dpo_family", "aot_pair", "aot_unpaired")
def _aot(given, tensor):
    pairs = Pairs(given, tensor)
    policy, reference = pairs.policy, pairs.reference
    settings = {"beta": given["beta"], "label_smoothing": given["label_smoothing"]}
    matched = same_rank(policy.chosen - policy.rejected, reference.chosen - reference.rejected)
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    below, above = same_rank(chosen, rejected), same_rank(rejected, chosen)
    both = aot_unpaired(policy, reference, pairs.weight, below, above, **settings)
    return {
        "aot_pair": mean(aot(policy, reference, pairs.weight, matched, **settings)).detach(),
        "aot_unpaired": mean(both).detach(),
    }


@check("dpo_family", "wpo_sigmoid")
def _wpo(given, tensor):
    pairs = Pairs(given, tensor)
    factor = wpo_weights(pairs.logps, pairs.collisions, pairs.segments, 4)
    return (pairs(dpo, beta=given["beta"]).loss * factor).mean().detach()


@check("dpo_family", "ld_dpo_sigmoid")
def _ld(given, tensor):
    return mean(Pairs(given, tensor, ld_alpha=given["ld_alpha"])(dpo, beta=given["beta"])).detach()


@check("dpo_family", "grad_sigmoid_wrt_chosen_logp", "grad_ipo_norm_wrt_chosen_logp", "reward_margin_mean")
def _pair_gradients(given, tensor):
    pairs, beta = Pairs(given, tensor), given["beta"]
    sigmoid = pairs(dpo, beta=beta)
    normalised = pairs(ipo, beta=beta, normalisation="token")
    chosen = pairs.policy.chosen
    return {
        "grad_sigmoid_wrt_chosen_logp": torch.autograd.grad(mean(sigmoid), chosen, retain_graph=True)[0],
        "grad_ipo_norm_wrt_chosen_logp": torch.autograd.grad(mean(normalised), chosen)[0],
        "reward_margin_mean": sigmoid.metrics["rewards/margin"].mean(),
    }


# --- unpaired


@check(
    "kto_bco",
    "z_ref",
    "z_ref_if_negative",
    "kto_per_sample",
    "kto",
    "kto_loss_is_mean_over_all_samples",
    "apo_zero_unpaired",
    "bco_delta_first_batch",
    "bco_per_sample",
    "bco",
    "grad_kto_wrt_logratio",
)
def _unpaired(given, tensor):
    policy = tensor(given["log_ratio"], grad=True)
    reference, weight, desirable = torch.zeros_like(policy), ones(policy), torch.tensor(given["label"])
    mismatched = given["kl_log_ratio"]
    z = kto_baseline(sum(mismatched), len(mismatched))
    weights = {f"{k}_weight": given[f"{k}_weight"] for k in ("desirable", "undesirable")}
    beta = given["beta"]
    of_kto = kto(policy, reference, desirable, weight, tensor(z), beta=beta, **weights)
    of_apo = apo_zero_unpaired(policy, reference, desirable, weight, beta=beta, **weights)
    rewards = [beta * r for r in given["log_ratio"]]
    delta, _ = bco_baseline(0.0, 0.0, sum(rewards), len(rewards))
    of_bco = bco(policy, reference, desirable, weight, tensor(delta), beta=beta)
    return {
        "z_ref": z,
        "z_ref_if_negative": kto_baseline(-sum(mismatched), len(mismatched)),
        "kto_per_sample": of_kto.loss.detach(),
        "kto": mean(of_kto).detach(),
        "kto_loss_is_mean_over_all_samples": len(of_kto.weight) == len(rewards),
        "apo_zero_unpaired": mean(of_apo).detach(),
        "bco_delta_first_batch": delta,
        "bco_per_sample": of_bco.loss.detach(),
        "bco": mean(of_bco).detach(),
        "grad_kto_wrt_logratio": torch.autograd.grad(mean(of_kto), policy)[0],
    }


# --- KL and token rewards


@check("kl_token_rewards_controller", "k1", "k2", "k3")
def _estimates(given, tensor):
    logps, reference = tensor(given["logp"]), tensor(given["ref_logp"])
    mask = tensor(given["mask"])
    return {name.__name__: (name(logps, reference) * mask).tolist() for name in (k1, k2, k3)}


@check(
    "kl_token_rewards_controller",
    "k1_token_mean",
    "k2_token_mean",
    "k3_token_mean",
    "k1_sum_per_sequence",
)
def _means_of_estimates(given, tensor):
    logps, reference = tensor(given["logp"]), tensor(given["ref_logp"])
    mask = tensor(given["mask"])
    found = {
        f"{name.__name__}_token_mean": (name(logps, reference) * mask).sum() / mask.sum()
        for name in (k1, k2, k3)
    }
    return found | {"k1_sum_per_sequence": (k1(logps, reference) * mask).sum(1)}


@check("kl_token_rewards_controller", "loss_gradient_wrt_logp")
def _slopes(given, tensor):
    reference, mask = tensor(given["ref_logp"]), tensor(given["mask"])
    found = {}
    for name in (k1, k2, k3):
        logps = tensor(given["logp"], grad=True)
        (name(logps, reference) * mask).sum().backward()
        found[name.__name__] = logps.grad.tolist()
    return found


@check("kl_token_rewards_controller", "shaped_score", "token_rewards_reward_at_last_token")
def _rewards(given, tensor):
    """Tokens lie end to end, so masked ones, which are rewarded with -0 in the file, are not there."""
    shaping = Shaping(missing_eos_penalty=given["missing_eos_penalty"], clip=given["score_clip"][1])
    scores = shaping(tensor(given["score"]), torch.tensor(given["has_eos"]), None)
    mask = torch.tensor(given["mask"], dtype=torch.bool)
    estimate = k1(tensor(given["logp"]), tensor(given["ref_logp"]))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    table = torch.zeros(mask.shape, dtype=torch.float64)
    table[mask] = token_rewards(scores.double(), offsets, given["kl_coef"] * estimate[mask].double())
    return {"shaped_score": scores, "token_rewards_reward_at_last_token": table.tolist()}


@check("kl_token_rewards_controller", "controller_next_coef")
def _controller(given, tensor):
    settings = given["controller"]
    bounds = {"target": settings["target"], "horizon": settings["horizon"], "samples": settings["n_steps"]}
    return [adaptive_kl(settings["init"], seen, **bounds) for seen in settings["observed"]]


# --- advantages with a critic


def _gae(gamma, lambda_):
    @check("gae", f"gamma={gamma},lambda={lambda_}")
    def _found(given, tensor):
        """The population's variance, which OpenRLHF takes, is (n - 1) / n of the other one."""
        rewards, segments = tensor.flat(given["rewards"])
        values, _ = tensor.flat(given["values"])
        mask = torch.tensor([bool(m) for row in given["mask"] for m in row])
        found, returns = adv.gae(rewards, values, segments, mask, gamma=gamma, lambda_=lambda_)
        n = int(mask.sum())
        like = given["rewards"]
        return {
            "advantages": rows(found, like),
            "returns": rows(torch.where(mask, returns, 0.0), like),
            "whitened_unbiased_eps1e8": rows(adv.whiten(found, mask), like),
            "whitened_population_clamp1e8": rows(
                adv.whiten(found, mask, eps=0.0) * (n / (n - 1)) ** 0.5, like
            ),
            "whitened_unbiased_keep_mean": rows(adv.whiten(found, mask, keep_mean=True), like),
        }


_gae(1.0, 0.95)
_gae(0.99, 0.9)
_gae(1.0, 1.0)


# --- PPO


@check(
    "ppo_losses",
    "ratio",
    "policy_per_token",
    "policy_token_mean",
    "policy_seq_mean",
    "policy_dual_clip_token_mean",
    "clip_fraction",
    "grad_token_mean_wrt_new_logp",
    "approx_kl_k2",
    "value_per_token",
    "value_token_mean",
    "value_unclipped_token_mean",
    "total_pg_plus_vf",
)
def _ppo(given, tensor):
    like = given["new_logp"]
    logps, segments = tensor.flat(like, grad=True)
    old, advantages = tensor.flat(given["old_logp"])[0], tensor.flat(given["advantages"])[0]
    bounds = {"clip_low": given["clip_low"], "clip_high": given["clip_high"]}
    policy = ppo(logps, old, advantages, ones(logps), **bounds)
    dual = ppo(logps, old, advantages, ones(logps), dual_clip=given["dual_clip"], **bounds)
    per_sequence = ppo(logps, old, advantages, _sequence_weights(segments, tensor), **bounds)
    critic = [tensor.flat(given[name])[0] for name in ("new_values", "old_values", "returns")]
    value = value_loss(*critic, ones(logps), clip=given["value_clip"])
    unclipped = value_loss(*critic, ones(logps), clip=None)
    metrics = policy.metrics
    return {
        "ratio": rows(metrics["ratio"], like),
        "policy_per_token": rows(policy.loss.detach(), like),
        "policy_token_mean": mean(policy).detach(),
        "policy_seq_mean": per_sequence.total().detach() / len(like),
        "policy_dual_clip_token_mean": mean(dual).detach(),
        "clip_fraction": (metrics["clip/low"] + metrics["clip/high"]).mean(),
        "grad_token_mean_wrt_new_logp": rows(torch.autograd.grad(mean(policy), logps)[0], like),
        "approx_kl_k2": metrics["approx_kl"].mean(),
        "value_per_token": rows(value.loss, like),
        "value_token_mean": mean(value),
        "value_unclipped_token_mean": mean(unclipped),
        "total_pg_plus_vf": (mean(policy) + given["vf_coef"] * mean(value)).detach(),
    }


def _sequence_weights(segments, tensor):
    """1 / n_i at each token of a sequence of n_i: what a stage fills in for a mean over sequences."""
    return tensor([1 / n for n in segments.bincount()[segments].tolist()])


# --- advantages of groups


@check(
    "group_advantages",
    "group_mean",
    "group_std_unbiased",
    "grpo_trl_eps1e4",
    "grpo_verl_eps1e6",
    "grpo_openrlhf_eps1e9",
    "dr_grpo",
    "batch_std_trl",
    "rloo",
    "opo_length_weighted",
    "passk_first_and_third_group",
    "dynamic_sampling_keep_group",
)
def _groups(given, tensor):
    """Mean and std are read off what is subtracted and divided by; eps differs between frameworks."""
    table = given["rewards"]
    rewards, groups = tensor.flat(table)
    lengths = torch.tensor([n for row in given["lengths"] for n in row])
    centred = adv.group_centred(rewards, groups)
    exact = adv.group_normalised(rewards, groups, eps=0.0)
    first = torch.arange(3) * 4
    informative = exact.view(3, 4).abs().sum(1) > 0
    return {
        "group_mean": (rewards - centred)[first],
        "group_std_unbiased": torch.where(informative, (centred / exact).view(3, 4)[:, 0], 0.0),
        "grpo_trl_eps1e4": rows(adv.group_normalised(rewards, groups, eps=1e-4), table),
        "grpo_verl_eps1e6": rows(adv.group_normalised(rewards, groups, eps=1e-6), table),
        "grpo_openrlhf_eps1e9": rows(adv.group_normalised(rewards, groups, eps=1e-9), table),
        "dr_grpo": rows(centred, table),
        "batch_std_trl": rows(adv.batch_scaled(rewards, groups), table),
        "rloo": rows(adv.leave_one_out(rewards, groups), table),
        "opo_length_weighted": rows(adv.length_weighted(rewards, groups, lengths), table),
        "passk_first_and_third_group": rows(adv.best_of_group(rewards, groups, eps=PASS_AT_K_EPS), table)[
            ::2
        ],
        "dynamic_sampling_keep_group": informative,
    }


PASS_AT_K_EPS = 1e-6


@check(
    "group_advantages",
    "reinforce_pp_token_whitened",
    "reinforce_pp_baseline_token_whitened",
    "reinforce_pp_baseline_openrlhf",
)
def _reinforce_pp(given, tensor):
    """The reward at the last token is every token's return; one number per answer is in the file."""
    rewards, groups = tensor.flat(given["rewards"])
    lengths = torch.tensor([n for row in given["lengths"] for n in row])
    segments = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    last = lengths.cumsum(0) - 1
    everything = torch.ones(len(segments), dtype=torch.bool)

    def whitened(scores, **settings):
        at_last = torch.zeros(len(segments), dtype=scores.dtype)
        at_last[last] = scores
        return adv.whiten(adv.returns_to_go(at_last, segments), everything, **settings)[last]

    n = len(segments)
    centred = adv.group_centred(rewards, groups)
    return {
        "reinforce_pp_token_whitened": whitened(rewards),
        "reinforce_pp_baseline_token_whitened": whitened(centred),
        "reinforce_pp_baseline_openrlhf": whitened(centred, eps=0.0) * (n / (n - 1)) ** 0.5,
    }


@check("group_advantages", "gdpo_first_group")
def _gdpo(given, tensor):
    rewards = tensor(given["gdpo_rewards_one_group"]).t()
    return adv.gdpo(rewards, torch.zeros(4, dtype=torch.int64), torch.ones(2))


@check("group_advantages", "remax_example")
def _remax(given, tensor):
    """Left out of a group of two, the other one is the baseline: here the greedy answer's reward."""
    greedy = CASES["group_advantages"]["expected"]["remax_example"]["greedy_reward"]
    pairs, groups = tensor.flat([[reward, greedy] for reward in given["rewards"][0]])
    return {
        "greedy_reward": greedy,
        "advantages_group0": adv.leave_one_out(pairs, groups)[::2],
    }


# --- the GRPO family


class Rollout:
    """The case as flat tokens, with each sequence's advantage at its tokens."""

    def __init__(self, given, tensor):
        self.like = given["new_logp"]
        self.logps, self.segments = tensor.flat(self.like, grad=True)
        self.old, self.reference = tensor.flat(given["old_logp"])[0], tensor.flat(given["ref_logp"])[0]
        self.advantages = tensor(given["advantages"])[self.segments]
        self.sequence = _sequence_weights(self.segments, tensor)
        self.inputs = (self.logps, self.old, self.advantages)

    def token_mean(self, loss, **settings):
        return mean(loss(*self.inputs, ones(self.logps), **settings))

    def sequence_mean(self, loss, *more, **settings):
        items = loss(*self.inputs, self.sequence, *more, **settings)
        return items.total() / len(self.like)

    def gradient(self, loss):
        return rows(torch.autograd.grad(loss, self.logps)[0], self.like)


@check(
    "grpo_family_losses",
    "ratio",
    "per_token",
    "grpo_seq_mean_token_mean",
    "dapo_token_mean",
    "dr_grpo_over_maxlen",
    "luspo_seq_sum",
    "k3_per_token",
    "k3_token_mean",
    "grpo_plus_kl_plain",
    "grpo_plus_kl_bias_corrected",
    "grad_dapo_wrt_logp",
)
def _grpo(given, tensor):
    case = Rollout(given, tensor)
    bounds = {"clip_low": given["eps_low"], "clip_high": given["eps_high"]}
    items = ppo(*case.inputs, ones(case.logps), **bounds)
    constant = torch.full_like(ones(case.logps), 1 / given["max_completion_length"])
    with_kl = {"reference_logps": case.reference, "kl": given["beta_kl"], **bounds}
    estimate = k3(case.logps, case.reference).detach()
    n = len(case.like)
    return {
        "ratio": rows(items.metrics["ratio"], case.like),
        "per_token": rows(items.loss.detach(), case.like),
        "grpo_seq_mean_token_mean": case.sequence_mean(ppo, **bounds).detach(),
        "dapo_token_mean": mean(items).detach(),
        "dr_grpo_over_maxlen": ppo(*case.inputs, constant, **bounds).total().detach() / n,
        "luspo_seq_sum": items.total().detach() / n,
        "k3_per_token": rows(estimate, case.like),
        "k3_token_mean": estimate.mean(),
        "grpo_plus_kl_plain": case.sequence_mean(ppo, **with_kl).detach(),
        "grpo_plus_kl_bias_corrected": case.sequence_mean(ppo, kl_importance=True, **with_kl).detach(),
        "grad_dapo_wrt_logp": case.gradient(mean(items)),
    }


@check("grpo_family_losses", "gspo_seq_ratio", "gspo")
def _gspo(given, tensor):
    case = Rollout(given, tensor)
    bounds = {"clip_low": given["gspo"]["eps_low"], "clip_high": given["gspo"]["eps_high"]}
    items = gspo(*case.inputs, case.sequence, case.segments, **bounds)
    first = torch.tensor([0, len(case.like[0])])
    return {"gspo_seq_ratio": items.metrics["ratio"][first], "gspo": items.total().detach() / 2}


@check(
    "grpo_family_losses",
    "cispo_trl_token_mean",
    "cispo_symmetric_clip_verl_token_mean",
    "grad_cispo_wrt_logp",
)
def _cispo(given, tensor):
    case = Rollout(given, tensor)
    paper = case.token_mean(cispo, ratio_low=0.0, ratio_high=given["cispo_max"])
    bounds = {"ratio_low": 1 - given["eps_low"], "ratio_high": 1 + given["eps_high"]}
    return {
        "cispo_trl_token_mean": paper.detach(),
        "cispo_symmetric_clip_verl_token_mean": case.token_mean(cispo, **bounds).detach(),
        "grad_cispo_wrt_logp": case.gradient(paper),
    }


@check("grpo_family_losses", "sapo_seq_mean", "grad_sapo_wrt_logp")
def _sapo(given, tensor):
    case = Rollout(given, tensor)
    taus = {"tau_positive": given["sapo"]["tau_pos"], "tau_negative": given["sapo"]["tau_neg"]}
    loss = case.sequence_mean(sapo, **taus)
    return {"sapo_seq_mean": loss.detach(), "grad_sapo_wrt_logp": case.gradient(loss)}


@check("grpo_family_losses", "gmpo")
def _gmpo(given, tensor):
    case = Rollout(given, tensor)
    bounds = {"clip_low": given["gmpo_eps"], "clip_high": given["gmpo_eps"]}
    return case.sequence_mean(gmpo, case.segments, **bounds).detach()


@check("grpo_family_losses", "overlong_penalty")
def _overlong(given, tensor):
    case = given["overlong"]
    bounds = {"max_tokens": case["max_len"], "buffer": case["cache"]}
    return torch.tensor([overlong(n, **bounds) for n in case["lengths"]], dtype=torch.float64)


def test_answers_are_what_the_file_says():
    """Hand check of the input: log-ratios [-0.4, 0.5] and [3.1, -0.8], lengths 4, 2 and 2, 5."""
    pairs = Pairs(CASES["dpo_family"]["inputs"], Tensors(torch.float64))
    policy, reference = pairs.policy, pairs.reference
    assert isinstance(policy, Answers)
    compare((policy.chosen - reference.chosen).detach(), [-0.4, 0.5], 1e-12)
    compare((policy.rejected - reference.rejected).detach(), [3.1, -0.8], 1e-12)
    assert (policy.chosen_tokens.tolist(), policy.rejected_tokens.tolist()) == ([4, 2], [2, 5])
