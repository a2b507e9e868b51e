"""What each protection keeps and costs, in a world of twelve letters where an arm takes seconds.

    python benchmarks/forgetting.py                      # all arms, three seeds: about half an hour
    python benchmarks/forgetting.py --arms none,replay-10 --seeds 0 --out /tmp/x.json

A model of 150k parameters learns three skills and forty facts, then a cipher (tests/train/characters.py). An
arm is one way of learning the cipher: what is left of the skills (accuracy of whole answers), of the facts
that no replay holds, and whether the cipher is learnt. Each seed has a start of its own. What was run already
is kept in the file of results, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/train"))

import characters
import torch
from side_by_side import machine, versions

from framework.config.compose import compose
from framework.config.work import work

REPLAY = "replay.sources=[{path: REPLAY, name: replay}]"
COMMON = (
    "launch.device=cpu launch.threads=1 precision=fp32 data.max_length=32 data.packing=false "
    "batch.sequences=64 batch.tokens_per_micro=2048 tracker.console=none tracker.report=false "
    "evaluate.samples=0 retain=none optim.betas=[0.9,0.98]"
).split()
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)  # of perplexity on the skills

ARMS: dict[str, list[str]] = {
    "none": [],
    **{f"replay-{p}": ["replay=fixed", REPLAY, f"replay.fraction={p / 100}"] for p in (2, 5, 10, 30)},
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
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="some of them, by comma")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/forgetting.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen, seeds = arguments.arms.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": []}
    done = {(run["arm"], run["seed"]) for run in found["runs"]}
    with tempfile.TemporaryDirectory() as place:
        for seed in seeds:
            missing = [arm for arm in chosen if (arm, seed) not in done]
            world = World(Path(place), seed) if missing else None
            for arm in missing:
                assert world is not None
                found["runs"].append({"arm": arm, "seed": seed, **world.arm(arm)})
                print(json.dumps(found["runs"][-1]), flush=True)
                found |= {"machine": machine(), "versions": versions(), "table": table(found["runs"])}
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(table(found["runs"])))


class World:
    """The files of the world and a model that has learnt skills and facts with `seed`."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed = place / str(seed), seed
        self.place.mkdir()
        self.files = characters.write_data(self.place)
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
        began = time.process_time()
        result = self._train(
            name,
            f"model.path={self.place}/start/model",
            f"data.train=[{{path: {self.files['cipher']}}}]",
            f"data.eval=[{{path: {self.files['held']}, name: task}}]",
            f"evaluate.retention=[{{path: {self.files['skills']}, name: skills}}]",
            "steps=200",
            "optim.lr=1e-3",
            *(text.replace("REPLAY", str(self.files["replay"])) for text in ARMS[name]),
        )
        seconds = time.process_time() - began
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
            "cpu_seconds": seconds,
        }

    def _accuracy(self, name: str, kind: str) -> float:
        where = self.place / name / "model"
        if (where / "adapter_config.json").exists():
            where = merged(where)
        return characters.accuracy(where, self.files[kind])

    def _train(self, name: str, *overrides: str) -> dict[str, Any]:
        own = [f"run_dir={self.place}/{name}", f"data.cache_dir={self.place}/cache", f"seed={self.seed}"]
        assert work(compose([*own, *COMMON, *overrides])) == 0
        return json.loads((self.place / name / "result.json").read_text())


def merged(adapter: Path) -> Path:
    """The plain model of an adapter's directory, beside it."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    where = adapter.with_name("merged")
    if not where.exists():
        AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(where)
        AutoTokenizer.from_pretrained(adapter).save_pretrained(where)
    return where


SHOWN = ("task", "skills", "facts", "perplexity", "perplexity_high", "kl", "replay", "x", "cpu_seconds")


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By arm: mean and standard deviation over seeds of each number, and the verdicts."""
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        row: dict[str, Any] = {"arm": arm, "seeds": len(own), "verdicts": [run["verdict"] for run in own]}
        for name in SHOWN:
            values = [run[name] for run in own if run[name] is not None]
            if values:
                row[name] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people: mean and, behind it, standard deviation."""

    def cell(row: Mapping[str, Any], name: str) -> str:
        return f"{row[name][0]:.3g} ± {row[name][1]:.2g}" if name in row else ""

    lines = ["| arm | " + " | ".join(SHOWN) + " | verdicts |", "|---" * (len(SHOWN) + 2) + "|"]
    for row in rows:
        verdicts = ", ".join(str(verdict) for verdict in row["verdicts"] if verdict)
        lines.append(
            f"| {row['arm']} | " + " | ".join(cell(row, name) for name in SHOWN) + f" | {verdicts} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
