"""Policy-gradient losses: numbers worked by hand, slopes, limits, and the regularising terms."""

import math

import pytest
import torch

from framework.losses.kl import adaptive_kl, k1, k2, k3, k3_plus, kl
from framework.losses.policy_gradient import cispo, gmpo, gspo, ppo, reinforce, rloo, sapo
from framework.losses.value import value_loss

BOUNDS = {"clip_low": 0.2, "clip_high": 0.28}


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def slope(loss, logps, *args, **settings):
    (found,) = torch.autograd.grad(loss(logps, *args, **settings).total(), logps)
    return found


def close(found, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)


OLD = tensor(-1.0, -0.5, -2.0, -0.7, -1.3)
ADVANTAGES = tensor(0.9, 0.9, 0.9, -1.1, -1.1)
WEIGHT = torch.ones(5, dtype=torch.float64)
SEGMENTS = torch.tensor([0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (ppo, BOUNDS),
        (ppo, {**BOUNDS, "dual_clip": 3.0}),
        (cispo, {"ratio_low": 0.0, "ratio_high": 5.0}),
        (sapo, {"tau_positive": 1.0, "tau_negative": 1.05}),
    ],
)
def test_on_policy_every_token_loss_is_reinforce(loss, settings):
    """At rho = 1 the slope in log pi is -A."""
    logps = OLD.clone().requires_grad_()
    close(slope(loss, logps, OLD, ADVANTAGES, WEIGHT, **settings), -ADVANTAGES)
    plain = torch.autograd.grad(reinforce(logps, ADVANTAGES, WEIGHT).total(), logps)[0]
    close(plain, -ADVANTAGES)


@pytest.mark.parametrize(("loss", "per_token"), [(gspo, True), (gmpo, True), (rloo, False)])
def test_on_policy_every_sequence_loss_is_reinforce(loss, per_token):
    """With weights 1 / n_i each token of sequence i has slope -A / n_i; for a product of ratios, -A."""
    logps, weight = OLD.clone().requires_grad_(), tensor(1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2)
    found = slope(loss, logps, OLD, ADVANTAGES, weight, SEGMENTS, **BOUNDS)
    close(found, -ADVANTAGES * (weight if per_token else 1.0))


def test_sequence_ratios_by_hand():
    """Log-ratios 0.2, -0.1, -0.5 and 0.4, -0.6: means -0.4 / 3 and -0.1, sums -0.4 and -0.2. A token that
    does not count is in neither: without the third, mean 0.05 and sum 0.1."""
    logps = OLD + tensor(0.2, -0.1, -0.5, 0.4, -0.6)
    for loss, logs in ((gspo, (-0.4 / 3, -0.1)), (rloo, (-0.4, -0.2))):
        ratio = loss(logps, OLD, ADVANTAGES, WEIGHT, SEGMENTS, **BOUNDS).metrics["ratio"]
        close(ratio, [math.exp(logs[0])] * 3 + [math.exp(logs[1])] * 2)
    weight = tensor(1.0, 1.0, 0.0, 1.0, 1.0)
    for loss, log in ((gspo, 0.05), (rloo, 0.1)):
        ratio = loss(logps, OLD, ADVANTAGES, weight, SEGMENTS, **BOUNDS).metrics["ratio"]
        close(ratio[0], math.exp(log))


def test_no_tokens_at_all():
    """A fill: nothing counted, nothing there, and still part of the graph."""
    logps = torch.empty(0, requires_grad=True)
    nothing, segments = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for loss in (gspo, rloo, gmpo):
        total = loss(logps, nothing, nothing, nothing, segments, **BOUNDS).total()
        total.backward()
        assert total == 0


def test_gmpo_clips_tokens_before_the_mean():
    """A > 0: log-ratios 1.0 and -1.0 with bound 0.4 above give the mean (0.4 - 1.0) / 2 = -0.3; A < 0:
    (1.0 - 0.4) / 2 = 0.3."""
    logps, segments = OLD[:4] + tensor(1.0, -1.0, 1.0, -1.0), torch.tensor([0, 0, 1, 1])
    advantages = tensor(1.0, 1.0, -1.0, -1.0)
    items = gmpo(logps, OLD[:4], advantages, WEIGHT[:4], segments, clip_low=0.4, clip_high=0.4)
    close(items.loss, [-math.exp(-0.3)] * 2 + [math.exp(0.3)] * 2)
    assert items.metrics["clip/high"].tolist() == [1, 0, 0, 0]
    assert items.metrics["clip/low"].tolist() == [0, 0, 0, 1]


