"""Worlds of threads, and tiny engine states whose every number says where it belongs."""

import functools
import json
import threading

import torch

from framework.strategy.base import FIRST, MASTER, SECOND, EngineState, Shard

SHAPES = {"lm.embed.weight": (7, 3), "lm.block.0.up": (5,), "lm.scale": (), "lm.head.weight": (2, 2, 3)}


class Threads:
    """One rank of a world whose ranks are threads of this process. JSON crosses, as in the real one."""

    device, local_rank = torch.device("cpu"), 0

    def __init__(self, rank, size, barrier, board):
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def gather(self, value):
        self._board[self.rank] = json.dumps(value)
        self._barrier.wait(20)
        answers = [json.loads(text) for text in self._board]
        self._barrier.wait(20)
        return answers

    def broadcast(self, value):
        return self.gather(value)[0]


def together(size, work):
    """`work(world)` on every rank at once; results in rank order. A rank's exception is its result."""
    barrier, board, results = threading.Barrier(size), [None] * size, [None] * size

    def rank(r):
        try:
            results[r] = work(Threads(r, size, barrier, board))
        except Exception as error:
            results[r] = error

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def alone():
    return Threads(0, 1, threading.Barrier(1), [None])


def whole(name, which, step):
    """[numel] fp32: a different exactly representable number for each step, parameter, value, element."""
    count = torch.Size(SHAPES[name]).numel()
    base = 1000 * step + 100 * list(SHAPES).index(name) + 33 * (MASTER, FIRST, SECOND).index(which)
    return torch.arange(count, dtype=torch.float32) + base + 1 / 3


def cuts(name, size):
    """Uneven boundaries between ranks: size + 1 ascending offsets, some ranks owning nothing."""
    count = torch.Size(SHAPES[name]).numel()
    inner = [(count * (r + 1) * (r + 2)) // (size * (size + 1)) for r in range(size - 1)]
    return [0, *inner, count]


@functools.cache
def engine_state(rank, size, step):
    shards = {}
    for name, shape in SHAPES.items():
        edges = cuts(name, size)
        start, stop = edges[rank], edges[rank + 1]
        middle = (start + stop) // 2  # two slices in one rank, as an optimizer with groups may have
        shards[name] = [
            Shard(shape, a, {which: whole(name, which, step)[a:b] for which in (MASTER, FIRST, SECOND)})
            for a, b in ((start, middle), (middle, stop))
        ]
    return EngineState(updates=step - 1, shards=shards)


def holds(checkpoint, step):
    """Every number of the checkpoint is that of `step`."""
    return checkpoint.step == step and all(
        torch.equal(
            checkpoint.read(name, which, 0, torch.Size(shape).numel()).view(torch.int32),
            whole(name, which, step).view(torch.int32),
        )
        for name, shape in SHAPES.items()
        for which in (MASTER, FIRST, SECOND)
    )
