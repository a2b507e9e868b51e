"""vLLM by its public interface, played by stand-ins that keep a prefix cache until they are told."""

import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import workers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from framework.errors import ConfigError, SapwoodError
from framework.models import adapters
from framework.rollout.base import Prompt, Sampling
from framework.rollout.vllm import Colocated, Server, VllmRollout
from framework.strategy.world import connect

TEXTS = ["the cat sat on the mat", "the dog", "the cat", "a b c d e"]


class StandIn:
    """A model that answers as vLLM documents, one token after another, and remembers prompts."""

    def __init__(self, path):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.cache = {}
        self.asked = []
        self.lock = threading.Lock()
        self.read = None

    def reload(self, directory):
        files = sorted(Path(directory).glob("*.safetensors"))
        self.read = {name: tensor for file in files for name, tensor in load_file(file).items()}
        parameters = dict(self.model.named_parameters())
        assert set(parameters) == set(self.read)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.read[name])

    def reset(self):
        self.cache.clear()
        return True

    @torch.no_grad()
    def logits(self, ids):
        """What vLLM's prefix cache would do wrong with other weights: the first token after a prompt."""
        if tuple(ids) not in self.cache:
            self.cache[tuple(ids)] = self.model(torch.tensor([ids])).logits[0, -1]
        return self.cache[tuple(ids)]

    def complete(self, prompt, **law):
        """[(ids, log-probabilities, reason)] of the samples, the last one first."""
        with self.lock:
            self.asked.append(law)
            return [(n, *self.one(list(prompt), law, law["seed"] + n)) for n in range(law["n"])][::-1]

    def one(self, prompt, law, seed):
        generator = torch.Generator().manual_seed(seed)
        ids, nats = [], []
        while len(ids) < law["max_tokens"]:
            logps = (self.logits(prompt + ids) / (law["temperature"] or 1.0)).log_softmax(-1)
            drawn = torch.multinomial(logps.exp(), 1, generator=generator)
            token = int(logps.argmax() if law["temperature"] == 0 else drawn)
            ids.append(token)
            nats.append(float(logps[token]))
            if token in law["stop_token_ids"]:
                return ids, nats, "stop"
        return ids, nats, "length"


