"""What people see: trained tokens marked, counts complete, every example in the first step's plan."""

import importlib.util
import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers import LlamaConfig

from framework.data import answers, preview, prompts, tables
from framework.data.mixture import Group, Mixture
from framework.data.pairs import Pairs
from framework.data.sources import Source


def printed(shown):
    stream = io.StringIO()
    Console(file=stream, width=200).print(shown, soft_wrap=True)
    return stream.getvalue()


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prepared(tokenizer, tmp_path, write):
    rows = [talk("Hi", "Hello"), talk("Say [bold]", "a" * 50), talk("", "x"), talk("And?", "Well")]
    [table] = tables.prepare(
        [Source(write("mine.jsonl", rows))],
        tokenizer=tokenizer,
        max_length=256,
        on_bad_row="drop",
        cache_dir=tmp_path / "cache",
    )
    return table


def test_trained_tokens_stand_between_marks(tokenizer, tmp_path, write):
    table = prepared(tokenizer, tmp_path, write)
    shown = printed(preview.example(table, 0, tokenizer, colours=False))
    assert "mine.jsonl:1  " in shown
    assert "tokens, " in shown
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n" in shown
    assert "[bold]" in printed(preview.example(table, 1, tokenizer, colours=False))
    coloured = preview.example(table, 0, tokenizer, colours=True)
    [trained] = [span for span in coloured.spans if "green" in str(span.style)]
    assert coloured.plain[trained.start : trained.end] == "Hello<|im_end|>"
    cut = printed(preview.example(table, 1, tokenizer, colours=False, limit=60))
    assert "…" in cut


def test_pairs_labels_and_prompts_come_under_headings(tokenizer, tmp_path, write):
    settings = {"tokenizer": tokenizer, "max_length": 256, "cache_dir": tmp_path / "cache"}
    pair = {"prompt": "Hi", "chosen": " Hello", "rejected": " you"}
    ranking = {"prompt": "Hi", "responses": [" one", " two", " three"], "ranks": [2, 1, 2]}
    path = write("pairs.jsonl", [pair])
    [pairs] = answers.prepare_comparisons([Source(path)], **settings)
    [ranked] = answers.prepare_comparisons([Source(write("ranked.jsonl", [ranking]))], **settings)
    shown = printed(preview.example(pairs, 0, tokenizer, colours=False))
    tokens = pairs.lengths[0]
    assert f"pairs.jsonl:1  {tokens} tokens, {pairs.trained[0]} trained\n── prompt, " in shown
    assert "tokens ──\nHi\n── chosen, " in shown
    assert "tokens ──\n⟦ Hello<|im_end|>⟧\n── rejected, " in shown
    shown = printed(preview.example(ranked, 0, tokenizer, colours=False))
    assert "answer 1, better than 0" in shown
    assert "answer 2, better than 2" in shown
    row = {"prompt": "Hi", "completion": " Hello", "label": False}
    [labelled] = answers.prepare_labelled([Source(write("liked.jsonl", [row]))], **settings)
    assert "── undesirable, " in printed(preview.example(labelled, 0, tokenizer, colours=False))
    settings["max_prompt_tokens"] = settings.pop("max_length")
    [asked] = prompts.prepare([Source(path)], **settings)
    shown = printed(preview.example(asked, 0, tokenizer, colours=False))
    assert f"{asked.lengths[0]} tokens, 0 trained\n── prompt, {asked.lengths[0]} tokens ──\nHi\n" in shown
    assert "⟦" not in shown
    mixture = Mixture(Group([pairs.trained, ranked.trained]), seed=0)
    cut = {"sequences": 2, "tokens_per_micro": 50, "packing": True, "ranks": 1}
    for sharing in (True, False):
        plan = printed(preview.packed([pairs, ranked], mixture, **cut, kind=Pairs(sharing=sharing)))
        assert (f"pairs:{tokens}" in plan) == sharing
        assert (f"pairs:{tokens + pairs.prompts[0]}" in plan) != sharing


def test_counts_name_what_was_dropped(tokenizer, tmp_path, write):
    table = prepared(tokenizer, tmp_path, write)
    line = printed(preview.counts([table])).splitlines()[-1].split()
    c = table.counts
    expected = ["mine", "messages", 4, 3, c.tokens, c.trained_tokens, table.lengths.max(), 0, "empty:", 1]
    assert line == [str(part) for part in expected]


def test_the_first_step_is_shown_whole(tokenizer, tmp_path, write):
    table = prepared(tokenizer, tmp_path, write)
    mixture = Mixture(Group([table.trained]), seed=0)
    shown = printed(preview.packed([table], mixture, sequences=3, tokens_per_micro=80, packing=True, ranks=2))
    assert shown.count("mine:") == 3
    assert "rank 1 micro 0" in shown
    efficiency = table.lengths.sum() / (80 * shown.count("micro"))
    assert f"packing efficiency {efficiency:.1%}" in shown


def test_the_command_prints_what_a_run_would_read_and_refuses_with_status_2(
    tokenizer, tmp_path, write, capsys
):
    """The whole command on a model directory without weights: nothing of it loads any."""
    path = Path(__file__).resolve().parents[2] / "launch" / "preview.py"
    spec = importlib.util.spec_from_file_location("launch_preview", path)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained(tmp_path / "model")
    data = write("mine.jsonl", [talk("Hi", "Hello"), talk("And?", "Well"), talk("", "x")])
    settings = [
        f"model.path={tmp_path / 'model'}",
        "model.init=random",
        f"data.train=[{{path: {data}}}]",
        f"data.cache_dir={tmp_path / 'cache'}",
        "batch.sequences=4",
        "steps=3",
    ]
    with pytest.raises(SystemExit) as ended:
        command.main([*settings, "data.on_bad_row=drop", "--examples", "1"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.count("⟦") == 1
    assert "First step: 4 sequences" in shown
    assert "empty: 1" in shown
    assert "3 steps of 4 sequences: 6.00 epochs of data.train" in shown
    with pytest.raises(SystemExit) as ended:
        command.main(settings)
    assert ended.value.code == 2
    assert f"error: {data}:3: message 1 (user) is empty" in capsys.readouterr().err
