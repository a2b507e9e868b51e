"""Ways of spreading a model over ranks: their keys and ranges. No value lives here.

What a way cannot do beside the rest of the tree is in `config.pairs`. See `config.schema` for the rules.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from framework.config.nodes import Node, Positive, Text, refuse


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


class Zero3Offload(Node):
    name: Literal["zero3_offload"]
    optimizer: Literal["cpu", "nvme"]
    parameters: Literal["none", "cpu", "nvme"]
    nvme_path: Text | None
    pin_memory: bool

    @model_validator(mode="after")
    def _together(self) -> Self:
        on_disk = "nvme" in (self.optimizer, self.parameters)
        if on_disk and self.nvme_path is None:
            raise refuse(
                "strategy.nvme_path, strategy.optimizer, strategy.parameters",
                "something that waits on NVMe and no place for it",
                "a directory on a local disk",
                "strategy.nvme_path=DIRECTORY, or strategy.optimizer=cpu strategy.parameters=cpu",
            )
        if not on_disk and self.nvme_path is not None:
            raise refuse(
                "strategy.nvme_path, strategy.optimizer, strategy.parameters",
                "a place on disk and nothing that waits there",
                "both or neither",
                "strategy.optimizer=nvme or strategy.nvme_path=null",
            )
        return self


class ZeroPlusPlus(Node):
    name: Literal["zeropp"]
    shard_size: Positive | None
    quantized_weights: bool
    quantized_gradients: bool


Spread = Ddp | Fsdp | Hsdp | FsdpOffload | Zero1 | Zero2 | Zero3 | Zero3Offload | ZeroPlusPlus