class Handler(BaseHTTPRequestHandler):
    engine: StandIn

    def do_GET(self):
        self.say({"data": [{"id": "tiny"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/collective_rpc":
            assert asked["method"] == "reload_weights"
            self.engine.reload(asked["kwargs"]["weights_path"])
            self.say({"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self.say({"success": self.engine.reset()})
        elif self.path == "/v1/completions":
            assert asked.pop("model") == "tiny"
            assert asked.pop("return_token_ids")
            self.say({"choices": [self.choice(*each) for each in self.engine.complete(**asked)]})
        else:
            self.send_error(404)

    def choice(self, index, ids, nats, reason):
        return {
            "index": index,
            "token_ids": ids,
            "logprobs": {"token_logprobs": nats},
            "finish_reason": reason,
        }

    def say(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tiny_model_dir):
    """(url, stand-in) of a server in this process."""
    engine = StandIn(tiny_model_dir)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"engine": engine}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", engine
    server.shutdown()
    server.server_close()


@pytest.fixture
def library(monkeypatch):
    """A `vllm` module of which LLM and SamplingParams are what we use."""

    class LLM(StandIn):
        def __init__(self, model, **options):
            super().__init__(model)
            self.options = options

        def collective_rpc(self, method, kwargs):
            assert method == "reload_weights"
            self.reload(kwargs["weights_path"])

        def reset_prefix_cache(self):
            return self.reset()

        def generate(self, prompts, laws, use_tqdm):
            return [
                types.SimpleNamespace(
                    outputs=[self.output(*o) for o in self.complete(p["prompt_token_ids"], **law)]
                )
                for p, law in zip(prompts, laws, strict=True)
            ]

        def output(self, index, ids, nats, reason):
            at = [{t: types.SimpleNamespace(logprob=n)} for t, n in zip(ids, nats, strict=True)]
            return types.SimpleNamespace(index=index, token_ids=ids, logprobs=at, finish_reason=reason)

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=dict))


def shaken(path, seed):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def named(model):
    return ((f"lm.{name}", parameter.detach()) for name, parameter in model.named_parameters())


def rollout(engine, path, world=None, **options):
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = {tokenizer.eos_token_id, 40}
    world = world or connect("cpu", timeout_s=10)
    return VllmRollout(engine, tokenizer, world, ends=ends, **{"dtype": torch.float32, **options})


def prompts(tokenizer):
    return [Prompt(tuple(tokenizer(text).input_ids), 10 + i) for i, text in enumerate(TEXTS)]


def assert_answers(engine, model, version):
    """Log-probabilities, ends, versions and places of what `engine` says with `model`'s weights."""
    asked = prompts(engine.tokenizer)
    sampling = Sampling(8, temperature=0.7, samples=3, seed=5)
    answers = engine.generate(asked, sampling)
    exact = model.double()
    for prompt, group in zip(asked, answers, strict=True):
        assert len({answer.ids for answer in group}) == 3
        for answer in group:
            with torch.no_grad():
                logits = exact(torch.tensor([[*prompt.ids, *answer.ids]])).logits[0, len(prompt.ids) - 1 : -1]
            expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(answer.logps).double(), expected, atol=2e-5, rtol=0)
            assert answer.finished == (answer.ids[-1] in engine.ends)
            assert answer.finished or len(answer.ids) == 8
            assert answer.version == version
            assert answer.text == engine.tokenizer.decode(answer.ids, skip_special_tokens=True)
    assert engine.generate(asked[1:3], sampling) == answers[1:3]  # keyed by prompt, not by place
    first = engine.generate(asked, Sampling(8, temperature=0.7, seed=5))
    assert [group[0] for group in answers] == [group[0] for group in first]


@pytest.mark.parametrize("kind", ["server", "colocated"])
def test_weights_arrive_and_caches_are_forgotten(kind, served, library, tiny_model_dir, tmp_path):
    options = {"max_length": 64, "memory_share": 0.3, "dtype": "float32"}
    world = connect("cpu", timeout_s=10)
    engine = Server(served[0]) if kind == "server" else Colocated(str(tiny_model_dir), world, **options)
    engine = rollout(engine, tiny_model_dir, directory=tmp_path)
    for version in (1, 2):
        model = shaken(tiny_model_dir, version)
        engine.update(named(model), version=version)
        assert not list(tmp_path.iterdir()), "the weights were left behind"
        assert_answers(engine, model, version)
    engine.close()


def test_the_whole_law_is_sent(served, tiny_model_dir, tmp_path):
    """A server fills what is missing from the model's own generation settings."""
    url, engine = served
    talking = rollout(Server(url), tiny_model_dir, directory=tmp_path)
    talking.update(named(engine.model), version=1)
    talking.generate(prompts(talking.tokenizer)[:1], Sampling(4, temperature=0.0, top_p=0.9, top_k=7))
    (law,) = engine.asked
    law.pop("seed")
    assert law == {
        "n": 1,
        "max_tokens": 4,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": talking.ends,
        "logprobs": 0,
    }


def test_adapters_arrive_merged_and_rounded_once(served, tiny_model_dir, tmp_path):
    url, engine = served
    trainer = adapters.attach(shaken(tiny_model_dir, 1), adapters.Lora(rank=4, alpha=8.0))
    with torch.no_grad():
        for name, parameter in trainer.named_parameters():
            if adapters.is_adapter(name):
                parameter.normal_(0, 0.2)
    talking = rollout(Server(url), tiny_model_dir, dtype=torch.bfloat16, lora_scaling=2.0, directory=tmp_path)
    talking.update(named(trainer), version=1)
    expected = dict(adapters.merged(trainer).named_parameters())
    for name, tensor in engine.read.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)


def on_ranks(world, url, path, directory):
    engine = rollout(Server(url), path, world, directory=Path(directory))
    engine.update(named(shaken(path, 1)), version=1)
    return engine.generate(prompts(engine.tokenizer), Sampling(6, samples=2))


def test_ranks_share_one_server(served, tiny_model_dir, tmp_path):
    url, engine = served
    alone = on_ranks(connect("cpu", timeout_s=10), url, tiny_model_dir, tmp_path)
    asked = len(engine.asked)
    first, second = workers.run(2, on_ranks, url, tiny_model_dir, str(tmp_path))
    assert alone == first == second
    assert len(engine.asked) == 2 * asked, "each prompt is asked by one rank"


def test_a_server_that_is_not_there_or_still_busy_is_named(served, tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be reached.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
        Server("http://127.0.0.1:9", timeout_s=2)
    url, engine = served
    talking = rollout(Server(url), tiny_model_dir, directory=tmp_path)
    engine.reset = lambda: False
    with pytest.raises(SapwoodError, match="still uses its prefix cache"):
        talking.update(named(engine.model), version=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SapwoodError, match="answered 404"):
        Server(url)._call("/nowhere", {})


def test_without_vllm_the_way_out_is_named(monkeypatch, tiny_model_dir):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"rollout.url=http.* vllm serve"):
        Colocated(
            str(tiny_model_dir), connect("cpu", timeout_s=9), max_length=8, memory_share=0.1, dtype="float32"
        )
