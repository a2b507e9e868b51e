"""The harness itself: results in rank order, the right traceback, recovery after a crash or a hang."""

import os
import resource
import signal

import pytest
import workers


def doubles(world, number):
    return world.rank, world.size, world.sum([number])[0]


def raises_on_rank_one(world):
    if world.rank == 1:
        raise ValueError("thirteen")
    world.barrier()


def dies_on_rank_one(world):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def crashes_on_rank_one(world):
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no dump is left behind
        signal.raise_signal(signal.SIGSEGV)
    world.barrier()


def hangs_on_rank_zero(world):
    if world.rank == 0:
        signal.pause()


def test_results_come_in_rank_order_and_processes_are_kept():
    assert workers.run(2, doubles, 1.5) == [(0, 2, 3.0), (1, 2, 3.0)]
    assert workers.run(1, doubles, 1.5) == [(0, 1, 1.5)]
    pids = workers.run(2, pid)
    assert workers.run(2, pid) == pids


def pid(world):
    return os.getpid()


def test_an_error_names_the_rank_and_shows_its_traceback():
    with pytest.raises(
        workers.WorkerError, match=r"(?s)rank 1 of 2.*raises_on_rank_one.*ValueError: thirteen"
    ):
        workers.run(2, raises_on_rank_one)
    assert workers.run(2, doubles, 1) == [(0, 2, 2.0), (1, 2, 2.0)]


def test_a_crash_is_reported_and_the_next_run_works():
    with pytest.raises(workers.WorkerError, match="rank 1 of 2: process died, exit code -9"):
        workers.run(2, dies_on_rank_one)
    assert workers.run(2, doubles, 1) == [(0, 2, 2.0), (1, 2, 2.0)]


def test_a_crash_in_native_code_shows_where():
    with pytest.raises(
        workers.WorkerError, match=r"(?s)rank 1 of 2: process died, exit code -11.*crashes_on_rank_one"
    ):
        workers.run(2, crashes_on_rank_one)


def test_a_hang_is_cut_and_shows_where():
    with pytest.raises(
        workers.WorkerError, match=r"(?s)rank 0 of 2 did not answer in 2 s.*hangs_on_rank_zero"
    ):
        workers.run(2, hangs_on_rank_zero, timeout_s=2)
    assert workers.run(2, doubles, 1) == [(0, 2, 2.0), (1, 2, 2.0)]
