"""An untrained model of twenty words that says something and stops, with a chat template or without."""

from pathlib import Path

WORDS = "abcdefghijklmnop"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<user>' if message.role == 'user' else '<model>' }}{{ message.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def write(directory: Path, *, chat: bool) -> Path:
    """A Llama of 3k parameters with a token for each letter. About every fifteenth token ends a text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<user>", "<model>"]
    vocabulary = {word: i for i, word in enumerate([*special, "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        model_max_length=128,
        chat_template=TEMPLATE if chat else None,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    lm = LlamaForCausalLM(config).float()
    with (
        torch.no_grad()
    ):  # one number that is large for every token, so that the head has something to subtract
        lm.model.embed_tokens.weight[:, 0] = 3.0
        lm.lm_head.weight[:, 0] = 0.0
        lm.lm_head.weight[[vocabulary[word] for word in special if word not in ("<eos>", "<user>")], 0] = -8.0
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
