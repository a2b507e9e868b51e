"""`launch/train.py` whose jobs take no time: a job of a sweep is this file alone, without workers or torch.

Its objective is a parabola of log(lr) with the optimum at 3e-5, plus the weight decay; the other metric falls
with lr. Held-out values are written step by step, as training writes them, towards the objective.
What else it does is said by its seed: 13 crashes, 14 is killed the first time, 20 waits to be stopped, 30
takes its steps slowly.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

JOB = "--job"
STEPS = 4


def objective(lr, decay):
    return (math.log10(lr) - math.log10(3e-5)) ** 2 + decay


def job(file):
    handed = json.loads(file.read_text())["run"]
    where, seed = Path(handed["run_dir"]), handed["seed"]
    lr, decay = handed["optim"]["lr"], handed["optim"]["weight_decay"]
    where.mkdir(parents=True, exist_ok=True)
    stops = []
    signal.signal(signal.SIGINT, lambda number, _: stops.append(number))
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    with open("jobs.txt", "a") as log:
        print(seed, repr(lr), os.environ.get("CUDA_VISIBLE_DEVICES") or "-", os.getpid(), file=log)
    if seed == 13:
        told(file, 1, error="RuntimeError: the thirteenth (rank 1)")
    if seed == 14 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while seed == 20 and not stops and not Path("go").exists():
        time.sleep(0.02)
    value = objective(lr, decay)
    for step in range(1, STEPS + 1):
        if stops:
            (where / "result.json").write_text(json.dumps({"status": "interrupted"}))
            told(file, 3)
        metrics = {"task/loss": value + (STEPS - step), "general/loss": 1 + math.log10(lr / 1e-6)}
        with (where / "metrics.jsonl").open("a") as log:
            print(json.dumps({"kind": "eval", "step": step, **metrics}), file=log)
        time.sleep(0.7 if seed == 30 else 0.0)
    best = {"metric": "task/loss", "value": value, "step": STEPS}
    result = {"status": "done", "objective": value, "metrics": metrics, "best": best, "seconds": 1.0}
    (where / "result.json").write_text(json.dumps(result))
    told(file, 0)


def told(file, status, error=None):
    file.with_name("outcome.json").write_text(json.dumps({"status": status, "error": error}))
    sys.exit(status)


if __name__ == "__main__":
    if sys.argv[1:2] == [JOB]:
        job(Path(sys.argv[2]))
    from program_train import train

    train.main(parts=train.Parts(None, None, Path(__file__)))
