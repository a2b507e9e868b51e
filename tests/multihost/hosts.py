"""Several hosts on one machine: network namespaces, each with one interface, joined by a switch of their own.

What crosses a host's `eth0` is what would cross its cable, and the kernel counts it. All names carry this
process's id, everything lives inside namespaces made here, and `close` deletes them with all that is in them.
Needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
SUBNET = "10.77.0"
MTU = 9000  # jumbo frames, as in a cluster: headers stay under 1 % of what is sent


def missing() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs ip and tc: install iproute2"
    name = f"sw{os.getpid()}try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"cannot make a network namespace: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Hosts:
    """`count` hosts, 10.77.0.1 and on. Close it in a `finally`."""

    _made = 0

    def __init__(self, count: int) -> None:
        Hosts._made += 1
        tag = f"sw{os.getpid()}x{Hosts._made}"
        self.names = [f"{tag}h{i}" for i in range(count)]
        self._switch = f"{tag}s"
        self._processes: list[subprocess.Popen[str]] = []
        try:
            self._ip("netns", "add", self._switch)
            self._ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            self._ip("-n", self._switch, "link", "set", "br0", "mtu", str(MTU), "up")
            for i, name in enumerate(self.names):
                self._ip("netns", "add", name)
                self._ip(
                    *("-n", self._switch, "link", "add", f"port{i}", "mtu", str(MTU), "type", "veth"),
                    *("peer", "name", "eth0", "mtu", str(MTU), "netns", name),
                )
                self._ip("-n", self._switch, "link", "set", f"port{i}", "master", "br0", "up")
                self._ip("-n", name, "address", "add", f"{self.address(i)}/24", "dev", "eth0")
                self._ip("-n", name, "link", "set", "eth0", "up")
                self._ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def address(self, host: int) -> str:
        return f"{SUBNET}.{host + 1}"

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """A process on a host."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
            env={**os.environ, **(environment or {})},
            text=True,
            **options,
        )
        self._processes.append(process)
        return process

    def cut(self, host: int) -> None:
        """Pull a host's cable: nothing passes, and nobody is told."""
        self._ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def join(self, host: int) -> None:
        """Put the cable back."""
        self._ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def slow(self, host: int, mbit: int | None) -> None:
        """Let a host send `mbit` a second at most; None takes the limit away."""
        where = ["-n", self.names[host], "qdisc"]
        if mbit is None:
            self._run("tc", *where, "del", "dev", "eth0", "root")
        else:
            limit = ["rate", f"{mbit}mbit", "burst", "128kb", "latency", "400ms"]
            self._run("tc", *where, "replace", "dev", "eth0", "root", "tbf", *limit)

    def sent(self, host: int) -> int:
        """Bytes that have left a host so far, with all headers."""
        told = self._ip("-n", self.names[host], "-s", "-j", "link", "show", "eth0")
        return int(json.loads(told)[0]["stats64"]["tx"]["bytes"])

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for name in [*self.names, self._switch]:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for process_id in inside.stdout.split():  # children that outlived their launcher
                subprocess.run(["kill", "-9", process_id], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)  # its interfaces go with it

    def _ip(self, *words: str) -> str:
        return self._run("ip", *words)

    def _run(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout


class Ranks:
    """One process on each host, joined in one world, that trains what it is told: see `program_rank`."""

    def __init__(self, hosts: Hosts, *, port: int = 29500) -> None:
        self.hosts = hosts
        self._ranks = [
            hosts.start(
                rank,
                [sys.executable, str(Path(__file__).with_name("program_rank.py"))],
                environment={
                    "RANK": str(rank),
                    "LOCAL_RANK": "0",
                    "WORLD_SIZE": str(len(hosts.names)),
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": hosts.address(0),
                    "MASTER_PORT": str(port),
                    "DS_ACCELERATOR": "cpu",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(len(hosts.names))
        ]

    def run(self, arguments: Sequence[str], *, steps: int) -> list[dict[str, Any]]:
        """Train with these settings; the answers in rank order."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([list(arguments), steps]) + "\n")
            rank.stdin.flush()
        return [json.loads(self._answer(rank)) for rank in self._ranks]

    def _answer(self, rank: subprocess.Popen[str]) -> str:
        assert rank.stdout is not None
        for line in rank.stdout:
            if line.startswith("{"):
                return line
        raise AssertionError(f"a rank has ended with status {rank.wait()}; what it said is above")
