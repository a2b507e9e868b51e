"""Generation with a plain transformers model on one device. Knows no task, no reward and no trainer.

Rows are sorted by length, padded on the left, and leave the batch as soon as they end, so that short
answers never wait for long ones. What all prompts begin with (system prompt, instructions, examples)
is read once and shared. Letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.keyed import key

Messages = Sequence[Mapping[str, str]]  # one conversation: {"role": ..., "content": ...} in order


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt."""

    text: str  # special tokens removed
    ids: tuple[int, ...]  # generated token ids, the end-of-turn token included when there is one
    finished: bool  # ended by itself; False: stopped at `max_new_tokens`


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """One completion per prompt, in the order of `prompts`.

    `model` is a transformers causal LM, `tokenizer` its tokenizer with a chat template. Temperature 0
    takes the most likely token; above 0 each prompt draws from its own generator, keyed by (seed, index
    of the prompt), so a draw depends neither on the batch size nor on the neighbours.
    `on_progress(done, total)` is called as rows end.
    """
    ids = [
        tokenizer.apply_chat_template(list(p), add_generation_prompt=True, return_dict=False) for p in prompts
    ]
    return complete(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        on_progress=on_progress,
    )


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: Any,
    ids: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """`generate` for prompts that are token ids already, each of at least one."""
    was_training = model.training
    model.eval()
    shared = _shared_prefix(ids)
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))  # the largest batch first
    done: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _Decoding(model, tokenizer, [ids[i] for i in rows], shared)
        generators = [_generator(model.device, seed, i) for i in rows] if temperature > 0 else None
        for row, completion in batch.run(max_new_tokens, temperature, generators):
            done[rows[row]] = completion
            if on_progress is not None:
                on_progress(len(done), len(ids))
    model.train(was_training)
    return [done[i] for i in range(len(ids))]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer: the tokenizer's end token and those the model itself names."""
    configured = model.generation_config.eos_token_id
    named = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*named, tokenizer.eos_token_id] if i is not None)


class _Decoding:
    """One left-padded batch being decoded; rows leave it as they end."""

    def __init__(self, model: Any, tokenizer: Any, ids: list[list[int]], shared: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ends = end_tokens(model, tokenizer)
        device = model.device
        self.cache = None
        if shared:
            prefix = torch.tensor([ids[0][:shared]], device=device)
            self.cache = model(prefix, use_cache=True, logits_to_keep=1).past_key_values
            self.cache.batch_repeat_interleave(len(ids))
        width = max(len(row) for row in ids) - shared
        padded = torch.zeros(len(ids), width, dtype=torch.long, device=device)  # [B, T]
        mask = torch.ones(len(ids), shared + width, dtype=torch.long, device=device)
        for b, row in enumerate(ids):
            gap = width - (len(row) - shared)
            padded[b, gap:] = torch.tensor(row[shared:], device=device)
            mask[b, shared : shared + gap] = 0  # by position: the padding id may be a real token
        self.inputs, self.mask = padded, mask

    def run(self, max_new_tokens: int, temperature: float, generators: list[torch.Generator] | None) -> Any:
        """Yields (row, completion) as rows end."""
        alive = list(range(self.inputs.shape[0]))
        written: list[list[int]] = [[] for _ in alive]
        inputs = self.inputs
        for new in range(max_new_tokens):
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            out = self.model(
                inputs,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self.cache = out.past_key_values
            chosen = _choose(out.logits[:, -1].float(), temperature, generators, alive)  # [B]
            keep = []
            for b, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
                written[row].append(token)
                if token in self.ends or new + 1 == max_new_tokens:
                    yield row, self._completion(written[row])
                else:
                    keep.append(b)
            if not keep:
                return
            if len(keep) < len(alive):
                kept = torch.tensor(keep, device=inputs.device)
                alive = [alive[b] for b in keep]
                chosen, self.mask = chosen[kept], self.mask[kept]
                self.cache.batch_select_indices(kept)
            inputs = chosen[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(alive), 1)], dim=1)

    def _completion(self, written: list[int]) -> Completion:
        return Completion(
            text=self.tokenizer.decode(written, skip_special_tokens=True),
            ids=tuple(written),
            finished=written[-1] in self.ends,
        )


def _choose(
    logits: Tensor, temperature: float, generators: list[torch.Generator] | None, alive: list[int]
) -> Tensor:
    """Next tokens [B] from fp32 logits [B, V]."""
    if generators is None:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    drawn = [
        torch.multinomial(p, 1, generator=generators[r]) for p, r in zip(probabilities, alive, strict=True)
    ]
    return torch.cat(drawn)


def _generator(device: torch.device, seed: int, index: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(key(seed, "generate", index))


def _shared_prefix(ids: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving each at least one of its own."""
    shortest = min(len(row) for row in ids) - 1
    first = ids[0]
    return next((t for t in range(shortest) if any(row[t] != first[t] for row in ids)), shortest)
