"""The same losses as TRL's SFTTrainer, step by step, on the same rows in the same order.

TRL's defaults that change numbers are off: bf16, gradient checkpointing, shuffling. Ours is the plain
pieces: a packed `Policy`, `sft`, the global token mean, AdamW.
"""

import pytest
import torch

from framework.batch import Batch
from framework.losses.sft import sft
from framework.models import load
from framework.train.optim import adamw

trl = pytest.importorskip("trl")

STEPS, ROWS, ACCUMULATED, LR = 10, 4, 2, 2e-3
TEXTS = ["Reverse the order of the words", "The capital of France is Paris", "Numbers", "Hello! How can I"]


def _rows(tokenizer):
    """Prompts and completions of uneven length: 80 rows, 8 a step."""
    rows = []
    for i in range(STEPS * ROWS * ACCUMULATED):
        prompt = TEXTS[i % 4] + f" {i}:"
        completion = " " + " ".join(TEXTS[(i + k) % 4] for k in range(1 + i % 3)) + tokenizer.eos_token
        rows.append({"prompt": prompt, "completion": completion})
    return rows


def _theirs(directory, tokenizer, out, monkeypatch):
    from datasets import Dataset

    monkeypatch.setenv("CI", "1")
    config = trl.SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATED,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        dataset_num_proc=None,
        seed=0,
    )
    from transformers import AutoModelForCausalLM

    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(_rows(tokenizer)),
        processing_class=tokenizer,
    )
    seen = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in trainer.train_dataset]
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return seen, [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


def _batch(examples):
    """Tokens and masks of several examples as one packed micro-batch."""
    lengths = [len(ids) for ids, _ in examples]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    ids = torch.tensor([token for row, _ in examples for token in row])
    mask = [bool(flag) for _, flags in examples for flag in flags]
    starts = {0, *ends}
    trained = torch.tensor([t - 1 for t in range(len(ids)) if mask[t] and t not in starts])
    return Batch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        boundaries=torch.tensor([0, *ends], dtype=torch.int32),
        trained=trained,
        targets=ids[trained + 1],
        weights=torch.ones(len(trained)),
        segments=torch.bucketize(trained, torch.tensor(ends), right=True),
        sources=torch.zeros(len(lengths), dtype=torch.int64),
        packed=True,
        max_length=max(lengths),
        units=float(len(trained)),
    )


def _ours(directory, examples):
    description = load.inspect(str(directory))
    policy = load.builder(description, attention="sapwood", head_chunk_tokens=32)()
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, tensor in load.reader(description)():
            parameters[name].copy_(tensor)
    optimizer = adamw(policy.named_parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms = [], []
    for step in range(STEPS):
        first = step * ROWS * ACCUMULATED
        cuts = [examples[first + i * ROWS : first + (i + 1) * ROWS] for i in range(ACCUMULATED)]
        micros = [_batch(cut) for cut in cuts]
        units = sum(micro.units for micro in micros)
        total = 0.0
        for micro in micros:
            loss = sft(policy(micro).logps, micro.weights).total() / units
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@pytest.mark.slow
def test_ten_steps_have_the_losses_of_trl(tiny_model_dir, tmp_path, monkeypatch):
    tokenizer = load.inspect(str(tiny_model_dir)).tokenizer
    examples, losses, norms = _theirs(tiny_model_dir, tokenizer, tmp_path, monkeypatch)
    assert len(losses) == STEPS
    ours, our_norms = _ours(tiny_model_dir, examples)
    assert losses[-1] < 0.97 * losses[0]  # something was learnt, so later steps test the updates too
    assert ours == pytest.approx(losses, rel=2e-5)
    assert our_norms == pytest.approx(norms, rel=2e-4)
