"""The tokenizer that lies beside a model's weights. Knows no weights and no templates."""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from framework.errors import ModelError
from framework.models.source import Source

TOKENIZER_FILES = (
    "tokenizer.json tokenizer.model vocab.json vocab.txt spiece.model sentencepiece.bpe.model tekken.json"
).split()


def load(found: Source, config: PretrainedConfig) -> Any:
    """A model's tokenizer, with a known end of sequence, no id beyond the embedding. Raises ModelError."""
    where = found.directory
    if found.gguf_file is None and not any((where / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{where} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); put one there or set "
            "model.path to a directory that has both"
        )
    options: dict[str, Any] = {"gguf_file": found.gguf_file} if found.gguf_file else {"config": config}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, trust_remote_code=False, local_files_only=True, **options
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{where}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    text = config.get_text_config(decoder=True)
    if tokenizer.eos_token_id is None:
        ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
        if ends[0] is None:
            raise ModelError(
                f"{where}: the tokenizer has no end-of-sequence token, so a model would never learn to "
                "stop; set eos_token in its tokenizer_config.json, or eos_token_id in config.json"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    largest = max(tokenizer.get_vocab().values())
    if largest >= text.vocab_size:
        raise ModelError(
            f"{where}: the tokenizer has ids up to {largest}, the embedding has {text.vocab_size} rows; set "
            "model.path to a model and tokenizer that belong together"
        )
    return tokenizer


def identity(tokenizer: Any) -> str:
    """A text that changes when the tokenizer would cut or frame a text in another way."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cut = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return json.dumps(
        [cut, tokenizer.special_tokens_map, tokenizer.chat_template], sort_keys=True, default=str
    )
