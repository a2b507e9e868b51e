"""Twelve letters, in which an arm takes seconds: a model of 150k parameters learns three skills and forty
facts, then a cipher (tests/train/characters.py).

An arm is one way of learning the cipher: what is left of the skills (accuracy of whole answers), of the facts
that no replay holds, and whether the cipher is learnt. Perplexity is that of 120 rows, and of 2,200 where an
arm ends in `-many`: their bound is close to what was measured.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[2] / room) for room in ("tests/train", "tests"))

import characters

REPLAY = "replay.sources=[{path: REPLAY, name: replay}]"
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)  # of perplexity on the skills
PERCENT = (0.5, 1, 2, 5, 10, 30)
BACK = ["replay=budget", REPLAY, "protect=interpolate"]
MANY = ["evaluate.retention=[{path: MANY, name: skills}]", "retain.rows=3000", "retain.every=5"]


def fixed(percent: float) -> list[str]:
    """A share of replay that is given."""
    return ["replay=fixed", REPLAY, f"replay.fraction={percent / 100}"]


ARMS: dict[str, list[str]] = {
    "none": [],
    **{f"replay-{p}": fixed(p) for p in PERCENT},
    "replay-10-start": ["replay=start", REPLAY, "replay.fraction=0.1"],
    **{f"l2sp-{c}": ["protect=l2sp", f"protect.pull={c}"] for c in (3, 10, 30)},
    **{f"ewc-{c}": ["protect=ewc", f"protect.pull={c}", f"protect.{REPLAY[7:]}"] for c in (3, 10, 30)},
    "lr-10th": ["protect=low_rate"],
    "lora": ["adapter=lora", "adapter.rank=8", "optim.lr=5e-3"],
    "stm": ["loss=stm"],
    "flow": ["loss=flow"],
    "freeze": ["protect=freeze"],
    "average": ["protect=average"],
    "interpolate-0.1": ["protect=interpolate", "replay.max_forgetting=0.1"],
    "replay-2-half-way": ["replay=fixed", REPLAY, "replay.fraction=0.02", "protect.interpolate=0.5"],
    **{f"budget-{b}": ["replay=budget", REPLAY, f"replay.max_forgetting={b}"] for b in BUDGETS},
    **{f"budget-{b}-back": [*BACK, f"replay.max_forgetting={b}"] for b in BUDGETS},
    **{f"replay-{p}-many": [*fixed(p), *MANY] for p in PERCENT},
    **{f"budget-{b}-back-many": [*BACK, *MANY, f"replay.max_forgetting={b}"] for b in BUDGETS},
}

PACKAGES = ("torch", "transformers", "peft", "numpy")
GAINED, KEPT = "task", {"skills": "skills kept"}
SHOWN = ("task", "skills", "facts", "perplexity", "perplexity_high", "kl", "replay", "x", "cpu_seconds")


class World:
    """The files of the world and a model that has learnt skills and facts with `seed`."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed = place / f"seed-{seed}", seed

    def prepare(self) -> None:
        """Write the files and train the start model, where that was not done."""
        self.place.mkdir(parents=True, exist_ok=True)
        self.files = characters.write_data(self.place)
        if not (self.place / "start/result.json").exists():
            characters.write_model(self.place / "untrained")
            self._train(
                "start",
                f"model.path={self.place}/untrained",
                f"data.train=[{{path: {self.files['learn']}}}]",
                "steps=600",
                "optim.lr=3e-3",
            )

    def arm(self, name: str) -> dict[str, Any]:
        """What is left after the cipher was learnt in the way of that name."""
        result = self._train(
            name,
            f"model.path={self.place}/start/model",
            f"data.train=[{{path: {self.files['cipher']}}}]",
            f"data.eval=[{{path: {self.files['held']}, name: task}}]",
            f"evaluate.retention=[{{path: {self.files['skills']}, name: skills}}]",
            "steps=200",
            "optim.lr=1e-3",
            *(
                text.replace("REPLAY", str(self.files["replay"])).replace("MANY", str(self.files["many"]))
                for text in ARMS[name]
            ),
        )
        kept, budget = result["retention"]["skills"], result.get("budget", {})
        return {
            "task": self._accuracy(name, "held"),
            "skills": self._accuracy(name, "skills"),
            "facts": self._accuracy(name, "facts"),
            "perplexity": kept["relative"],
            "perplexity_high": kept["relative_high"],
            "kl": kept["kl"],
            "trained_tokens": result["trained_tokens"],
            "replay": budget.get("mean_replay"),
            "verdict": budget.get("verdict"),
            "x": result.get("interpolation", {}).get("x"),
        }

    def _accuracy(self, name: str, kind: str) -> float:
        where = self.place / name / "model"
        if (where / "adapter_config.json").exists():
            where = merged(where)
        return characters.accuracy(where, self.files[kind])

    def _train(self, name: str, *overrides: str) -> dict[str, Any]:
        shutil.rmtree(self.place / name, ignore_errors=True)
        return characters.train(self.place, name, f"seed={self.seed}", *overrides)


def derived(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nothing besides what was measured."""
    return runs


def merged(adapter: Path) -> Path:
    """The plain model of an adapter's directory, beside it."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    where = adapter.with_name("merged")
    if not where.exists():
        AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(where)
        AutoTokenizer.from_pretrained(adapter).save_pretrained(where)
    return where
