"""Stand-ins for reinforcement learning: a scripted rollout, an engine of fixed answers, prompts."""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace

import torch

from framework.batch import Outputs
from framework.data.collate import collate, fill
from framework.data.pack import plan
from framework.rollout.base import Completion, Prompt
from framework.rollout.experience import Packing

END = 2  # the tiny model's end token


def packing(world, tokens=64):
    return Packing(
        plan=partial(plan, tokens_per_micro=tokens, ranks=world.size, packing=True),
        collate=lambda examples: collate(examples, [0] * len(examples), packing=True, pad_id=0),
        fill=partial(fill, packing=True, pad_id=0),
        tokens_per_micro=tokens,
        rank=world.rank,
    )


def prompts(start, stop):
    """Prompts of 2 to 5 tokens, a function of their place alone."""
    return [
        Prompt(tuple(3 + (7 * index + t) % 50 for t in range(2 + index % 4)), index, {"index": index})
        for index in range(start, stop)
    ]


def judged(scores, **metrics):
    return SimpleNamespace(scores=torch.as_tensor(scores, dtype=torch.float64), metrics=metrics)


class Scripted:
    """Answers that are a function of (prompt, sample, version): no model."""

    def __init__(self, lengths=(3, 1, 2, 4), *, logp=-1.0):
        self.lengths, self.logp = lengths, logp
        self.versions, self.asked = [], []

    def update(self, weights, *, version):
        list(weights)
        self.versions.append(version)

    def generate(self, prompts, sampling):
        self.asked.append([prompt.index for prompt in prompts])
        return [[self._answer(prompt, sample) for sample in range(sampling.samples)] for prompt in prompts]

    def _answer(self, prompt, sample):
        length = self.lengths[(prompt.index + sample) % len(self.lengths)]
        ids = (*(10 + (prompt.index + 5 * sample + t) % 40 for t in range(length - 1)), END)
        finished = length < max(self.lengths)
        return Completion(f"{prompt.index}/{sample}", ids, finished, (self.logp,) * length, self.versions[-1])


class FixedEngine:
    """A model whose log-probability of token t is -t / 100 and whose value of its state is t / 10."""

    def __init__(self, world):
        self.world = world
        self.temperatures = set()

    def __call__(self, batch, *, needs=frozenset(), temperature=1.0, adapter=True):
        self.temperatures.add(temperature)
        tokens = batch.targets.float()
        logps = (-tokens / 100 - (0.0 if adapter else 0.5)).requires_grad_()
        return Outputs(
            logps,
            entropies=torch.ones_like(tokens) if "entropies" in needs else None,
            values=tokens / 10 if "values" in needs else None,
        )

    def weights(self, *, without=None):
        yield "w", torch.zeros(1)

    def inference(self):
        return contextlib.nullcontext()
