"""Run a chain of steps: `python launch/pipeline.py experiment=NAME [KEY=VALUE ...]`

Each step is one run of launch/train.py, or one function, in a process and a directory of its own under the
pipeline's. All are checked before the first starts. The same line goes on where it stopped: what is done is
not done again, what was interrupted resumes, what has changed is done anew beside the old.
report.html in the pipeline's directory shows the road so far.

stages.STEP.KEY=VALUE sets a key of one step, KEY=VALUE of every step of training, ~stages.STEP leaves one
out. --dry-run checks everything and starts nothing.

Exit status: that of the step it ended in: 0 done, 2 refused, 3 stopped with a checkpoint, else failed.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from framework.cluster import directory, worker
from framework.cluster.child import Children
from framework.config import compose, pipeline, record, secrets, targets
from framework.config.pipeline import Pipeline, Step
from framework.config.schema import Target
from framework.errors import DONE, INTERRUPTED, REFUSED, ConfigError, UserError
from framework.track import road

TRAIN = Path(__file__).with_name("train.py")
STEP = "--step"  # how this file starts itself for a function, with a file that says which
DRY_RUN = "--dry-run"
ENDED = {DONE: "done", REFUSED: "refused", INTERRUPTED: "interrupted"}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [STEP]:
        worker.run(lambda: call(json.loads(Path(given[1]).read_text())))
    dry = DRY_RUN in given
    given = [argument for argument in given if argument != DRY_RUN]
    try:
        if compose.command(given, config_name="pipeline").asks:
            print(__doc__)
            sys.exit(DONE)
        chain = pipeline.check(given)
        if dry:
            show(chain)
            sys.exit(DONE)
        with directory.held(chain.run_dir):
            status = run(chain)
    except UserError as error:
        print(secrets.mask({}, given)(f"error: {error}"), file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:  # before there was a child
        sys.exit(128 + signal.SIGINT)
    sys.exit(status)


def run(chain: Pipeline) -> int:
    """Every step that is not done, in order. Returns the exit status of the first that does not finish."""
    where = chain.run_dir
    (where / directory.CONFIG).write_text(pipeline.saved(chain), encoding="utf-8")
    (where / directory.RESULT).unlink(missing_ok=True)
    with Children() as children:
        for number, step in enumerate(chain.steps, start=1):
            title = f"[{number}/{len(chain.steps)}] {step.name}"
            if done(step):
                say(f"{title}: done before, in {step.directory}")
                continue
            say(f"{title}: {step.command}")
            for line in changes(chain, step):
                say(f"  {line}")
            status = start(step, chain.trusted, children)
            if status == DONE and children.stopped is not None:
                status = INTERRUPTED  # between two steps: everything so far is kept
            road.build(where)
            if status != DONE:
                word = ENDED.get(status, "failed")
                directory.write_result(where, {"status": word, "stage": step.name, "exit_status": status})
                road.build(where)
                hint = "" if status == REFUSED else "; the same command goes on from here"
                say(f"{title}: {word} with status {status}{hint}")
                return status
    results = {step.name: directory.result(step.directory) for step in chain.steps}
    stages = {
        step.name: {"run_dir": str(step.directory), **_brief(results[step.name])} for step in chain.steps
    }
    directory.write_result(where, {"status": "done", "stages": stages})
    say(f"{len(chain.steps)} steps done; the road: {road.build(where)}")
    return DONE


def start(step: Step, trusted: Sequence[str], children: Children) -> int:
    """One step in processes of its own. Returns its exit status."""
    if step.run is not None:
        return children.run([sys.executable, str(TRAIN), *step.overrides])
    assert step.call is not None
    step.directory.mkdir(parents=True, exist_ok=True)
    kept = secrets.concealed(step.settings)
    (step.directory / directory.CONFIG).write_text(yaml.safe_dump(kept, sort_keys=False))
    with tempfile.TemporaryDirectory(prefix="sapwood-") as temporary:
        handed = Path(temporary) / "step.json"
        told = {"directory": str(step.directory), "settings": step.settings, "trusted": list(trusted)}
        handed.write_text(json.dumps(told))
        return children.run([sys.executable, __file__, STEP, str(handed)])


def call(told: dict[str, Any]) -> int:
    """In a process of its own: the function of a step. What it returns goes into `result.json`."""
    where, began = Path(told["directory"]), time.monotonic()
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries would break into our lines
    node = Target.model_validate({**told["settings"], "_partial_": True})
    function = targets.resolve(node, told["trusted"], supplied=pipeline.GIVEN)
    given = {"directory": where, "trusted": tuple(told["trusted"])}
    wanted = inspect.signature(function).parameters
    found = function(**{name: value for name, value in given.items() if name in wanted}) or {}
    seconds = round(time.monotonic() - began, 3)
    directory.write_result(where, {"status": "done", "seconds": seconds, **found})
    return DONE


def done(step: Step) -> bool:
    """Whether an earlier command has finished this very step: its directory is named after its settings."""
    return (directory.result(step.directory) or {}).get("status") == "done"


def changes(chain: Pipeline, step: Step) -> list[str]:
    """How a step differs from the last one of its name that stands in the pipeline's directory."""
    if step.directory.exists():
        kept = any(step.directory.glob("checkpoints/step-*"))
        return ["goes on from its last checkpoint"] if kept else []
    kept = chain.run_dir.glob(f"{step.name}-*/{directory.CONFIG}")
    beside = max(kept, key=os.path.getmtime, default=None)
    if beside is None:
        return []
    lines = [f"other settings than {beside.parent}, which stays:"]
    try:
        before = record.load(beside, trusted=chain.trusted).decisive() if step.run else _tree(beside)
    except ConfigError:  # of another version of ours
        return lines
    return lines + [f"  {line}" for line in directory.differences(before, secrets.concealed(step.settings))]


def show(chain: Pipeline) -> None:
    """What would be done, as commands."""
    for step in chain.steps:
        print(f"{step.name}: {'done' if done(step) else 'to do'}: {step.directory}\n  {step.command}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tree(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tree


def _brief(result: dict[str, Any] | None) -> dict[str, Any]:
    """What the pipeline's own `result.json` keeps of a step's."""
    kept = ("status", "steps", "seconds", "metrics", "chain")
    return {key: value for key, value in (result or {}).items() if key in kept}


if __name__ == "__main__":
    main()
