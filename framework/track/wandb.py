"""Weights & Biases, whose library has its only home here. Never stops a run and never makes it wait.

A thread of its own talks to the library, so that training goes on whatever the server does. What
leaves the machine is what is logged and the configuration given: no command line, environment, code,
git remote or console output. Steps are a metric ("step"), never wandb's own counter, which drops what
comes out of order. What a server did not get stays in the run directory for `wandb sync`.
"""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import wandb


class Wandb:
    """The run's page. `close` waits at most `timeout_s` for what is not sent yet; nothing else waits.

    `config` is stored as it is, so it must hold no secret. `group` is the experiment or sweep,
    `job_type` the stage. `mode` is "auto" (online with a key, else offline), "online" or "offline";
    a server that has not answered after half of `timeout_s` makes it offline. The run's id is
    kept in `run_dir`/wandb/run_id, so a resumed run goes on on the same page; records of steps that the
    server has already are not sent twice. `say` gets plain-language notices, from another thread.
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
        say: Callable[[str], None] = logging.getLogger(__name__).warning,
    ) -> None:
        self._say = say
        self._timeout_s = timeout_s
        self._work: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._known = -1  # the last step that the server had when this process joined
        online = mode == "online" or (mode == "auto" and _has_key())
        if mode == "auto" and not online:
            say("W&B: no key here (WANDB_API_KEY or `wandb login`), so this run is recorded offline")

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
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                settings=_settings(timeout_s),
            )

        self._thread = threading.Thread(target=self._serve, args=(init, online), name="wandb", daemon=True)
        self._thread.start()

    def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
        def send(run: Any) -> None:
            if kind not in ("train", "eval", "retain") or step > self._known:
                run.log({**_record(kind, metrics), "step": step})

        if kind != "event":
            self._work.put(send)

    def artifact(self, path: Path, *, kind: str) -> None:
        """Nothing is uploaded: artifacts are found by their place in the run directory."""

    def close(self, status: str) -> None:
        self._work.put(lambda run: run.finish(exit_code=0 if status == "done" else 1))
        self._work.put(None)
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            self._say("W&B has not taken everything in time; metrics.jsonl is complete")

    # -- in the thread ------------------------------------------------------------------------------

    def _serve(self, init: Callable[[str], Any], online: bool) -> None:
        try:
            run = self._start(init, online)
        except Exception as error:
            self._say(f"W&B records nothing in this run: {_short(error)}")
            return
        failed = False
        while (work := self._work.get()) is not None:
            try:
                work(run)
            except Exception as error:
                if not failed:
                    self._say(f"W&B did not take a record; metrics.jsonl has all: {_short(error)}")
                failed = True

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
        run.define_metric("*", step_metric="step")
        if run.resumed:
            self._known = int(run.summary.get("step", -1))
        return run


def _record(kind: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as they are named on the page; samples are a table."""
    if kind != "samples":
        return {f"{kind}/{key}": value for key, value in metrics.items()}
    rows = metrics["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return {
        "samples": wandb.Table(columns, [[str(row.get(column, "")) for column in columns] for row in rows])
    }


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
    """The id kept in the run directory, made on the first start."""
    path = run_dir / "wandb" / "run_id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("run_id.tmp")
        temporary.write_text(secrets.token_hex(4))
        os.replace(temporary, path)
    return path.read_text().strip()


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
