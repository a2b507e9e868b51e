"""Weights & Biases, whose library has its only home here. Never stops a run and never makes it wait.

A thread of its own talks to the library, so that training goes on whatever the server does. What
leaves the machine is what is logged and the configuration given: no command line, environment, code,
git remote or console output. Steps are a metric ("step"), never wandb's own counter, which drops what
comes out of order. Metrics are called as `panels` says, so that the page's sections are its panels. What a
server did not get stays in the run directory for `wandb sync`.
"""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import wandb

from framework.track import jsonl, panels
from framework.track.ledger import OFFLINE, Ledger


class Wandb:
    """The run's page. `close` waits at most `timeout_s` for what is not sent yet; nothing else waits.

    `config` is stored as it is, so it must hold no secret. `group` is the experiment or sweep,
    `job_type` the stage. `mode` is "auto" (online with a key, else offline), "online" or "offline";
    a server that has not answered after half of `timeout_s` makes it offline. The run's id is
    kept in `run_dir`/wandb/run_id, so a resumed run goes on on the same page: with what metrics.jsonl has and
    the page has not, and without what the page has (see `ledger`); goes behind the tracker that writes it.
    An offline run is one directory, whole at every start. Under `wandb agent` the run is the sweep's.

    `objective` is the held-out metric that is also logged as "objective". With `checkpoints` each checkpoint
    and model is noted as an artifact: a reference to its place, nothing is uploaded. `say` gets
    plain-language notices, from another thread.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        config: Mapping[str, Any],
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        mode: str = "auto",
        timeout_s: float = 10.0,
        objective: str | None = None,
        checkpoints: bool = False,
        say: Callable[[str], None] = logging.getLogger(__name__).warning,
    ) -> None:
        self._say = say
        self._timeout_s = timeout_s
        self._work: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._later = ""  # how what is not sent can be sent
        self._run_dir, self._objective, self._checkpoints = Path(run_dir), objective, checkpoints
        self._ledger = Ledger(self._run_dir / "wandb")
        metrics = self._run_dir / "metrics.jsonl"
        self._before = metrics.stat().st_size if metrics.exists() else 0  # bytes that earlier starts wrote
        online = mode == "online" or (mode == "auto" and _has_key())
        if mode == "auto" and not online:
            say("W&B: no key here (WANDB_API_KEY or `wandb login`), so this run is recorded offline")

        # A first start sent again by hand is written over its own rows; one that resumes is put behind them.
        again = (self._run_dir / "wandb" / "run_id").exists() or _given_id() is not None

        def init(mode: str) -> Any:
            return wandb.init(
                dir=str(run_dir),
                project=project,
                entity=entity,
                group=group,
                job_type=job_type,
                name=name,
                tags=list(tags),
                config=dict(config),
                id=_run_id(Path(run_dir)),
                resume="allow" if again else None,
                mode=mode,  # type: ignore[arg-type]
                settings=_settings(timeout_s),
            )

        self._thread = threading.Thread(target=self._serve, args=(init, online), name="wandb", daemon=True)
        self._thread.start()

    def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
        if kind != "event":
            kept = dict(metrics)  # whoever reports may fill the same mapping anew before the thread is there
            self._work.put(lambda run: self._send(run, kind, kept, step))

    def artifact(self, path: Path, *, kind: str) -> None:
        if self._checkpoints and kind in ("checkpoint", "model"):
            self._work.put(lambda run: self._refer(run, path, kind))

    def close(self, status: str) -> None:
        self._work.put(lambda run: run.finish(exit_code=0 if status == "done" else 1))
        self._work.put(None)
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            self._say(f"W&B has not taken everything in time; metrics.jsonl is complete{self._later}")

    # -- in the thread ------------------------------------------------------------------------------

    def _serve(self, init: Callable[[str], Any], online: bool) -> None:
        try:
            run = self._start(init, online)
        except Exception as error:
            self._say(f"W&B records nothing in this run: {_short(error)}")
            return
        failed = False
        for work in chain([self._catch_up], iter(self._work.get, None)):
            try:
                work(run)
            except Exception as error:
                if not failed:
                    self._say(f"W&B did not take a record; metrics.jsonl has all: {_short(error)}")
                failed = True

    def _catch_up(self, run: Any) -> None:
        """What earlier starts have recorded, and this page has not."""
        if self._before == 0:
            return
        for line in jsonl.read(self._run_dir / "metrics.jsonl", most=self._before):
            kind, step = line.pop("kind"), line.pop("step")
            if kind != "event":
                self._send(run, kind, jsonl.numbers(line), step)

    def _send(self, run: Any, kind: str, metrics: Mapping[str, Any], step: int) -> None:
        if not self._ledger.lacks(kind, step):
            return
        record: dict[str, Any] = (
            _table(metrics["rows"]) if kind == "samples" else panels.placed(kind, metrics)
        )
        if kind == "eval" and self._objective is not None and self._objective in metrics:
            record[panels.OBJECTIVE] = metrics[self._objective]
        run.log({**record, "step": step})

    def _refer(self, run: Any, path: Path, kind: str) -> None:
        """Note a directory as an artifact, by its place alone: it has hashes of its own, and hashing it again
        would take minutes."""
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        artifact.add_reference(path.absolute().as_uri(), name=path.name, checksum=False)
        run.log_artifact(artifact, aliases=["latest", path.name])

    def _start(self, init: Callable[[str], Any], online: bool) -> Any:
        # Its error reports would carry tracebacks to the server, and hold up the exit for seconds.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        wandb.setup(wandb.Settings(silent=True))  # else it announces where it found the key
        run = None
        if online:
            try:
                run = init("online")
                self._say(f"W&B: {run.url}")
            except Exception as error:
                self._say(f"W&B does not answer, so this run is recorded offline: {_short(error)}")
                wandb.teardown(exit_code=1)  # the id would count as in use otherwise
        if run is None:
            run = init("offline")
            self._say(f"W&B: send this run later with `wandb sync {Path(run.dir).parent}`")
        directory = Path(run.dir).parent
        offline = directory.name.startswith(OFFLINE)
        if not (offline or run.resumed):
            self._later = f", and all is sent by `wandb sync --include-online {directory}`"
        run.define_metric("step", hidden=True)
        for name in ("samples", panels.OBJECTIVE):
            run.define_metric(name, step_metric="step")
        for section, summary in panels.SECTIONS.items():  # no two may fit: which one rules would be chance
            run.define_metric(f"{section}/*", step_metric="step", summary=summary)
        self._ledger.begin(
            directory.name,
            count=None if offline else run.starting_step,
            last_step=int(run.summary.get("step", -1)) if run.resumed else -1,
        )
        return run


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples as they are shown."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    return {"samples": wandb.Table([*columns], cells)}


def _settings(timeout_s: float) -> wandb.Settings:
    return wandb.Settings(
        init_timeout=timeout_s / 2,  # half, so that a very short run still gets to record offline
        login_timeout=timeout_s / 2,
        finish_timeout=timeout_s,
        silent=True,
        console="off",
        program="",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


def _run_id(run_dir: Path) -> str:
    """The id kept in the run directory, made on the first start. That of a `wandb agent` rules."""
    path = run_dir / "wandb" / "run_id"
    given = _given_id()
    if given is not None or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("run_id.tmp")
        temporary.write_text(given or secrets.token_hex(4))
        os.replace(temporary, path)
    return path.read_text().strip()


def _given_id() -> str | None:
    """The id that `wandb agent` gives."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def _has_key() -> bool:
    """Whether a key is found where wandb looks for one: the environment, else a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _short(error: Exception) -> str:
    """The first line of an error, which may be a page long."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
