"""Rewards that misbehave in every way we could think of, for tests/rollout/test_pool.py."""

import os
import sys
import threading
import time


def obeys(answer, row):
    """What the answer says: a number, or one of the crimes below."""
    return CRIMES[answer]() if answer in CRIMES else float(answer) + row.get("bonus", 0)


def loop():
    while True:
        pass


def huge():
    """Zeros that are never touched: they cost nothing where nothing forbids them."""
    return float(len(bytearray(1 << 32)))


def bit_by_bit():
    held = []
    while True:
        held.append(bytearray(64 << 20))


def fails():
    raise RuntimeError("no such luck")


def prints():
    for _ in range(2000):
        print("x" * 1000)
        print('{"id": 1, "values": [99], "strange": null}', file=sys.stderr)
    os.write(1, b"raw\n")
    return 5.0


def opened():
    """Descriptors behind the standard ones; a session of many tests has some far beyond the first."""
    return [number for number in map(int, os.listdir("/proc/self/fd")) if number > 2]


def garbage():
    """Writes to everything that is open."""
    for descriptor in opened():
        try:
            os.write(descriptor, b'\x00\xff not json\n{"id":')
        except OSError:
            continue
    return 5.0


def flood():
    for descriptor in opened():
        try:
            while True:
                os.write(descriptor, b"x" * 65536)
        except OSError:
            continue
    return 5.0


def forks():
    """The child goes on as if it were the worker, then sleeps with the socket open."""
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(1000)
        return 99.0
    time.sleep(0.5)
    return 6.0


def fork_and_exit():
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)


def threads():
    for _ in range(4):
        threading.Thread(target=time.sleep, args=(1000,)).start()
    return 7.0


CRIMES = {
    "loop": loop,
    "sleep": lambda: time.sleep(1000),
    "huge": huge,
    "bit_by_bit": bit_by_bit,
    "fails": fails,
    "exits": lambda: os._exit(0),
    "sys_exit": lambda: sys.exit(0),
    "kills": lambda: os.kill(os.getpid(), 9),
    "stops": lambda: os.kill(os.getpid(), 19),
    "recurses": lambda: [].append(CRIMES["recurses"]()),
    "prints": prints,
    "garbage": garbage,
    "flood": flood,
    "forks": forks,
    "fork_and_exit": fork_and_exit,
    "threads": threads,
    "string": lambda: "1.0",
    "nothing": lambda: None,
    "nan": lambda: float("nan"),
    "infinite": lambda: float("inf"),
    "truth": lambda: True,
}


def batched(answers, rows, finished, *, factor=1.0):
    if "fails" in answers:
        raise RuntimeError("all of them")
    return [factor * len(a) * f for a, f in zip(answers, finished, strict=True)]


def wrong_count(answers, rows):
    return [1.0]


def asks(answer, row, *, tokens, finished, scale):
    return scale * tokens if finished else -1


def environment(answer, row):
    return float(len(os.environ)) if not any("SECRET" in name for name in os.environ) else -1.0


class Task:
    """Made once a process."""

    def __init__(self, right):
        self.right, self.times = right, 0

    def score(self, answer, row):
        self.times += 1
        return float(answer == self.right) * self.times
