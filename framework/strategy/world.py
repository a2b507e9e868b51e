"""Who trains together: the ranks of this run, and small exchanges between them.

A world of one has no process group, unless a strategy forms one, so nothing else in the framework asks
whether it is distributed. Numbers travel as float64 over gloo on the CPU, values as JSON: no pickle crosses a
socket. Tensors of the model are the engines' business, over the same default process group.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from framework.errors import ConfigError
from framework.strategy.base import World


def connect(device: str = "auto", *, timeout_s: float, environment: Mapping[str, str] = os.environ) -> World:
    """Join the other ranks, or be a world of one when WORLD_SIZE is absent or 1.

    `device` is "auto" (CUDA where there is one), "cpu" or "cuda"; `timeout_s` bounds every wait for
    another rank. `environment` holds what torchrun sets: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT and TORCHELASTIC_*.

    Raises ConfigError when the environment names a world but not this rank's place in it, or a
    device that is not there.
    """
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1:
        return Solo(0, 1, 0, _device(device, int(environment.get("LOCAL_RANK", "0"))))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size} is set but {', '.join(missing)} is not; "
            "start with `torchrun`, or unset WORLD_SIZE to train in one process"
        )
    rank = int(environment["RANK"])
    local_rank = int(environment.get("LOCAL_RANK", str(rank)))
    place = _device(device, local_rank)
    timeout = timedelta(seconds=timeout_s)
    _listen_towards(environment["MASTER_ADDR"])
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
        store=_store(environment, rank, timeout),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=place if place.type == "cuda" else None,
    )
    return Group(rank, size, local_rank, place)


def form_group(world: World) -> None:
    """Give a world of one the process group that some libraries insist on; others have theirs. Collective.

    It is alone in it and needs no address; `close` ends it.
    """
    if world.size == 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend=backend, store=dist.HashStore(), rank=0, world_size=1)


@dataclass
class Solo:
    """A world of one: every answer is one's own."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def max(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]

    def broadcast(self, value: Any) -> Any:
        return json.loads(json.dumps(value))

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass
class Group:
    """Several processes, joined in torch's default process group."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        mine = _encode(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([mine.numel()]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.numel()] = mine
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, padded)
        return [_decode(text[: int(length)]) for text, length in zip(texts, lengths, strict=True)]

    def broadcast(self, value: Any) -> Any:
        text = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([text.numel()])
        dist.broadcast(length, src=0)
        if self.rank != 0:
            text = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, src=0)
        return _decode(text)

    def barrier(self) -> None:
        self.sum([0.0])  # `dist.barrier` would pick the GPU, and waiting here needs none

    def close(self) -> None:
        dist.destroy_process_group()

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        numbers = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(numbers, op=how)
        return numbers.tolist()


def host_store(address: str, port: int, *, timeout: timedelta) -> dist.TCPStore:
    """The key-value store where ranks find each other, listening on `address` and nowhere else.

    torch's own store listens on every interface of the machine, unauthenticated; this one gets a
    socket that is already bound. `port` 0 takes a free one, read it from the result's `.port`.
    """
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(place)
    listener.listen(1024)
    return dist.TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _store(environment: Mapping[str, str], rank: int, timeout: timedelta) -> dist.Store:
    """The store of this attempt: keys left by ranks that died in an earlier one are out of sight."""
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    agent_hosts = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: dist.Store
    if rank == 0 and not agent_hosts:
        store = host_store(address, port, timeout=timeout)
    else:
        store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"this machine shows {count} CUDA devices, but rank {local_rank} of this host needs its own; "
            f"type launch.nproc={max(count, 1)} or launch.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _listen_towards(address: str) -> None:
    """Let gloo use the interface that leads to `address`, unless the user has named one.

    Left alone, gloo takes the address of the machine's host name: often loopback, or an interface
    the other hosts cannot reach. gloo reads nothing but the process environment.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: asks the routing table
        except OSError:  # an IPv6-only master: gloo's own choice stands
            return
        local = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR, linux/sockios.h
            except OSError:  # this interface has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == local:
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(text: Tensor) -> Any:
    return json.loads(bytes(text.tolist()))
