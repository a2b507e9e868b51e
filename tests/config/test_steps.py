"""Steps between trainings: pairs from a model's own answers, models compared; by hand where it can be."""

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from framework.config import compare, steps
from framework.errors import ConfigError, DataError
from framework.rollout.base import Completion


def said(text, finished=True, logps=(-1.0,)):
    return Completion(text, ids=tuple(range(len(logps))), finished=finished, logps=logps)


def row(question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "question": question, "answer": answer, "family": "any"}


@pytest.fixture
def verifier(monkeypatch):
    """Right is an answer of even length: a tiny random model gets there now and then."""
    monkeypatch.setattr(steps.tasks, "score", lambda text, row: float(len(text) % 2 == 0))


def test_pairs_are_right_over_wrong_with_no_wrong_answer_twice():
    answers = [said("a"), said("b"), said("b"), said("c"), said("cut", finished=False), said("d")]
    right = [True, False, False, False, None, False]
    found = steps.matched(answers, right, most=2, draw=random.Random(0))
    assert [better.text for better, _ in found] == ["a", "a"]
    assert len({worse.text for _, worse in found} & {"b", "c", "d"}) == 2
    every = steps.matched(answers, right, most=9, draw=random.Random(0))
    assert sorted(worse.text for _, worse in every) == ["b", "c", "d"]
    uneven = [said("a"), *(said(text, logps=[-1.0] * n) for text, n in (("b", 3), ("c", 1), ("d", 2)))]
    verdicts = [True, False, False, False]
    short = steps.matched(uneven, verdicts, most=2, draw=random.Random(0), shortest=True)
    assert [worse.text for _, worse in short] == ["c", "d"]
    assert steps.matched(answers, [False] * 6, most=2, draw=random.Random(0)) == []
    assert steps.matched(answers, [True] * 6, most=2, draw=random.Random(0)) == []


def test_trivial_rankings_of_pairs():
    """Lengths (1, 2), (2, 1), (1, 1): the shorter is better in 1 + 1/2 of 3, and so is the longer. Sums of
    log-probabilities (-1, -4), (-4, -3), (-1, -1): 1 + 1/2 of 3."""
    one, two = said("x", logps=(-1.0,)), said("y", logps=(-2.0, -2.0))
    found = steps._baselines([(one, two), (two, said("z", logps=(-3.0,))), (one, one)])
    assert list(found.values()) == [0.5, 0.5]


def test_a_model_is_sampled_into_pairs_that_depend_on_the_seed_alone(tmp_path, tiny_model_dir, verifier):
    for name in ("train", "held"):
        rows = [row(f"{name} one {'two ' * (i % 3)}", "e") for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def sampled(where, seed):
        (tmp_path / where).mkdir()
        files = {"train": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held.jsonl")}
        result = steps.pairs(
            tmp_path / where, model=str(tiny_model_dir), **files, samples=30, max_new_tokens=96, seed=seed
        )
        written = (tmp_path / where / "train.jsonl").read_text()
        return result["facts"], [json.loads(line) for line in written.splitlines()], written

    facts, pairs, text = sampled("first", 0)
    assert facts["train pairs"] == len(pairs) > 0
    assert 0 < facts["train answers right"] < 1
    for pair in pairs:
        assert list(pair) == ["prompt", "chosen", "rejected"]
        assert pair["prompt"][-1]["role"] == "user"
        assert [len(pair[side][0]["content"]) % 2 for side in ("chosen", "rejected")] == [0, 1]
    assert sampled("again", 0)[2] == text
    assert sampled("other", 1)[2] != text


def test_no_pair_is_refused(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(steps.tasks, "score", lambda text, row: 0.0)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("one", "two")) + "\n")
    with pytest.raises(DataError, match="no pair: 0 of 2 answers"):
        steps.pairs(
            tmp_path,
            model=str(tiny_model_dir),
            train=str(path),
            held_out=str(path),
            samples=2,
            max_new_tokens=2,
        )


def test_intervals_by_hand():
    """Wilson with z^2 = 3.8415: 0 of 10 gives 0 .. 3.8415 / 13.8415 = 0.2775; 5 of 10 is symmetric,
    0.5 -+ sqrt(3.8415 / 40 + 3.8415^2 / 400) / 1.38415 = 0.5 -+ 0.2634. Wins 1, 0, 1/2, 1/2: mean 1/2,
    variance 1/8, half width 1.96 sqrt(1/8 / 4)."""
    assert compare.wilson(0, 10) == pytest.approx([0, 0, 0.2775], abs=1e-4)
    assert compare.wilson(5, 10) == pytest.approx([0.5, 0.2366, 0.7634], abs=1e-4)
    rate, low, high = compare.win_rate([True, False, True, False], [False, True, True, False])
    assert rate == 0.5
    assert high - rate == pytest.approx(rate - low) == pytest.approx(1.959964 * math.sqrt(1 / 32))


def test_models_side_by_side(tmp_path, tiny_model_dir, verifier):
    """Against itself a model is at distance 0 and wins half; the general loss is transformers' own."""
    other = tmp_path / "other"
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    lm.save_pretrained(other)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.save_pretrained(other)
    rows = [row(f"one {'two ' * (i % 3)}", "e") for i in range(6)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "general.jsonl").write_text(json.dumps(row("Hello!", "one two three")) + "\n")
    found = compare.models(
        tmp_path,
        models={"start": str(tiny_model_dir), "same": str(tiny_model_dir), "other": str(other)},
        against="start",
        held_out=str(tmp_path / "held.jsonl"),
        general=str(tmp_path / "general.jsonl"),
        max_new_tokens=6,
        shown=2,
    )
    start, same, moved = (found["measured"][name] for name in ("start", "same", "other"))
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["win_rate"] == [0.5, 0.5, 0.5]
    assert {k: v for k, v in same.items() if k not in ("kl", "win_rate")} == start
    assert moved["kl"] > 1e-3
    assert [list(sample) for sample in found["samples"]] == [
        ["prompt", "reference", "start", "same", "other"]
    ] * 2

    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_dict=False
    )
    answer = tokenizer("one two three<|im_end|>", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(asked) + answer])
    with torch.no_grad():
        expected = lm.bfloat16()(input_ids=torch.tensor([[*asked, *answer]]), labels=labels).loss
    assert moved["general_loss"] == pytest.approx(float(expected), rel=1e-3)  # of bf16 weights, both
    with pytest.raises(ConfigError, match="against: found stat; expected one of models: start"):
        compare.models(tmp_path, models={"start": "x"}, against="stat", held_out="y")


def test_a_task_is_cut_into_parts_that_share_no_question(tmp_path):
    pytest.importorskip("reasoning_gym")
    found = steps.task(
        tmp_path, family="word_sequence_reversal", parts={"sft": 6, "prompts": 4}, held_out=3, seed=5
    )
    assert found["facts"]["sft rows"] == 6
    questions = [
        json.loads(line)["question"]
        for name in ("sft", "prompts", "held-out")
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len(questions) == len(set(questions)) == 13
    assert not (tmp_path / "train.jsonl").exists()


def test_a_model_is_unpacked_once(tmp_path, tiny_model_dir):
    steps.start_model(tmp_path, path=str(tiny_model_dir), dtype="fp32")
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "model", tiny_model_dir)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
