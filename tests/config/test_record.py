"""What is written down of a configuration: readable, readable back, and without secrets."""

import pytest
import yaml

from framework.config import record
from framework.config.compose import compose
from framework.config.schema import Run
from framework.errors import ConfigError

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]
CANARY = "canary-0123456789"


def test_a_saved_run_reads_back_as_itself(tmp_path):
    run = compose([*GIVEN, "adapter=lora", "tracker=wandb", "optim.lr=1e-5"])
    path = tmp_path / "config.yaml"
    path.write_text(record.saved(run))
    assert record.load(path) == run
    assert yaml.safe_load(path.read_text())["optim"]["lr"] == 1e-5  # a number to a plain YAML reader, too


def test_a_run_passes_through_json_as_itself():
    run = compose([*GIVEN, "adapter=lora", "adapter.targets=[q_proj]", "schedule=wsd"])
    assert Run.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize(
    "override",
    [
        "tracker.wandb.entity=${oc.env:MY_VALUE}",
        "tracker.wandb.entity=team-${oc.env:MY_VALUE}",
        "tracker.wandb.entity=${oc.env:MY_VALUE,none}",
        "tracker.wandb.tags=[a,'${oc.env:MY_VALUE}']",
        "data.train=[{path: '${oc.env:MY_VALUE}/rows.jsonl'}]",
        "+loss.note=${oc.env:MY_VALUE}",
        f"+loss.api_key={CANARY}",
        f"+loss.judge={{auth: {{token: {CANARY}}}}}",
        f"model.path='https://user:{CANARY}@host/model'",
        f"tracker.wandb.group=sent-{CANARY}-here",  # the value of a variable that is named like a secret
    ],
)
def test_no_value_of_the_environment_and_no_secret_is_written(override, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_VALUE", CANARY)
    monkeypatch.setenv("SERVICE_API_KEY", CANARY)
    run = compose([*GIVEN, "tracker=wandb", override])
    assert CANARY not in record.saved(run)
    assert CANARY not in str(record.shown(run))


def test_a_value_of_the_environment_reaches_the_run_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_MODELS", "/models")
    run = compose([*GIVEN, "model.path=${oc.env:MY_MODELS}/small"])
    assert run.model.path == "/models/small"
    path = tmp_path / "config.yaml"
    path.write_text(record.saved(run))
    assert "path: ${oc.env:MY_MODELS}/small" in path.read_text()
    assert record.load(path).model.path == "/models/small"


def test_ordinary_keys_are_not_mistaken_for_secrets():
    """tokens_per_micro and head_chunk_tokens count tokens; they are no token."""
    shown = record.shown(compose([*GIVEN, "data.train=[{path: token.jsonl}]"]))
    assert shown["batch"]["tokens_per_micro"] == 8192
    assert record.HIDDEN not in str(shown)


def test_a_file_cannot_make_itself_trusted(tmp_path):
    run = compose([*GIVEN, "trusted_packages=[evil]", "loss._target_=evil.run"])
    path = tmp_path / "config.yaml"
    path.write_text(record.saved(run))
    assert record.load(path).trusted_packages == ()
    assert record.load(path, trusted=["mine"]).trusted_packages == ("mine",)


def test_a_file_cannot_ask_for_a_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", CANARY)
    path = tmp_path / "config.yaml"
    path.write_text(
        record.saved(compose([*GIVEN, "model.path=x-${oc.env:PATH}"])).replace("PATH}", "HUB_TOKEN}")
    )
    assert CANARY not in record.load(path).model.path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: [", "not readable as YAML"),
        ("- 1\n", "found list; expected the mapping"),
        ("seed: !!python/object/apply:os.system ['true']\n", "not readable as YAML"),
        ("seed: 1\n", "optim: not set"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, told):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml:") as refused:
        record.load(path)
    assert told in str(refused.value)


def test_a_run_that_was_never_started_is_told(tmp_path):
    with pytest.raises(ConfigError, match="not there; expected the directory of a run"):
        record.load(tmp_path / "config.yaml")
