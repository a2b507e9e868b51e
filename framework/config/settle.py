"""From a composed tree to a run with nothing left open: one of each pair, absolute paths, a directory."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.config.nodes import Source
from framework.config.schema import Run, digest


def validated(tree: Mapping[str, Any], *, sweep: Path | None = None) -> Run:
    """The run a composed tree asks for, with local paths made absolute and `run_dir` filled in.

    The default directory of a job of a `sweep` lies in the sweep's and tells jobs apart that differ in
    how they run only. Raises pydantic's ValidationError; `config.compose` words it for people.
    """
    chosen = tree.get("run_dir")
    settled = _settled({**tree, "run_dir": "." if chosen is None else chosen})
    run = Run.model_validate_json(json.dumps(settled))
    run = _absolute(run)
    if chosen is None:
        mark = run.identity()
        if sweep is not None:
            mark = digest(run.model_dump(mode="json", exclude={"run_dir", "resume", "tracker"}))
        chosen = (sweep or Path("runs")) / f"{run.name or run.stage.name}-{mark}"
    return run.model_copy(update={"run_dir": str(Path(chosen).expanduser().absolute())})


def _absolute(run: Run) -> Run:
    """Local paths as absolute ones, so that workers started elsewhere find them; hub ids as they are."""

    def local(path: str) -> str:
        whole = str(Path(path).expanduser().absolute())
        return whole if Path(whole).exists() or glob.glob(whole) else path

    def sources(given: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(source.model_copy(update={"path": local(source.path)}) for source in given)

    model = {"path": local(run.model.path)}
    if run.model.chat_template is not None and "{" not in run.model.chat_template:  # else the template itself
        model["chat_template"] = local(run.model.chat_template)
    stage = {
        key: local(path)
        for key in ("critic", "reference_path", "teacher")
        if (path := getattr(run.stage, key, None)) is not None
    }
    evaluate = {"retention": sources(run.evaluate.retention), "prompts": sources(run.evaluate.prompts)}
    strategy = {}
    if (directory := getattr(run.strategy, "nvme_path", None)) is not None:
        strategy["nvme_path"] = str(Path(directory).expanduser().absolute())
    prompts = run.synthesis.prompts
    synthesis = {} if prompts is None else {"prompts": local(prompts)}
    carry = run.replay.carry if run.replay.carry in (None, "auto") else local(run.replay.carry)
    replay = {"sources": sources(run.replay.sources), "carry": carry}
    reward = {} if run.reward.model is None else {"model": local(run.reward.model)}
    data = {
        "train": sources(run.data.train),
        "eval": sources(run.data.eval),
        "cache_dir": str(Path(run.data.cache_dir).expanduser().absolute()),
    }
    return run.model_copy(
        update={
            "resume": run.resume if run.resume in ("auto", "never") else local(run.resume),
            "model": run.model.model_copy(update=model),
            "stage": run.stage.model_copy(update=stage),
            "synthesis": run.synthesis.model_copy(update=synthesis),
            "reward": run.reward.model_copy(update=reward),
            "strategy": run.strategy.model_copy(update=strategy),
            "evaluate": run.evaluate.model_copy(update=evaluate),
            "data": run.data.model_copy(update=data),
            "retain": run.retain.model_copy(update={"prompts": sources(run.retain.prompts)}),
            "protect": run.protect.model_copy(update={"sources": sources(run.protect.sources)}),
            "replay": run.replay.model_copy(update=replay),
        }
    )


def _settled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A number of steps rules over a share, so that one number decides and one is hashed."""
    settled = dict(tree)
    if settled.get("steps") is not None:
        settled["epochs"] = None
    schedule = settled.get("schedule")
    if isinstance(schedule, Mapping) and schedule.get("warmup_steps") is not None:
        settled["schedule"] = {**schedule, "warmup_fraction": None}
    return settled
