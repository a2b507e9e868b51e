"""The service in trouble while a run records: training never waits, and all is sent in the end, once."""

import threading
import time

import pytest
from test_wandb_resume import expected, shown
from wandb_process import run, sync
from wandb_server import Server

# The library's own waits, up to a minute, in whole seconds: it takes a part of one for its default.
IMPATIENT = {
    f"WANDB__{client}_RETRY_WAIT_{end}_SECONDS": "1"
    for client in ("FILE_STREAM", "GRAPHQL")
    for end in ("MIN", "MAX")
}
TRAIN = """
import itertools, threading
def until(name):
    # a step every 50 ms until the file is there, a look every 10 steps; how long the slowest record took
    slowest = 0.0
    for step in itertools.count(steps[-1] + 1 if steps else 1):
        began = time.perf_counter()
        log(step)
        if step % 10 == 0:
            tracker.log("eval", {"task/loss": 1 / step}, step=step)
        slowest = max(slowest, time.perf_counter() - began)
        steps.append(step)
        time.sleep(0.05)
        if Path("run", name).exists():
            return slowest
steps = []
"""


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def wait(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def beside(trouble, place):
    """Trouble in a thread, once the page has a row; a file `over` in the run directory when it has passed."""

    def whole(server):
        try:
            wait(lambda: server.runs and server.history)
            trouble(server)
        finally:
            (place / "over").touch()

    return whole


def seconds(said, what):
    return float(said.split(what)[1].split()[0])


def test_whatever_the_service_does_everything_arrives_once(tmp_path, server):
    """Errors; then a stop after rows were taken and before the answer; nobody there; back, and slow;
    restarted. In the end the page is metrics.jsonl, row by row."""
    place = tmp_path / "run"
    place.mkdir()
    passed = []

    def more_rows():
        before = len(server.history)
        wait(lambda: len(server.history) > before)
        passed.append(len(server.history))

    def unanswered(server):
        """Stopped by the request that brings the next rows, which are taken: nobody is told."""
        before, stopped = len(server.history), threading.Event()

        def stop(path):
            if path.endswith("file_stream") and len(server.history) > before:
                server.taken = lambda path: None
                server.stop()
                passed.append(len(server.history))
                stopped.set()

        server.taken = stop
        assert stopped.wait(60)

    def trouble(server):
        refused = []
        server.refuse = lambda path: (
            503 if path.endswith("file_stream") and not refused.append(path) else None
        )
        wait(lambda: len(refused) > 1)
        server.refuse = lambda path: None
        more_rows()
        server.delay_s = 0.5
        unanswered(server)
        time.sleep(1)
        server.start()
        more_rows()
        server.stop()
        server.start()
        more_rows()

    thread = threading.Thread(target=beside(trouble, place), args=(server,), daemon=True)
    thread.start()
    said = run(
        place,
        TRAIN + 'print("slowest", until("over")); done()',
        url=server.url,
        timeout_s=20,
        variables=IMPATIENT,
    )
    thread.join()
    assert len(passed) == 4
    assert seconds(said, "slowest") < 0.5
    assert "not taken everything" not in said
    assert shown(server.rows) == expected(place)
    assert server.complete == [True]


def test_what_a_service_that_stays_away_has_not_got_is_kept_for_wandb_sync(tmp_path, server):
    """Closing waits its limit, and says the command that sends the rest: what was sent is not there twice."""
    place = tmp_path / "run"
    place.mkdir()
    thread = threading.Thread(target=beside(Server.stop, place), args=(server,), daemon=True)
    thread.start()
    said = run(
        place,
        TRAIN + 'until("over"); Path("run/over").unlink()\n'
        "threading.Timer(1, Path('run/over').touch).start()\n"
        'print("slowest", until("over")); done()',
        url=server.url,
        timeout_s=5,
        variables=IMPATIENT,
    )
    thread.join()
    (directory,) = place.glob("wandb/run-*")
    assert f"wandb sync --include-online {directory}" in said
    assert seconds(said, "slowest") < 0.5
    assert seconds(said, "close took") < 5.5
    assert 0 < len(server.rows) < len(expected(place))
    server.start()
    sync(server, tmp_path, directory, "--include-online")
    assert shown(server.rows) == expected(place)
