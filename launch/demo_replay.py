"""Writes the demonstration's general text: what the start model itself says about everyday topics.

    python launch/demo_replay.py        # after `make demo` has unpacked the start model; about two minutes

Every answer is sampled from SmolLM2-135M-Instruct (Apache-2.0), so no other text enters and nothing is
corrected: many answers are wrong, as the model's are. Replay is to keep how it speaks, not what is true.
The topics of general.jsonl, which only measures, are apart from those of replay.jsonl, which is trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from framework.rollout.hf import generate

HERE = Path(__file__).parent / "demo_data"
TEMPLATES = (
    "Explain {} in two or three sentences.",
    "Why does {} matter? Answer in one or two sentences.",
    "Give a beginner one useful fact about {}.",
    "Describe {} to a child in a few words.",
    "What should I know about {}? Keep it short.",
    "Tell me something interesting about {}, in one sentence.",
)
REPLAYED = (
    "the water cycle", "bicycles", "healthy breakfasts", "the Roman Empire", "photosynthesis",
    "learning the piano", "electric cars", "bees", "how bridges stay up", "saving money", "the Moon",
    "good sleep", "chess", "bread baking", "the human heart", "libraries", "recycling",
    "the Amazon rainforest", "writing a letter", "gravity", "dogs", "the printing press", "earthquakes",
    "gardening in spring", "public speaking", "antibiotics", "trains", "Leonardo da Vinci", "coral reefs",
    "computers", "tea", "mountain climbing", "the stock market", "vaccines", "painting with watercolours",
    "the Great Wall of China", "batteries", "teamwork", "wind power", "birds in winter",
    "a job interview", "the Olympic Games", "glass", "swimming", "the brain", "cooking rice", "penguins",
    "time zones",
)  # fmt: skip
HELD_OUT = (
    "volcanoes", "the French Revolution", "running shoes", "whales", "how an aeroplane flies",
    "friendship", "salt", "the internet", "growing tomatoes", "Mozart", "the immune system",
    "desert animals", "making coffee", "democracy", "lightning", "reading to children", "the planet Mars",
    "first aid", "cotton", "football", "a good password", "rivers", "the pyramids", "yoga",
)  # fmt: skip


def prompts(topics: tuple[str, ...], per_topic: int) -> list[list[dict[str, str]]]:
    """`per_topic` questions on every topic, the templates taken in turn."""
    asked = [
        TEMPLATES[(number * per_topic + turn) % len(TEMPLATES)].format(topic)
        for number, topic in enumerate(topics)
        for turn in range(per_topic)
    ]
    return [[{"role": "user", "content": question}] for question in asked]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/start"))
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for name, topics, per_topic in (("replay", REPLAYED, 3), ("general", HELD_OUT, 1)):
        asked = prompts(topics, per_topic)
        answers = generate(
            model,
            tokenizer,
            asked,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_size=48,
            on_progress=lambda done, total: print(f"{done}/{total}", flush=True),
        )
        rows = [
            {"messages": [*prompt, {"role": "assistant", "content": answer.text.strip()}]}
            for prompt, answer in zip(asked, answers, strict=True)
            if answer.finished
        ]
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} of {len(asked)} answers ended by themselves and were kept")


if __name__ == "__main__":
    main()
