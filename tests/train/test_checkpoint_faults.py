"""Damage, death and full disks: a checkpoint is whole or it is not there, and the last good one stays."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_worlds import alone, engine_state, holds, together
from xxhash import xxh3_128_hexdigest

from framework.errors import CheckpointError
from framework.strategy.base import FIRST, MASTER, SECOND, EngineState, Shard
from framework.train import commit
from framework.train.checkpoint import Checkpointer


def saver(world, directory, keep=9, say=lambda message: None):
    return Checkpointer(directory, world=world, keep=keep, identity={"model": "m"}, say=say)


def save(directory, step, size=1, keep=9):
    def rank(world):
        checkpoints = saver(world, directory, keep)
        checkpoints.newest()
        return checkpoints.save(step, engine_state(world.rank, size, step), {"at": step})

    return together(size, rank)


def last_good(directory):
    """The step that a fresh process would go on from, with every number of it checked."""
    said = []
    found = saver(alone(), directory, say=said.append).newest()
    assert found is None or holds(found, found.step)
    return (found.step if found else None), said


@pytest.fixture
def tmp_path(tmp_path_factory):
    """In memory where possible: thousands of fsyncs of a busy disk take minutes and prove no more."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="sapwood-") as place:
        yield Path(place)


@pytest.fixture
def two(tmp_path):
    """Steps 10 and 20, written by two ranks. -> the directory of step 20"""
    save(tmp_path, 10, 2)
    save(tmp_path, 20, 2)
    assert last_good(tmp_path) == (20, [])
    return tmp_path / "step-000020"


# -- damage -----------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(two):
    """One bit at 150 places in each file, its header and its end among them: never a silent one."""
    draw, tried = random.Random(0), 0
    for path in sorted(two.iterdir()):
        good = path.read_bytes()
        places = {*range(16), *range(len(good) - 16, len(good)), *draw.sample(range(len(good)), 118)}
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            step, said = last_good(two.parent)
            assert step == 10
            assert len(said) == 1
            assert path.name in said[0]
            tried += 1
        path.write_bytes(good)
    assert tried >= 200
    assert last_good(two.parent) == (20, [])


def test_every_truncation_is_found(two):
    """Cut at 40 places each, or with bytes added: the message has both sizes, or names the seal."""
    for path in sorted(two.iterdir()):
        good = path.read_bytes()
        for length in sorted({*range(0, len(good), len(good) // 40), len(good) - 1}):
            path.write_bytes(good[:length])
            step, said = last_good(two.parent)
            assert step == 10
            assert ("seal" if path.name == "manifest.json" else f"{length:,} bytes") in said[0]
        path.write_bytes(good + b"\0")
        assert last_good(two.parent)[0] == 10
        path.write_bytes(good)


def test_missing_and_swapped_files_are_found(two):
    """Also a shard of the same name, size and a true hash that is of another save."""
    for path in sorted(two.iterdir()):
        path.rename(two / "away")
        step, said = last_good(two.parent)
        assert step == 10
        assert f"{path.name} is missing" in said[0]
        (two / "away").rename(path)
    zero, one = two / "shard-0-of-2.safetensors", two / "shard-1-of-2.safetensors"
    good, other = zero.read_bytes(), one.read_bytes()
    zero.write_bytes(other), one.write_bytes(good)
    assert last_good(two.parent)[0] == 10
    one.write_bytes(other)
    foreign = (two.parent / "step-000010" / zero.name).read_bytes()
    zero.write_bytes(foreign)
    assert last_good(two.parent)[0] == 10
    reseal(
        two,
        lambda body: body["files"][zero.name].update(
            bytes=len(foreign), xxh3_128=xxh3_128_hexdigest(foreign)
        ),
    )
    step, said = last_good(two.parent)
    assert step == 10
    assert "two saves are mixed" in said[0]
    (two / "manifest.json").write_bytes((two.parent / "step-000010" / "manifest.json").read_bytes())
    step, said = last_good(two.parent)
    assert step == 10
    assert "it is of step 10" in said[0]


def test_all_ranks_see_the_damage_that_one_rank_found(two):
    """Rank 1 of 3 verifies one shard; all three must fall back, and an explicit path must be refused."""
    shard = two / "shard-1-of-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [found.step for found in together(3, lambda world: saver(world, two.parent).newest())] == [
        10,
        10,
        10,
    ]
    for error in together(3, lambda world: saver(world, two.parent).open(two)):
        assert isinstance(error, CheckpointError)
        assert shard.name in str(error)


def test_a_damaged_one_does_not_block_its_step_nor_count_as_kept(two):
    """Fallen back to 10, the run reaches 15 and 20 again: the damaged 20 made room."""
    (two / "manifest.json").unlink()
    checkpoints = saver(alone(), two.parent, keep=2)
    assert checkpoints.newest().step == 10
    checkpoints.save(15, engine_state(0, 1, 15), {})
    assert last_good(two.parent)[0] == 15
    assert holds(checkpoints.open(two.parent / "step-000010"), 10)
    checkpoints.save(20, engine_state(0, 1, 20), {})
    assert last_good(two.parent)[0] == 20


# -- hostile ----------------------------------------------------------------------------------------


def reseal(step, change):
    """What an attacker who can rewrite the manifest does: change it and seal it again."""
    path = step / "manifest.json"
    body = json.loads(path.read_text())
    del body["seal"]
    change(body)
    text = b"{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in body.items()).encode()
    path.write_bytes(text + b',\n"seal": "%s"\n}\n' % xxh3_128_hexdigest(text).encode())


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/b",
        "..",
        "",
        "shard-0-of-2.safetensors\0",
        "model.pt",
        "shard-0-of-2.safetensors/",
    ],
)
def test_file_names_that_lead_elsewhere_are_refused(two, name):
    reseal(two, lambda body: body["files"].update({name: body["files"]["shard-0-of-2.safetensors"]}))
    step, said = last_good(two.parent)
    assert step == 10
    assert "only shard-R-of-W.safetensors" in said[0]


