"""Masks, decoded and compared as text. ⟦ and ⟧ stand around what is trained."""

import numpy as np
import pytest

from framework.data import templates
from framework.data.chat import Encoded, Encoder
from framework.data.records import RowError, parse
from framework.errors import ModelError

CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


def talk(*contents, **more):
    """Alternating user and assistant turns, the assistant's given last."""
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], **more}


def encode(tokenizer, row, format="messages", **settings):
    settings = {"max_length": 512, "truncation": "error", "train_on": "assistant", **settings}
    template = templates.resolve(tokenizer, settings.pop("template", None))
    [answer] = Encoder(tokenizer, template, **settings).encode([parse(row, format)])
    return answer


def marked(tokenizer, answer):
    """The decoded example with ⟦⟧ around trained stretches."""
    assert isinstance(answer, Encoded), answer
    text, on = "", False
    for token, trained in zip(answer.input_ids.tolist(), answer.trained.tolist(), strict=True):
        if trained != on:
            text, on = text + "⟧⟦"[trained], trained
        text += tokenizer.decode([token])
    return text + ("⟧" if on else "")


GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION_BEFORE_END = GENERATION.replace(
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
    "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    + GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
)
THINKING = (  # drops the reasoning of earlier turns
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OPENS_THINKING = THINKING.replace(
    "assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}"
).replace("m.content.split('</think>')[-1]", "m.content")


@pytest.mark.parametrize("template", [None, "chatml", GENERATION, GENERATION_BEFORE_END])
def test_every_assistant_turn_is_trained_with_its_end_and_without_the_line_break(tokenizer, template):
    answer = encode(tokenizer, talk("Hi", "Hello there", "And?", "I am well"), template=template)
    assert marked(tokenizer, answer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello there<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦I am well<|im_end|>⟧\n"
    )
    assert answer.input_ids.dtype == np.int32
    assert answer.trained.dtype == np.bool_


def test_llama_like_template_without_generation_prompt(bos_tokenizer):
    answer = encode(bos_tokenizer, talk("Hi", "Hello", "And?", "Well"), template=LLAMA)
    assert marked(bos_tokenizer, answer) == (
        "<s>[INST] Hi [/INST]⟦ Hello </s>⟧<s>[INST] And? [/INST]⟦ Well </s>⟧"
    )


def test_plain_template_serves_a_tokenizer_that_knows_only_an_end(bos_tokenizer):
    answer = encode(bos_tokenizer, talk("Hi", "Hello"), template="plain")
    assert marked(bos_tokenizer, answer) == "<s>### User:\nHi\n\n### Assistant:\n⟦Hello</s>⟧\n\n"


def test_a_default_system_prompt_is_rendered_once_and_never_trained(tokenizer):
    answer = encode(tokenizer, talk("Hi", "Hello", "And?", "Well"), template=DEFAULT_SYSTEM)
    assert marked(tokenizer, answer) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Well<|im_end|>⟧\n"
    )


def test_templates_that_rewrite_earlier_turns_are_refused_and_single_turns_are_not(tokenizer):
    thought = "<think>hm</think>Hello"
    with pytest.raises(ModelError, match=r"turn 2 of 4.*not prefix-stable.*train_on=last_assistant"):
        encode(tokenizer, talk("Hi", thought, "And?", "Well"), template=THINKING)
    answer = encode(tokenizer, talk("Hi", thought), template=THINKING)
    assert marked(tokenizer, answer).endswith(f"assistant\n⟦{thought}<|im_end|>⟧\n")
    answer = encode(
        tokenizer, talk("Hi", thought, "And?", thought), template=THINKING, train_on="last_assistant"
    )
    assert marked(tokenizer, answer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        f"<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦{thought}<|im_end|>⟧\n"
    )


def test_prompts_that_open_a_thought_do_not_hide_the_answer(tokenizer):
    """The generation prompt ends in <think>, the finished turn may not have it."""
    answer = encode(tokenizer, talk("Hi", "Hello"), template=OPENS_THINKING)
    assert marked(tokenizer, answer).endswith("assistant\n⟦Hello<|im_end|>⟧\n")
    answer = encode(tokenizer, talk("Hi", "<think>\nhm</think>Hello"), template=OPENS_THINKING)
    assert marked(tokenizer, answer).endswith("assistant\n<think>\n⟦hm</think>Hello<|im_end|>⟧\n")


