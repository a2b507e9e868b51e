"""One rank on one host: trains what it reads from stdin, a line of [settings, steps] each; answers in JSON.

The bytes of a step are counted at this host's interface, after a first step that made all connections.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402

from framework.config import build, compose, stages  # noqa: E402
from framework.strategy.world import connect  # noqa: E402
from framework.train.meter import Meter  # noqa: E402
from framework.train.trainer import accumulate  # noqa: E402

SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")  # this namespace's: `ip netns exec` mounts it


def settled(world):
    """Bytes sent, once all ranks are here and the last acknowledgements are out."""
    world.barrier()
    time.sleep(0.2)
    return int(SENT.read_text()) if SENT.exists() else 0


def train(world, arguments, steps):
    run = compose.compose(arguments)
    prepared = build.prepare(run)
    engine = build.build_engine(prepared, world)
    stage = stages.build_stage(prepared, world, engine)
    rate, meter = build.learning_rate(prepared), Meter(world)
    losses, norms, micros, first, began = [], [], [], 0, 0.0
    for step in range(steps):
        if step == 1:
            first, began = settled(world), time.monotonic()
        terms = stage.next(step)
        micros.append(len(terms[0].micros))
        accumulate(engine, terms, seed=run.seed, step=step, meter=meter)
        norms.append(engine.step(lr=rate(step), max_grad_norm=run.optim.max_grad_norm))
        losses.append(meter.line()["loss"])
    seconds = time.monotonic() - began
    sent = settled(world) - first
    sizes = {name: list(shape) for name, shape in engine.trained.items()}
    return {
        "losses": losses,
        "norms": norms,
        "micros": micros,
        "sent_per_step": sent / max(1, steps - 1),
        "seconds": seconds,
        "trained": sizes,
    }


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # answers alone on stdout; whatever libraries print goes beside them
    torch.set_num_threads(1)
    world = connect("cpu", timeout_s=120)
    for line in sys.stdin:
        arguments, steps = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            answer = train(world, arguments, steps)
        out.write(json.dumps(answer) + "\n")
        out.flush()
