"""Mistakes on a command line and in a YAML file, and what a person is told."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.config.compose import CONF, check, command, compose
from framework.errors import ConfigError

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]

MISTAKES = [
    # keys
    ("optm.lr=1e-3", "optm.lr=1e-3: no such key; type optim.lr=1e-3"),
    ("+optm.lr=1e-3", "+optm.lr=1e-3: no such key; type optim.lr=1e-3"),
    ("++optm.lr=1e-3", "++optm.lr=1e-3: no such key; type optim.lr=1e-3"),
    (
        "+optim.leaning_rat=1",
        "+optim.leaning_rat=1: no such key; expected one of optim.betas, optim.eps, optim.lr",
    ),
    ("lr=1e-3", "lr=1e-3: no such key; type optim.lr=1e-3"),
    ("max_length=512", "type data.max_length=512"),
    ("optim.lr", "optim.lr: expected KEY=VALUE; type optim.lr=2.0e-5"),
    ("+optim.lr=1e-3", "+optim.lr=1e-3: optim.lr is there already; type optim.lr=1e-3"),
    ("~optim.lr", "optim.lr: not set; type optim.lr=2.0e-5"),
    ("~adapter.rank", "~adapter.rank: there is no adapter.rank with what is chosen; leave it out"),
    (
        "adapter.rank=8",
        "with what is chosen; type adapter=dora or adapter=lora or adapter=qlora and adapter.rank=8",
    ),
    ("tracker.wandb.project=p", "type tracker=wandb and tracker.wandb.project=p"),
    ("loss.label_smoohting=0.1", "no such key; type loss.label_smoothing=0.1"),
    ("data.train=[{pth: a}]", "data.train[0].pth: no such key; type path"),
    # groups
    ("strategy=fdsp", "strategy=fdsp: strategy has no choice fdsp; type strategy=fsdp"),
    ("strtegy=fsdp", "strtegy=fsdp: no such key; type strategy=fsdp"),
    ("strategy=null", "strategy takes one of ddp, fsdp, fsdp_offload, hsdp, zero1, "),
    ("strategy.name=fsdp", "strategy.reshard_after_forward: not set; type strategy=fsdp"),
    ("strategy.name=fdsp", 'got "fdsp"; expected ddp or fsdp or '),
    ("strategy.fsdp=true", "fsdp is a choice of strategy, not a key; type strategy=fsdp"),
    ("optim/lr=1e-3", "a slash chooses a file and a dot sets a key; type optim.lr=1e-3"),
    ("+experiment=lora", "experiment is a choice already; type experiment=lora"),
    ("experiment=lroa", "type experiment=lora"),
    ("model=Qwen/Qwen3-0.6B", "if it is your model, type model.path=Qwen/Qwen3-0.6B"),
    ("data=mine.jsonl", "if it is your data, type 'data.train=[{path: mine.jsonl}]'"),
    # types and ranges
    ("optim.lr=-1", "optim.lr: got -1; expected a number > 0; type optim.lr=2.0e-5"),
    ("optim.lr=0", "optim.lr: got 0; expected a number > 0"),
    ("optim.lr=", 'optim.lr: got ""; expected a number > 0'),
    ("optim.lr=fast", 'optim.lr: got "fast"; expected a number > 0'),
    ("optim.lr='1e-3'", 'got "1e-3"; expected a number > 0, without quotes; type optim.lr=1e-3'),
    ("optim.max_grad_norm=inf", "optim.max_grad_norm: got Infinity; expected a number > 0 or null"),
    ("optim.betas=[0.9]", "optim.betas: got [0.9]; expected a list of"),
    ("optim.betas=[0.9,1.5]", "optim.betas[1]: got 1.5; expected a number >= 0 and < 1"),
    ("steps=0", "steps: got 0; expected a whole number > 0 or null"),
    ("seed=1.5", "seed: got 1.5; expected a whole number >= 0"),
    ("seed=true", "seed: got true; expected a whole number"),
    ("data.packing=1", "data.packing: got 1; expected true or false; type data.packing=true"),
    ("data.packing=yes", 'data.packing: got "yes"; expected true or false'),
    ("precision=fp16", 'precision: got "fp16"; expected one of fp32, bf16; type precision=bf16'),
    ("data.train=mine.jsonl", "type 'data.train=[{path: mine.jsonl}]'"),
    ("data.train=[mine.jsonl]", 'data.train[0]: got "mine.jsonl"; expected {path: ...'),
    ("data.train=[]", "data.train: got []; expected a list of at least one"),
    ("data.eval=null", "data.eval: got null; expected a list"),
    ("optim=null", "optim takes one of adamw"),
    ("launch.master_port=70000", "launch.master_port: got 70000; expected a whole number > 0 and < 65536"),
    ("trusted_packages=[os.path]", "trusted_packages[0]: got"),
    ("name=../up", 'name: got "../up"'),
    # grammar
    ("optim.lr=1,2", "several values for one run; add -m for a run of each"),
    ("model.path=(a", "type 'model.path=\"(a\"'"),
    ("model.path=???", "model.path: not given; type model.path=DIRECTORY_OR_HUB_ID"),
    ("run_dir=${nope}", "run_dir: Interpolation key 'nope' not found"),
    ("run_dir=${oc.env:NOT_THERE_AT_ALL}", "run_dir: Environment variable 'NOT_THERE_AT_ALL' not found"),
    # pairs
    ("epochs=null", "steps, epochs: both null; expected exactly one of the two; type steps=NUMBER"),
    ("steps=10 epochs=2", "steps, epochs: both given; expected one of the two; leave out epochs"),
    ("schedule.warmup_steps=1 schedule.warmup_fraction=0.1", "both given"),
    ("schedule=wsd schedule.decay_fraction=0.99", "schedule.warmup_fraction, schedule.decay_fraction"),
    ("data.max_length=100000", "type batch.tokens_per_micro=100000 or data.max_length=8192"),
    ("evaluate.every=10", "evaluation every 10 steps of no data"),
    (
        "batch.sequences=2 launch.nproc=4",
        "2 examples a step for 4 ranks; expected at least one for each rank",
    ),
    (
        "batch.sequences=7 launch.nproc=4 launch.nnodes=2 launch.master_addr=h launch.master_port=1",
        "7 examples a step for 8 ranks",
    ),
    ("adapter=dora stage=grpo reward=verifier", "type adapter=lora"),
    (
        "adapter=dora reward=verifier retain.prompts=[{path:q.jsonl}]",
        "adapter, retain.prompts: answers to be written while training",
    ),
    ("retain.prompts=[{path:q.jsonl}]", "nothing that says what an answer is worth"),
    (
        "stage=reward reward=verifier retain.prompts=[{path:q.jsonl}]",
        "questions to a reward model, which writes no answer; expected none; type retain.prompts=[]",
    ),
    (
        "replay=budget replay.sources=[{path:a}] replay.unit=accuracy",
        "a budget of accuracy and no questions to answer; expected questions that the start model answers "
        "right; type 'retain.prompts=[{path: questions.jsonl}]' or replay.unit=relative_loss",
    ),
    (
        "replay=budget replay.sources=[{path:a}] replay.unit=accuracy replay.max_forgetting=1 "
        "retain.prompts=[{path:q.jsonl}] reward=verifier",
        "1 of all right answers to be lost; expected a share between 0 and 1",
    ),
    (
        "replay=budget replay.sources=[{path:a}] replay.max_forgetting={chat:0.02,code:-1}",
        "replay.max_forgetting: -1 for code; expected a number > 0 for each kind of text; type "
        "'replay.max_forgetting={code: 0.01}'",
    ),
    (
        "replay=budget replay.sources=[{path:a}] replay.max_forgetting={chat:much}",
        'replay.max_forgetting: got "much"; expected a number > 0 or {NAME: a number, ...} or null',
    ),
    (
        "replay=budget replay.sources=[{path:a}] replay.max_forgetting={chat:0.02} replay.strata=[chat]",
        "budgets by kind of text, and kinds of text beside them",
    ),
    ("adapter=qlora model.compile=blocks", "type model.compile=none or adapter=lora"),
    ("adapter=qlora stage=preference stage.reference=frozen", "type stage.reference=auto"),
    ("model.compile=blocks strategy=zero3", "type strategy=fsdp or model.compile=none"),
    ("launch.nnodes=2", "type launch.master_addr=HOST launch.master_port=29500"),
    ("launch.node_rank=3", "machine 3 of 1"),
    ("replay.fraction=0.1", "a share of 0.1 of no data"),
    ("replay=fixed", "type 'replay.sources=[{path: general.jsonl}]', replay.carry=auto or replay=none"),
    ("replay.carry=auto", "sources of which nothing is replayed"),
    ("replay=fixed replay.carry=auto replay.stratum_tokens=0", "earlier stages to rehearse by no token"),
    ("replay.select=surprise replay.stratum_tokens=0", "rows chosen by surprise to be left, and none left"),
    ("replay.select=surprise stage=reward", "a reward model, which leaves none"),
    ("replay.additive=false", "type replay=fixed or replay.additive=null"),
    ("replay.share_of=words", "type replay.share_of=trained_tokens"),
    (
        "stage=preference replay=term replay.sources=[{path: a}] replay.share_of=rows",
        "replay.share_of and no share of replay",
    ),
    ("replay.sources=[{path: a}]", "sources of which nothing is replayed"),
    (
        "replay.sources=[{path: a}] replay.fraction=1",
        "replay.fraction: got 1; expected a number >= 0 and < 1",
    ),
    (
        "data.train=[{path: a, weight: 2}, {path: b}]",
        "'data.train=[{path: a, weight: 2.0}, {path: b, weight: 1}]'",
    ),
    ("model.init=random model.gguf_file=a.gguf", "model.gguf_file, model.init"),
    (
        "adapter=lora adapter.rank=1.5",
        "adapter.rank: got 1.5; expected a whole number > 0; type adapter.rank=16",
    ),
    ("adapter=lora adapter.targets=3", "expected all-linear or a list of at least one text"),
    # teachers
    ("stage=distill", "stage.teacher: not given; type stage.teacher=DIRECTORY_OR_HUB_ID"),
    ("stage=distill stage.teacher=t stage.top_k=0", "got 0; expected a whole number > 0 or null"),
    ("stage=distill stage.teacher=t stage.sft_share=1", "got 1; expected a number >= 0 and < 1"),
    ("stage=distill stage.teacher=t stage.top_k=1 stage.rest=renormalise", "type stage.rest=bucket"),
    ("stage=distill stage.teacher=t model.neftune_alpha=5", "type model.neftune_alpha=null"),
    ("stage=distill stage.teacher=t replay=term replay.sources=[{path: a}]", "type replay=fixed"),
    ("stage=distill stage.teacher=t stage.own_share=1.5", "got 1.5; expected a number"),
    ("stage=distill stage.teacher=t stage.own_share=1 rollout.samples=2", "type rollout.samples=1"),
    (
        "stage=ppo reward=verifier stage.shaping.within_prompt=true rollout.samples=1",
        "type rollout.samples=8",
    ),
    ("stage=distill stage.teacher=t stage.own_share=1 data.train_on=all", "type data.train_on=assistant"),
    (
        "stage=distill stage.teacher=t stage.own_share=1 data.max_length=200",
        "answers of 256 tokens",
    ),
    ("stage=distill stage.teacher=t stage.own_share=1 adapter=dora", "type adapter=lora"),
    ("stage=grpo stage.advantages=teacher", "advantages from a teacher, and none given"),
    (
        "stage=grpo stage.advantages=teacher stage.reference_path=t stage.kl_coefficient=0.1",
        "a penalty of 0.1 on it; expected one of the two; type stage.kl_coefficient=0",
    ),
    (
        "stage=grpo stage.advantages=teacher stage.reference_path=t stage.extra_prompts=8",
        "prompts replaced by their rewards",
    ),
    (
        "stage=grpo reward=verifier adapter=lora stage.reference=adapter stage.reference_path=t",
        "type stage.reference=frozen or stage.reference_path=null",
    ),
]


def split(line: str) -> list[str]:
    """Overrides of a line: spaces inside of brackets belong to a value."""
    return re.split(r" (?=[^ \[\]{}]+=)", line)


@pytest.mark.parametrize(("line", "told"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_told_with_what_to_type(line, told):
    """Whatever a message says to type is typed, too: it must be accepted."""
    with pytest.raises(ConfigError) as refused:
        compose([*GIVEN, *split(line)])
    message = str(refused.value)
    assert told in message
    suggested = re.search(r"; type ([\w./]+=[^ ;'\[]+)$", message)
    if suggested and "\n" not in message and not re.search(r"VALUE|NUMBER|HUB_ID", message):
        kept = split(line)[:-1] if "=" in line else []
        try:
            compose([*GIVEN, *kept, suggested[1]])  # instead of the mistake
        except ConfigError:
            compose([*GIVEN, *split(line), suggested[1]])  # or besides it


def test_everything_missing_is_told_at_once():
    with pytest.raises(ConfigError) as refused:
        compose([])
    assert str(refused.value).splitlines() == [
        "data.train: not given; type 'data.train=[{path: FILE.jsonl}]'",
        "model.path: not given; type model.path=DIRECTORY_OR_HUB_ID",
    ]


def test_every_refused_key_has_its_line():
    with pytest.raises(ConfigError) as refused:
        compose([*GIVEN, "optim.lr=-1", "seed=x", "+data.trian=1"])
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("seed: ")
    assert any(line == "+data.trian=1: no such key; type data.train=1" for line in lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optim:\n  lrr: 1\n", "experiment/mine.yaml:3: optim.lrr: no such key; type optim.lr"),
        ("optm:\n  lr: 1\n", "experiment/mine.yaml:3: optm.lr: no such key; type optim.lr"),
        ("optim:\n  lr: -3\n", "experiment/mine.yaml:3: optim.lr: got -3; expected a number > 0"),
        ("optim:\n  lr: '1e-3'\n", 'optim.lr: got "1e-3"; expected a number > 0, without quotes'),
        ("optim:\n\tlr: 1\n", "mine.yaml:3: not readable as YAML"),
        ("seed: 1\nseed: 2\n", "mine.yaml:3: not readable as YAML: found duplicate key seed"),
        ("defaults:\n  - override /strategy: fdsp\n", "strategy has no choice fdsp; type strategy=fsdp"),
        ("loss:\n  label_smoohting: 0.1\n", "loss.label_smoohting"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(tmp_path, text, told):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\n" + text)
    argv = [*GIVEN, "experiment=mine", "--config-dir", str(tmp_path)]
    with pytest.raises(ConfigError) as refused:
        check(argv)
    assert told in str(refused.value)


def test_numbers_in_files_need_no_dot(tmp_path):
    """Plain YAML 1.1 reads 1e-3 as text; composed files read it as the number it is."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\noptim:\n  lr: 1e-3\n")
    assert compose([*GIVEN, "experiment=mine"], config_dir=tmp_path).optim.lr == 0.001


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--multrun"], "unrecognized arguments: --multrun"),
        (["--config-dir", "/not/there"], "--config-dir: found /not/there; expected a directory"),
        (["-m", "optim.lr=1e-5,-2"], "optim.lr: got -2"),
        (["-m", "optim.lr=1e-5,2e-5", "strategy=ddp,fsdp,zeor3"], "type strategy=zero3"),
        (["-m", "sweep=lr", "seed=1,2,x"], 'seed: got "x"'),
        (["-m", "seed=interval(1,4)"], "seed=interval(1,4): an interval; expected a list"),
        (["-m", "seed=1,2", "run_dir=one"], "run_dir: one directory for all jobs"),
    ],
)
def test_flags_and_every_value_of_a_sweep_are_checked(argv, told):
    with pytest.raises(ConfigError) as refused:
        check([*GIVEN, *argv])
    assert told in str(refused.value)


@pytest.mark.parametrize(
    "argv", [["--help"], ["--cfg", "job"], ["--info", "defaults"], ["-c", "job", "optm.lr=1"]]
)
def test_questions_to_hydra_are_left_to_hydra(argv):
    check(argv)
    assert command(argv).asks


def test_flags_may_stand_anywhere():
    asked = command(["a=1", "-m", "b=2", "--config-dir", str(CONF), "c=3"])
    assert asked.overrides == ("a=1", "b=2", "c=3")
    assert asked.multirun
    assert asked.config_dir == CONF


def test_a_mistyped_key_is_refused_fast_and_without_torch(tmp_path):
    """From another directory, in a process of its own; most of the time is Python's own start."""
    program = (
        "import sys\n"
        "from framework.config.compose import check\n"
        "from framework.errors import ConfigError\n"
        "try: check(['optm.lr=1'])\n"
        "except ConfigError as error: print(error)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    start = time.perf_counter()
    root = str(Path(CONF).parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "optm.lr=1: no such key; type optim.lr=1\n", done.stderr
    assert time.perf_counter() - start < 5
    assert list(tmp_path.iterdir()) == []
