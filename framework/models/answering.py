"""A model on disk, ready to answer or to judge answers, for one process and one device; nothing here trains.

A directory as `export` writes it, an adapter, a hub id or a GGUF file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from framework.errors import ModelError
from framework.models import adapters
from framework.models import load as models


def load(
    path: str, *, gguf_file: str | None = None, device: str = "auto", dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """The transformers (or peft) model on its device, in evaluation mode, and its tokenizer.

    A directory with adapters alone is put on the model they were trained on. In `dtype`, or bf16 on CUDA and
    the stored type elsewhere. `device` is "auto" (CUDA where there is one) or a torch device. Raises
    ModelError.
    """
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    adapter = Path(path) / "adapter_config.json"
    asked = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else path
    description = models.inspect(asked, gguf_file=gguf_file)
    with models.quiet():
        lm = models.load(description, dtype=dtype or (torch.bfloat16 if where.type == "cuda" else None))
        lm.generation_config = models.generation_config(description)
        lm.set_attn_implementation("sdpa" if lm._supports_sdpa else "eager")
        if adapter.is_file():
            lm = adapters.reload(lm, Path(path))
    return lm.to(where).eval(), description.tokenizer


def load_scorer(path: str, *, device: str = "auto", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The reward model at `path`, transformers' classifier of one label, and its tokenizer; see `load`."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    description = inspect_scorer(path)
    with models.quiet():
        lm = models.load(description, dtype=dtype or (torch.bfloat16 if where.type == "cuda" else None))
        lm.set_attn_implementation("sdpa" if lm._supports_sdpa else "eager")
    return lm.to(where).eval(), description.tokenizer


def inspect_scorer(path: str) -> models.Description:
    """Look at the reward model at `path`.

    Raises ModelError, also where there is no head that scores: a new one would judge by chance.
    """
    description = models.inspect(path, head="score")
    if not description.scored:
        raise ModelError(
            f"{path} holds no reward model, its head writes tokens; expected RUN/model of a stage=reward run"
        )
    return description
