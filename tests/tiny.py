"""A tiny random Llama in Hugging Face form, with a tokenizer trained here: nothing is downloaded."""

from framework.config.specimens import CHATML, TEXT, tokenizer
from framework.config.specimens import write_model as write

__all__ = ["CHATML", "TEXT", "tokenizer", "write"]
