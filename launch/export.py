"""A run's checkpoint as a Hugging Face model: `python launch/export.py RUN_DIR [--out DIRECTORY]`

Needs no GPU and no process group, only memory for one model. Writes RUN_DIR/model, or the adapter alone for
a LoRA run; --merge writes the whole model with the adapter in it. What was written is loaded again with
transformers (and peft) and must give the logits of the checkpoint's weights before it gets its name.

Exit status: 0 done, 2 refused, anything else failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.config import record
from framework.errors import DONE, REFUSED, CheckpointError, UserError

if TYPE_CHECKING:
    from framework.models.load import Description
    from framework.train.restore import Checkpoint


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a run's directory")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest whole one")
    parser.add_argument("--merge", action="store_true", help="add the adapter to the model's weights")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as the model came")
    parser.add_argument("--out", type=Path, metavar="DIRECTORY", help="default: RUN_DIR/model")
    given = parser.parse_args(arguments)
    out = given.out or given.run_dir / "model"
    try:
        run = record.load(given.run_dir / "config.yaml")
        from framework.models import export, load  # imports torch: a refusal must not wait for it

        model = run.model
        description = load.inspect(
            model.path,
            revision=model.revision,
            gguf_file=model.gguf_file,
            init=model.init,
            head="score" if run.stage.name == "reward" else "lm",
        )
        checkpoint = opened(given.run_dir, given.checkpoint, model=description.fingerprint)
        adapter = None if run.adapter.kind == "full" else run.adapter.model_dump()
        print(f"writing {checkpoint.path} to {out}", flush=True)
        export.export(
            out,
            description=description,
            weights=weights(checkpoint, description, adapter, run.seed),
            adapter=adapter,
            merge=given.merge,
            dtype=given.dtype,
        )
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    print(f"loaded again and compared: {out} holds the weights of step {checkpoint.step}")
    sys.exit(DONE)


def opened(run_dir: Path, step: int | None, *, model: str) -> Checkpoint:
    """The checkpoint of `step`, or the newest that is whole, every file verified, of the model with that
    fingerprint. Raises CheckpointError."""
    from framework.strategy.world import connect
    from framework.train.checkpoint import Checkpointer

    alone = connect("cpu", timeout_s=60, environment={})
    checkpoints = Checkpointer(
        run_dir / "checkpoints",
        world=alone,
        keep=1,
        identity={"model": model},
        say=lambda message: print(message, file=sys.stderr),
    )
    if step is None:
        return checkpoints.open(run_dir)
    path = checkpoints.directory / f"step-{step:06d}"
    if not path.is_dir():
        there = ", ".join(sorted(found.name for found in checkpoints.directory.glob("step-*"))) or "none"
        raise CheckpointError(f"{checkpoints.directory} has no checkpoint of step {step}; there are: {there}")
    return checkpoints.open(path)


def weights(
    checkpoint: Checkpoint, description: Description, adapter: Any, seed: int
) -> Iterator[tuple[str, Any]]:
    """Every parameter once: the checkpoint's fp32 masters, and what was frozen as the model came.

    Of an actor with its critic, the actor.
    """
    from framework.models import load
    from framework.models.actor_critic import CRITIC, POLICY
    from framework.strategy.base import MASTER

    saved = {name.removeprefix(POLICY): name for name in checkpoint.parameters if not name.startswith(CRITIC)}

    def master(name: str) -> Any:
        shape, pieces = checkpoint.parameters[name].shape, checkpoint.parameters[name].pieces
        return checkpoint.read(name, MASTER, 0, pieces[-1][2]).view(shape)

    if adapter is None:
        for name, stored in saved.items():
            yield name, master(stored)
        return
    for name, tensor in load.reader(description, adapter=adapter, seed=seed)():
        yield name, master(saved[name]) if name in saved else tensor


if __name__ == "__main__":
    main()
