"""Round trips over world sizes, what is refused, what is kept."""

import json
import math
import pickle

import pytest
import torch
from checkpoint_worlds import SHAPES, alone, cuts, engine_state, holds, together, whole
from safetensors import safe_open

from framework.errors import CheckpointError
from framework.strategy.base import FIRST, MASTER, SECOND, EngineState, Shard
from framework.train.checkpoint import Checkpointer

IDENTITY = {"data": {"train.jsonl": "aa", "replay": "bb"}, "model": "llama", "sizes": (1, 2)}
STATE = {"stage": {"index": 128}, "progress": {"best": 1 / 3, "evaluated": None}, "word": "Ωé"}


def saver(world, directory, keep=2, identity=IDENTITY, say=lambda message: None):
    return Checkpointer(directory, world=world, keep=keep, identity=identity, say=say)


def save(directory, steps, size=1, keep=2, say=lambda message: None):
    def rank(world):
        checkpoints = saver(world, directory, keep, say=say)
        checkpoints.newest()
        return [checkpoints.save(step, engine_state(world.rank, size, step), STATE) for step in steps]

    return together(size, rank)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("written", [1, 2, 3])
@pytest.mark.parametrize("read", [1, 2, 3])
def test_any_world_reads_what_any_world_wrote(tmp_path, written, read):
    """Each reader fetches its own, differently cut slices; joined they are the values saved."""
    paths = save(tmp_path, [20], written)
    assert paths == [[tmp_path / "step-000020"]] * written

    def rank(world):
        found = saver(world, tmp_path).newest()
        found.expect(SHAPES)
        mine = {}
        for name in SHAPES:
            edges = cuts(name, read)
            for which in (MASTER, FIRST, SECOND):
                mine[name, which] = found.read(name, which, edges[world.rank], edges[world.rank + 1])
        return found, mine

    results = together(read, rank)
    for name in SHAPES:
        for which in (MASTER, FIRST, SECOND):
            joined = torch.cat([mine[name, which] for _, mine in results])
            assert joined.view(torch.int32).equal(whole(name, which, 20).view(torch.int32))
    for found, _ in results:
        assert (found.step, found.updates, found.world_size) == (20, 19, written)
        assert found.state == STATE
        assert holds(found, 20)


def test_every_slice_of_a_parameter_can_be_read(tmp_path):
    """All 21 * 22 / 2 ranges of a 21-element parameter in six pieces, and the result is one's own."""
    save(tmp_path, [3], 3)
    found = saver(alone(), tmp_path).newest()
    expected = whole("lm.embed.weight", FIRST, 3)
    for start in range(22):
        for stop in range(start, 22):
            assert found.read("lm.embed.weight", FIRST, start, stop).equal(expected[start:stop])
    found.read("lm.embed.weight", FIRST, 0, 21).zero_()
    assert holds(found, 3)


def test_numbers_keep_their_bits(tmp_path):
    """NaN with a payload, both zeros, subnormals and infinities are the same bits afterwards."""
    odd = torch.tensor([0x7FC00123, -(2**31), 0, 1, 0x7F800000, -0x800000], dtype=torch.int32)
    values = {which: odd.view(torch.float32) for which in (MASTER, FIRST, SECOND)}
    saver(alone(), tmp_path).save(1, EngineState(0, {"w": [Shard((6,), 0, values)]}), {})
    assert saver(alone(), tmp_path).newest().read("w", SECOND, 0, 6).view(torch.int32).equal(odd)


def test_the_files_are_plain_safetensors_and_json(tmp_path):
    """Name, value and range of each slice can be read off its key, without the manifest."""
    save(tmp_path, [20], 2)
    step = tmp_path / "step-000020"
    assert names(step) == ["manifest.json", "shard-0-of-2.safetensors", "shard-1-of-2.safetensors"]
    manifest = json.loads((step / "manifest.json").read_text())
    assert manifest["parameters"]["lm.embed.weight"]["shape"] == [7, 3]
    with safe_open(step / "shard-1-of-2.safetensors", "pt") as file:
        assert file.metadata()["save_id"] == manifest["save_id"]
        for key in file.keys():  # noqa: SIM118
            name, which, start, stop = key.rsplit(":", 3)
            assert file.get_tensor(key).equal(whole(name, which, 20)[int(start) : int(stop)])


