"""From `model.path` to what a strategy needs: a structure to build and weights to fill it with.

Knows no rank and no strategy. `inspect` reads no weights and refuses what cannot be trained; `builder`
makes the structure wherever the strategy wants it; `reader` is called on one rank and yields whole
tensors one by one.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from framework.errors import ModelError
from framework.keyed import key
from framework.models import adapters, attention, families, nf4, source
from framework.models import tokenizer as words
from framework.models.adapters import Lora
from framework.models.policy import Policy, causal_lm
from framework.models.scorer import Scorer
from framework.models.source import Source
from framework.strategy.base import Build, Weights

Adapter = Lora | Mapping[str, Any] | None
PREFIX = "lm."  # of every parameter of a `Policy` and of a `Scorer`
HEADS = {"lm": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}
SCORE = "score.weight"  # the head of a `Scorer`, [1, d]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by `precision`
WIDEST = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Description:
    """A model that was looked at and accepted; none of its weights have been read."""

    path: str  # as it was asked for
    source: Source
    init: str  # pretrained | random
    config: PretrainedConfig
    tokenizer: Any
    pad_id: int  # fills padded rows; masks go by position, so any id would do
    parameters: int  # tied ones once
    fingerprint: str  # of configuration, tokenizer and weights
    head: str = "lm"  # lm: log-probabilities (`Policy`); score: one number (`Scorer`)
    scored: bool = False  # the files hold a head that scores; False: it is made new

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids must be below it."""
        return int(self.config.get_text_config(decoder=True).vocab_size)

    @property
    def blocks(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config(decoder=True).num_hidden_layers)


def inspect(
    path: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    init: str = "pretrained",
    head: str = "lm",
    quantised: bool = False,
) -> Description:
    """Look at the model that `model.path` names. Raises ModelError for what cannot be trained.

    `head` is "lm", or "score" for a body with one number on top, whose head is new unless the directory is
    itself one of sequence classification. `quantised`: its blocks are to be held in four bits.
    """
    with quiet():
        found = source.find(path, revision=revision, gguf_file=gguf_file)
        config = source.configuration(found)
        families.check(config, head=head)
        scored = _scores(path, config, head) and init != "random"
        tokenizer = words.load(found, config)
        lm = _structure(config, "eager", torch.device("meta"), head=head)
        if quantised:
            nf4.check(lm, config.model_type)
    names = {name for name, _ in lm.named_parameters(remove_duplicate=False)}
    state = sorted(set(lm.state_dict()) - names)
    if head == "score":
        state += sorted(name for name in names if not name.startswith((f"{lm.base_model_prefix}.", SCORE)))
    if state:
        raise ModelError(
            f"model type {config.model_type} is not supported: it keeps state that is not a parameter of its "
            f"layers ({state[0]})"
        )
    weights = "random" if init == "random" else found.fingerprint()
    parts = [json.dumps(config.to_dict(), sort_keys=True, default=str), words.identity(tokenizer), weights]
    return Description(
        path=path,
        source=found,
        init=init,
        config=config,
        tokenizer=tokenizer,
        pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        parameters=sum(parameter.numel() for parameter in lm.parameters()),
        fingerprint=hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest(),
        head=head,
        scored=scored,
    )


def attention_for(description: Description, name: str, device: torch.device, *, precision: str) -> str:
    """The attention implementation for `model.attention`; see `attention.choose`. Raises ModelError."""
    return attention.choose(name, device, description.config, DTYPES[precision])