def test_links_and_devices_in_place_of_files_are_refused(two, tmp_path):
    for path in sorted(two.iterdir()):
        good = path.read_bytes()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_bytes(good)
        path.unlink()
        path.symlink_to(elsewhere)
        assert "not a plain file" in last_good(two.parent)[1][0]
        path.unlink()
        os.mkfifo(path)  # opening it would wait for ever
        assert "not a plain file" in last_good(two.parent)[1][0]
        path.unlink()
        path.mkdir()
        assert "not a plain file" in last_good(two.parent)[1][0]
        path.rmdir()
        path.write_bytes(good)
    (two.parent / "step-000030").symlink_to(two)
    assert last_good(two.parent) == (20, [])


def first(body):
    return body["parameters"]["lm.embed.weight"]


HOSTILE = {
    "pieces_overlap": lambda body: first(body)["pieces"][1].__setitem__(1, 0),
    "piece_missing": lambda body: first(body)["pieces"].pop(),
    "piece_negative": lambda body: first(body)["pieces"][0].__setitem__(1, -5),
    "piece_elsewhere": lambda body: first(body)["pieces"][0].__setitem__(0, "shard-7-of-9.safetensors"),
    "shape_lies": lambda body: first(body).update(shape=[2**40, 2**40]),
    "size_lies": lambda body: body["files"]["shard-0-of-2.safetensors"].update(bytes=10**15),
    "value_not_there": lambda body: first(body)["values"].append("max_exp_avg_sq"),
    "future_format": lambda body: body.update(format=2),
    "not_a_mapping": lambda body: body.update(files=[1, 2]),
    "no_step": lambda body: body.pop("step"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_manifests_that_lie_are_refused(two, change):
    reseal(two, change)
    assert last_good(two.parent)[0] == 10


# -- death ------------------------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")


@contextmanager
def counted(monkeypatch, act):
    """Calls `act(number, name)` before each system call that a save makes, from any thread."""
    lock, number = threading.RLock(), [0]

    def hook(name, call):
        def hooked(*args, **kwargs):
            with lock:
                number[0] += 1
                act(number[0], name)
            return call(*args, **kwargs)

        return hooked

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, hook(name, getattr(os, name)))
        yield number


def killed_at(monkeypatch, point, work):
    """`work()` in a forked child that vanishes before its system call number `point`. -> it vanished

    torch's thread pool does not outlive a fork, so the states that `work` saves are made before it.
    """
    child = os.fork()
    if child == 0:
        try:
            with counted(monkeypatch, lambda number, name: os._exit(77) if number == point else None):
                work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_any_system_call_the_last_good_one_stays(tmp_path, monkeypatch, size):
    """Steps 10 and 20 stand, keep=2; the save of 30 dies at every boundary, retention's included.

    Before the rename the newest is 20, after it 30, never anything between; the next save works and
    clears the debris.
    """
    start = tmp_path / "start"
    save(start, 10, size)
    save(start, 20, size)
    for rank in range(size):
        engine_state(rank, size, 30)
    seen, point = [], 0
    while True:
        point += 1
        directory = tmp_path / f"at-{point}"
        shutil.copytree(start, directory)
        if not killed_at(monkeypatch, point, lambda where=directory: save(where, 30, size, keep=2)):
            break
        step, said = last_good(directory)
        assert said == [], "debris must not look like a damaged checkpoint"
        for path in directory.iterdir():
            if commit.COMMITTED.fullmatch(path.name):
                assert holds(saver(alone(), directory).open(path), int(path.name[5:])), "half deleted"
        seen.append(step)
        assert not any(isinstance(result, Exception) for result in save(directory, 40, size, keep=2))
        assert last_good(directory) == (40, [])
        kept = sorted(path.name for path in directory.iterdir())
        assert kept == [f"step-{step:06d}", "step-000040"], "debris is cleared, two are kept"
        shutil.rmtree(directory)
    assert len(seen) >= 20
    assert seen == sorted(seen)
    assert set(seen) == {20, 30}
    assert last_good(directory) == (30, [])


def test_killed_while_going_back_it_is_still_back(tmp_path, monkeypatch):
    """From 20 (30 abandoned) the save of 25 dies anywhere: the newest is 30 only before a byte of
    the commit, then 20, then 25; never 30 again once 25 was seen."""
    start = tmp_path / "start"
    for step in (20, 30):
        save(start, step)

    def go_back(directory):
        checkpoints = saver(alone(), directory)
        checkpoints.open(directory / "step-000020")
        checkpoints.save(25, engine_state(0, 1, 25), {})

    engine_state(0, 1, 25)
    seen, point = [], 0
    while True:
        point += 1
        directory = tmp_path / f"at-{point}"
        shutil.copytree(start, directory)
        if not killed_at(monkeypatch, point, lambda where=directory: go_back(where)):
            break
        seen.append(last_good(directory)[0])
    assert list(dict.fromkeys(seen)) == [30, 20, 25]


@pytest.mark.parametrize("size", [1, 2])
def test_an_error_at_any_system_call_fails_the_save_on_all_ranks(tmp_path, monkeypatch, size):
    """As a disk that fills up at each point: every rank gets the same CheckpointError or none does,
    20 or 30 is the newest, and the next save goes through in the same processes."""
    start = tmp_path / "start"
    save(start, 20, size)
    failures, point = 0, 0

    def full(number, name):
        if number == point and name not in ("close", "unlink", "rmdir"):
            raise OSError(28, "No space left on device")

    while point < 100:
        point += 1
        directory = tmp_path / f"at-{point}"
        shutil.copytree(start, directory)
        with counted(monkeypatch, full) as number:
            results = save(directory, 30, size)
        failed = [isinstance(result, CheckpointError) for result in results]
        assert all(failed) or not any(failed), results
        failures += failed[0]
        assert last_good(directory) == (20 if failed[0] else 30, [])
        save(directory, 40, size)
        assert last_good(directory)[0] == 40
        shutil.rmtree(directory)
        if point > number[0]:
            break
    assert failures >= 12


# -- full disks -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def big(step, elements):
    values = {which: torch.full((elements,), float(step)) for which in (MASTER, FIRST, SECOND)}
    return EngineState(step, {"w": [Shard((elements,), 0, values)]})


def test_a_full_disk_keeps_the_old_one_and_training_may_go_on(small_disk):
    """3 values * 40,000 * 4 = 480 kB a save: two fit in 1 MiB, the third does not, a small one does."""
    checkpoints = saver(alone(), small_disk / "c")
    checkpoints.save(10, big(10, 40_000), {})
    checkpoints.save(20, big(20, 40_000), {})
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(30, big(30, 40_000), {})
    message = str(error.value)
    assert "No space left" in message
    assert "480,000 bytes" in message
    assert "step-000030.tmp-" in message
    assert "the newest one is still step 20" in message
    assert "checkpoint.keep" in message
    assert sorted(path.name for path in (small_disk / "c").iterdir()) == ["step-000010", "step-000020"]
    checkpoints.save(40, big(40, 2_000), {})
    assert checkpoints.newest().read("w", SECOND, 0, 2_000).eq(40).all()


def test_a_full_disk_on_one_rank_fails_all_of_them(tmp_path, monkeypatch):
    """Rank 1's write fails halfway; rank 0's part, written well, is removed too."""
    save(tmp_path, 10, 3)
    write = os.write
    monkeypatch.setattr(commit, "_CHUNK", 64)

    def full(descriptor, data):
        if "shard-1" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    for error in save(tmp_path, 20, 3):
        assert isinstance(error, CheckpointError)
        assert "rank 1: " in str(error)
        assert "rank 0" not in str(error)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]
    save(tmp_path, 20, 3)
    assert last_good(tmp_path) == (20, [])


