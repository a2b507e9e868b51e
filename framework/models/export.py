"""Writes trained weights as a directory that transformers (or peft) loads, and proves that it does.

Collective: every rank hands in the same iterator of whole tensors and goes through it to the end; rank 0
alone keeps and writes them. What is on disk is then loaded as a stranger would load it, and its logits are
compared with those of the tensors that were handed in. Only then does the directory get its name.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.errors import ConfigError, SapwoodError
from framework.models import adapters, load, nf4
from framework.models.load import Adapter, Description
from framework.models.policy import causal_lm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE_TOKENS = 16
# The same numbers through the same kernels: what may differ is the order of a sum. A merge changes the
# arithmetic of fp32 itself.
TOLERANCE, TOLERANCE_MERGED = 1e-4, 2e-3  # of the largest logit


class ExportError(SapwoodError):
    """What was written does not answer as what was handed in; nothing was left behind."""


def export(
    directory: Path,
    *,
    description: Description,
    weights: Iterable[tuple[str, Tensor]],
    adapter: Adapter = None,
    merge: bool = False,
    dtype: str | None = None,
    rank: int = 0,
) -> None:
    """Write `weights` (an engine's, under names of the built model) to `directory`, replacing it.

    Without an adapter, or with `merge`: a model with configuration, tokenizer, chat template and generation
    settings, in `dtype` (fp32, bf16, fp16; None: bf16, or fp32 where the model came in fp32). Else the
    adapter alone, in peft's format, in fp32 or `dtype`. Merging adds in fp32 and rounds once, to weights in
    four bits as they are brought back in fp32; a model that scores is always merged, since an adapter alone
    would lack its head. Rank 0 holds one whole model in memory, in fp32 for a merge.

    Raises ConfigError before any tensor is asked for, ExportError when the proof fails.
    """
    lora = adapters.of(adapter)
    if merge and lora is None:
        raise ConfigError("nothing to merge: the model was trained without an adapter; leave out --merge")
    merge = merge or (lora is not None and description.head == "score")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is unknown; type one of {', '.join(DTYPES)}")
    if rank != 0:
        for _ in weights:
            pass
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports deepspeed, which else wonders aloud
    with load.quiet():
        kind = DTYPES[dtype] if dtype else _own_dtype(description)
        lm, frozen = _filled(description, weights, lora, torch.float32 if lora else kind)
        expected = _answers(lm)  # of what was handed in
        if merge:
            lm = adapters.merged(lm)
            _same(_answers(lm), expected, directory, "the merged model", TOLERANCE_MERGED)
            lm = load.cast(lm, kind)
            expected = _answers(lm)
        with _replacing(directory) as draft:
            if lora and not merge:
                _write_adapter(lm, draft, description, DTYPES[dtype] if dtype else torch.float32)
                del lm
                base = load.load(description, dtype=torch.float32)
                for name, parameter in base.named_parameters():
                    parameter.data = parameter.data.to(frozen[name]).float()
                if lora.kind == "qlora":  # what it was trained against; anyone's base is the plain one
                    nf4.round_(base, double=lora.double_quantisation)
                tolerance = TOLERANCE if dtype in (None, "fp32") else 2e-2
                _same(_answers(adapters.reload(base, draft)), expected, directory, "the adapter", tolerance)
            else:
                _write_model(lm, draft, description)
                del lm
                again = load.HEADS[description.head].from_pretrained(
                    draft, dtype="auto", attn_implementation="eager", trust_remote_code=False
                )
                _same(_answers(again), expected, directory, "the model", TOLERANCE)


def _own_dtype(description: Description) -> torch.dtype:
    """fp32 stays fp32; everything else is handed out in bf16, like most published models."""
    stored = description.config.dtype
    return torch.float32 if stored in (torch.float32, "float32") else torch.bfloat16


def _filled(
    description: Description,
    weights: Iterable[tuple[str, Tensor]],
    lora: adapters.Lora | None,
    dtype: torch.dtype,
) -> tuple[Any, dict[str, torch.dtype]]:
    """The transformers (or peft) model in `dtype` that holds exactly `weights`, and the type that each
    frozen weight came in, by its name in the plain model: a run in bf16 trains against a rounded base."""
    if lora and lora.kind == "qlora":  # what is left of the weights in four bits, as plain ones in fp32
        lora, weights = replace(lora, kind="lora"), nf4.unpacked(weights)
    build = load.builder(description, attention="eager", head_chunk_tokens=1, adapter=lora)
    policy = load.cast(build(), dtype)
    waiting = dict(policy.named_parameters())
    types: dict[str, torch.dtype] = {}
    with torch.no_grad():
        for name, tensor in weights:
            if name not in waiting:
                raise ValueError(f"{name} is no parameter of this model, or came twice")
            waiting.pop(name).copy_(tensor)
            if plain := adapters.base_name(name.removeprefix(load.PREFIX)):
                types[plain] = tensor.dtype
    if waiting:
        raise ValueError(f"{len(waiting)} parameters were not handed in, such as {min(waiting)}")
    lm = policy.lm.eval()
    if description.head == "lm":
        lm.generation_config = load.generation_config(description)
    return lm, types


def _write_model(lm: Any, draft: Path, description: Description) -> None:
    words = description.tokenizer
    if description.head == "score":
        words = copy.deepcopy(words)
        words.pad_token = padding(words)
        lm.config.pad_token_id = words.pad_token_id
    lm.save_pretrained(draft)
    words.save_pretrained(draft)


def padding(words: Any) -> str | None:
    """The token of a tokenizer that fills rows before a reward model: transformers scores the last other one.

    A token that may end an answer will not do, since the token before it would be scored. None if nothing
    is left; transformers then refuses batches instead of scoring them wrong.
    """
    added = [str(token) for token in words.added_tokens_decoder.values() if "pad" in str(token).lower()]
    taken = (None, words.eos_token, words.bos_token)
    return next((token for token in (words.pad_token, words.unk_token, *added) if token not in taken), None)


def _write_adapter(lm: Any, draft: Path, description: Description, dtype: torch.dtype) -> None:
    written = copy.deepcopy(lm) if dtype != torch.float32 else lm
    adapters.save(load.cast(written, dtype), draft, base=description.path)
    description.tokenizer.save_pretrained(draft)


@torch.no_grad()
def _answers(lm: Any) -> Tensor:
    """[1, PROBE_TOKENS, ...] fp32 of a fixed row of tokens, in evaluation mode: logits, or what a model that
    scores makes of every token, and the score beside it."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.config.get_text_config(decoder=True).vocab_size
    row = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
    plain = causal_lm(lm.eval())
    if hasattr(plain, "score"):
        hidden = plain.base_model(input_ids=row, use_cache=False).last_hidden_state
        return torch.cat([hidden, plain.score(hidden)], dim=-1).float()
    return lm(input_ids=row, use_cache=False).logits.float()


def _same(found: Tensor, expected: Tensor, directory: Path, what: str, tolerance: float) -> None:
    off = ((found - expected).abs().max() / expected.abs().max()).item()
    if not off <= tolerance:
        raise ExportError(
            f"{directory} was not written: {what} answers otherwise than the trained weights (off by "
            f"{off:.2g} of the largest, expected at most {tolerance:.0e})"
        )


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A draft beside `directory` that takes its place if the body succeeds, and vanishes if not."""
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    draft, old = (directory.with_name(f".{directory.name}.{word}-{mark}") for word in ("draft", "old"))
    draft.mkdir()
    try:
        yield draft
        for file in [*draft.rglob("*"), draft]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if directory.exists():
            directory.rename(old)
        draft.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