def test_only_the_newest_committed_ones_are_kept(tmp_path):
    """Debris of a dead save neither counts as kept nor survives the next save."""
    dead = tmp_path / "step-000025.tmp-00ff"
    dead.mkdir()
    (dead / "shard-0-of-1.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("the user's own")
    saver(alone(), tmp_path).newest()
    assert dead.exists()  # looking changes nothing: another process may be writing it
    save(tmp_path, [10, 20, 30], keep=2)
    assert names(tmp_path) == ["notes.txt", "step-000020", "step-000030"]


def test_saving_the_same_step_again_changes_nothing(tmp_path):
    save(tmp_path, [20])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    save(tmp_path, [20])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_going_back_leaves_the_abandoned_future_aside(tmp_path):
    """From 20 the run went to 40; sent back to 20, its new 30 must be the newest, and 40 not lost."""
    save(tmp_path, [20, 40])
    said = []
    checkpoints = saver(alone(), tmp_path, say=said.append)
    assert checkpoints.open(tmp_path / "step-000020").step == 20
    checkpoints.save(30, engine_state(0, 1, 30), STATE)
    assert saver(alone(), tmp_path).newest().step == 30
    kept = [name for name in names(tmp_path) if ".aside-" in name]
    assert len(kept) == 1
    assert kept[0].startswith("step-000040")
    assert kept[0] in said[0]
    checkpoints.save(40, engine_state(0, 1, 40), STATE)
    assert holds(saver(alone(), tmp_path).newest(), 40)


def test_open_takes_a_step_or_a_run(tmp_path):
    save(tmp_path / "run" / "checkpoints", [10, 20])
    other = saver(alone(), tmp_path / "another" / "checkpoints")
    assert other.open(tmp_path / "run").step == 20
    assert other.open(tmp_path / "run" / "checkpoints" / "step-000010").step == 10
    assert holds(other.open(tmp_path / "run" / "checkpoints" / "step-000010"), 10)
    other.save(5, engine_state(0, 1, 5), STATE)  # a run that starts from another's step 10 counts anew
    assert names(tmp_path / "another" / "checkpoints") == ["step-000005"]
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        other.open(tmp_path / "nothing")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        other.open(tmp_path / "empty")
    assert saver(alone(), tmp_path / "not" / "yet").newest() is None


def test_another_identity_is_refused_by_name(tmp_path):
    """One fingerprint changed, one gone, one new: all three are named with both values."""
    save(tmp_path, [20], 2)
    now = {"data": {"train.jsonl": "cc"}, "model": "llama", "sizes": [1, 2], "adapter": "lora"}
    for error in together(2, lambda world: saver(world, tmp_path, identity=now).newest()):
        assert isinstance(error, CheckpointError)
        for part in ('data.train.jsonl was "aa", now it is "cc"', "data.replay was", "adapter was null"):
            assert part in str(error)
        assert "model" not in str(error).split(":", 1)[1].split(". Restore")[0]


def test_a_model_that_does_not_fit_is_refused_by_name(tmp_path):
    save(tmp_path, [20])
    found = saver(alone(), tmp_path).newest()
    wrong = {**SHAPES, "lm.embed.weight": (8, 3), "lm.lora_A": (2,)}
    del wrong["lm.scale"]
    with pytest.raises(CheckpointError) as error:
        found.expect(wrong)
    assert "lm.embed.weight was saved as [7, 3], now it is [8, 3]" in str(error.value)
    assert "lm.lora_A is trained now but is not in" in str(error.value)
    assert "lm.scale is in the checkpoint but is not trained" in str(error.value)
    for name, which, start, stop in (("lm.lora_A", MASTER, 0, 1), ("lm.scale", "max_exp_avg_sq", 0, 1)):
        with pytest.raises(CheckpointError, match=f"no {which} of {name}"):
            found.read(name, which, start, stop)
    with pytest.raises(CheckpointError, match="has 21 elements"):
        found.read("lm.embed.weight", MASTER, 20, 22)


def test_slices_that_miss_or_repeat_an_element_are_never_committed(tmp_path):
    """A strategy that loses element 2 of 4, or writes it twice, is told so; nothing is committed."""
    for first, second in ((2, 3), (3, 2)):
        values = {which: torch.zeros(first) for which in (MASTER, FIRST, SECOND)}
        rest = {which: torch.zeros(4 - second) for which in (MASTER, FIRST, SECOND)}
        state = EngineState(1, {"w": [Shard((4,), 0, values), Shard((4,), second, rest)]})
        with pytest.raises(ValueError, match="slices of w do not follow on"):
            saver(alone(), tmp_path).save(1, state, {})
        assert saver(alone(), tmp_path).newest() is None


def test_a_planted_pickle_is_never_opened(tmp_path):
    """A pickle in the directory is ignored; one in a shard's place, or the manifest's, is damage."""
    sentinel = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (open, (str(sentinel), "w"))

    save(tmp_path / "c", [20], 2)
    step = tmp_path / "c" / "step-000020"
    (step / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    assert holds(saver(alone(), tmp_path / "c").newest(), 20)
    for name in ("shard-0-of-2.safetensors", "manifest.json"):
        good = (step / name).read_bytes()
        (step / name).write_bytes(pickle.dumps(Bomb()))
        assert saver(alone(), tmp_path / "c").newest() is None
        (step / name).write_bytes(good)
    assert not sentinel.exists()


def test_keep_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        saver(alone(), tmp_path, keep=0)


def test_infinite_metrics_survive_in_the_state(tmp_path):
    """A diverged model's held-out perplexity is inf; the checkpoint must still be one."""
    checkpoints = saver(alone(), tmp_path)
    checkpoints.save(1, engine_state(0, 1, 1), {"metrics": {"perplexity": math.inf}})
    assert checkpoints.newest().state == {"metrics": {"perplexity": math.inf}}
