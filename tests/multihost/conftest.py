"""Every test here needs hosts of its own; where they cannot be made it says so and is skipped."""

import json
import signal

import hosts
import pytest


def pytest_collection_modifyitems(items):
    here = [item for item in items if "multihost" in item.keywords]
    if here and (why := hosts.missing()):
        print(f"\nNOT RUN: {len(here)} tests of several hosts: {why}")
        for item in here:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session", autouse=True)
def _hosts_go_on_sigterm():
    """A test run that is told to end deletes its hosts, as on Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A random Llama of 1.9 million parameters: its bytes outweigh headers and small talk."""
    import tiny

    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.02}
    return tiny.write(tmp_path_factory.mktemp("wide"), tied=True, **sizes)


@pytest.fixture(scope="session")
def settings(model, tmp_path_factory):
    """settings(**changes): a command line in fp32 with everything small; `__` stands for a dot."""
    place = tmp_path_factory.mktemp("multihost")
    rows = [
        {"prompt": f"one two {'three ' * (i % 7)}", "completion": f"four {'five ' * (10 + i * 5 % 11)}"}
        for i in range(80)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def get(**changes):
        values = {
            "model.path": model,
            "data.train": f"[{{path: {place}/rows.jsonl}}]",
            "data.cache_dir": f"{place}/cache",
            "data.max_length": 128,
            "batch.sequences": 32,
            "batch.tokens_per_micro": 1024,
            "precision": "fp32",
            "optim.lr": 1e-4,
            "schedule": "constant",
            "schedule.warmup_steps": 0,
            "steps": 60,
            "launch.device": "cpu",
            "retain.builtin": "false",
            "run_dir": f"{place}/run",
        } | {name.replace("__", "."): value for name, value in changes.items()}
        return [f"{name}={value}" for name, value in values.items()]

    return get
