"""Canaries in the environment, in settings and in URLs: real runs and sweeps leave none of them anywhere."""

import gzip
import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "WANDB_API_KEY": "envcanary0wandb".ljust(40, "0"),
    "HF_TOKEN": "hf_envcanary1huggingfacehub",
    "AWS_SECRET_ACCESS_KEY": "envcanary2/aws+secret",
    "DATABASE_URL": "postgres://me:envcanary3database@host/db",
    "MY_SERVICE_PASSWORD": "envcanary4password",
}
CANARIES = ["canary0", "canary1", "canary2", "canary3", "canary4", "canary5", "canary6", "canary7", "canary8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's package with a loss that is careless with a secret it is handed, and a git remote with one."""
    place = tmp_path_factory.mktemp("secrets")
    (place / "careless.py").write_text(
        textwrap.dedent(
            """
            import os, sys
            from framework.losses.items import Items

            def loss(logps, weight, *, label_smoothing, api_key, judge, note, fail=False):
                if "RANK" in os.environ:  # not where a launcher tries it out
                    print("asking", judge, "with", api_key, "as", os.environ["HF_TOKEN"], flush=True)
                    print("password", os.environ["MY_SERVICE_PASSWORD"], file=sys.stderr, flush=True)
                    if fail:
                        raise RuntimeError(f"{judge} did not take {api_key}")
                return Items(-logps, weight)
            """
        )
    )
    rows = [{"prompt": f"one two {'three ' * (i % 7)}", "completion": "four five six"} for i in range(24)]
    for name in ("train", "held"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    remote = "https://me:canary5remote@example.org/mine.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=place, check=True)
    return place


def train(place, model, *more):
    """launch/train.py as a person would start it. -> (status, what it said)"""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "RANK", "WORLD_SIZE", "LOCAL_RANK"))
    }
    environment |= {**ENVIRONMENT, "PYTHONPATH": str(place), "HOME": str(place), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        f"model.path={model}",
        "data.train=[{path: train.jsonl}]",
        "data.eval=[{path: held.jsonl, name: task}]",
        "data.max_length=64",
        "batch.sequences=4",
        "batch.tokens_per_micro=256",
        "steps=2",
        "checkpoint.every=1",
        "evaluate.samples=1",
        "launch.device=cpu",
        "precision=fp32",
        "tracker=wandb",
        "tracker.wandb.mode=offline",
        "tracker.wandb.checkpoints=true",
        "tracker.wandb.tags=['at ${oc.env:DATABASE_URL}']",
        "trusted_packages=[careless]",
        "loss._target_=careless.loss",
        "+loss.api_key=canary6typed",
        "+loss.judge='https://me:canary7login@judge/v1?model=x&token=canary8query'",
        "+loss.note='${oc.env:MY_SERVICE_PASSWORD}'",
        *more,
    ]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


def leaks(where):
    """(file, canary) of every canary in every file, compressed ones opened."""
    return [
        (path.relative_to(where).as_posix(), canary)
        for path in sorted(where.rglob("*"))
        if path.is_file() and not path.is_symlink()
        for content in contents(path.read_bytes())
        for canary in CANARIES
        if canary.encode() in content
    ]


def contents(content):
    yield content
    if content[:2] == b"\x1f\x8b":
        yield gzip.decompress(content)
    if content[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield archive.read(name)


@pytest.mark.slow
def test_a_run_keeps_no_secret(place, tiny_model_dir):
    status, said = train(place, tiny_model_dir, "run_dir=run")
    assert status == 0, said
    assert leaks(place / "run") == []
    assert [canary for canary in CANARIES if canary in said] == []
    log = (place / "run" / "logs" / "rank-0.log").read_text()
    assert "asking https://***@judge/v1?model=x&token=*** with *** as ***" in log
    assert "password ***" in log
    assert list((place / "run").glob("wandb/offline-run-*/*.wandb"))
    assert list((place / "run").glob("checkpoints/step-*"))


@pytest.mark.slow
def test_a_sweep_keeps_no_secret(place, tiny_model_dir):
    """One job is done, one fails with the secret in its last words: records, page and console are without."""
    status, said = train(
        place, tiny_model_dir, "-m", "+loss.fail=false,true", "hydra.sweep.dir=sweep", "evaluate.samples=0"
    )
    assert status == 1, said
    found = [json.loads(file.read_text()) for file in (place / "sweep").glob("jobs/[!.]*.json")]
    assert sorted(record["status"] for record in found) == ["done", "failed"]
    assert any("did not take ***" in (record["error"] or "") for record in found)
    assert all("+loss.api_key=***" in record["command"] for record in found)
    assert leaks(place / "sweep") == []
    assert [canary for canary in CANARIES if canary in said] == []


@pytest.mark.slow
def test_a_refusal_does_not_quote_a_secret(place, tiny_model_dir):
    status, said = train(place, tiny_model_dir, "run_dir=other", "+loss.tokn=1", "optim.lr=canary6typed")
    assert status == 2
    assert [canary for canary in CANARIES if canary in said] == []
