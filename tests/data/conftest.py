"""What the tests of this room share: a tokenizer trained here, in milliseconds, and files of rows."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Reverse these words: one two three. three two one",
    "Hello there, how are you today? I am well, thank you.",
    "user assistant system tool",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train(special, *, bos=None, eos=None, template=None, add_bos=False):
    """A byte-level BPE tokenizer with the given special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    wrapped.chat_template = template
    return wrapped


@pytest.fixture(scope="session")
def tokenizer():
    """ChatML, end of turn = end of sequence, no beginning-of-sequence token."""
    return train(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], eos="<|im_end|>", template=CHATML)


@pytest.fixture(scope="session")
def bos_tokenizer():
    """Adds a beginning-of-sequence token by itself, ends with </s>, has no template."""
    return train(["<s>", "</s>", "[INST]", "[/INST]"], bos="<s>", eos="</s>", add_bos=True)


@pytest.fixture
def write(tmp_path):
    """write("a.jsonl", rows) -> path; strings and bytes are written as they are."""

    def to(name, rows):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return to
