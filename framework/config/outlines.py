"""Who takes part in a run: the models it trains and asks, from their configurations alone. For planning."""

from __future__ import annotations

from typing import Any

from framework.config import build, targets
from framework.config.build import Inspected
from framework.config.schema import Run
from framework.config.stage import ONLINE, Distill, Grpo, OnPolicy, Ppo, Preference
from framework.losses.inputs import inputs
from framework.models.load import Description
from framework.models.outline import outline


def outlined(run: Run) -> Inspected:
    """The run's models, from their configurations alone. Raises UserError."""
    targets.rewards(run)
    stage = run.stage
    own: dict[str, Any] = {
        "revision": run.model.revision,
        "gguf_file": run.model.gguf_file,
        "init": run.model.init,
    }
    critic = None
    if isinstance(stage, Ppo):
        critic = outline(stage.critic, head="score") if stage.critic else None
        critic = critic or outline(run.model.path, head="score", **own)
    other = getattr(stage, "reference_path", None)
    judged = stage.name in ONLINE and run.reward.model is not None
    return Inspected(
        run=run,
        loss=targets.loss(run),
        description=outline(run.model.path, head="score" if stage.name == "reward" else "lm", **own),
        critic=critic,
        judge=outline(run.reward.model, head="score") if judged and run.reward.model else None,
        reference=outline(other) if other is not None else None,
        teacher=outline(stage.teacher) if isinstance(stage, Distill) else None,
    )


def answers(inspected: Inspected) -> int:
    """Segments of an example: pairs have two."""
    stage = inspected.run.stage
    paired = stage.name == "reward" or (stage.name == "preference" and not inspected.unpaired)
    return 2 if paired else 1


def asked(inspected: Inspected) -> list[Description]:
    """Models that are asked beside the one that is trained."""
    stage, found = inspected.run.stage, [d for d in (inspected.teacher, inspected.judge) if d is not None]
    wanted = bool(inputs(inspected.loss) & {"reference", "reference_logps"})
    if isinstance(stage, OnPolicy):
        taught = isinstance(stage, Grpo) and stage.advantages == "teacher"
        wanted = wanted or taught or stage.kl_coefficient > 0
    elif not isinstance(stage, Preference):
        wanted = False
    where = getattr(stage, "reference", None)
    if (
        wanted
        and where != "cached"
        and not (where == "adapter" or (where == "auto" and build.uses_adapter(inspected)))
    ):
        found.append(inspected.reference or inspected.description)
    return found
