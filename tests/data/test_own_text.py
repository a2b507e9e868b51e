"""What a start model is asked, which of its texts are alike, and what is held out of a file."""

import random

import numpy as np
import pytest

from framework.data import holdout, likeness, requests
from framework.data.leaks import normalised
from framework.data.probing import STRATA

WORDS = "river stone light engine window paper music garden winter bridge copper letter market forest".split()


def asked(part, count):
    return [requests.request(part, index) for index in range(count)]


def test_kinds_take_turns_and_every_request_comes_once_in_a_round():
    first = asked("train", 600)
    assert [request.stratum for request in first[:6]] == list(STRATA)
    assert first == asked("train", 600)
    codes = [request.text for request in first if request.stratum == "code"]
    assert len(codes) == len(set(codes)) == len(requests.TASKS) * len(requests.LANGUAGES)


def test_what_measures_is_asked_about_other_things():
    """No request, topic, task or sum is in both parts."""
    train, probe = (asked(part, 3000) for part in ("train", "probe"))
    assert not {normalised(r.text) for r in train} & {normalised(r.text) for r in probe}
    assert not set(requests.TOPICS) & set(requests.PROBE_TOPICS)
    assert not set(requests.TASKS) & set(requests.PROBE_TASKS)


def text(seed, words=60):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + str(draw.randint(0, 99)) for _ in range(words))


def test_texts_that_differ_in_form_only_are_duplicates():
    seen = likeness.Seen()
    assert seen.add("The River, and the stone!") is None
    assert seen.add("the river and THE  stone") == "duplicate"
    assert seen.add("the river and the stones") is None  # short: one letter is a difference
    assert seen.add("2 + 3 = 5") is None
    assert seen.add("2 + 4 = 6") is None
    assert [seen.add("+"), seen.add("+"), seen.add("-")] == [None, "duplicate", None]


@pytest.mark.parametrize("changed", [1, 3])
def test_texts_that_share_most_of_their_pieces_are_near_duplicates(changed):
    seen = likeness.Seen()
    words = text(0).split()
    assert seen.add(" ".join(words)) is None
    for place in range(changed):
        words[place * 20 + 5] = "otherwise"
    assert seen.add(" ".join(words)) == "near duplicate"
    assert seen.add(text(1)) is None


def test_languages_without_spaces_are_compared_too():
    letters = [chr(0x4E00 + n) for n in random.Random(0).sample(range(5000), 80)]
    seen = likeness.Seen()
    assert seen.add("".join(letters)) is None
    assert seen.add("".join([*letters[:40], "的", *letters[41:]])) == "near duplicate"
    assert seen.add("".join(reversed(letters))) is None


def test_what_is_alike_is_found_as_often_as_it_should_be():
    """At 0.8 of shared shingles a band is shared with probability 1 - (1 - 0.8^4)^32; half is let be."""
    found = {0.8: 0, 0.5: 0}
    for share in found:
        for trial in range(50):
            draw = np.random.default_rng([trial, int(10 * share)])
            letters = [chr(c) for c in draw.choice(np.arange(0x4E00, 0x9000), 400, replace=False)]
            # with n letters of 400 replaced at the end, 396 - n of 396 + n shingles are shared
            end = round(396 * (1 - share) / (1 + share))
            seen = likeness.Seen()
            seen.add("".join(letters))
            other = [chr(c) for c in draw.choice(np.arange(0x9000, 0x9F00), end, replace=False)]
            found[share] += seen.add("".join([*letters[:-end], *other])) == "near duplicate"
    assert found == {0.8: 50, 0.5: 0}


def test_rows_that_measure_are_not_left_to_learn_from():
    texts = ["One.", "two", "ONE", "three", "four", "two!", "five"]
    measured, left = holdout.split(texts, 2, without={"three"})
    kept = {normalised(texts[place]) for place in measured}
    assert len(kept) == len(measured) == 2
    assert "three" not in kept
    assert {normalised(texts[place]) for place in left} == {normalised(t) for t in texts} - kept
    everything, rest = holdout.split(texts, 99, without={"three"})
    assert [texts[place] for place in everything] == ["One.", "two", "four", "five"]
    assert [texts[place] for place in rest] == ["three"]


def test_the_choice_hangs_on_what_rows_say():
    texts = [text(seed, 5) for seed in range(40)]
    chosen = {texts[place] for place in holdout.split(texts, 10)[0]}
    turned = texts[::-1]
    assert {turned[place] for place in holdout.split(turned, 10)[0]} == chosen
    assert len(chosen & {texts[:35][place] for place in holdout.split(texts[:35], 10)[0]}) >= 5