def test_dual_clip_is_the_two_sided_clip():
    """min(rho, delta) in the unclipped branch, as INTELLECT-2 writes it, against ours with c = delta: value
    and slope agree for every sign of A and every rho."""
    generator = torch.Generator().manual_seed(0)
    logps = 3 * torch.randn(200, generator=generator, dtype=torch.float64)
    logps.requires_grad_()
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    old, weight, delta = torch.zeros_like(advantages), torch.ones_like(advantages), 3.0
    ratio = logps.exp()
    branch = torch.minimum(ratio, torch.tensor(delta, dtype=torch.float64)) * advantages
    theirs = -torch.minimum(branch, ratio.clamp(0.8, 1.28) * advantages)
    ours = ppo(logps, old, advantages, weight, dual_clip=delta, **BOUNDS)
    close(ours.loss, theirs)
    close(
        torch.autograd.grad(ours.total(), logps)[0],
        torch.autograd.grad(theirs.sum(), logps)[0],
    )
    held = ours.metrics["clip/dual"].bool()
    assert held.any()
    assert ((advantages < 0) & (ratio > delta) == held).all()


def test_sapo_by_hand():
    """rho = e, A = -2, tau 1.05: (4 / 1.05) s(1.05 (e - 1)) * 2; slope 4 u (1 - u) rho * 2."""
    logps = tensor(0.0, grad=True)
    gate = 1 / (1 + math.exp(-1.05 * (math.e - 1)))
    items = sapo(logps, tensor(-1.0), tensor(-2.0), tensor(1.0), tau_positive=1.0, tau_negative=1.05)
    close(items.loss, [4 / 1.05 * gate * 2])
    close(torch.autograd.grad(items.total(), logps)[0], [4 * gate * (1 - gate) * math.e * 2])


def test_cispo_keeps_the_gradient_of_every_token():
    """Ratios e^2 and e^-2 bounded to [0.5, 5]: slopes -5 A and -0.5 A."""
    logps = tensor(0.0, -4.0, grad=True)
    found = slope(
        cispo, logps, tensor(-2.0, -2.0), tensor(1.0, -3.0), tensor(1.0, 1.0), ratio_low=0.5, ratio_high=5.0
    )
    close(found, [-5.0, 1.5])


def test_correction_scales_the_policy_term_alone():
    logps, correction = OLD.clone(), tensor(0.5, 0.0, 2.0, 1.0, 1.0)
    extras = {"reference_logps": OLD - 0.3, "entropies": OLD.abs(), "kl": 0.1, "entropy": 0.01}
    plain = ppo(logps, OLD, ADVANTAGES, WEIGHT, **BOUNDS).loss
    bare = ppo(logps, OLD, ADVANTAGES, WEIGHT, **extras, **BOUNDS).loss - plain
    corrected = ppo(logps, OLD, ADVANTAGES, WEIGHT, correction, **extras, **BOUNDS).loss
    close(corrected, correction * plain + bare)


def test_regularisers_by_hand():
    """l = 0.3 per token: k2 = 0.045, times 0.1; entropy 0.5 times 0.01. With rho = e^0.2 the KL is
    multiplied by it where `kl_importance` is set."""
    logps, old = tensor(-1.0), tensor(-1.2)
    given = {"reference_logps": tensor(-1.3), "entropies": tensor(0.5)}
    settings = {"kl": 0.1, "kl_estimator": "k2", "entropy": 0.01, **BOUNDS}
    nothing, one = tensor(0.0), tensor(1.0)
    items = ppo(logps, old, nothing, one, **given, **settings)
    close(items.loss, [0.1 * 0.045 - 0.01 * 0.5])
    close(items.metrics["kl"], [0.045])
    close(items.metrics["entropy"], [0.5])
    weighted = ppo(logps, old, nothing, one, **given, kl_importance=True, **settings)
    close(weighted.loss, [0.1 * 0.045 * math.exp(0.2) - 0.01 * 0.5])


