"""What all rooms' tests share: a quiet offline environment, worker processes, tiny models."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import workers

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _worker_processes():
    """Ends the processes of `workers.run` with the session."""
    yield
    workers.stop()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
