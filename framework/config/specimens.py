"""Something small to train: a random Llama, its tokenizer, rows of every kind, a reward model and a teacher.

Nothing is downloaded, and everything is the same on every machine. The certificate trains on it, and so do
the tests.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

TEXT = [
    "The capital of France is Paris. What is the capital of France? The capital of Spain is Madrid.",
    "Reverse the order of the words: one two three four five. Answer: five four three two one.",
    "You are a helpful assistant. Hello! How can I help you today? Please write a short story.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9, 10, 20, 30. Sums: 1 + 2 = 3, 4 + 5 = 9. A list: [1, 2, 3]; a dict: {}.",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> Any:
    """A byte-level BPE of 400 tokens (every text can be encoded) that speaks ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        chat_template=CHATML,
    )


def write_model(directory: Path, *, tied: bool, **sizes: Any) -> Path:
    """Model, tokenizer and chat template in `directory`: 3 layers, grouped queries, fp32, 60k parameters.

    `sizes` are other ones, as of transformers' LlamaConfig.
    """
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # large enough that logits differ from token to token
    }
    words = tokenizer()
    return save(llama(words, tie_word_embeddings=tied, **tiny | sizes), words, directory)


def llama(words: Any, **config: Any) -> Any:
    """An untrained Llama in fp32 for a tokenizer, the same on every machine."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(words)} | ids | config)).float()


def save(lm: Any, words: Any, directory: Path) -> Path:
    """Model and tokenizer in one directory."""
    lm.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


WORDS = "one two three four five list story capital of France".split()


def write_rows(path: Path, rows: int = 60, seed: int = 0) -> Path:
    """Chats of very uneven length, some of two turns."""
    draw = random.Random(seed)
    words = "the capital of France is Paris one two three four five words list story".split()

    def say(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    with path.open("w") as file:
        for row in range(rows):
            messages = []
            for _ in range(1 + (row % 5 == 0)):
                messages.append({"role": "user", "content": say(8)})
                messages.append({"role": "assistant", "content": say(3 if row % 3 else 20)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write(place: Path, model: Path) -> Path:
    """Pairs, labelled answers, prompts and chats of very uneven length, a reward model and a teacher."""
    draw = random.Random(0)

    def say(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "labelled": [], "prompts": [], "chats": []}
    for row in range(60):
        prompt = [{"role": "user", "content": say(10)}]
        one, other = f"{say(3 if row % 3 else 16)}.", f"{say(6)}!"
        rows["pairs"].append({"prompt": prompt, "chosen": one, "rejected": other, "margin": row % 2 * 0.5})
        rows["labelled"].append(
            {"prompt": prompt, "completion": one if row % 2 else other, "label": bool(row % 2)}
        )
        rows["prompts"].append({"prompt": prompt})
        rows["chats"].append({"messages": [*prompt, {"role": "assistant", "content": one}]})
    for name, lines in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_rows(place / "turns.jsonl")
    _write_judge(place / "judge", model)
    write_teacher(place / "teacher", model)
    return place


def write_teacher(place: Path, model: Path, *, more_rows: int = 0) -> Path:
    """A wider, shallower model of the same words with sharp opinions; `more_rows` stand for no token."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.from_pretrained(
        model, hidden_size=48, num_hidden_layers=2, initializer_range=0.2, tie_word_embeddings=False
    )
    config.vocab_size += more_rows
    LlamaForCausalLM(config).float().save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)
    return place


def _write_judge(place: Path, model: Path) -> None:
    """A scorer of the policy's words, with weights of its own."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(model, num_labels=1)
    LlamaForSequenceClassification(config).float().save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)