def test_train_on_and_weights_choose_turns(tokenizer):
    row = talk("Hi", "Hello", "And?", "Well")
    last = marked(tokenizer, encode(tokenizer, row, train_on="last_assistant"))
    assert last.count("⟦") == 1
    assert "⟦Well<|im_end|>⟧" in last
    every = encode(tokenizer, row, train_on="all")
    assert every.trained.tolist() == [False] + [True] * (len(every.trained) - 1)
    row["messages"][1]["weight"] = 0
    first_excluded = marked(tokenizer, encode(tokenizer, row))
    assert first_excluded == last
    assert marked(tokenizer, encode(tokenizer, row, template=GENERATION)) == last


def test_last_turn_excluded_leaves_nothing(tokenizer):
    row = talk("Hi", "Hello", "And?", "Well")
    row["messages"][3]["weight"] = 0
    assert encode(tokenizer, row, train_on="last_assistant").reason == "no trained turn"


def test_spaces_at_the_edges_of_an_answer_belong_to_it(tokenizer):
    for answer in ("  two", "two  ", "\n\ntwo", " é", "日本語", "🙂 ok 🙂"):
        encoded = encode(tokenizer, talk("Hi", answer))
        trained = tokenizer.decode(encoded.input_ids[encoded.trained].tolist())
        assert trained.removeprefix("\n").endswith("<|im_end|>")
        assert answer in tokenizer.decode(encoded.input_ids.tolist())
        assert trained.replace("\n", "") == (answer + "<|im_end|>").replace("\n", "")


def test_masks_by_characters_equal_masks_by_common_prefixes_of_tokens(tokenizer, bos_tokenizer):
    """Two ways to map spans to tokens must agree: the tokenizer's offsets, and the longest common prefix."""

    class WithoutOffsets:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, texts, **settings):
            encoding = self.inner(texts, **settings)
            encoding._encodings = None
            return encoding

    rows = [
        talk("Hi  ", f"{a} Hello{b}", "And?", f"{b}Well") for a in ("", " ", "\n") for b in ("", " é", "🙂")
    ]
    for of, template in ((tokenizer, None), (bos_tokenizer, LLAMA), (bos_tokenizer, "plain")):
        for row in rows:
            one, other = (encode(t, row, template=template) for t in (of, WithoutOffsets(of)))
            assert marked(of, one) == marked(of, other)
    texts = {"prompt": "The capital of Fra", "completion": "nce is Paris"}
    one, other = (encode(t, texts, "prompt_completion") for t in (tokenizer, WithoutOffsets(tokenizer)))
    assert marked(tokenizer, one) == marked(tokenizer, other)


def test_completions_are_tokenised_with_their_prompt_and_end(tokenizer, bos_tokenizer):
    """A token that reaches over the boundary is trained: the prompt alone would not have given it."""
    row = {"prompt": "The capital of France is", "completion": " Paris"}
    answer = encode(tokenizer, row, "prompt_completion")
    assert marked(tokenizer, answer) == "The capital of France is⟦ Paris<|im_end|>⟧"
    row = {"prompt": "The capital of Fran", "completion": "ce"}
    answer = encode(tokenizer, row, "prompt_completion")
    assert marked(tokenizer, answer) == "The capital of⟦ France<|im_end|>⟧"
    answer = encode(bos_tokenizer, row, "prompt_completion", train_on="all")
    assert marked(bos_tokenizer, answer) == "<s>⟦The capital of France</s>⟧"


def test_text_is_trained_whole_with_one_start_and_one_end(bos_tokenizer):
    for text in ("Hello there", "<s>Hello there", "<s>Hello there</s>"):
        assert marked(bos_tokenizer, encode(bos_tokenizer, {"text": text}, "text")) == "<s>⟦Hello there</s>⟧"


