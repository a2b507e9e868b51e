"""Memory that runs out: the error becomes settings to type, each of which the run does not have yet."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from framework.config import plan
from framework.config.compose import compose
from framework.config.outlines import outlined
from framework.config.shortage import OutOfMemory, advice, explained, remedies

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def typed(*overrides, device=CUDA):
    return [setting for setting, _ in remedies(compose([*GIVEN, *overrides]), device)]


class Engine:
    """Fails as a device does whose memory is full."""

    def __call__(self, batch):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has more to say."
        )


def test_a_full_device_names_three_settings():
    run, world = compose(GIVEN), SimpleNamespace(rank=1, device=CUDA)
    with pytest.raises(OutOfMemory) as caught, explained(run, world):
        Engine()(None)
    assert str(caught.value).splitlines() == [
        "rank 1 ran out of memory on cuda: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "what would help most, to be added to the same command:",
        "  batch.tokens_per_micro=4096          fewer tokens at once; the result stays the same",
        "  model.activation_checkpointing=full  keeps block inputs alone, a third slower",
        "  strategy=fsdp_offload                weights and optimizer wait in the host's memory",
    ]


def test_what_is_advised_saves_what_a_plan_says(tmp_path):
    """Three of the settings, the largest saving first, each with the difference of two plans."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    LlamaConfig(vocab_size=32000, num_attention_heads=4, **sizes).save_pretrained(tmp_path)
    run = compose([f"model.path={tmp_path}", *GIVEN[1:], "launch.nproc=2"])
    inspected, seen = outlined(run), {}
    advised = advice(run, CUDA, inspected)
    assert len(advised) == 3
    now = plan.plan(inspected, CUDA, seen=seen).peak
    saved = []
    for setting, why in advised:
        changed = compose([f"model.path={tmp_path}", *GIVEN[1:], "launch.nproc=2", *setting.split()])
        saved.append(now - plan.plan(outlined(changed), CUDA, seen=seen).peak)
        assert why.startswith(f"saves {saved[-1] / 2**30:.1f} GiB: ")
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] > 0


def test_a_model_that_cannot_be_planned_gets_the_usual_advice(monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(plan, "plan", fails)
    run = compose(GIVEN)
    assert advice(run, CUDA, SimpleNamespace(run=run)) == remedies(run, CUDA)[:3]


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), explained(compose(GIVEN), SimpleNamespace(rank=0)):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["launch.nproc=4"],
        ["strategy=fsdp", "strategy.reshard_after_forward=false", "launch.nproc=2"],
        ["precision=fp32", "adapter=lora", "batch.tokens_per_micro=3000"],
        ["stage=grpo", "reward=verifier"],
    ],
    ids=" ".join,
)
def test_everything_that_is_advised_can_be_typed_and_is_not_advised_again(overrides):
    run = compose([*GIVEN, *overrides])
    advised = typed(*overrides)
    assert advised
    for setting in advised:
        changed = compose([*GIVEN, *overrides, *setting.split()])
        assert changed.model_dump() != run.model_dump()
        assert setting not in [s for s, _ in remedies(changed, CUDA)]


def test_what_is_saved_already_is_not_advised():
    saving = ["model.activation_checkpointing=full", "batch.tokens_per_micro=2048", "data.max_length=2048"]
    assert not [s for s in typed(*saving) if "checkpointing" in s or s.startswith("batch.tokens_per_micro")]
    assert "strategy=fsdp" in typed("launch.nproc=4")
    assert "strategy=fsdp" not in typed()
    assert "strategy=zero3_offload" in typed("launch.nproc=4", "strategy=zero3")
    assert not [s for s in typed(device=CPU) if "offload" in s]


def test_a_cpu_whose_memory_is_full(tmp_path):
    """A real allocation fails under a limit on the address space; the status is that of a failure."""
    program = f"""
        import resource, torch
        from types import SimpleNamespace
        from framework.cluster import worker
        from framework.config.compose import compose
        from framework.config.shortage import explained

        run = compose({GIVEN!r})
        limit = 64 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        def work():
            with explained(run, SimpleNamespace(rank=0, device=torch.device("cpu"))):
                torch.empty(2 * limit, dtype=torch.uint8)
            return 0

        worker.run(work)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "error: rank 0 ran out of memory on cpu: " in done.stderr
    assert "can't allocate memory" in done.stderr
    assert "model.activation_checkpointing=full" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_whose_engine_fails_says_so_and_records_the_failure(monkeypatch):
    from framework.config import work

    ended = []
    monkeypatch.setattr(work.build, "prepare", lambda run: SimpleNamespace(run=run, probes=None))
    monkeypatch.setattr(work, "_join", lambda run, closing: SimpleNamespace(rank=0, device=CUDA))
    monkeypatch.setattr(work, "agree", lambda prepared, world: None)
    monkeypatch.setattr(work.leaving, "leave", lambda prepared: None)
    monkeypatch.setattr(work.build, "checkpointer", lambda prepared, world: None)
    monkeypatch.setattr(work, "_resume", lambda run, checkpoints: None)
    monkeypatch.setattr(work, "open_tracker", lambda *_, **__: SimpleNamespace(close=ended.append))
    monkeypatch.setattr(work, "_train", lambda *_: Engine()(None))
    with pytest.raises(OutOfMemory, match=r"batch\.tokens_per_micro=4096"):
        work.work(compose(GIVEN))
    assert ended == ["failed"]
