"""Distillation through the composed configuration against whole logits of two transformers models."""

import pytest
import recipes
import stage_recipes
import torch
import trl_recipes
import workers
from test_strategies import largest_difference
from torch.nn.functional import kl_div

ROWS = 24  # tokens without a row in the student's vocabulary


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    place = tmp_path_factory.mktemp("distillation")
    recipes.write_rows(place / "chats.jsonl")
    stage_recipes.write_teacher(place / "teacher", tiny_model_dir)
    stage_recipes.write_teacher(place / "padded", tiny_model_dir, more_rows=ROWS)
    return place


def kl(left, right):
    return kl_div(right, left, log_target=True, reduction="none").sum(-1)


def jsd(student, teacher, beta=0.3):
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


DIVERGENCES = {
    "forward_kl": lambda student, teacher: kl(teacher, student),
    "reverse_kl": kl,
    "jsd": jsd,
}


def known(logps, ids, rest):
    """The distribution over the tokens `ids` [K, k] of `logps` [K, n], computed from probabilities."""
    some = logps.exp().gather(1, ids)
    if rest == "bucket":
        return torch.cat([some, 1 - some.sum(1, keepdim=True)], 1).log()
    return (some / some.sum(1, keepdim=True)).log()


def plain(arguments, divergence):
    """Loss, mean cross-entropy and gradient of the first step, an example at a time."""
    from framework.config import build, compose

    run = compose.compose(arguments)
    prepared, stage = build.prepare(run), run.stage
    student, teacher = (trl_recipes.causal(path) for path in (run.model.path, stage.teacher))
    shared = min(student.config.vocab_size, teacher.config.vocab_size)
    picks = prepared.mixture.picks(0, run.batch.sequences)
    examples = [prepared.tables[pick.source].example(pick.row) for pick in picks]
    units = sum(int(mask[1:].sum()) for _, mask in examples)
    loss = nll = 0.0
    for ids, mask in examples:
        tokens, trained = torch.tensor(ids, dtype=torch.int64), torch.tensor(mask[1:].astype(bool))
        logits = student(input_ids=tokens[None], use_cache=False).logits[0, :-1][trained]
        with torch.no_grad():
            theirs = teacher(input_ids=tokens[None], use_cache=False).logits[0, :-1][trained]
        laws = [(each[:, :shared] / stage.temperature).log_softmax(-1) for each in (logits, theirs)]
        if stage.top_k not in (None, shared):
            likeliest = laws[1].topk(stage.top_k).indices
            laws = [known(law, likeliest, stage.rest) for law in laws]
        hard = torch.nn.functional.cross_entropy(logits, tokens[1:][trained], reduction="none")
        each = (1 - stage.sft_share) * divergence(*laws) + stage.sft_share * hard
        (each.sum() / units).backward()
        loss, nll = loss + float(each.sum().detach()) / units, nll + float(hard.sum().detach()) / units
    return loss, nll, {f"lm.{name}": p.grad for name, p in student.named_parameters()}


def ours(place, model, **changes):
    """The command line, and what the run makes of its first step."""
    chosen = {"stage": "distill", "stage__teacher": place / "teacher", **changes}
    chosen |= {"loss__beta": 0.3} if chosen.get("loss") == "jsd" else {}
    line = recipes.overrides(model, place / "chats.jsonl", place, **chosen)
    return line, workers.run(1, recipes.measure, line, steps=1, timeout_s=180)


