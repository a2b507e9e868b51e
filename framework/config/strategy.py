"""Ways of spreading a model over ranks: their keys and ranges. No value lives here.

What a way cannot do beside the rest of the tree is in `config.pairs`. See `config.schema` for the rules.
"""

from __future__ import annotations

from typing import Literal

from framework.config.nodes import Node, Positive


class Ddp(Node):
    name: Literal["ddp"]


class Fsdp(Node):
    name: Literal["fsdp"]
    reshard_after_forward: bool


class Hsdp(Node):
    name: Literal["hsdp"]
    reshard_after_forward: bool
    shard_size: Positive | None


class FsdpOffload(Node):
    name: Literal["fsdp_offload"]


class Zero1(Node):
    name: Literal["zero1"]


class Zero2(Node):
    name: Literal["zero2"]


class Zero3(Node):
    name: Literal["zero3"]


Spread = Ddp | Fsdp | Hsdp | FsdpOffload | Zero1 | Zero2 | Zero3
