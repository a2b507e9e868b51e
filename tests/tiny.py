"""A tiny random Llama in Hugging Face form, with a tokenizer trained here: nothing is downloaded."""

from pathlib import Path

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


def tokenizer():
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


def write(directory: Path, *, tied: bool) -> Path:
    """Model, tokenizer and chat template in `directory`: 3 layers, grouped queries, fp32, 60k parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # large enough that logits differ from token to token
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
