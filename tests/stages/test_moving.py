"""TR-DPO's reference: what it becomes, and that a resumed run has the same one."""

import judged
import pytest
import torch

from framework.errors import CheckpointError
from framework.stages.moving import Moving


class Weights(judged.Fixed):
    """An engine of two parameters, of which one is trained: its value is 10 more at every step."""

    def __init__(self):
        super().__init__(None)
        self.trained = {"a": (2,)}
        self.value = 0.0

    def weights(self):
        yield "a", torch.full((2,), self.value)
        yield "b", torch.ones(1, dtype=torch.bfloat16)


class Copy:
    """A frozen model that remembers what it was filled with."""

    def __init__(self):
        self.now = {"a": torch.zeros(2), "b": torch.ones(1)}

    def refill(self, weights):
        self.now = dict(weights)


def advance(moving, steps):
    """Values of the reference's parameter before each step; the policy's is 10 * step."""
    seen = []
    for step in steps:
        moving.engine.value = 10.0 * step
        moving.advance(step)
        seen.append(float(moving.frozen.now["a"][0]))
    return seen


def start(directory, **options):
    options = dict(every=2, mix=0.6, directory=directory, keep=1) | options
    return Moving(Copy(), Weights(), **options)


def test_the_reference_is_a_running_mixture(tmp_path):
    """Step 2: 0.6 * 20 + 0.4 * 0 = 12. Step 4: 0.6 * 40 + 0.4 * 12 = 28.8."""
    assert advance(start(tmp_path), range(6)) == pytest.approx([0, 0, 12, 12, 28.8, 28.8])


def test_a_hard_update_takes_the_policy_itself(tmp_path):
    moving = start(tmp_path, mix=1.0)
    assert advance(moving, range(5)) == [0, 0, 20, 20, 40]
    assert float(moving.frozen.now["b"]) == 1.0


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_has_the_same_reference(tmp_path, stop):
    moving = start(tmp_path)
    before = advance(moving, range(stop))
    state = moving.state_dict()
    resumed = start(tmp_path)
    resumed.load_state_dict(state)
    assert before + advance(resumed, range(stop, 6)) == pytest.approx([0, 0, 12, 12, 28.8, 28.8])


def test_refreshes_that_no_checkpoint_needs_are_removed(tmp_path):
    """Checkpoints before steps 3 and 7, of which the last two may be needed (one kept, one being made)."""
    moving = start(tmp_path)
    advance(moving, range(3))
    moving.state_dict()
    advance(moving, range(3, 7))
    moving.state_dict()
    advance(moving, range(7, 13))
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-000002", "step-000006", "step-000012"]


def test_a_reference_that_was_not_kept_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="gone"):
        start(tmp_path).load_state_dict({"refreshed": 4, "needed": []})


def test_a_damaged_refresh_is_an_error(tmp_path):
    moving = start(tmp_path)
    advance(moving, range(3))
    path = tmp_path / "step-000002" / "0.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not as it was written"):
        start(tmp_path).load_state_dict(moving.state_dict())


@pytest.mark.parametrize("options", [{"every": 0}, {"mix": 0.0}, {"mix": 1.5}])
def test_numbers_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="every="):
        start(tmp_path, **options)
