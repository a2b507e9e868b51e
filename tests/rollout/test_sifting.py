"""Which of a model's own texts are of use, and where a turn ends that generation does not end at."""

import pytest
import tiny

from framework.rollout.base import Completion
from framework.rollout.sifting import Rules, cut

WORDS = tiny.tokenizer()
RULES = Rules.of(WORDS, ("### User:",), 3)


def said(text, *, finished=True, end="<|im_end|>"):
    ids = WORDS(text, add_special_tokens=False)["input_ids"]
    last = [WORDS.convert_tokens_to_ids(end)] if finished else []
    return Completion(WORDS.decode(ids, skip_special_tokens=True), (*ids, *last), finished)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("The capital of France is Paris.", None),
        ("1, 2, 3", None),
        (" ... ", "empty"),
        ("", "empty"),
        ("a", "too short"),
        ("Hello <|im_start|>user again", "special tokens"),
        ("Hello! ### User: and so on", "special tokens"),
        ("one two three. " * 12, "repetitive"),
        ("one two three. " * 2, None),
    ],
)
def test_faults_have_names(text, fault):
    completion = said(text)
    assert RULES.fault(completion, completion.text.strip()) == fault


def test_what_did_not_end_is_unfinished_whatever_else_it_is():
    assert RULES.fault(said("The capital of", finished=False), "The capital of") == "unfinished"


def test_half_a_letter_is_no_text():
    ids = WORDS("The capital é of France", add_special_tokens=False)["input_ids"]
    whole = WORDS("é", add_special_tokens=False)["input_ids"]
    assert len(whole) == 2  # bytes
    ids.remove(whole[1])
    completion = Completion(WORDS.decode(ids), (*ids, WORDS.eos_token_id), True)
    assert RULES.fault(completion, completion.text) == "broken characters"


def test_a_turn_ends_where_its_mark_stands():
    """A template whose user's turn ends with a mark that generation goes on behind."""
    whole = said("What is the capital? [/ASK] The capital is Paris.")
    request = cut(whole, WORDS, "[/ASK]")
    assert request.text == "What is the capital? "
    assert request.finished
    assert RULES.fault(request, request.text) is None
    assert WORDS.decode(request.ids[:-1]) == "What is the capital? "
    assert cut(whole, WORDS, "[/OTHER]") is whole
    assert cut(whole, WORDS, "") is whole
