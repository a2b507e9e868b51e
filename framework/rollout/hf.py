"""Generation with a plain transformers model on one device. Knows no task, no reward and no trainer.

Answers are decoded in chunks of prompts of similar length (`decoding`). Chunks are cut from the whole list
before ranks share them out, and every answer draws from its own numbers, so what comes out depends neither
on the number of ranks nor on who else was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import ConfigError
from framework.rollout import sharing
from framework.rollout import weights as filling
from framework.rollout.base import Completion, Prompt, Sampling
from framework.rollout.decoding import Decoder, prepare
from framework.rollout.sampling import uniforms
from framework.rollout.sharing import Answer

Messages = Sequence[Mapping[str, str]]  # one conversation: {"role": ..., "content": ...} in order

ANSWERS_TOGETHER = 128
"""Answers decoded at a time. SmolLM2-135M on one AMX core: larger batches gain nothing more."""


class HfRollout:
    """A `Rollout` in the trainer's process: every rank holds a whole copy of the policy on its device.

    `build` makes the transformers causal language model, its values meaning nothing yet; it is brought to
    `dtype` (its buffers stay as they are) and filled by `update`. Answers end at the tokenizer's end token
    and at those that the model's `generation_config` names. `world` is the ranks that answer together.
    `batch_size` answers are decoded at a time on a rank: with N ranks, no more than an N-th of an iteration's
    answers, or ranks will wait. `lora_scaling` is alpha / rank where the policy has adapters.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        tokenizer: Any,
        world: Any,
        *,
        batch_size: int = ANSWERS_TOGETHER,
        dtype: torch.dtype = torch.bfloat16,
        lora_scaling: float | None = None,
    ) -> None:
        lm: Any = build().requires_grad_(False).eval()
        for parameter in lm.parameters():
            parameter.data = parameter.data.to(world.device, dtype)
        self.lm = lm.to(world.device)
        prepare(self.lm)
        self.tokenizer, self.world = tokenizer, world
        self.batch_size, self.lora_scaling = batch_size, lora_scaling
        self.version: int | None = None  # of the weights held

    def update(self, weights: Iterator[tuple[str, Tensor]], *, version: int) -> None:
        """Take `weights`. There is no cache to forget: none outlives a call of `generate`. Collective."""
        filling.fill(self.lm, weights, lora_scaling=self.lora_scaling)
        self.version = version

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.samples` answers to each prompt, in order; the same on every rank. Collective.

        Raises ConfigError where a prompt and its answer could outgrow the model.
        """
        assert self.version is not None, "update comes before generate"
        self._check_room(prompts, sampling)
        chunks = cut(prompts, sampling.samples, self.batch_size)
        mine = chunks[self.world.rank :: self.world.size]
        decoder = Decoder(self.lm, sorted(end_tokens(self.lm, self.tokenizer)), sampling, shared(prompts))
        said = [a for chunk in mine for a in _decode(decoder, prompts, chunk, sampling)]
        by_rank = [iter(answers) for answers in sharing.gather(self.world, said)]
        answers: list[list[Completion]] = [[] for _ in prompts]
        for number, chunk in enumerate(chunks):
            for index, _ in chunk:
                answer = next(by_rank[number % self.world.size])
                answers[index].append(sharing.completion(answer, self.tokenizer, self.version))
        return answers

    def close(self) -> None:
        """Nothing runs besides this process."""

    def _check_room(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        room = getattr(self.lm.config, "max_position_embeddings", None)
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        if room is not None and longest + sampling.max_new_tokens > room:
            raise ConfigError(
                f"a prompt has {longest} tokens and an answer may have {sampling.max_new_tokens}, but the "
                f"model has {room} positions; type rollout.max_new_tokens={max(1, room - longest)} or less, "
                "or drop longer prompts"
            )


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    batch_size: int = ANSWERS_TOGETHER,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """`samples` completions per prompt, in the order of `prompts`, those of one prompt together.

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
        samples=samples,
        seed=seed,
        on_progress=on_progress,
    )


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = ANSWERS_TOGETHER,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """`generate` for prompts that are token ids already, each of at least one."""
    sampling = Sampling(max_new_tokens, temperature=temperature, samples=samples, seed=seed)
    prompts = [Prompt(tuple(row), index) for index, row in enumerate(ids)]
    done: dict[tuple[int, int], Completion] = {}
    ended = 0

    def count() -> None:
        nonlocal ended
        ended += 1
        if on_progress is not None:
            on_progress(ended, len(ids) * samples)

    lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside of a peft model
    was_training, attention = model.training, prepare(lm)
    model.eval()
    try:
        decoder = Decoder(lm, sorted(end_tokens(model, tokenizer)), sampling, shared(prompts))
        for chunk in cut(prompts, samples, batch_size):
            answers = _decode(decoder, prompts, chunk, sampling, count)
            for place, answer in zip(chunk, answers, strict=True):
                done[place] = sharing.completion(answer, tokenizer, version=0)
    finally:
        lm.set_attn_implementation(attention)
        model.train(was_training)
    return [done[index, sample] for index in range(len(ids)) for sample in range(samples)]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer: the tokenizer's end token and those the model itself names."""
    configured = model.generation_config.eos_token_id
    named = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*named, tokenizer.eos_token_id] if i is not None)


def cut(prompts: Sequence[Prompt], samples: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Chunks of (place of the prompt in `prompts`, sample), each of at most `batch_size` answers.

    Prompts of similar length together, the longest first, whole groups where they fit; chunks are as even
    as can be. A group larger than a chunk is cut.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
    if samples > batch_size:
        spans = _even(samples, batch_size)
        return [[(index, sample) for sample in span] for index in order for span in spans]
    return [
        [(order[place], sample) for place in span for sample in range(samples)]
        for span in _even(len(order), batch_size // samples)
    ]


def shared(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """The tokens that all prompts begin with, leaving each at least one of its own."""
    if not prompts:
        return ()
    shortest = min(len(prompt.ids) for prompt in prompts) - 1
    first = prompts[0].ids
    columns = zip(*(prompt.ids[:shortest] for prompt in prompts), strict=True)
    return first[: next((t for t, column in enumerate(columns) if len(set(column)) > 1), shortest)]


def _even(count: int, most: int) -> list[range]:
    """0 to count - 1 in the fewest runs of at most `most`, which differ in length by one at most."""
    runs = -(-count // most)
    return [range(count * r // runs, count * (r + 1) // runs) for r in range(runs)]


def _decode(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    chunk: Sequence[tuple[int, int]],
    sampling: Sampling,
    on_end: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answers of one chunk, in its order."""
    numbers = torch.stack([uniforms(sampling, prompts[index].index, sample) for index, sample in chunk])
    asked = [prompts[index].ids for index in dict(chunk)]
    return decoder.run(asked, numbers, on_end)
