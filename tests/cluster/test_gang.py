"""A gang of two real processes: its logs and variables, one failing, one killed, stops, and no orphans."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.cluster import gang, orphans
from framework.cluster.output import Log

RANK = str(Path(__file__).with_name("program_rank.py"))
GANG = str(Path(__file__).with_name("program_gang.py"))


def launch(mode, log_dir, **options):
    environment = {"WORD": "given", "LOGS": str(log_dir)}
    return gang.launch(
        [sys.executable, RANK, mode], nproc=2, log_dir=log_dir, grace_s=20, environment=environment, **options
    )


def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return answer


def ready(log_dir):
    """Process ids of both ranks and their helpers, once both have said that they are ready."""

    def look():
        texts = [path.read_text() for path in log_dir.glob("rank-*.log")]
        found = [re.findall(r"^ready (.*)$", text, re.MULTILINE) for text in texts]
        return len(found) == 2 and all(found) and [int(word) for line in found for word in line[-1].split()]

    return wait_for(look)


def test_ranks_know_their_place_and_write_their_logs(tmp_path, capfd):
    assert launch("settings", tmp_path, threads=3) is None
    shown = capfd.readouterr()
    line = "RANK={0} WORLD_SIZE=2 LOCAL_RANK={0} LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=3 "
    line += "given\n"
    assert shown.out == line.format(0)  # rank 0 alone is on the console, with its streams kept apart
    assert "whole" in shown.err
    for rank in (0, 1):
        text = (tmp_path / f"rank-{rank}.log").read_text()
        assert line.format(rank) in text
        assert "\nwhole False\n" in text  # colours and overwritten text are not for files

    assert launch("settings", tmp_path) is None  # a second start adds to the log
    assert len(re.findall("^RANK=1 ", (tmp_path / "rank-1.log").read_text(), re.MULTILINE)) == 2


def test_threads_are_shared_out_unless_the_user_has_chosen(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launch("settings", tmp_path)
    assert "OMP_NUM_THREADS=7 " in capfd.readouterr().out
    monkeypatch.delenv("OMP_NUM_THREADS")
    launch("settings", tmp_path)
    each = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"OMP_NUM_THREADS={each} " in capfd.readouterr().out


def test_the_rank_that_raised_is_named_once_and_the_others_end(tmp_path, capfd):
    with pytest.raises(gang.WorkerFailed) as caught:
        launch("raises", tmp_path)
    text = str(caught.value)
    assert (caught.value.rank, caught.value.status) == (1, 1)
    assert text.count("RuntimeError: wrong on one") == 1
    assert re.search(
        rf"error: rank 1 \(process \d+\) failed with exit status 1; see {tmp_path}/rank-1.log", text
    )
    assert "RuntimeError: wrong on one" in (tmp_path / "rank-1.log").read_text()
    assert "Traceback" not in capfd.readouterr().err
    (line,) = re.findall(r"^ready (.*)$", (tmp_path / "rank-0.log").read_text(), re.MULTILINE)
    assert not any(alive(process) for process in line.split())


def test_a_killed_rank_is_named_with_its_last_words(tmp_path):
    began = time.monotonic()
    with pytest.raises(gang.WorkerFailed, match=r"last words\nerror: rank 1 .* ended by SIGKILL") as caught:
        launch("killed", tmp_path)
    assert caught.value.status == -signal.SIGKILL
    assert time.monotonic() - began < 15


def test_a_rank_that_hears_nothing_does_not_hold_up_a_failure(tmp_path, monkeypatch):
    """As one that waits in a collective for the rank that failed; torch-elastic alone waits 30 s."""
    monkeypatch.setattr(gang, "FAILURE_GRACE_S", 0.5)
    began = time.monotonic()
    with pytest.raises(gang.WorkerFailed, match="RuntimeError: wrong on one"):
        launch("raises_beside_deaf", tmp_path)
    assert time.monotonic() - began < 15


def test_failures_are_retried_and_refusals_are_not(tmp_path, capfd):
    assert launch("second_time", tmp_path, max_restarts=1) is None
    assert "starting all ranks again" in capfd.readouterr().err
    with pytest.raises(gang.WorkerFailed) as caught:
        launch("refuses", tmp_path, max_restarts=1)
    assert str(caught.value) == "error: found this; expected that"
    assert "starting all ranks again" not in capfd.readouterr().err


def test_an_error_of_ours_needs_no_traceback(tmp_path):
    with pytest.raises(gang.WorkerFailed, match=r"^error: a shard is missing\nerror: rank ") as caught:
        launch("damaged", tmp_path)
    assert caught.value.status == 1


started = []  # launchers, ended with the test that started them


@pytest.fixture(autouse=True)
def _end_launchers():
    yield
    while started:
        process = started.pop()
        process.kill()
        process.wait()


def start(mode, log_dir, grace_s=20):
    process = subprocess.Popen(
        [sys.executable, GANG, mode, str(log_dir), str(grace_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_ranks_which_save_and_leave(tmp_path, number):
    """Also the helpers of a rank live until the rank has saved, and not longer."""
    launcher = start("wait", tmp_path)
    processes = ready(tmp_path)
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=30)
    assert f"stopped by {number.name}" in out, err
    assert f"{number.name}: saving after this step" in err
    for rank in (0, 1):
        assert f"saved after {number.name}" in (tmp_path / f"rank-{rank}.log").read_text()
    assert not any(alive(process) for process in processes)


def test_sigusr1_goes_on_to_the_ranks(tmp_path):
    launcher = start("wait", tmp_path)
    ready(tmp_path)
    launcher.send_signal(signal.SIGUSR1)
    out, err = launcher.communicate(timeout=30)
    assert "stopped by None" in out, err  # they left by themselves
    assert "saved after SIGUSR1" in (tmp_path / "rank-1.log").read_text()


def test_a_second_stop_ends_at_once_and_patience_ends_too(tmp_path):
    hurried, patient = start("deaf", tmp_path / "a", 60), start("deaf", tmp_path / "b", 1)
    processes = ready(tmp_path / "a") + ready(tmp_path / "b")
    hurried.send_signal(signal.SIGINT)
    patient.send_signal(signal.SIGTERM)
    assert "at most 60 s" in hurried.stderr.readline() + hurried.stderr.readline()
    hurried.send_signal(signal.SIGINT)
    assert "ended by force" in hurried.communicate(timeout=15)[1]
    assert "not stopped after 1 s" in patient.communicate(timeout=15)[1]
    assert not any(alive(process) for process in processes)


def test_a_killed_launcher_leaves_no_orphans(tmp_path):
    launcher = start("wait", tmp_path)
    processes = ready(tmp_path)
    assert len(processes) == 6
    assert all(alive(process) for process in processes)
    launcher.kill()
    launcher.communicate()
    wait_for(lambda: not any(alive(process) for process in processes), timeout_s=10)


def test_a_sweep_ends_only_what_carries_the_mark():
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(100)"]
    both = [
        subprocess.Popen(sleep, env={**os.environ, "SAPWOOD_TEST": word}, stdout=subprocess.PIPE)
        for word in ("mine", "mine-not")
    ]
    for process in both:
        process.stdout.readline()
    orphans.sweep("SAPWOOD_TEST=mine")
    assert both[0].wait(10) == -signal.SIGKILL
    assert both[1].poll() is None
    both[1].kill()
    both[1].wait()


def test_a_log_keeps_what_would_be_left_on_paper(tmp_path):
    """A live line is drawn over and over and may come in any pieces; it is not piled up meanwhile."""
    log = Log(tmp_path / "rank-0.log", str)
    for step in range(1000):
        for piece in (b"\r\x1b[", f"2Kstep {step}".encode()):
            log.write(piece)
    assert len(log._rest) < 100
    log.write(b"\r\x1b[2K\x1b[1msaved\x1b[0m\nstep 1000")
    log.close()
    assert (tmp_path / "rank-0.log").read_text() == "saved\nstep 1000\n"
    assert list(log.tail) == ["saved", "step 1000"]


def test_rank_0_gets_a_terminal_where_the_launcher_has_one(tmp_path):
    ours, theirs = pty.openpty()
    launcher = subprocess.Popen(
        [sys.executable, GANG, "settings", str(tmp_path), "5"], stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    assert launcher.wait(30) == 0
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "\x1b[32mwhole\x1b[0m True\r\n" in shown
    assert "whole True\n" in (tmp_path / "rank-0.log").read_text()
    assert "whole False\n" in (tmp_path / "rank-1.log").read_text()