def test_tools_that_the_template_leaves_out_are_refused(tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = talk("Hi", "", tools=tools)
    row["messages"][1]["tool_calls"] = [CALL]
    with pytest.raises(ModelError, match="leaves out the call of add"):
        encode(tokenizer, row)
    with pytest.raises(ModelError, match="leaves out the tool add"):
        encode(tokenizer, talk("Hi", "Hello", tools=tools))
    knows = templates.BUILT_IN["chatml"].split("{% for message in messages %}")[-1]
    knows = (
        "{% for t in tools %}{{ t.function.name }}{% endfor %}{% for message in messages %}"
        + knows.replace("message.content", "message.content ~ (message.tool_calls or '') | string")
    )
    rendered = marked(tokenizer, encode(tokenizer, row, template=knows))
    assert "⟦" in rendered
    assert "add" in rendered[rendered.index("⟦") :]
    assert encode(tokenizer, row, template="chatml").reason == "template"  # a refusal of the template's own


def test_missing_and_unusable_templates_are_refused_with_the_key_to_set(tokenizer, bos_tokenizer, tmp_path):
    row = talk("Hi", "Hello", "And?", "Well")
    cases = [
        (bos_tokenizer, None, "no chat template.*model.chat_template to one of chatml, plain"),
        (bos_tokenizer, "chatml", "does not end assistant turns with a special token"),
        (tokenizer, "chatlm", "no such file and no such template"),
        (tokenizer, "{% for m in %}", "not valid.*line 1"),
        (tokenizer, "{{ messages.append(1) }}", "forbidden"),
        (tokenizer, "{% for i in range(1000000) %}a{% endfor %}", "forbidden"),
        (tokenizer, "{{ 'x' * 9000000 }}", "made 9000000 characters"),
        (
            tokenizer,
            "{% generation %}{{ messages[0].content }}{% endgeneration %}",
            "marks 1 parts .* 2 assistant",
        ),
    ]
    for of, template, message in cases:
        with pytest.raises(ModelError, match=message):
            encode(of, row, template=template)
    everything = GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ModelError, match="from its first word on"):
        encode(
            tokenizer,
            talk("Hi", "Hello"),
            template="{% generation %}" + everything + "{% endgeneration %}",
        )
    refusal = "{{ raise_exception('roles must alternate') }}"
    answer = encode(tokenizer, row, template=refusal)
    assert isinstance(answer, RowError)
    assert "roles must alternate" in str(answer)
    path = tmp_path / "own.jinja"
    path.write_text(GENERATION)
    assert marked(tokenizer, encode(tokenizer, row, template=str(path))).count("⟦") == 2


def test_truncation_keeps_the_wanted_end_and_never_an_example_without_trained_tokens(tokenizer):
    row = talk("Hi there, how are you today?", "I am well, thank you.")
    whole = encode(tokenizer, row)
    n = len(whole.input_ids)
    answer = encode(tokenizer, row, max_length=n)
    assert not answer.truncated
    for truncation in ("error", "drop"):
        answer = encode(tokenizer, row, max_length=n - 1, truncation=truncation)
        assert answer.reason == "over-long"
        assert f"{n} tokens" in str(answer)
    right = encode(tokenizer, row, max_length=n - 3, truncation="right")
    assert right.truncated
    assert np.array_equal(right.input_ids, whole.input_ids[:-3])
    assert np.array_equal(right.trained, whole.trained[:-3])
    left = encode(tokenizer, row, max_length=4, truncation="left")
    assert np.array_equal(left.input_ids, whole.input_ids[-4:])
    assert left.trained.tolist() == [False, *whole.trained[-3:].tolist()]
    nothing = encode(tokenizer, row, max_length=4, truncation="right")
    assert nothing.reason == "no trained token"
    assert "after truncation to 4 tokens" in str(nothing)


def test_ids_outside_the_vocabulary_and_missing_end_are_refused(tokenizer, bos_tokenizer):
    with pytest.raises(ModelError, match="vocabulary has 3 entries"):
        encode(tokenizer, talk("Hi", "Hello"), vocab_size=3)
    biggest = int(encode(tokenizer, talk("Hi", "Hello")).input_ids.max())
    assert isinstance(encode(tokenizer, talk("Hi", "Hello"), vocab_size=biggest + 1), Encoded)
    without_end = type(bos_tokenizer)(tokenizer_object=bos_tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode(without_end, {"text": "Hello"}, "text")


def test_a_bad_row_among_good_ones_keeps_the_order(tokenizer):
    rows = [talk("Hi", "Hello"), talk("Hi", "Hello " * 400), talk("And?", "Well")]
    encoder = Encoder(
        tokenizer, tokenizer.chat_template, max_length=100, truncation="error", train_on="assistant"
    )
    first, second, third = encoder.encode([parse(row, "messages") for row in rows])
    assert "Hello" in marked(tokenizer, first)
    assert isinstance(second, RowError)
    assert "Well" in marked(tokenizer, third)
