"""Chains of steps, composed and refused, nothing run: what is typed for whom, what refers to what."""

import pytest

from framework.config import names, pipeline
from framework.config.compose import CONF
from framework.errors import ConfigError

CHAIN = """
name: tale
common:
  batch.sequences: 6
  tracker: {every: 3}
stages:
  task:
    _target_: framework.config.steps.task
    family: word_sequence_reversal
    parts: {sft: 10}
    held_out: 5
    settings: {min_words: 3}
  first:
    model.path: some/model
    data.train: [{path: "${stages.task.run_dir}/sft.jsonl"}]
    steps: 3
    batch.sequences: 8
  second:
    model: {path: "${stages.first.model}"}
    data.train: [{path: "${stages.task.run_dir}/sft.jsonl"}]
    strategy: fsdp
    strategy.reshard_after_forward: false
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Checks the chain, which stands where a user would put it, with more overrides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/pipeline").mkdir(parents=True)

    (tmp_path / "conf/pipeline/tale.yaml").write_text(CHAIN)
    return lambda *more: pipeline.check(["--config-dir=conf", "experiment=tale", *more])


def by_name(chain):
    return {step.name: step for step in chain.steps}


def test_every_pipeline_of_ours_is_checked_and_says_its_command():
    assert names.pipelines([CONF])
    for name in names.pipelines([CONF]):
        assert pipeline.check([f"experiment={name}"]).steps
        first = (CONF / "pipeline" / f"{name}.yaml").read_text().splitlines()[0]
        assert first == f"# python launch/pipeline.py experiment={name}"


def test_steps_have_their_places_and_later_ones_refer_to_them(check, tmp_path):
    chain = check()
    steps = by_name(chain)
    assert list(steps) == ["task", "first", "second"]
    assert chain.run_dir == tmp_path / "runs/tale"
    for name, step in steps.items():
        assert step.directory.parent == chain.run_dir
        assert step.directory.name.startswith(f"{name}-")
    assert steps["first"].run.data.train[0].path == str(steps["task"].directory / "sft.jsonl")
    assert steps["second"].run.model.path == str(steps["first"].directory / "model")
    assert steps["second"].run.run_dir == str(steps["second"].directory)
    assert steps["second"].run.strategy.name == "fsdp"
    assert steps["second"].run.strategy.reshard_after_forward is False
    assert not (tmp_path / "runs").exists(), "checking writes nothing"


def test_what_is_typed_for_one_step_beats_what_is_typed_for_all_and_that_the_file(check):
    steps = by_name(
        check(
            "steps=5", "stages.second.steps=7", "launch.nproc=4", "seed=9", "stages.task.settings.max_words=6"
        )
    )
    assert (steps["first"].run.steps, steps["second"].run.steps) == (5, 7)
    assert {steps[name].run.launch.nproc for name in ("first", "second")} == {4}
    assert [steps["task"].call.keywords["seed"], steps["first"].run.seed] == [9, 9]
    assert steps["task"].call.keywords["settings"] == {"min_words": 3, "max_words": 6}
    assert by_name(check("stages.first.seed=3", "seed=9"))["first"].run.seed == 3


def test_what_is_common_stands_under_each_steps_own(check):
    first, second = (by_name(check())[name].run for name in ("first", "second"))
    assert (first.batch.sequences, second.batch.sequences) == (8, 6)
    assert first.tracker.every == second.tracker.every == 3
    assert by_name(check("batch.sequences=10"))["first"].run.batch.sequences == 10
    with pytest.raises(ConfigError, match=r"stages\.first: optm\.lr=1: no such key"):
        check("+common={optm.lr: 1}")


def test_only_a_changed_step_and_what_comes_of_it_move(check):
    """How a stage is spread, watched and kept moves nothing; what decides its numbers moves it."""
    before = {name: step.directory for name, step in by_name(check()).items()}

    def moved(*overrides):
        return {name for name, step in by_name(check(*overrides)).items() if step.directory != before[name]}

    assert moved("launch.nproc=2", "tracker.every=5", "stages.first.strategy=zero3") == set()
    assert moved("stages.second.optim.lr=1e-3") == {"second"}
    assert moved("stages.first.optim.lr=1e-3") == {"first", "second"}
    assert moved("stages.task.held_out=6") == {"task", "first", "second"}
    assert moved("run_dir=elsewhere") == {"task", "first", "second"}


def test_a_step_can_be_left_out(check):
    assert list(by_name(check("~stages.second"))) == ["task", "first"]


def test_what_named_a_step_that_is_left_out_can_be_changed_or_left_out_with_it(check, monkeypatch):
    """A training's key, plain or within a mapping, and a function's."""
    steps = by_name(check("~stages.first", "stages.second.model.path=some/model"))
    assert steps["second"].run.model.path == "some/model"
    monkeypatch.chdir(CONF.parent)
    demo = ["experiment=rlhf_demo", "~stages.ppo", "~stages.compare.models.ppo"]
    models = by_name(pipeline.check(demo))["compare"].call.keywords["models"]
    assert list(models) == ["start", "sft", "dpo", "grpo"]
    demo[-1] = "stages.compare.models.ppo=${stages.grpo.model}"
    models = by_name(pipeline.check(demo))["compare"].call.keywords["models"]
    assert models["ppo"] == models["grpo"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["~stages.task.settings.max"], "~stages.task.settings.max: no such key; expected min_words"),
        (["~stages.task.parts.sft.x"], "~stages.task.parts.sft.x: no such key; expected a key that is there"),
        (["stages.second.optm.lr=1"], "stages.second: optm.lr=1: no such key; type optim.lr=1"),
        (["stages.secnd.steps=1"], "stages.secnd: no such step; type stages.second"),
        (["optm.lr=1"], "stages.first: optm.lr=1: no such key; type optim.lr=1"),
        (["stages.second.loss._target_=framework.losses.sft.stf"], "stages.second: loss._target_: no stf"),
        (["stages.task.famly=x"], "stages.task.famly: framework.config.steps.task has no such keyword"),
        (["stages.task._target_=os.system"], "stages.task._target_: found os.system"),
        (["~stages.first"], "${stages.first.model}: first is no step; expected an earlier step (task)"),
        (["stages.first.checkpoint.export=false"], "first writes no model"),
        (["stages.first.run_dir=x"], "the pipeline places its steps itself"),
        (["stages.second.model.path=./nowhere"], "stages.second: model.path: no ./nowhere"),
        (["stages.first.data.train=[{path: gone.jsonl}]"], "data.train[0].path: no gone.jsonl"),
        (["stages.first.model.path=${stages.second.model}"], "second comes later"),
        (["stages.second.model.path=${stages.first.weights}"], "no such output; expected ${stages"),
        (["launch.nnodes=2", "launch.master_addr=a", "launch.master_port=2950"], "launch.nnodes: found 2"),
        (["-m", "seed=1,2"], "a pipeline is one chain"),
        (["seed=one"], "seed: "),
        (["stages.first.seed=1,2"], "several values for one run"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_refused_with_the_step_and_what_to_type(check, overrides, message):
    with pytest.raises(ConfigError) as refused:
        check(*overrides)
    assert message in str(refused.value)


@pytest.mark.usefixtures("check")
def test_an_unknown_chain_is_refused_with_the_nearest():
    for given, hint in (("experiment=tail", "type experiment=tale"), ("name=x", "experiment: not given")):
        with pytest.raises(ConfigError) as refused:
            pipeline.check(["--config-dir=conf", given])
        assert hint in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 1e-05, "it's, a: \\ word", "a\\'\\", "null", "1e-5", [1, "a b"], {"a": [{"b": "/y"}]}],
)  # fmt: skip
def test_values_of_a_file_reach_training_as_they_are(value):
    """Hydra's grammar reads back what was written for it."""
    override = pipeline._parse(f"key={pipeline._text(value)}")
    assert override.value() == value