def test_short_writes_are_completed(tmp_path, monkeypatch):
    """The kernel may take fewer bytes than offered."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    save(tmp_path, 10, 2)
    monkeypatch.undo()
    assert last_good(tmp_path) == (10, [])


def test_no_byte_reaches_the_disk_after_its_file_was_synced(tmp_path, monkeypatch):
    """Durable means: all of a file is written before its fsync, all fsyncs before the rename, and the
    directories are synced around it."""
    log, place = [], lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    write, fsync, rename = os.write, os.fsync, os.rename
    monkeypatch.setattr(os, "write", lambda d, data: (log.append(("write", place(d))), write(d, data))[1])
    monkeypatch.setattr(os, "fsync", lambda d: (log.append(("fsync", place(d))), fsync(d))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(("rename", b.name)), rename(a, b))[1])
    (tmp_path / "c").mkdir()
    save(tmp_path / "c", 10)
    monkeypatch.undo()
    order = [entry for i, entry in enumerate(log) if entry != log[i - 1]]
    temporary = next(name for _, name in order if ".tmp-" in name)
    assert order == [
        ("write", "shard-0-of-1.safetensors"),
        ("fsync", "shard-0-of-1.safetensors"),
        ("fsync", temporary),
        ("write", "manifest.json"),
        ("fsync", "manifest.json"),
        ("fsync", temporary),
        ("rename", "step-000010"),
        ("fsync", "c"),
        ("fsync", tmp_path.name),
    ]


# -- power cuts -------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Nothing that the kernel has not put on the disk is left."""


