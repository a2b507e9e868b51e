"""What all rooms' tests share: a quiet offline environment, worker processes, tiny models."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
import workers

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _worker_processes():
    """Ends the processes of `workers.run` with the session."""
    yield
    workers.stop()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A Hugging Face directory with a tiny random Llama, tied embeddings, a tokenizer and ChatML."""
    return tiny.write(tmp_path_factory.mktemp("tiny-tied"), tied=True)


@pytest.fixture(scope="session")
def tiny_untied_dir(tmp_path_factory):
    """The same with a head of its own."""
    return tiny.write(tmp_path_factory.mktemp("tiny-untied"), tied=False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