@pytest.mark.parametrize(("setting", "missing"), [("kl", "reference_logps"), ("entropy", "entropies")])
def test_a_term_without_its_input_is_refused(setting, missing):
    with pytest.raises(ValueError, match=f"{setting}=0.1 needs {missing}"):
        ppo(OLD, OLD, ADVANTAGES, WEIGHT, **BOUNDS, **{setting: 0.1})


def test_dual_clip_must_lie_above_the_clip():
    with pytest.raises(ValueError, match=r"dual_clip=1.1 is outside \(1.28, inf\)"):
        ppo(OLD, OLD, ADVANTAGES, WEIGHT, dual_clip=1.1, **BOUNDS)


# --- KL estimates


def test_importance_makes_the_gradient_of_an_old_policys_tokens_right():
    """Three tokens; the sum over them of p_old(x) rho k(x), an expectation written out, has exactly the
    gradient of KL(pi, ref) for k1 and k3."""
    torch.manual_seed(0)
    logits, old, reference = (torch.randn(3, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    logps = logits.log_softmax(0)
    old_logps, reference_logps = old.log_softmax(0), reference.log_softmax(0)
    exact = (logps.exp() * (logps - reference_logps)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for estimator in ("k1", "k3"):
        items = ppo(
            logps,
            old_logps,
            torch.zeros(3, dtype=torch.float64),
            old_logps.exp(),
            reference_logps=reference_logps,
            kl=1.0,
            kl_estimator=estimator,
            kl_importance=True,
            **BOUNDS,
        )
        close(torch.autograd.grad(items.total(), logits, retain_graph=True)[0], expected)


def test_where_estimates_are_biased():
    """Expectations over three tokens, written out: k1 and k3 have the value of KL(pi, ref); as a loss with
    tokens held fixed k1 has no gradient, k2 and k3_plus that of KL(pi, ref), k3 that of KL(ref, pi)."""
    torch.manual_seed(1)
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    logps, reference = logits.log_softmax(0), torch.randn(3, dtype=torch.float64).log_softmax(0)
    drawn = logps.exp().detach()

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    reverse = (logps.exp() * (logps - reference)).sum()
    forward = (reference.exp() * (reference - logps)).sum()
    for estimate in (k1, k3, k3_plus):
        close((drawn * estimate(logps, reference)).sum(), reverse.item())
    assert (drawn * k2(logps, reference)).sum().item() != pytest.approx(reverse.item(), rel=1e-3)
    close(gradient((drawn * k1(logps, reference)).sum()), [0.0, 0.0, 0.0])
    close(gradient((drawn * k2(logps, reference)).sum()), gradient(reverse))
    close(gradient((drawn * k3_plus(logps, reference)).sum()), gradient(reverse))
    close(gradient((drawn * k3(logps, reference)).sum()), gradient(forward))


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match="estimator=k4; expected k1, k2, k3, k3_plus"):
        kl(OLD, OLD, "k4")


def test_the_controller_moves_by_at_most_a_fifth_per_horizon():
    settings = {"target": 6.0, "horizon": 1000.0}
    assert adaptive_kl(0.1, 600.0, samples=1000, **settings) == pytest.approx(0.12)
    assert adaptive_kl(0.1, -600.0, samples=1000, **settings) == pytest.approx(0.08)
    assert adaptive_kl(0.1, 6.0, samples=1000, **settings) == 0.1


# --- the critic


def test_a_value_is_held_near_the_old_one():
    """V 0.9, V_old 0.5, R 1, clip 0.2: the clipped value 0.7 is worse, 0.3^2 / 2, and has no slope."""
    values = tensor(0.9, grad=True)
    items = value_loss(values, tensor(0.5), tensor(1.0), tensor(1.0), clip=0.2)
    close(items.loss, [0.045])
    assert items.metrics["value/clipped"].tolist() == [1.0]
    close(torch.autograd.grad(items.total(), values)[0], [0.0])
    free = value_loss(values, tensor(0.5), tensor(1.0), tensor(1.0), clip=None)
    close(free.loss, [0.005])
