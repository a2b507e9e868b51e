"""What a run may be asked to do: types, ranges and pairs that are refused. No value lives here.

Values and their meaning live in `conf/*.yaml`, one comment a key; this file knows which of them can be
carried out. It imports neither torch nor a room, so that a mistake is refused before anything heavy starts.
The composed tree is validated as JSON: strictly, unknown keys refused, lists become tuples, and the
result is frozen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from framework.config import pairs, protect, replay, synthesis
from framework.config.nodes import (
    Batch,
    Checkpoint,
    Constant,
    Cosine,
    Data,
    Dora,
    Evaluate,
    Full,
    Launch,
    Linear,
    Lora,
    Model,
    Name,
    Node,
    Optim,
    Positive,
    Qlora,
    Retain,
    Target,
    Text,
    Tracking,
    Wsd,
    exactly_one,
    refuse,
)
from framework.config.protect import Protect
from framework.config.replay import Replay
from framework.config.stage import (
    ONLINE,
    SUPERVISED,
    Distill,
    Grpo,
    Hf,
    Ppo,
    Preference,
    RewardModel,
    Rewards,
    Sft,
    Vllm,
    writes,
)
from framework.config.strategy import Spread
from framework.config.synthesis import SELF, Synthesis


class Run(Node):
    """The whole tree of one stage of training."""

    name: Name | None
    run_dir: Text  # never null here: `compose` fills in the default
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    steps: Positive | None  # exactly one of steps and epochs is set
    epochs: Annotated[float, Field(gt=0)] | None
    precision: Literal["fp32", "bf16"]
    resume: Text  # auto, never or the path of a checkpoint
    trusted_packages: tuple[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], ...]
    stage: Annotated[Sft | Distill | RewardModel | Preference | Ppo | Grpo, Field(discriminator="name")]
    loss: Target
    model: Model
    adapter: Annotated[Full | Lora | Dora | Qlora, Field(discriminator="kind")]
    data: Data
    replay: Replay
    protect: Protect
    synthesis: Synthesis
    rollout: Annotated[Hf | Vllm, Field(discriminator="engine")]
    reward: Rewards
    batch: Batch
    optim: Optim
    schedule: Annotated[Constant | Linear | Cosine | Wsd, Field(discriminator="name")]
    strategy: Annotated[Spread, Field(discriminator="name")]
    evaluate: Evaluate
    retain: Retain
    checkpoint: Checkpoint
    tracker: Tracking
    launch: Launch

    # Values that read the environment, as written, by their place: `config.record` saves them so.
    _withheld: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    # Files that a start has written: rows of `reward.environment` by split (`config.environment`), and under
    # `self:` those of the start model (`config.selfmade`).
    _rows: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _together(self) -> Self:
        exactly_one("steps", self.steps, "epochs", self.epochs)
        self._fed()
        if self.data.max_length > self.batch.tokens_per_micro:
            raise refuse(
                "data.max_length, batch.tokens_per_micro",
                f"an example of {self.data.max_length} tokens cannot fit a micro-batch of "
                f"{self.batch.tokens_per_micro}",
                "data.max_length of at most batch.tokens_per_micro",
                f"batch.tokens_per_micro={self.data.max_length} or "
                f"data.max_length={self.batch.tokens_per_micro}",
            )
        asked = self.data.eval or self.reward.environment or self.evaluate.prompts or self.evaluate.retention
        if self.evaluate.every is not None and not asked:
            raise refuse(
                "evaluate.every, data.eval",
                f"evaluation every {self.evaluate.every} steps of no data",
                "sources to evaluate on",
                "'data.eval=[{path: held_out.jsonl}]' or evaluate.every=null",
            )
        questions = self.evaluate.prompts or (self.stage.name in ONLINE and self.data.eval)
        if questions and not (self.reward.judging or self.evaluate.score):
            raise refuse(
                "data.eval, evaluate.prompts, evaluate.score",
                "prompts to answer, and nothing that says what an answer is worth",
                "a function of an answer and its row",
                "reward=verifier or 'evaluate.score={_target_: my_package.my_module.my_score}'",
            )
        self._asked()
        if self.model.neftune_alpha is not None and self.stage.name != "sft":
            raise refuse(
                "model.neftune_alpha, stage.name",
                f"noise on the embeddings in stage {self.stage.name}, where answers are compared",
                "no noise",
                "model.neftune_alpha=null",
            )
        rate = getattr(self.adapter, "dropout", 0.0)
        if rate > 0 and self.stage.name not in SUPERVISED:
            # noise in one of two passes over an answer would be taken for a preference
            raise refuse(
                "adapter.dropout, stage.name",
                f"adapter.dropout={rate:g} in stage={self.stage.name}, where answers are compared with those "
                "of another pass",
                "no dropout",
                "adapter.dropout=0",
            )
        replay.check(self)
        protect.check(self)
        synthesis.check(self)
        self._online()
        self._writing()
        pairs.check(self)
        world_size = self.launch.nproc * self.launch.nnodes
        if world_size > self.batch.sequences:
            raise refuse(
                "batch.sequences, launch.nproc",
                f"{self.batch.sequences} examples a step for {world_size} ranks",
                "at least one for each rank",
                f"batch.sequences={world_size}",
            )
        return self

    def _asked(self) -> None:
        """What questions about retention need of the rest of the tree."""
        if not self.retain.prompts:
            return
        if self.stage.name == "reward":
            raise refuse(
                "retain.prompts, stage.name",
                "questions to a reward model, which writes no answer",
                "none",
                "retain.prompts=[]",
            )
        if not (self.reward.judging or self.evaluate.score or self.retain.score):
            raise refuse(
                "retain.prompts, retain.score",
                "questions to answer, and nothing that says what an answer is worth",
                "a function of an answer and its row",
                "'retain.score={_target_: framework.rollout.rewards.exact}' or reward=verifier",
            )

    def _fed(self) -> None:
        """Either sources or an environment to learn from."""
        environment = self.reward.environment
        if environment is None and not self.data.train:
            raise refuse(
                "data.train",
                "got []",
                "a list of at least one {path: ...}, or an environment",
                "'data.train=[{path: FILE.jsonl}]' or reward=environment",
            )
        if environment is not None and self.stage.name not in ONLINE:
            raise refuse(
                "reward.environment, stage.name",
                f"prompts and a verifier in stage {self.stage.name}, which learns from given answers",
                "a stage that answers by itself",
                "stage=grpo or stage=ppo",
            )
        if environment is not None and (self.data.train or self.data.eval):
            raise refuse(
                "data.train, data.eval, reward.environment",
                "sources beside an environment, whose rows are the data",
                "one of the two",
                "data.train=[] data.eval=[], or to judge your own rows with its score reward=none "
                f"'reward.functions=[{{_target_: {environment.target}}}]'",
            )

    @property
    def synthesised(self) -> bool:
        """Whether the start model is to write what is replayed."""
        return any(source.path == SELF for source in self.replay.sources)

    def _online(self) -> None:
        """What a stage that rolls out needs of the rest of the tree."""
        stage = self.stage
        if stage.name not in ONLINE:
            return
        assert isinstance(stage, Ppo | Grpo)
        taught = isinstance(stage, Grpo) and stage.advantages == "teacher"
        if self.reward.empty and not taught:
            raise refuse(
                "reward, stage.name",
                f"stage {stage.name} and nothing that rewards",
                "a reward function or model",
                "reward=verifier, reward=model reward.model=PATH or 'reward.functions=[{_target_: "
                "my_package.my_module.my_reward}]'",
            )
        answers = stage.prompts * self.rollout.samples
        if self.batch.sequences > answers:
            raise refuse(
                "batch.sequences, stage.prompts, rollout.samples",
                f"{self.batch.sequences} answers a step of {answers} in an iteration",
                "at most prompts times samples",
                f"batch.sequences={answers}",
            )
        alone = taught or (isinstance(stage, Grpo) and "plus_plus" in stage.advantages)
        if isinstance(stage, Grpo) and self.rollout.samples < 2 and not alone:
            raise refuse(
                "rollout.samples, stage.advantages",
                "one answer to each prompt, which has nothing to be compared with",
                "two or more",
                "rollout.samples=8",
            )
        if stage.shaping.within_prompt and self.rollout.samples < 2:
            raise refuse(
                "rollout.samples, stage.shaping.within_prompt",
                "one answer to each prompt, whose reward less the mean of one is 0",
                "two or more",
                "rollout.samples=8",
            )

    def _writing(self) -> None:
        """What a stage whose policy answers needs of the rest of the tree."""
        if not writes(self.stage):
            return
        if self.rollout.max_new_tokens >= self.data.max_length:
            raise refuse(
                "rollout.max_new_tokens, data.max_length",
                f"answers of {self.rollout.max_new_tokens} tokens in sequences of {self.data.max_length}",
                "room for a prompt before them",
                f"data.max_length={2 * self.rollout.max_new_tokens}",
            )
        if self.stage.name in ONLINE:
            return
        if self.rollout.samples > 1:
            raise refuse(
                "rollout.samples, stage.own_share",
                f"{self.rollout.samples} answers to a prompt that stands for one example",
                "one",
                "rollout.samples=1",
            )
        if self.data.train_on == "all":
            raise refuse(
                "data.train_on, stage.own_share",
                "examples that are learnt whole, of which no part is the answer",
                "answers that are learnt",
                "data.train_on=assistant",
            )

    def decisive(self) -> dict[str, Any]:
        """What decides the numbers of training, as JSON: two runs with equal trees are the same run.

        How the work is cut, spread, watched and kept is left out, because a run may be stopped
        and go on under another strategy, world size or micro-batch.
        """
        tree: dict[str, Any] = self.model_dump(mode="json")
        for dotted in INCIDENTAL:
            *parents, leaf = dotted.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node.pop(leaf, None)  # a choice may lack it
        if self.replay.max_forgetting is not None:  # then what is watched decides what is replayed
            tree["retain"] = self.retain.model_dump(mode="json")
            tree["retention"] = [source.model_dump(mode="json") for source in self.evaluate.retention]
            if self.retain.prompts and self.retain.score is None and self.evaluate.score is not None:
                tree["score"] = self.evaluate.score.model_dump(mode="json")
        if self.synthesised:
            tree["synthesis"] = self.synthesis.model_dump(mode="json", exclude={"batch_size"})
        return tree

    def identity(self) -> str:
        """Eight hexadecimal digits of `decisive()`, equal on every machine and Python version."""
        return digest(self.decisive())


INCIDENTAL = (
    "name",
    "run_dir",
    "resume",
    "trusted_packages",
    "model.attention",
    "model.activation_checkpointing",
    "model.activation_offload",
    "model.compile",
    "model.head_chunk_tokens",
    "data.eval",
    "data.packing",
    "data.cache_dir",
    "data.workers",
    "synthesis",
    "rollout.batch_size",
    "rollout.url",
    "rollout.timeout_s",
    "rollout.memory_share",
    "reward.workers",
    "batch.tokens_per_micro",
    "strategy",
    "evaluate",
    "retain",
    "checkpoint",
    "tracker",
    "launch",
)
"""Keys that change neither which examples a step sees nor what is computed from them."""


def digest(tree: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of a JSON tree, whatever the order of its keys."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
