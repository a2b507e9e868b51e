"""`launch/train.py` with the inside of a run replaced: what it does depends on its seed.

seed 1..9: done, with the seed as the objective. 13: rank 1 crashes. 20: waits to be stopped, then saves.
21: the data is refused. 22: rank 1 refuses. 14: rank 1 is killed the first time. 15: the launcher is.
5 and 6 wait for each other, so they are done only where both run at the same time.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

spec = importlib.util.spec_from_file_location("train", Path(__file__).parents[2] / "launch" / "train.py")
train = importlib.util.module_from_spec(spec)
sys.modules["train"] = train
spec.loader.exec_module(train)  # also finds `framework` where it is not installed

from framework.cluster.signals import StopRequest  # noqa: E402
from framework.errors import DONE, INTERRUPTED, DataError, ModelError  # noqa: E402


def prepare(run):
    with open("prepared.txt", "a") as file:
        file.write(f"{run.seed}\n")
    if run.seed == 21:
        raise DataError("no assistant turn", path="mine.jsonl", line=17)


def together(facts, seed, rank):
    """Leave facts of this job and wait until the other one has begun, too."""
    Path(f"begun-{seed}-{rank}.json").write_text(json.dumps(facts))
    deadline = time.monotonic() + 120
    while len(list(Path().glob("begun-*.json"))) < 4:
        assert time.monotonic() < deadline, "the other job does not run at the same time"
        time.sleep(0.02)


def work(run):
    directory, rank = Path(run.run_dir), int(os.environ["RANK"])
    facts = {
        "rank": rank,
        "world_size": int(os.environ["WORLD_SIZE"]),
        "run_dir": run.run_dir,
        "lr": run.optim.lr,
        "nproc": run.launch.nproc,
        "resume": run.resume,
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "port": os.environ["MASTER_PORT"],
    }
    with open(f"rank-{rank}.json", "w") as file:
        json.dump(facts, file)
    if run.seed in (5, 6):
        together({**facts, "run_id": os.environ["TORCHELASTIC_RUN_ID"]}, run.seed, rank)
    if run.seed == 13 and rank == 1:
        raise RuntimeError("the thirteenth")
    if run.seed == 22 and rank == 1:
        raise ModelError("no such tokenizer")
    if run.seed in (14, 15) and rank == 1 and not Path(f"killed-{run.seed}").exists():
        Path(f"killed-{run.seed}").touch()
        os.kill(os.getpid() if run.seed == 14 else os.getppid(), signal.SIGKILL)
        time.sleep(60)
    status, word = DONE, "done"
    with StopRequest() as stop:
        if run.seed in (13, 20, 22):
            print("waiting", flush=True)
            while not stop.requested:
                time.sleep(0.02)
            status, word = INTERRUPTED, "interrupted"
    if rank == 0:
        (directory / "result.json").write_text(json.dumps({"status": word, "objective": float(run.seed)}))
        (directory / "checkpoints" / "step-000001").mkdir(parents=True, exist_ok=True)
    return status


if __name__ == "__main__":
    train.main(parts=train.Parts(prepare, work, Path(__file__)))
