"""Group-relative policy optimisation side by side: ours and trl.GRPOTrainer, phase by phase.

    python benchmarks/grpo.py                    # everything; long, see the options
    python benchmarks/grpo.py --shapes tiny --rounds 1 --examples 8 --out /tmp/x.json

An iteration answers 4 prompts 8 times each with exactly 128 new tokens, and the first is not counted. The two
tasks: `prompts`, where all answers make one optimizer step and nothing holds the policy near its start (TRL's
defaults); `prompts-kl`, with a KL term and two steps an iteration, so that the start model and the policy
before its first step have to be asked. Scoring is that asking; update is forward, backward and optimizer;
generation includes handing the weights over. Both reward with the same function. Ours also with small
micro-batches that are computed again, which takes least memory. Best flags for TRL: weights in bf16, nothing
computed twice, small micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trainers
from side_by_side import Benchmark, main
from trainers import Marks, fixed_length, phases_of

PROMPTS, SAMPLES, NEW_TOKENS = 4, 8, 128
ANSWERS = PROMPTS * SAMPLES
ANSWERS_AT_ONCE = 8  # a micro-batch of TRL's with best flags
KL = 0.04  # of the GRPO paper


def updates(data: Path) -> int:
    """Optimizer steps of an iteration."""
    return 2 if data.stem == "prompts-kl" else 1


def ours(model: Path, data: Path, marks: Marks, *, small: bool = False) -> None:
    """As it comes, but for the sizes, or in little memory."""
    marks.warmup = updates(data)
    settings = [
        "stage=grpo",
        f"stage.prompts={PROMPTS}",
        f"loss.kl={KL if updates(data) > 1 else 0.0}",
        f"batch.sequences={ANSWERS // updates(data)}",
        f"rollout.samples={SAMPLES}",
        f"rollout.max_new_tokens={NEW_TOKENS}",
        "reward.functions=[{_target_: framework.rollout.rewards.repetition_penalty, words: 1}]",
        *(trainers.LITTLE_MEMORY if small else ()),
    ]
    with fixed_length():
        trainers.ours(
            model, data, marks, settings, counts=["trained_tokens"], prepare=lambda s: phases_of(s, marks)
        )


def trl(model: Path, data: Path, marks: Marks, *, best: bool) -> None:
    """GRPOTrainer as it comes, or with the flags that are fastest for it here."""
    from trl import GRPOConfig, GRPOTrainer

    marks.warmup = updates(data)

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            with marks.phase("scoring"):
                return super()._generate_and_score_completions(*args, **kwargs)

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with marks.phase("generation"):
                return super()._generate(*args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with marks.phase("reward"):
                return super()._calculate_rewards(*args, **kwargs)

    at_once = ANSWERS_AT_ONCE if best else ANSWERS // updates(data)
    settings: dict[str, Any] = {
        "beta": KL if updates(data) > 1 else 0.0,
        "num_generations": SAMPLES,
        "max_completion_length": NEW_TOKENS,
        "generation_kwargs": {"min_new_tokens": NEW_TOKENS},
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": ANSWERS // updates(data) // at_once,
        "steps_per_generation": ANSWERS // at_once,
    }
    if best:
        settings |= trainers.unchecked_bf16()
    trainers.trl(
        Trainer, GRPOConfig, model, data, marks, settings, counts=counts, reward_funcs=repetition_penalty
    )


def repetition_penalty(completions: Sequence[Sequence[Mapping[str, str]]], **_: Any) -> list[float]:
    from framework.rollout import rewards

    return [rewards.repetition_penalty(messages[-1]["content"], words=1) for messages in completions]


def counts(inputs: Mapping[str, Any]) -> dict[str, int]:
    return {"trained_tokens": int(inputs["completion_mask"].sum())}


if __name__ == "__main__":
    main(
        Benchmark(
            script=__file__,
            description=__doc__,
            title="answers' tokens per CPU-second of whole iterations, CPU-seconds by phase, one thread",
            contenders={
                "ours": ours,
                "ours, checkpointed": lambda m, d, k: ours(m, d, k, small=True),
                "trl, defaults": lambda m, d, k: trl(m, d, k, best=False),
                "trl, best flags": lambda m, d, k: trl(m, d, k, best=True),
            },
            data=("prompts", "prompts-kl"),
            examples=12,
            rounds=1,
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
