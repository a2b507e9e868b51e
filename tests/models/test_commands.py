"""launch/export.py and launch/generate.py on a run directory made by hand."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from framework.config import compose, record
from framework.models import adapters, load
from framework.strategy.base import FIRST, MASTER, SECOND, EngineState, Shard
from framework.strategy.world import connect
from framework.train.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(capsys, monkeypatch):
    """stdout and stderr of `python launch/<name> ...`, run in this process."""

    def run(name, *arguments, given="", status=0):
        spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            module.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert end.value.code == status, said.err
        return said

    return run


def _run(directory, model, *overrides):
    """A run directory with one checkpoint whose masters are the model's weights plus 0.02."""
    run = compose.compose([f"model.path={model}", "data.train=[{path: none.jsonl}]", "steps=1", *overrides])
    directory.mkdir()
    (directory / "config.yaml").write_text(record.saved(run))
    description = load.inspect(str(model))
    adapter = None if run.adapter.kind == "full" else run.adapter.model_dump(exclude={"kind"})
    shards = {
        name: [Shard(tuple(t.shape), 0, {k: t.float().flatten() + 0.02 for k in (MASTER, FIRST, SECOND)})]
        for name, t in load.reader(description, adapter=adapter, seed=run.seed)()
        if adapter is None or adapters.is_adapter(name)
    }
    world = connect("cpu", timeout_s=60)
    identity = {"model": description.fingerprint}
    checkpoints = Checkpointer(directory / "checkpoints", world=world, keep=2, identity=identity)
    checkpoints.save(3, EngineState(1, shards), {})
    world.close()
    return directory


def test_export_and_talk(command, tmp_path, tiny_model_dir):
    run = _run(tmp_path / "run", tiny_model_dir)
    said, _ = command("generate", run, status=2)
    assert said == ""
    said, _ = command("export", run)
    assert "holds the weights of step 3" in said
    exported = dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())
    for name, parameter in AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters():
        assert torch.equal(exported[name], parameter + 0.02)
    asked = "Hello!\n\n/reset\nHello!\n/quit\nnever asked\n"
    said, _ = command("generate", run, "--max-new-tokens", 4, given=asked)
    assert len(said.splitlines()) == 2
    assert len(set(said.splitlines())) == 1  # the second conversation began anew


def test_adapter_and_merged(command, tmp_path, tiny_model_dir):
    run = _run(tmp_path / "run", tiny_model_dir, "adapter=lora")
    command("export", run)
    asked = json.loads((run / "model" / "adapter_config.json").read_text())
    assert asked["base_model_name_or_path"] == str(tiny_model_dir)
    command("export", run, "--merge", "--out", tmp_path / "merged")
    answers = [
        command("generate", where, "--max-new-tokens", 8, given="Hello!\n")[0]
        for where in (run, run / "model", tmp_path / "merged")
    ]
    assert len(set(answers)) == 1


def test_refusals(command, tmp_path, tiny_model_dir):
    run = _run(tmp_path / "run", tiny_model_dir)
    _, error = command("export", tmp_path / "nothing", status=2)
    assert "not there; expected the directory of a run" in error
    _, error = command("export", run, "--merge", status=2)
    assert "nothing to merge" in error
    _, error = command("export", run, "--checkpoint", 2, status=2)
    assert "no checkpoint of step 2; there are: step-000003" in error
    _, error = command("generate", run, status=2)
    assert "has not written a model yet; type python launch/export.py" in error
    shard = next((run / "checkpoints" / "step-000003").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    _, error = command("export", run, status=2)
    assert shard.name in error
    assert not (run / "model").exists()
