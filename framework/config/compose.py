"""From a command line to a validated run: Hydra composes `conf/`, pydantic refuses.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

import framework
from framework.config.schema import Run, validated

CONF = Path(framework.__file__).resolve().parent.parent / "conf"
"""The tree of settings that comes with the code."""


def compose(overrides: Sequence[str], *, config_name: str = "train") -> Run:
    """The run that these overrides ask for."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra_compose(config_name, overrides=list(overrides))
    tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return validated(tree)  # type: ignore[arg-type]