CELLS = [
    {"loss": "forward_kl", "stage__top_k": "null"},
    {"loss": "reverse_kl", "stage__top_k": 400, "stage__temperature": 1.7},
    {"loss": "jsd", "stage__top_k": "null", "stage__temperature": 0.8, "stage__sft_share": 0.4},
    {"loss": "forward_kl", "stage__top_k": 5, "stage__temperature": 2.0, "stage__sft_share": 0.1},
    {"loss": "jsd", "stage__top_k": 1},
    {"loss": "reverse_kl", "stage__top_k": 5, "stage__rest": "renormalise"},
    {"loss": "forward_kl", "stage__top_k": "null", "stage__teacher": "padded"},
    {"loss": "jsd", "stage__top_k": 7, "stage__teacher": "padded", "stage__temperature": 1.5},
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell.values())))
def test_the_loss_and_gradient_are_those_of_whole_logits(cell, place, tiny_model_dir):
    """To 1e-5: every token or some of them, teachers with rows that stand for nothing, hard labels beside."""
    if "stage__teacher" in cell:
        cell = cell | {"stage__teacher": place / cell["stage__teacher"]}
    line, ranks = ours(place, tiny_model_dir, **cell)
    loss, _, gradient = plain(line, DIVERGENCES[cell["loss"]])
    assert max(ranks[0]["micros"]) > 1
    assert ranks[0]["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert largest_difference(recipes.whole(ranks), gradient) < 1e-5


def test_held_out_text_goes_through_the_same_objective(place, tiny_model_dir):
    """The whole set as one step: its loss and cross-entropy before training."""
    line, found = measured(place, tiny_model_dir)
    loss, nll, _ = plain([*line, "batch.sequences=60", "data.shuffle=false"], DIVERGENCES["forward_kl"])
    assert found["held/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["held/nll"] == pytest.approx(nll, rel=1e-5)
    assert "held/perplexity" not in found


def measured(place, model):
    line = recipes.overrides(
        model,
        place / "chats.jsonl",
        place,
        stage="distill",
        stage__teacher=place / "teacher",
        data__eval=f"[{{path: {place}/chats.jsonl, name: held}}]",
    )
    (found,) = workers.run(1, evaluated, line, timeout_s=180)
    return line, found


def evaluated(world, line):
    from framework.config import build, compose, stages
    from framework.train.evaluate import evaluate

    prepared = build.prepare(compose.compose(line))
    engine = build.build_engine(prepared, world)
    return evaluate(engine, stages.build_stage(prepared, world, engine).held_out())


@pytest.mark.parametrize("top_k", [64, "null"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_an_adapter_learns_the_same_on_two_ranks(strategy, top_k, place, tiny_model_dir):
    """Four steps with a replay share, packed; the loss is told apart by source."""
    rows = [{"prompt": f"one {i}", "completion": f"two {i}"} for i in range(40)]
    trl_recipes.write(place / "general.jsonl", rows)
    line = recipes.overrides(
        tiny_model_dir,
        place / "chats.jsonl",
        place,
        stage="distill",
        stage__teacher=place / "teacher",
        stage__top_k=top_k,
        adapter="lora",
        optim__lr=1e-2,
        replay="fixed",
        replay__fraction=0.3,
        replay__sources=f"[{{path: {place}/general.jsonl, name: general}}]",
    )
    (alone,) = workers.run(1, stage_recipes.measure, line, steps=4, timeout_s=180)
    ranks = workers.run(2, stage_recipes.measure, [*line, f"strategy={strategy}"], steps=4, timeout_s=180)
    assert ranks[0]["lines"] == ranks[1]["lines"]
    assert alone["lines"][-1]["loss"] < 0.9 * alone["lines"][0]["loss"]
    for found, expected in zip(ranks[0]["lines"], alone["lines"], strict=True):
        assert {"loss/chats", "loss/general", "divergence", "nll"} <= set(found)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_on_policy_distillation_comes_near_to_the_teacher(place, tiny_model_dir):
    """The reverse KL per token, of the student on its own answers, falls to under a third in 16 steps."""
    lm = trl_recipes.causal(tiny_model_dir)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.06 * torch.randn_like(parameter))
    lm.save_pretrained(place / "near")
    trl_recipes.tokenizer(tiny_model_dir).save_pretrained(place / "near")
    prompts = [{"prompt": f"one two {'three ' * (i % 5)}{i}"} for i in range(48)]
    trl_recipes.write(place / "prompts.jsonl", prompts)
    line = [
        "experiment=on_policy_distillation",
        f"model.path={tiny_model_dir}",
        f"stage.reference_path={place}/near",
        f"data.train=[{{path: {place}/prompts.jsonl}}]",
        f"data.cache_dir={place}/cache",
        "data.max_length=64",
        "stage.prompts=48",
        "batch.sequences=192",
        "batch.tokens_per_micro=4096",
        "rollout.max_new_tokens=6",
        "rollout.batch_size=192",
        "precision=fp32",
        "optim.lr=3e-3",
        "schedule.warmup_steps=0",
        "steps=16",
        "launch.device=cpu",
        f"run_dir={place}/run",
    ]
    (found,) = workers.run(1, stage_recipes.measure, line, steps=16, timeout_s=180)
    nats = [rollout["kl"] for rollout in found["rollouts"]]
    assert len(nats) == 16
    assert all(rollout["reward"] == 0 for rollout in found["rollouts"])
    assert nats[0] > 0.3
    assert nats[-1] < nats[0] / 3, nats
