"""Train one run, or with -m a sweep of runs: `python launch/train.py KEY=VALUE GROUP=CHOICE ...`

Started by hand it composes and checks the configuration, then starts its own workers, one gang a run.
Started by torchrun or deepspeed it is one of the workers and joins the others. A run is found again by
its settings, so the same line goes on where it stopped. In a sweep a job that has failed stays so until
--retry-failed is typed beside -m.

Exit status: 0 done, 2 refused (nothing was loaded), 3 stopped with a checkpoint, anything else failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
from omegaconf import DictConfig

from framework.cluster import directory, environ, schedulers, worker
from framework.cluster.child import Children
from framework.cluster.machines import Alone, Machines, gathered
from framework.config import compose, jobs, record, secrets, sweeps
from framework.config.schema import Run
from framework.errors import DONE, INTERRUPTED, REFUSED, ConfigError, SapwoodError, UserError

TELL_EVERY_S = 2.0  # tokenising a large file takes minutes, and silence looks like a hang
WORKER = "--worker"  # how our own gang starts this file, with the path of a run
JOB = "--job"  # how a sweep starts it, likewise
KEEP = "--keep"  # how the command of a sweep starts it, with what was typed


@dataclass(frozen=True)
class Parts:
    """What happens to a run, apart from its launching."""

    prepare: Callable[[Run], None]  # once on each machine, before any worker
    work: Callable[[Run], int]  # on every rank; its exit status
    program: Path  # what starts this again: for one rank, for one job of a sweep


@dataclass(frozen=True)
class Outcome:
    """How a run ended, for the shell and for a sweeper."""

    status: int
    objective: float | None = None
    error: str | None = None  # last line of what a failure said
    ended_by: int | None = None  # the signal that ended a rank


def main(arguments: Sequence[str] | None = None, *, parts: Parts | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    arguments = environ.strip_launcher_arguments(sys.argv[1:] if arguments is None else arguments)
    parts = parts or Parts(_prepare, _work, Path(__file__))
    hide = secrets.mask({}, arguments)
    sys.excepthook = lambda *raised: print(
        hide("".join(traceback.format_exception(*raised))), file=sys.stderr
    )
    if arguments[:1] == [WORKER]:
        worker.run(lambda: parts.work(record.unpacked(Path(arguments[1]).read_text())))
    if arguments[:1] == [JOB]:
        job(Path(arguments[1]), parts)
    if arguments[:1] == [KEEP]:
        sys.exit(sweeps.keep(arguments[1:], program=(str(parts.program), JOB)))
    try:
        place = environ.place(os.environ)
        if place is not None:
            worker.run(lambda: join(arguments, place, parts))
        launch(arguments, parts)
    except UserError as error:
        print(hide(f"error: {error}"), file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:  # before there were workers
        sys.exit(128 + signal.SIGINT)


def launch(arguments: Sequence[str], parts: Parts) -> NoReturn:
    """Hydra makes one run of the arguments, or the runs of a sweep; each gets its own gang."""
    node = schedulers.node(os.environ)
    arguments = [*(node.overrides() if node else ()), *arguments]
    typed = sweeps.settings(arguments)
    compose.check(typed)
    asked = compose.command(typed)
    if asked.multirun and not asked.asks:
        with Children() as children:  # a terminal's signals reach the sweep through this process alone
            sys.exit(children.run([sys.executable, str(parts.program), KEEP, *arguments]))
    flags = list(typed)
    for override in asked.overrides:
        flags.remove(override)
    outcomes: list[Outcome] = []

    def task(config: DictConfig) -> None:
        try:
            outcomes.append(start(compose.composed(config), parts))
        except UserError as error:
            print(secrets.mask({}, arguments)(f"error: {error}"), file=sys.stderr)
            outcomes.append(Outcome(REFUSED))

    sys.argv[1:] = [*asked.overrides, *flags]  # Hydra does not read settings on both sides of a flag
    hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="train")(task)()
    sys.exit(outcomes[0].status if outcomes else DONE)


def job(file: Path, parts: Parts) -> NoReturn:
    """One job of a sweep, in a process of its own. Its last words go beside `file`, where the sweep looks."""
    run = record.unpacked(file.read_text())
    try:
        outcome = start(run, parts)
    except UserError as error:
        said = record.masked(run)(str(error))
        print(f"error: {said}", file=sys.stderr)
        outcome = Outcome(REFUSED, error=said)
    file.with_name(jobs.OUTCOME).write_text(json.dumps(asdict(outcome)))
    sys.exit(outcome.status)


def start(run: Run, parts: Parts) -> Outcome:
    """Train one run with workers of our own, from its start or from where it stopped.

    Raises UserError where the run cannot be started.
    """
    where, options, hide = Path(run.run_dir), run.launch, record.masked(run)
    try:
        with ExitStack() as stack:
            machines = stack.enter_context(
                gathered(
                    rank=options.node_rank,
                    count=options.nnodes,
                    address=options.master_addr,
                    port=options.master_port,
                    timeout_s=options.timeout_s,
                )
            )

            def look() -> Any:  # machine 0, for all: the others may share the directory, or not see it
                stack.enter_context(directory.held(where))
                finished = begin(run)
                return {"finished": finished and asdict(finished), "decisive": run.decisive()}

            found = machines.first(look)
            machines.each(lambda: _same(found["decisive"], run))
            if found["finished"] is not None:
                print(f"{where}: already done; its model and metrics are there", file=sys.stderr)
                return Outcome(**found["finished"])
            if machines.count > 1:
                written_once(run, parts, machines.first)
            machines.each(lambda: parts.prepare(run))
            if machines.rank == 0:
                keep(run)
            try:
                stopped = _train(run, parts, machines)
            except SapwoodError as error:
                earlier = directory.result(where) or {}
                if machines.rank == 0 and earlier.get("status") != "failed":
                    said = hide(str(error)).splitlines()[-1]
                    directory.write_result(where, {"status": "failed", "error": said})
                raise
            return Outcome(**machines.first(lambda: asdict(_outcome(directory.result(where), stopped))))
    except UserError:
        raise
    except SapwoodError as error:  # a worker, or another machine
        of_worker = isinstance(error, worker.WorkerFailed)
        print(hide(str(error) if of_worker else f"error: {error}"), file=sys.stderr)
        status = REFUSED if of_worker and error.status == REFUSED else worker.FAILED
        ended_by = -error.status if of_worker and error.status < 0 else None
        return Outcome(status, error=hide(_last_words(error)), ended_by=ended_by)


def _train(run: Run, parts: Parts, machines: Machines | Alone) -> signal.Signals | None:
    """The workers of this machine, from start to end. Returns the signal that stopped them, if one did."""
    from framework.cluster import gang  # torch takes seconds to import; a refusal must not wait for it

    options = run.launch
    with tempfile.TemporaryDirectory(prefix="sapwood-") as temporary:
        handed = Path(temporary) / "run.json"
        handed.write_text(record.packed(_resumable(run)))
        processes = f"{options.nproc} process{'es' * (options.nproc != 1)}"
        print(f"{run.run_dir}: starting {processes}", file=sys.stderr)
        return gang.launch(
            [sys.executable, str(parts.program), WORKER, str(handed)],
            nproc=options.nproc,
            log_dir=Path(run.run_dir) / directory.LOGS,
            machines=machines,
            run_id=run.identity() if options.nnodes > 1 else Path(run.run_dir).name,
            threads=options.threads,
            grace_s=options.grace_s,
            timeout_s=options.timeout_s,
            max_restarts=options.max_restarts,
            mask=record.masked(run),
        )


def begin(run: Run) -> Outcome | None:
    """Look at what earlier starts have left: the outcome of a run that is done, None for one to train.

    Raises ConfigError where the directory holds another run, or one that was to start anew.
    """
    where = Path(run.run_dir)
    kept = where / directory.CONFIG
    if run.resume == "never":
        if any((where / "checkpoints").glob("step-*")):
            raise ConfigError(
                f"resume=never: {where} holds checkpoints already; expected a new directory; "
                "type run_dir=OTHER, or resume=auto to go on"
            )
        return None
    if kept.exists():
        earlier = record.load(kept, trusted=run.trusted_packages)
        changed = directory.differences(earlier.decisive(), _as_kept(run).decisive())
        if changed:
            lines = "\n  ".join(changed)
            raise ConfigError(
                f"run_dir: {where} holds a run of other settings:\n  {lines}\n"
                "expected the same ones, to go on with it; type run_dir=OTHER, or leave run_dir out"
            )
    result = directory.result(where)
    return _outcome(result, None) if result is not None and result["status"] == "done" else None


def keep(run: Run) -> None:
    """Write `config.yaml` at the first start of a run, and clear away how the last start ended."""
    where = Path(run.run_dir)
    kept = where / directory.CONFIG
    if run.resume == "never" or not kept.exists():
        kept.write_text(record.saved(run), encoding="utf-8")
    (where / directory.RESULT).unlink(missing_ok=True)


def join(arguments: Sequence[str], place: environ.Place, parts: Parts) -> int:
    """Be one of the workers that another launcher has started. Returns the exit status.

    Rank 0 composes, looks at the directory and holds it; what it refuses is refused on all ranks.
    """
    from framework.cluster.meeting import Meeting

    meeting = Meeting(place)
    with ExitStack() as stack:

        def decide() -> Any:
            asked = compose.command(arguments)
            if asked.multirun or asked.asks:
                raise ConfigError("-m, --cfg, --help and the like are for `python launch/train.py` alone")
            told = [*arguments, *place.overrides()]
            compose.check(told)
            run = compose.compose(
                compose.command(told).overrides, config_name=asked.config_name, config_dir=asked.config_dir
            )
            stack.enter_context(directory.held(Path(run.run_dir)))
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                run = _resumable(run)
            return {"done": begin(run) is not None, "run": record.packed(run)}

        answer = meeting.first(decide)
        run = record.unpacked(answer["run"])
        if answer["done"]:
            if place.rank == 0:
                print(f"{run.run_dir}: already done; its model and metrics are there", file=sys.stderr)
            return DONE
        if place.world_size > place.local_size:
            written_once(run, parts, meeting.first)
        meeting.each(lambda: parts.prepare(run) if place.local_rank == 0 else None)
        # what preparing has found: no other rank asks an environment again
        run = record.unpacked(meeting.first(lambda: record.packed(run)))
        if place.rank == 0:
            keep(run)
        return parts.work(run)


def written_once(run: Run, parts: Parts, first: Callable[[Callable[[], Any]], Any]) -> None:
    """What the start model writes is written on the first machine, which tells the others. Collective."""
    if not run.synthesised:
        return
    from framework.config import selfmade

    def write() -> Any:
        parts.prepare(run)
        return selfmade.packed(run)

    selfmade.unpack(run, first(write))


def _last_words(error: SapwoodError) -> str:
    """What a failure comes down to: of a traceback the last line, and whose it was."""
    *_, said, who = ["", *str(error).splitlines()]
    who = who.removeprefix("error: ")
    return f"{said.strip()} ({who})" if said else who


def _same(decisive: dict[str, Any], run: Run) -> None:
    """Refuse to train something else here than on machine 0."""
    if changed := directory.differences(decisive, run.decisive()):
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"machine {run.launch.node_rank} was started with other settings than machine 0:\n  {lines}\n"
            "expected the same command on all machines"
        )


def _outcome(result: dict[str, Any] | None, stopped: signal.Signals | None) -> Outcome:
    """What `result.json` and the signal that ended the workers come to."""
    status = result["status"] if result is not None else None
    if result is not None and status == "done":
        return Outcome(DONE, result.get("objective"))
    if status == "interrupted":
        return Outcome(INTERRUPTED)
    if stopped is not None:
        print(f"ended by {stopped.name} with no checkpoint of this start", file=sys.stderr)
        return Outcome(128 + stopped)
    print("the workers have ended without a result", file=sys.stderr)
    return Outcome(worker.FAILED)


def _resumable(run: Run) -> Run:
    """What workers are told: the directory was looked at, so a start after a failure goes on."""
    return run.model_copy(update={"resume": "auto"}) if run.resume == "never" else run


def _as_kept(run: Run) -> Run:
    """The run as it would be read back from its `config.yaml`, where secrets are not."""
    with tempfile.TemporaryDirectory(prefix="sapwood-") as temporary:
        path = Path(temporary) / directory.CONFIG
        path.write_text(record.saved(run), encoding="utf-8")
        return record.load(path, trusted=run.trusted_packages)


def _prepare(run: Run) -> None:
    from framework.config import build

    told = time.monotonic()

    def progress(source: str, rows: int) -> None:
        nonlocal told
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            print(f"reading {source}: {rows:,} rows", file=sys.stderr)

    build.prepare(run, progress=progress)


def _work(run: Run) -> int:
    from framework.config.work import work

    return work(run)


if __name__ == "__main__":
    main()
