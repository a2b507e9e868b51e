"""Which rows to leave for later stages: any, or those that surprise the model that a stage begins with.

    python benchmarks/left_rows.py            # four minutes on one core
    python benchmarks/left_rows.py --seeds 0 --out /tmp/x.json

The world of twelve letters (tests/train/characters.py). A model that copies and sorts is trained on a source
in which five of six rows are copied and one is reversed, which is new to it; then on a cipher, with a tenth
of replay of what the stage before has left, a hundred rows of its 1,800. Shown is the share of held-out rows
that are right, of each skill, after either stage. Every run takes one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import HERE, machine

sys.path.extend(str(HERE.parent / room) for room in ("tests/train", "tests"))

import characters

from framework.data import buffer

SKILLS = {"C": "copied", "R": "reversed", "K": "cipher"}
TOKENS = 1200  # of a hundred rows
ARMS = {
    "uniform": ("uniform", ""),
    "surprise": ("surprise", ""),
    "surprise, and rows of copying": ("surprise", "replay.sources=[{path: BEFORE, name: before}]"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2", help="by comma")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "left_rows.json")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in map(int, arguments.seeds.split(",")):
        with tempfile.TemporaryDirectory() as place:
            for run in runs(Path(place), seed):
                found.append({"seed": seed, **run})
                print(json.dumps(found[-1]), flush=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")


def runs(place: Path, seed: int) -> Any:
    """What each arm keeps, with `seed`."""
    mixed = [("C", i) for i in range(1500)] + [("R", i) for i in range(0, 1500, 5)]
    mixed.sort(key=lambda each: each[1])
    sets = {
        "before": characters.rows("CS", 1500, "before"),
        "copied": characters.rows("C", 1500, "before"),
        "mixed": [characters.row(task, characters.word(f"mixed {task} {i}")) for task, i in mixed],
        "cipher": characters.rows("K", 1500, "cipher"),
        **{f"held-{skill}": characters.rows(skill, 100, "held") for skill in SKILLS},
    }
    for name, rows in sets.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(name: str, start: Path, data: str, *more: str, leaves: int = TOKENS) -> None:
        own = [f"model.path={start}", f"data.train=[{{path: {place}/{data}.jsonl}}]", f"seed={seed}"]
        characters.train(place, name, *own, f"replay.stratum_tokens={leaves}", *more)

    def right(name: str) -> dict[str, float]:
        model = place / name / "model"
        return {SKILLS[s]: characters.accuracy(model, place / f"held-{s}.jsonl") for s in SKILLS}

    characters.write_model(place / "untrained")
    train("start", place / "untrained", "before", "steps=500", "optim.lr=3e-3", leaves=0)
    for number, (arm, (select, more)) in enumerate(ARMS.items()):
        stage, after = f"mixed-{select}", f"cipher-{number}"
        if not (place / stage).exists():
            chosen = f"replay.select={select}"
            train(stage, place / "start/model", "mixed", "steps=600", "optim.lr=1e-3", chosen)
        replay = "replay=fixed replay.carry=auto replay.fraction=0.1".split()
        replay += [more.replace("BEFORE", f"{place}/copied.jsonl")] if more else []
        train(after, place / stage / "model", "cipher", "steps=200", "optim.lr=1e-3", *replay)
        (stratum,) = buffer.read(place / stage / "buffer").strata
        drawn = buffer.draw(buffer.lines(place / stage / "buffer", stratum), tokens=TOKENS)
        new = sum(row["prompt"].startswith("R") for row in drawn)
        yield {"arm": arm, "rows": len(drawn), "new": new, "before": right(stage), "after": right(after)}


if __name__ == "__main__":
    main()
