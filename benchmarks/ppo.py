"""Proximal policy optimisation, phase by phase, against the time that its matrix products alone would take.

    python benchmarks/ppo.py                     # everything; long, see the options
    python benchmarks/ppo.py --shapes tiny --rounds 1 --examples 32 --out /tmp/x.json

There is no trainer left to run against (TRL 1.16 has no PPO). An iteration answers 16 prompts with exactly
128 new tokens each and trains actor and critic for two epochs of two optimizer steps; the first iteration is
not counted. Scoring asks actor, critic and start model once.
The limit: 2 FLOPs for each weight and token forward and 4 backward (the head's only at answer tokens), plus
attention over the keys seen, no padding, nothing twice, divided by the rate at which this core computes the
products of this model's own shapes in bf16, 2048 tokens at a time. It knows no optimizer, no sampling, no
norms and no small batches while decoding. Its memory: 16 bytes for every trained weight and 2 for every
one that is only asked (start model, sampler), no activations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainers
from side_by_side import Benchmark, main
from trainers import Marks, fixed_length, phases_of

PROMPTS, NEW_TOKENS = 16, 128
EPOCHS, SEQUENCES = 2, 8
RATE_TOKENS = 2048


def ours(model: Path, data: Path, marks: Marks) -> None:
    """As it comes, but for the sizes."""
    marks.warmup = EPOCHS * PROMPTS // SEQUENCES
    settings = [
        "stage=ppo",
        f"stage.prompts={PROMPTS}",
        f"stage.epochs={EPOCHS}",
        f"batch.sequences={SEQUENCES}",
        f"rollout.max_new_tokens={NEW_TOKENS}",
        "reward.functions=[{_target_: framework.rollout.rewards.repetition_penalty, words: 1}]",
    ]
    with fixed_length():
        trainers.ours(
            model, data, marks, settings, counts=["trained_tokens"], prepare=lambda s: phases_of(s, marks)
        )


@dataclass(frozen=True)
class Shape:
    """What decides the products of one forward pass."""

    layers: int
    products: tuple[tuple[int, int], ...]  # (in, out) of a layer's weights
    head: tuple[int, int]
    attention: int  # query heads times their width

    @classmethod
    def read(cls, model: Path) -> Shape:
        config = json.loads((model / "config.json").read_text())
        hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        queries = config["num_attention_heads"] * width
        keys = config["num_key_value_heads"] * width
        attention = ((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden))
        mlp = ((hidden, inner), (hidden, inner), (inner, hidden))
        head = (hidden, config["vocab_size"])
        return cls(config["num_hidden_layers"], attention + mlp, head, queries)

    @property
    def body(self) -> int:
        """Weights of all layers."""
        return self.layers * sum(a * b for a, b in self.products)

    @property
    def weights(self) -> int:
        """With the head, which is the embedding, too."""
        return self.body + self.head[0] * self.head[1]

    def forward(self, tokens: int) -> int:
        """FLOPs of a sequence through the body: each token sees half of the others."""
        return 2 * self.body * tokens + 2 * self.layers * self.attention * tokens**2

    def answers(self, tokens: int) -> int:
        """FLOPs of the head."""
        return 2 * self.head[0] * self.head[1] * tokens


def limit(model: Path, data: Path, marks: Marks) -> None:
    """The same iterations as `ours`, in FLOPs."""
    from transformers import AutoTokenizer

    shape = Shape.read(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    lengths = [
        len(tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False)) + NEW_TOKENS
        for row in rows
    ]
    body = sum(map(shape.forward, lengths)) / len(rows) * PROMPTS  # of an iteration
    head = shape.answers(NEW_TOKENS * PROMPTS)
    rate = matmul_rate(shape)
    iteration = {
        "generation": body + head,
        "reward": 0,
        "scoring": 2 * (body + head) + body,  # actor and start model, critic
        "update": EPOCHS * 3 * (2 * body + head),
    }
    seconds = {name: flops / rate for name, flops in iteration.items()}
    marks.warmup = 1
    for number in range(len(rows) // PROMPTS):  # as many as ours
        spent = {name: number * s for name, s in seconds.items() if name != "update"}
        counts = {"trained_tokens": float(EPOCHS * PROMPTS * NEW_TOKENS)}
        marks.steps.append((number * sum(seconds.values()), counts, spent))
    asked = 2 * shape.weights
    trained = shape.weights + shape.body + shape.head[0] * shape.head[1]  # the critic embeds, too
    marks.peak = round((16 * trained + 2 * asked) / 2**10)


def matmul_rate(shape: Shape) -> float:
    """FLOPs per CPU-second of the products of one forward pass in bf16, the best of three."""
    import torch

    def product(size: tuple[int, int]) -> tuple[int, Any, Any]:
        draw = torch.randn(RATE_TOKENS, size[0], dtype=torch.bfloat16)
        return 2 * RATE_TOKENS * size[0] * size[1], draw, torch.randn(size[::-1], dtype=torch.bfloat16).T

    products = [product(size) for size in [*shape.products * shape.layers, shape.head]]
    best = 0.0
    with torch.inference_mode():
        for _ in range(4):  # the first warms up
            began = trainers.cpu_seconds()
            for _, left, right in products:
                left @ right
            best = max(best, sum(flops for flops, _, _ in products) / (trainers.cpu_seconds() - began))
    return best


if __name__ == "__main__":
    main(
        Benchmark(
            script=__file__,
            description=__doc__,
            title="trained tokens per CPU-second of whole iterations, CPU-seconds by phase, one thread",
            contenders={"ours": ours, "limit": limit},
            data=("prompts",),
            examples=48,
            rounds=3,
            speed=("trained_tokens_per_cpu_s", "tokens/CPU-s"),
            phases={
                "generation_s": "generation",
                "reward_s": "reward",
                "scoring_s": "scoring",
                "update_s": "update",
            },
            counts=f"prompts, {PROMPTS} an iteration; the first iteration is not counted",
        )
    )
