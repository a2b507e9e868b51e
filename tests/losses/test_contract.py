"""What holds for every public loss: pure, additive, blind to masked units, finite, slopes that are right."""

import copy
import inspect

import catalogue
import pytest
import torch
from catalogue import CUT, MASKED, N
from torch import Tensor

from framework.losses.answers import Answers
from framework.losses.items import Items

BOUND = catalogue.bound()
COUNTED = [i for i in range(N) if i not in MASKED]
HELD_CONSTANT = {"dft", "cispo", "aot_unpaired"}  # their slope is not the value's; checked elsewhere

every_loss = pytest.mark.parametrize("loss", BOUND.values(), ids=BOUND)


def gradients(loss, inputs):
    """(total, gradient of each differentiable input, 0 where there is none)."""
    tensors = catalogue.leaves(inputs)
    total = loss(**inputs).total()
    found = torch.autograd.grad(total, tensors, allow_unused=True)
    return total.detach(), [
        torch.zeros_like(tensor) if grad is None else grad
        for tensor, grad in zip(tensors, found, strict=True)
    ]


def flat(inputs):
    return [
        tensor
        for value in inputs.values()
        for tensor in (value if isinstance(value, Answers) else [value])
        if isinstance(tensor, Tensor)
    ]


def test_the_room_was_found():
    assert {"sft", "dpo", "kto", "ppo", "mixed", "bradley_terry", "forward_kl", "value_loss"} <= set(
        catalogue.losses()
    )
    assert {loss.func for loss in BOUND.values()} == set(catalogue.losses().values())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_number_a_unit_and_metrics_without_gradient(loss, dtype):
    inputs = catalogue.made_up(loss, dtype=dtype)
    catalogue.leaves(inputs)
    items = loss(**inputs)
    assert isinstance(items, Items)
    assert items.loss.shape == items.weight.shape == (N,)
    assert items.loss.dtype == dtype
    assert items.loss.requires_grad
    for name, metric in items.metrics.items():
        assert metric.shape == (N,), name
        assert not metric.requires_grad, name
    torch.testing.assert_close(items.weight.detach(), torch.tensor(catalogue.WEIGHTS, dtype=dtype))


@every_loss
def test_pure(loss):
    """Same answer twice, and the inputs as they were: values and version counters."""
    inputs = catalogue.made_up(loss)
    before = copy.deepcopy(inputs)
    versions = [tensor._version for tensor in flat(inputs)]
    one, other = loss(**inputs), loss(**inputs)
    assert torch.equal(one.loss, other.loss)
    assert one.metrics.keys() == other.metrics.keys()
    for name, metric in one.metrics.items():
        torch.testing.assert_close(metric, other.metrics[name], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(a, b) for a, b in zip(flat(inputs), flat(before), strict=True))
    assert versions == [tensor._version for tensor in flat(inputs)]


@every_loss
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_masked_units_do_not_matter(loss, garbage):
    """Whatever stands in units of weight 0: total, gradients and counted metrics are the same bits, and the
    masked inputs' gradient is 0."""

    def spoil(name, tensor):
        tensor = tensor.detach().clone()
        tensor[MASKED] = ~tensor[MASKED] if tensor.dtype == torch.bool else garbage
        return tensor

    plain = catalogue.made_up(loss)
    spoilt = catalogue.changed(catalogue.made_up(loss), spoil)
    total, slopes = gradients(loss, plain)
    found, found_slopes = gradients(loss, spoilt)
    assert torch.equal(found, total)
    for tensor, slope, found_slope in zip(catalogue.leaves(plain), slopes, found_slopes, strict=True):
        if tensor is plain["weight"]:
            continue  # its slope is the loss itself, of masked units too
        assert torch.equal(found_slope, slope)
        assert not (slope.dim() and slope[MASKED].any())
    metrics = loss(**plain).metrics
    for name, metric in loss(**spoilt).metrics.items():
        expected = metrics[name][COUNTED]
        torch.testing.assert_close(metric[COUNTED], expected, rtol=0, atol=0, equal_nan=True)


@every_loss
def test_additive(loss):
    """Cut in two, each part with what belongs to it, the totals and gradients add up."""
    inputs = catalogue.made_up(loss)
    total, slopes = gradients(loss, inputs)
    parts = []
    for part in (slice(0, CUT), slice(CUT, N)):
        cut = catalogue.changed(catalogue.made_up(loss), lambda name, tensor, part=part: tensor[part].clone())
        cut["weight"] = cut["weight"][part].clone()
        if "segments" in cut:
            cut["segments"] = cut["segments"][part] - cut["segments"][part][0]
        parts.append(gradients(loss, cut))
    torch.testing.assert_close(parts[0][0] + parts[1][0], total, rtol=1e-12, atol=1e-12)
    for first, second, whole in zip(parts[0][1], parts[1][1], slopes, strict=True):
        joined = torch.cat([first, second]) if whole.dim() else first + second
        torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12)


@every_loss
@pytest.mark.parametrize("positive", [True, False])
def test_finite_at_extreme_inputs(loss, positive):
    """Numbers of size 0, 1e-3, 1 and 1e4 in any combination, fp32: value and gradient stay finite."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.0, -1e-3, -1.0, -1e4] + ([1e-3, 1.0, 1e4] if positive else []))

    def extreme(name, tensor):
        if tensor.dtype == torch.bool:
            return tensor
        drawn = sizes[torch.randint(len(sizes), tensor.shape, generator=generator)]
        if name in ("student_logps", "teacher_logps"):
            return drawn.log_softmax(-1)
        return drawn

    for seed in range(8):
        plain = catalogue.made_up(loss, dtype=torch.float32, seed=seed)
        inputs = catalogue.changed(plain, extreme)
        for name, value in plain.items():
            if isinstance(value, Answers):
                inputs[name] = Answers(*inputs[name][:2], *value[2:])
        total, slopes = gradients(loss, inputs)
        assert total.isfinite()
        assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize(
    "loss",
    [loss for loss in BOUND.values() if loss.func.__name__ not in HELD_CONSTANT],
    ids=[label for label, loss in BOUND.items() if loss.func.__name__ not in HELD_CONSTANT],
)
def test_slopes_in_fp64(loss):
    """Autograd against differences, for all inputs that are not held constant."""
    inputs = catalogue.made_up(loss, seed=3)
    constant = {"weight", "correction", "baseline", "matched", "matched_chosen", "matched_rejected"}
    free = {name: value for name, value in inputs.items() if name not in constant}
    tensors = catalogue.leaves(free)
    assert tensors
    for name in constant & set(inputs):
        inputs[name] = inputs[name].detach().requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *_: loss(**inputs).total(), tensors)


def _settings():
    for label, loss in BOUND.items():
        for name, parameter in inspect.signature(loss.func).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and "float" in str(parameter.annotation):
                value = loss.keywords.get(name, parameter.default)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield pytest.param(loss, name, id=f"{label}-{name}")


@pytest.mark.parametrize(("loss", "name"), _settings())
def test_settings_outside_their_range_are_refused(loss, name):
    inputs = catalogue.made_up(loss)
    for value in (float("nan"), -5.0, float("-inf")):
        with pytest.raises(ValueError, match=f"{name}=.* outside"):
            loss(**inputs, **{name: value})
