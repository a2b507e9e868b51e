"""Which run a command line means: identities, directories, defaults that give way, sweeps."""

import functools
import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from framework.config.compose import CONF, compose, sweep_dir
from framework.config.schema import INCIDENTAL, Run, digest

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]


@functools.cache
def plain():
    return compose(GIVEN).identity()


@pytest.mark.parametrize(
    "more",
    [
        ["launch.nproc=4"],
        ["launch.device=cpu", "launch.threads=1"],
        ["tracker=wandb"],
        ["strategy=fsdp"],
        ["batch.tokens_per_micro=4096"],
        ["model.activation_checkpointing=full"],
        ["model.activation_offload=true", "model.compile=blocks"],
        ["checkpoint.every=7"],
        ["evaluate.at_start=false"],
        ["data.eval=[{path: held.jsonl}]"],
        ["resume=never"],
        ["name=other"],
        ["run_dir=elsewhere"],
        ["epochs=1.0"],
        ["optim.lr=0.00002"],
    ],
    ids=" ".join,
)
def test_how_a_run_is_carried_out_does_not_change_which_run_it_is(more):
    assert compose([*GIVEN, *more]).identity() == plain()


@pytest.mark.parametrize(
    "more",
    [
        ["optim.lr=3e-5"],
        ["seed=1"],
        ["steps=10"],
        ["epochs=2"],
        ["precision=fp32"],
        ["loss.label_smoothing=0.1"],
        ["loss=dft"],
        ["adapter=lora"],
        ["batch.sequences=16"],
        ["data.max_length=1024"],
        ["data.train=[{path: other.jsonl}]"],
        ["schedule=linear"],
        ["replay=fixed", "replay.sources=[{path: general.jsonl}]"],
        ["model.revision=abc"],
    ],
    ids=" ".join,
)
def test_what_decides_the_numbers_decides_which_run_it_is(more):
    assert compose([*GIVEN, *more]).identity() != plain()


def test_the_order_of_overrides_does_not_matter():
    overrides = [*GIVEN, "seed=3", "adapter=lora", "optim.lr=1e-4"]
    assert compose(overrides).run_dir == compose(overrides[::-1]).run_dir


def test_steps_make_epochs_irrelevant_to_the_identity(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/two.yaml").write_text("# @package _global_\nepochs: 2\n")
    with_epochs = compose([*GIVEN, "experiment=two", "steps=10"], config_dir=tmp_path)
    assert with_epochs.identity() == compose([*GIVEN, "steps=10"]).identity()


def test_a_digest_is_the_same_everywhere():
    """BLAKE2b of {"a":1,"b":[2.5,null]} in 4 bytes: stable over machines, Python versions and hash seeds."""
    import hashlib

    expected = hashlib.blake2b(b'{"a":1,"b":[2.5,null]}', digest_size=4).hexdigest()
    assert digest({"b": [2.5, None], "a": 1}) == expected == "ff98e67b"


def test_every_incidental_key_exists():
    """Under one of the choices of its group."""
    trees = [compose([*GIVEN, *more]).model_dump(mode="json") for more in ([], ["rollout=vllm"])]

    def exists(node, parts):
        return not parts or (parts[0] in node and exists(node[parts[0]], parts[1:]))

    for dotted in INCIDENTAL:
        assert any(exists(tree, dotted.split(".")) for tree in trees), dotted


def test_the_default_directory_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = compose(GIVEN)
    assert run.run_dir == str(tmp_path / "runs" / f"sft-{run.identity()}")
    assert compose([*GIVEN, "name=mine"]).run_dir == str(tmp_path / "runs" / f"mine-{run.identity()}")
    assert compose([*GIVEN, "run_dir=here"]).run_dir == str(tmp_path / "here")


def test_local_paths_become_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    run = compose(["model.path=model", "data.train=[{path: rows.jsonl}, {path: '*.jsonl'}, {path: org/set}]"])
    assert run.model.path == str(tmp_path / "model")
    paths = [source.path for source in run.data.train]
    assert paths == [str(tmp_path / "rows.jsonl"), str(tmp_path / "*.jsonl"), "org/set"]
    assert run.data.cache_dir == os.path.expanduser("~/.cache/sapwood")


def test_what_is_typed_makes_a_default_give_way():
    run = compose([*GIVEN, "steps=10", "schedule.warmup_steps=2"])
    assert (run.steps, run.epochs) == (10, None)
    assert (run.schedule.warmup_steps, run.schedule.warmup_fraction) == (2, None)
    assert compose(GIVEN).epochs == 1


def test_a_run_is_frozen():
    run = compose(GIVEN)
    with pytest.raises(ValidationError):
        run.seed = 2
    with pytest.raises(ValidationError):
        run.optim.lr = 1.0


def test_strict_types_hold_without_hydra():
    tree = compose(GIVEN).model_dump(mode="json")
    for wrong in ({"seed": "1"}, {"seed": 1.5}, {"epochs": "1"}, {"extra": 1}, {"steps": 3}):
        with pytest.raises(ValidationError):
            Run.model_validate({**tree, **wrong})


def test_a_sweep_is_found_again_by_its_command():
    first = sweep_dir([*GIVEN, "optim.lr=1e-5,3e-5", "launch.nproc=2"])
    assert first == sweep_dir(["optim.lr=1e-5,3e-5", *GIVEN[::-1], "launch.nproc=4", "tracker=wandb"])
    assert first != sweep_dir([*GIVEN, "optim.lr=1e-5,2e-5"])


PROGRAM = """
import sys
import hydra
from framework.config import compose

def task(config):
    run = compose.composed(config)
    print("job", run.seed, run.strategy.name, run.run_dir, run.tracker.wandb.group)

hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="train")(task)()
"""


def hydra_main(tmp_path, *argv):
    environment = {"PYTHONPATH": str(CONF.parent), "PATH": os.environ["PATH"], "HYDRA_FULL_ERROR": "1"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(program), *argv, *GIVEN, "tracker=wandb"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("job ")]
    return work, jobs


def test_a_single_run_under_hydra_makes_no_directory(tmp_path):
    work, jobs = hydra_main(tmp_path, "seed=5", "experiment=lora")
    assert [job[0] for job in jobs] == ["5"]
    assert jobs[0][3] == "lora"  # runs of an experiment are shown together
    assert list(work.iterdir()) == []


def test_jobs_of_a_sweep_lie_in_the_sweep_each_by_itself(tmp_path):
    """Also jobs that differ in their strategy only, which is no other run but another job."""
    work, jobs = hydra_main(tmp_path, "-m", "seed=1,2", "strategy=ddp,fsdp", "hydra.sweep.dir=runs/sweep-x")
    assert len(jobs) == 4
    directories = {job[2] for job in jobs}
    assert len(directories) == 4
    assert all(directory.startswith(str(work / "runs/sweep-x/sft-")) for directory in directories)
    assert {job[3] for job in jobs} == {"sweep-x"}
    made = sorted(path.relative_to(work).as_posix() for path in work.rglob("*"))
    assert made == ["runs", "runs/sweep-x", "runs/sweep-x/multirun.yaml"]
