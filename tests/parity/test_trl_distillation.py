"""The losses of TRL's distillation trainer, step by step, on scripted answers.

No stage distils, so ours are plain pieces: the loss, the global token mean, the optimizer. The models are
transformers' own on both sides; what is compared is the divergence, its mean and its gradient.
"""

import pytest
import torch
import trl_recipes
from test_trl_online import PROMPTS, SAMPLES, TEMPERATURE, answers, prompts

from framework.losses.distill import generalised_jsd
from framework.train.optim import adamw

trl = pytest.importorskip("trl")


def rows(words):
    """[(prompt, answer)] token ids: the first answer to each prompt, a step's after the other's."""
    ids = [words(row["prompt"])["input_ids"] for row in prompts()]
    return [(prompt, answers(prompt, words.eos_token_id)[i % SAMPLES]) for i, prompt in enumerate(ids)]


def teacher(model):
    """The student's structure with other weights."""
    found = trl_recipes.causal(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


def ours(model, words, beta):
    student, master = trl_recipes.causal(model), teacher(model).eval()
    optimizer = adamw(student.named_parameters(), betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = trl_recipes.LR
    losses, norms = [], []
    pairs = rows(words)
    for step in range(trl_recipes.STEPS):
        taken = pairs[step * PROMPTS : (step + 1) * PROMPTS]
        units = sum(len(answer) for _, answer in taken)
        total = 0.0
        for prompt, answer in taken:
            ids = torch.tensor([[*prompt, *answer]])
            keep = slice(len(prompt) - 1, -1)

            def logps(lm, ids=ids, keep=keep):
                return (lm(input_ids=ids, use_cache=False).logits[0, keep] / TEMPERATURE).log_softmax(-1)

            with torch.no_grad():
                theirs = logps(master)
            loss = generalised_jsd(logps(student), theirs, torch.ones(len(answer)), beta=beta).total() / units
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences(beta, tiny_model_dir, tmp_path):
    from datasets import Dataset

    words = trl_recipes.tokenizer(tiny_model_dir)
    settings = trl_recipes.THEIRS | {"per_device_train_batch_size": PROMPTS}
    trainer = trl.DistillationTrainer(
        model=trl_recipes.causal(tiny_model_dir),
        teacher_model=teacher(tiny_model_dir),
        args=trl.DistillationConfig(
            output_dir=str(tmp_path), beta=beta, temperature=TEMPERATURE, shuffle_dataset=False, **settings
        ),
        train_dataset=Dataset.from_list(prompts()),
        processing_class=words,
    )
    script = {tuple(prompt): answer for prompt, answer in rows(words)}

    def generate(given):
        ids = [words(prompt)["input_ids"] for prompt in given]
        return ids, [script[tuple(prompt)] for prompt in ids], None, None, None

    trainer._generate = generate
    losses, norms = trl_recipes.Theirs(trainer).train()
    our_losses, our_norms = ours(tiny_model_dir, words, beta)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    assert our_losses == pytest.approx(losses, rel=2e-5)
    assert our_norms == pytest.approx(norms, rel=2e-5)
