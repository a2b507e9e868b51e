"""The shared tiny model is a model that transformers loads, and its tokenizer loses nothing."""

from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_tiny_model_loads_and_speaks_chatml(tiny_model_dir, tiny_untied_dir):
    tied, untied = map(AutoModelForCausalLM.from_pretrained, (tiny_model_dir, tiny_untied_dir))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    words = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = words.apply_chat_template([{"role": "user", "content": "Ünï? 7"}], tokenize=False)
    assert text == "<|im_start|>user\nÜnï? 7<|im_end|>\n"
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert words.decode(ids) == text
    assert ids[-2] == words.eos_token_id == tied.config.eos_token_id
    assert max(ids) < tied.config.vocab_size
