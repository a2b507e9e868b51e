"""The losses of TRL's distillation trainer, step by step, on scripted answers.

To TRL they are the student's own answers, to `stage=distill` rows of data: the tokens are the same, and so
are the divergence over the whole vocabulary, its mean and its gradient.
"""

import pytest
import torch
import trl_recipes
import workers

trl = pytest.importorskip("trl")

TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    """Prompts with completions, and the student's structure with other weights."""
    place = tmp_path_factory.mktemp("trl-distillation")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in trl_recipes.pairs()]
    trl_recipes.write(place / "rows.jsonl", rows)
    lm = trl_recipes.causal(tiny_model_dir)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    lm.save_pretrained(place / "teacher")
    trl_recipes.tokenizer(tiny_model_dir).save_pretrained(place / "teacher")
    return place


def ours(place, model, beta):
    line = trl_recipes.line(
        model,
        place / "rows.jsonl",
        stage="distill",
        stage__teacher=place / "teacher",
        stage__top_k="null",
        stage__temperature=TEMPERATURE,
        loss="jsd",
        loss__beta=beta,
    )
    (found,) = workers.run(1, curve, line)
    return found


def curve(world, line):
    """Losses and norms of five steps, and (prompt, answer) token ids of every row."""
    import stage_recipes

    from framework.config import build, compose

    table = build.prepare(compose.compose(line)).tables[0]
    found = stage_recipes.measure(world, line, steps=trl_recipes.STEPS)["lines"]
    pairs = []
    for ids, trained in map(table.example, range(len(table))):
        first = int(trained.argmax())
        assert trained[first:].all()
        pairs.append((ids[:first].tolist(), ids[first:].tolist()))
    return [each["loss"] for each in found], [each["grad_norm"] for each in found], pairs


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences(beta, place, tiny_model_dir, tmp_path):
    from datasets import Dataset

    our_losses, our_norms, pairs = ours(place, tiny_model_dir, beta)
    trainer = trl.DistillationTrainer(
        model=trl_recipes.causal(tiny_model_dir),
        teacher_model=trl_recipes.causal(place / "teacher"),
        args=trl.DistillationConfig(
            output_dir=str(tmp_path),
            beta=beta,
            temperature=TEMPERATURE,
            shuffle_dataset=False,
            **trl_recipes.THEIRS,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in trl_recipes.pairs()]),
        processing_class=trl_recipes.tokenizer(tiny_model_dir),
    )
    script = iter(pairs)

    def generate(prompts):
        taken = [next(script) for _ in prompts]
        return [prompt for prompt, _ in taken], [answer for _, answer in taken], None, None, None

    trainer._generate = generate
    losses, norms = trl_recipes.Theirs(trainer).train()
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    assert our_losses == pytest.approx(losses, rel=2e-5)
    assert our_norms == pytest.approx(norms, rel=2e-5)
