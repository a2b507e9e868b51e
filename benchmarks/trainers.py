"""What contenders share: marks of time and memory, our trainer without its disk, foreign ones with marks."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEQUENCES = 8  # examples (of pairs: pairs) per optimizer step
LEARNING_RATE = 1e-5
LITTLE_MEMORY = ("model.activation_checkpointing=full", "batch.tokens_per_micro=2048")  # of ours

Counts = Callable[[Mapping[str, Any]], dict[str, int]]
"""What to count of a foreign trainer's micro-batch."""


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has started and that still run."""
    import psutil

    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def peak_kib() -> int:
    """Most resident memory of this process. `ru_maxrss` would begin with that of the process before exec."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


@dataclass
class Marks:
    """CPU-seconds, counts and phases after each optimizer step; the first `warmup` steps are not counted."""

    warmup: int = 1
    steps: list[tuple[float, dict[str, float], dict[str, float]]] = field(default_factory=list)
    spent: Counter[str] = field(default_factory=Counter)  # seconds of each phase until now
    before: float | None = None  # seconds of work for all steps done before the first, where there may be any
    first_loss: float | None = None
    peak: int = 0  # KiB, at the last step
    _inner: float = 0.0

    def step(self, **counts: float) -> None:
        """An optimizer step has ended."""
        self.steps.append((cpu_seconds(), counts, dict(self.spent)))
        self.peak = peak_kib()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is spent inside belongs to `name`, except for phases inside of it."""
        began, outer, self._inner = cpu_seconds(), self._inner, 0.0
        try:
            yield
        finally:
            spent = cpu_seconds() - began
            self.spent[name] += spent - self._inner
            self._inner = outer + spent

    def during(self, name: str, called: Callable[..., Any]) -> Callable[..., Any]:
        """`called`, all of it in phase `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return called(*args, **kwargs)

        return timed

    def report(self) -> dict[str, Any]:
        """Rates after the warm-up, seconds by phase ("update_s": the rest), totals with the warm-up.

        "again" is what another pass would run at, without the work done before the first step.
        """
        start, _, earlier = self.steps[self.warmup - 1]
        end, _, later = self.steps[-1]
        taken = [counts for _, counts, _ in self.steps]
        counted = {name: sum(c[name] for c in taken[self.warmup :]) for name in taken[0]}
        total = {name: int(sum(c[name] for c in taken)) for name in taken[0]}
        own = end - start
        share = (len(self.steps) - self.warmup) / len(self.steps)
        seconds = own + share * (self.before or 0.0)
        again = {} if self.before is None else {f"{n}_per_cpu_s_again": c / own for n, c in counted.items()}
        phases = {name: later[name] - earlier.get(name, 0.0) for name in later}
        return {
            **{f"{name}_per_cpu_s": count / seconds for name, count in counted.items()},
            **again,
            **{f"{name}_s": spent for name, spent in phases.items()},
            **({"update_s": own - sum(phases.values())} if phases else {}),
            "cpu_s": seconds,
            "steps": len(self.steps),
            **total,
            "first_loss": self.first_loss,
            "peak_gib": self.peak / 2**20,
        }


def ours(
    model: Path,
    data: Path,
    marks: Marks,
    settings: Sequence[str],
    *,
    counts: Sequence[str],
    prepare: Callable[[Any], Any] = lambda stage: stage,
    building: bool = False,
) -> None:
    """What `python launch/train.py SETTINGS` does on one rank, without writing anything.

    `counts` are names of numbers of a training line; `prepare` may dress the stage. With `building`, what
    building the stage costs is marked as work for all steps.
    """
    from framework.config import build, compose, judging, stages
    from framework.config.stage import ONLINE
    from framework.strategy.world import connect
    from framework.train.trainer import train

    class Record:
        def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
            if kind == "train":
                marks.first_loss = metrics["loss"] if marks.first_loss is None else marks.first_loss
                marks.step(**{name: metrics[name] for name in counts})

        def artifact(self, path: Path, *, kind: str) -> None: ...
        def close(self, status: str) -> None: ...

    class Nowhere:
        def save(self, *_: Any) -> Path:
            return Path()

    class Never:
        requested = False

    with tempfile.TemporaryDirectory() as temporary:
        run = compose.compose(
            [
                f"model.path={model}",
                f"data.train=[{{path: {data}}}]",
                f"data.cache_dir={temporary}/cache",
                f"run_dir={temporary}/run",
                f"optim.lr={LEARNING_RATE}",
                "data.workers=1",
                "launch.device=cpu",
                "launch.threads=1",
                *settings,
            ]
        )
        prepared = build.prepare(run)
        world = connect("cpu", timeout_s=60)
        engine = build.build_engine(prepared, world)
        rollout = judging.build_rollout(prepared, world) if run.stage.name in ONLINE else None
        began = cpu_seconds()
        stage = prepare(stages.build_stage(prepared, world, engine, rollout))
        if building:
            marks.before = cpu_seconds() - began
        train(
            stage,
            engine,
            build.plan(prepared),
            learning_rate=build.learning_rate(prepared),
            checkpoints=Nowhere(),
            tracker=Record(),
            stop=Never(),
        )
        world.close()


def trl(
    trainer: Any,
    config: Any,
    model: Path,
    data: Path,
    marks: Marks,
    settings: Mapping[str, Any],
    *,
    counts: Counts,
    **arguments: Any,
) -> None:
    """One of TRL's trainers with `settings` beside its defaults."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        made = timed(trainer, marks, counts)(
            model=str(model),
            args=config(**{**common(temporary), **settings}),
            train_dataset=load_dataset("json", data_files=str(data), split="train", cache_dir=temporary),
            processing_class=AutoTokenizer.from_pretrained(model),
            **arguments,
        )
        made.train()
        marks.first_loss = made.state.log_history[0]["loss"]


def unchecked_bf16() -> dict[str, Any]:
    """What makes each of TRL's trainers faster here, besides its own flags: nothing is computed twice, and
    weights are not cast in every layer."""
    import torch

    return {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": torch.bfloat16}}


def common(directory: str) -> dict[str, Any]:
    """What all trainers are told: the same step size, the same optimizer, nothing written."""
    return {
        "output_dir": directory,
        "per_device_train_batch_size": SEQUENCES,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def timed(trainer: Any, marks: Marks, counts: Counts) -> Any:
    """The trainer, with a mark after every optimizer step and the counts of what went into it."""
    from transformers import TrainerCallback

    class Timed(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen = self.seen = Counter[str]()

            class Mark(TrainerCallback):  # type: ignore[misc]
                def on_step_end(self, *_: Any, **__: Any) -> None:
                    marks.step(**seen)
                    seen.clear()

            self.add_callback(Mark())

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.seen.update(counts(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Timed


@contextmanager
def fixed_length() -> Iterator[None]:
    """Our sampler without a token that ends an answer: all answers have the greatest length."""
    from framework.rollout import hf

    before = hf.end_tokens
    hf.end_tokens = lambda *_: frozenset()
    try:
        yield
    finally:
        hf.end_tokens = before


def phases_of(stage: Any, marks: Marks) -> Any:
    """Our stage that rolls out, its parts timed: what is neither generation nor reward is scoring."""
    rollout = stage.rollout
    rollout.update = marks.during("generation", rollout.update)
    rollout.generate = marks.during("generation", rollout.generate)
    stage.reward = marks.during("reward", stage.reward)
    stage.next = marks.during("scoring", stage.next)
    return stage