def builder(
    description: Description,
    *,
    attention: str,
    head_chunk_tokens: int,
    adapter: Adapter = None,
    neftune_alpha: float | None = None,
) -> Build:
    """Makes the structure of the `Policy` or `Scorer`, in fp32, with values that mean nothing yet.

    `attention` is a name from `attention_for`. Buffers (rotary tables) are real even where the strategy
    lets parameters be born on the meta device. With an adapter only its parameters ask for gradients,
    and the head's where it is one that scores.
    """
    lora = adapters.of(adapter)

    def build() -> nn.Module:
        with quiet():
            lm = _structure(description.config, attention, head=description.head)
            lm = _adapted(lm, lora, description.head)
            if lora and lora.kind == "qlora":
                nf4.quantise(lm, double=lora.double_quantisation)
        if description.head == "score":
            return Scorer(lm)
        return Policy(lm, head_chunk_tokens=head_chunk_tokens, neftune_alpha=neftune_alpha)

    return build


def reader(
    description: Description,
    *,
    adapter: Adapter = None,
    seed: int = 0,
    zero_head: bool = False,
    keep_head: bool = True,
) -> Weights:
    """Yields (name in the built model, whole tensor on the CPU), every parameter once, in its order.

    Pretrained weights keep the type they are stored in (fp32 for GGUF) unless they are quantised. New ones,
    `init=random`, adapters and scoring heads, are fp32 and pure functions of `seed`; a new scoring head is 0
    with `zero_head`, every one without `keep_head`. Call it on one rank: it holds the model. Raises
    ModelError where the files lack a parameter.
    """
    lora = adapters.of(adapter)

    def weights() -> Iterator[tuple[str, Tensor]]:
        with quiet():
            lm = _adapted(load(description, seed=seed), lora, description.head)
        quantised = nf4.chosen(lm) if lora and lora.kind == "qlora" else {}
        for name, parameter in lm.named_parameters():
            if lora and name.removesuffix(".weight") in quantised:
                yield from nf4.packed(PREFIX + name, parameter, double=lora.double_quantisation)
            elif lora and adapters.is_magnitude(name):
                yield PREFIX + name, adapters.magnitudes(lm, name)
            elif lora and adapters.is_adapter(name):
                yield PREFIX + name, adapters.initial(name, parameter.shape, seed)
            elif zero_head and not (description.scored and keep_head) and name.endswith(SCORE):
                yield PREFIX + name, torch.zeros_like(parameter, requires_grad=False)
            else:
                yield PREFIX + name, parameter.detach()

    return weights


def load(description: Description, *, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
    """The transformers model on the CPU, with its weights, in `dtype` or the type they are stored in.

    A new scoring head is drawn from N(0, 1 / (d + 1)) (Stiennon et al. 2020, arXiv 2009.01325), in fp32.
    """
    if description.head == "score" and not description.scored:
        return _with_head(load(replace(description, head="lm"), seed=seed, dtype=dtype), description, seed)
    if description.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "init"))
            return cast(_structure(description.config, "eager"), dtype or torch.float32)
    found = description.source
    files = found.weight_files()
    stored = torch.float32 if found.gguf_file else _stored_dtype(files)
    answer: Any = HEADS[description.head].from_pretrained(
        found.directory,
        config=None if found.gguf_file else copy.deepcopy(description.config),
        gguf_file=found.gguf_file,
        dtype=dtype or stored,
        attn_implementation="eager",
        trust_remote_code=False,
        use_safetensors=None if found.gguf_file else True,
        local_files_only=True,
        output_loading_info=True,
    )
    lm, report = answer
    absent = sorted(report["missing_keys"]) + sorted(str(entry) for entry in report["mismatched_keys"])
    if absent:
        raise ModelError(
            f"{found.directory}: the weights do not fit the configuration; {len(absent)} parameters are "
            f"missing or of another shape, such as {absent[0]}"
        )
    if found.gguf_file:
        undo_quantisation(lm)
    expected = _structure(description.config, "eager", torch.device("meta"), head=description.head)
    ours, theirs = ([name for name, _ in model.named_parameters()] for model in (expected, lm))
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))
        raise ModelError(
            f"{found.directory}: its configuration and its weights disagree on {', '.join(odd[:3])}"
        )
    if description.config.model_type not in families.VERIFIED:
        attention.register()
        lm.set_attn_implementation(attention.OURS["auto"])
        families.prove(Scorer(lm) if description.head == "score" else Policy(lm, head_chunk_tokens=16), lm)
    return lm.eval()


