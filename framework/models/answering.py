"""A model on disk, ready to answer: a directory as `export` writes it, an adapter, a hub id, a GGUF file.

For one process and one device; nothing here trains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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
