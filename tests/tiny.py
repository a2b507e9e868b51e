"""Tiny random Llamas in Hugging Face form, with tokenizers made here: nothing is downloaded."""

from framework.config.specimens import CHATML, TEXT, llama, save, tokenizer
from framework.config.specimens import write_model as write

__all__ = ["CHATML", "TEXT", "llama", "save", "speller", "tokenizer", "write"]


def speller(tokens, **special):
    """A tokenizer with a token for each character, in the order of `tokens`; `special` as in transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", **special
    )