def unfilled(description: Description) -> Any:
    """The transformers model on the CPU as its family makes it, for generation; without values yet."""
    with quiet():
        lm = _structure(description.config, "sdpa")
        lm.generation_config = generation_config(description)
    return lm


def cast(lm: Any, dtype: torch.dtype) -> Any:
    """`lm` with its parameters in `dtype`. Buffers stay: a rotary table in bf16 is a wrong one."""
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(dtype)
    return lm


def undo_quantisation(lm: Any) -> None:
    """Forget that the weights came out of a GGUF file: they are plain tensors now."""
    for name in ("quantization_method", "hf_quantizer", "is_quantized"):
        lm.__dict__.pop(name, None)
    lm.config.__dict__.pop("quantization_config", None)


def generation_config(description: Description) -> GenerationConfig:
    """How the model likes to generate: its own settings, or its special tokens."""
    file = description.source.directory / "generation_config.json"
    if description.source.gguf_file is None and file.is_file():
        return GenerationConfig.from_pretrained(description.source.directory)
    words = description.tokenizer
    return GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=description.pad_id
    )


def _structure(
    config: PretrainedConfig, implementation: str, device: torch.device | None = None, *, head: str = "lm"
) -> Any:
    """An unfilled fp32 model; its configuration is a copy."""
    attention.register()
    with device or contextlib.nullcontext():
        return HEADS[head].from_config(
            copy.deepcopy(config),
            attn_implementation=implementation,
            dtype=torch.float32,
            trust_remote_code=False,
        )


def _scores(path: str, config: PretrainedConfig, head: str) -> bool:
    """Whether the files at `path` hold a scoring head; makes `config` one of a single label where asked.

    Raises ModelError where the head that is there is not the one that is wanted.
    """
    saved = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    if saved and head == "lm":
        raise ModelError(
            f"{path} holds a reward model ({saved[0]}), which has no head for tokens; expected a causal "
            "language model, such as the one it was trained from"
        )
    if saved and config.num_labels != 1:
        raise ModelError(
            f"{path} holds a classifier with {config.num_labels} labels; expected a reward model, which has "
            "1, or a causal language model, which gets a new head"
        )
    if head == "score":
        config.num_labels = 1
    return bool(saved)


def _with_head(lm: Any, description: Description, seed: int) -> Any:
    """The scorer that has the body of `lm` and a new head."""
    scorer = _structure(description.config, "eager", torch.device("meta"), head="score")
    setattr(scorer, scorer.base_model_prefix, lm.base_model)
    generator = torch.Generator().manual_seed(key(seed, "score"))
    width = scorer.score.weight.shape[1]  # d
    drawn = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
    scorer.score.weight = nn.Parameter(drawn)
    return scorer.eval()


def _adapted(lm: Any, lora: Lora | None, head: str) -> Any:
    """`lm` with adapters, if any; a head that scores is trained beside them."""
    if lora is None:
        return lm
    lm = adapters.attach(lm, lora, excluded=["score"] if head == "score" else None)
    if head == "score":
        causal_lm(lm).score.weight.requires_grad_(True)
    return lm


def _stored_dtype(files: list[Any]) -> torch.dtype:
    """The widest floating type among the tensors of safetensors files, so that nothing is rounded."""
    kinds = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    known = [dtype for name, dtype in WIDEST.items() if name in kinds]
    if not known:
        raise ModelError(f"{files[0]}: holds {', '.join(sorted(kinds))}; expected one of {', '.join(WIDEST)}")
    return known[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and remarks."""
    if not torch.cuda.is_available():
        # Saving a model makes accelerate import DeepSpeed where that is installed, which remarks on a CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between transformers and peft, not for the user
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
