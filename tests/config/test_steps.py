"""Steps between trainings: pairs from a model's own answers, models compared; by hand where it can be."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from framework.config import compare, steps
from framework.errors import ConfigError, DataError, ModelError
from framework.rollout.base import Completion
from framework.rollout.hf import generate
from framework.rollout.intervals import win_rate


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
            tmp_path / where,
            model=str(tiny_model_dir),
            **files,
            samples=30,
            max_new_tokens=96,
            damaged_per_prompt=1,
            separator="e",
            seed=seed,
        )
        texts = [(tmp_path / where / f"{name}.jsonl").read_text() for name in ("train", "held-out")]
        return result["facts"], *([json.loads(line) for line in t.splitlines()] for t in texts), texts

    facts, rankings, pairs, texts = sampled("first", 0)
    assert 0 < facts["train answers right"] < 1
    assert facts["held-out pairs"] == len(pairs) > 0
    for pair in pairs:
        assert list(pair) == ["prompt", "chosen", "rejected"]
        assert pair["prompt"][-1]["role"] == "user"
        assert [len(pair[side][0]["content"]) % 2 for side in ("chosen", "rejected")] == [0, 1]
    assert facts["train rankings"] == len(rankings) > 0
    assert facts["train pairs with damaged answers"] == sum(len(r["responses"]) - 1 for r in rankings)
    assert facts["train pairs with damaged answers"] > facts["train pairs"]
    for ranking in rankings:
        better, *wrong = ranking["responses"]
        assert ranking["ranks"] == [1] + [2] * len(wrong)
        assert [len(text) % 2 for text in ranking["responses"]] == [0] + [1] * len(wrong)
        if len(wrong) == 3:  # two of the model's own, then one made of the right answer's letters
            assert set(wrong[-1]) <= {*better, "e"}
    assert sampled("again", 0)[3] == texts
    assert sampled("other", 1)[3] != texts


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


def answered(lm, tokenizer, rows):
    return generate(lm, tokenizer, [r["messages"][:-1] for r in rows], max_new_tokens=12)


@pytest.fixture
def judged(tmp_path, tiny_model_dir, verifier):
    """`compare.models` of a model, a tired copy of it and a judge whose padding token ends an answer, too."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    lm.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    with torch.no_grad():
        scorer.score.weight.copy_(torch.randn(1, 32, generator=generator))
    rows = [row(f"one {'two ' * (i % 3)}{i}", "e") for i in range(8)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (answer,) = answered(lm.bfloat16(), tokenizer, rows[:1])
    scorer.config.pad_token_id = answer.ids[-1]
    scorer.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")

    def compared(judge):
        found = compare.models(
            tmp_path,
            models={name: str(tiny_model_dir) for name in ("start", "same")}
            | {"other": str(tmp_path / "other")},
            against="start",
            held_out=str(tmp_path / "held.jsonl"),
            max_new_tokens=12,
            kl_questions=1,
            judge=str(judge),
        )
        return found["measured"]

    return compared, rows, tokenizer, scorer


def test_a_reward_model_compares_models(tmp_path, tiny_model_dir, judged):
    """Scores are transformers' own at the last token, asked without padding; ours run in bf16."""
    compared, rows, tokenizer, scorer = judged
    measured = compared(tmp_path / "judge")
    scorer.config.pad_token_id = None  # its pooling then takes the last token
    expected = {}
    for name, path in (("start", tiny_model_dir), ("other", tmp_path / "other")):
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        questions = [r["messages"][:-1] for r in rows]
        asked = [tokenizer.apply_chat_template(q, add_generation_prompt=True)["input_ids"] for q in questions]
        answers = answered(lm, tokenizer, rows)
        with torch.no_grad():
            expected[name] = torch.tensor(
                [
                    float(scorer(torch.tensor([[*q, *a.ids]])).logits)
                    for q, a in zip(asked, answers, strict=True)
                ]
            )
        assert measured[name]["reward"] == pytest.approx(float(expected[name].mean()), abs=0.05)
    assert measured["same"]["reward"] == measured["start"]["reward"]
    assert measured["same"]["judged_win_rate"] == [0.5, 0.5, 0.5]
    assert measured["other"]["judged_win_rate"] == list(win_rate(expected["other"], expected["start"]))
    assert "judged_win_rate" not in measured["start"]
    assert "win_rate" in measured["other"]


def test_a_judge_without_an_opinion_is_left_out_and_one_that_cannot_judge_refused(
    tmp_path, tiny_model_dir, judged
):
    compared, _, tokenizer, scorer = judged
    with torch.no_grad():
        scorer.score.weight.fill_(torch.nan)
    scorer.save_pretrained(tmp_path / "judge")
    measured = compared(tmp_path / "judge")
    assert not {"reward", "judged_win_rate"} & (measured["other"].keys() | measured["start"].keys())
    with pytest.raises(ModelError, match="holds no reward model"):
        compared(tiny_model_dir)
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained(tmp_path / "judge")
    scorer.resize_token_embeddings(len(tokenizer))
    scorer.save_pretrained(tmp_path / "judge")
    with pytest.raises(ConfigError, match=r"judge: .* has another vocabulary than start"):
        compared(tmp_path / "judge")


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
