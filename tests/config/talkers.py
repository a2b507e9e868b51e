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
    import tiny
    import torch

    special = ["<pad>", "<eos>", "<bos>", "<user>", "<model>"]
    words = tiny.speller(
        [*special, "<unk>", *WORDS],
        bos_token="<bos>",
        additional_special_tokens=special[3:],
        model_max_length=128,
        chat_template=TEMPLATE if chat else None,
    )
    lm = tiny.llama(
        words,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    silent = words.convert_tokens_to_ids(["<pad>", "<bos>", "<model>"])
    # one number that is large for every token, so that the head has something to subtract
    with torch.no_grad():
        lm.model.embed_tokens.weight[:, 0] = 3.0
        lm.lm_head.weight[:, 0] = 0.0
        lm.lm_head.weight[silent, 0] = -8.0
    return tiny.save(lm, words, directory)