def cut_power(place):
    """Stop an ext4 file system as a power cut would: what is not on the disk, journal included, is lost."""
    descriptor = os.open(place, os.O_RDONLY)
    fcntl.ioctl(descriptor, 0x8004587D, (2).to_bytes(4, "little"))  # EXT4_IOC_SHUTDOWN, without flushing
    os.close(descriptor)


@pytest.mark.slow
def test_after_a_power_cut_what_was_saved_is_there(tmp_path_factory, monkeypatch, request):
    """A real file system loses power at every sixth system call of a save, and right after it returned.

    Until the commit the newest is 10, and a save that returned is there for ever.
    """
    base = tmp_path_factory.mktemp("power")
    image, place = base / "disk", base / "mounted"
    place.mkdir()
    monkeypatch.setenv("PATH", "/usr/sbin:/sbin", prepend=os.pathsep)

    def mount():
        return subprocess.run(["mount", "-o", "loop", image, place], capture_output=True)

    def unmount():
        subprocess.run(["umount", place], check=True)

    def make():
        with open(image, "wb") as file:
            file.truncate(16 << 20)
        return subprocess.run(["mkfs.ext4", "-q", "-F", image], capture_output=True)

    if shutil.which("mkfs.ext4") is None or make().returncode or mount().returncode:
        pytest.skip("cannot mount an ext4 image here")
    unmount()
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", place], capture_output=True))
    seen = []
    for point in range(3, 100, 6):
        make(), mount()
        save(place / "c", 10)
        os.sync()
        gone = []

        def act(number, name, point=point, gone=gone):
            if number >= point and name not in ("open", "close") and not gone:
                gone.append(number)
                cut_power(place)
                raise PowerCut

        checkpoints = saver(alone(), place / "c")
        checkpoints.newest()
        try:
            with counted(monkeypatch, act):
                checkpoints.save(20, engine_state(0, 1, 20), {})
            cut_power(place)
        except PowerCut:
            pass
        del checkpoints
        unmount(), mount()
        seen.append(last_good(place / "c"))
        unmount()
        if not gone:
            break
    assert not gone, "the last round lost power after the save had returned"
    assert seen[0] == (10, [])
    assert seen[-1] == (20, [])
    assert [step for step, _ in seen] == sorted(step for step, _ in seen)
    assert all(said == [] for _, said in seen)
