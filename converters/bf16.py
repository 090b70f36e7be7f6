"""bf16: every tensor as loading sees it, in one folder with checksums: the very bits of a bf16 checkpoint, and others'
rounded once, as loading does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_bagel.checkpoint.manifest import Option, TensorRecord
from lowmem_bagel.checkpoint.tensors import TensorSpec

from .engine.base import Encoded, SourceTensor, component, refuse_options

if TYPE_CHECKING:
    from torch import Tensor


class Bf16Converter:
    """Nothing is encoded. The VAE keeps its own dtype."""

    name: ClassVar[str] = "bf16"
    version: ClassVar[int] = 1
    lossless: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, Option]) -> None:
        refuse_options(self.name, options)
        self.options: Mapping[str, Option] = {}

    def encodes(self, spec: TensorSpec) -> bool:
        return spec.part != "vae"

    def bytes_estimate(self, shape: tuple[int, ...]) -> int:
        return 2 * math.prod(shape)

    def convert(self, unit: Sequence[SourceTensor]) -> Iterator[Encoded]:
        for tensor in unit:
            yield Encoded(tensor, "bf16", {tensor.spec.name: tensor.data})

    @staticmethod
    def restore(record: TensorRecord, stored: Mapping[str, Tensor]) -> Tensor:
        return component(record, stored, "", record.shape, "bfloat16")

    def config_entries(self, specs: Sequence[TensorSpec]) -> Mapping[str, Any]:
        return {}
