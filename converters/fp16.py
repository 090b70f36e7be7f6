"""fp16 for GPUs without native bf16: every tensor in float16, with what the narrower range cost. The VAE, which
overflows in fp16, stays float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_bagel.checkpoint.manifest import Option, TensorRecord
from lowmem_bagel.checkpoint.tensors import TensorSpec

from .engine.base import Encoded, SourceTensor, component, naming, refuse_options

if TYPE_CHECKING:
    from torch import Tensor


class Fp16Converter:
    """See `formats.fp16.codec`. A value beyond float16's range is an error that names the tensor."""

    name: ClassVar[str] = "fp16"
    version: ClassVar[int] = 1
    lossless: ClassVar[bool] = False
    as_stored: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, Option]) -> None:
        refuse_options(self.name, options)
        self.options: Mapping[str, Option] = {}

    def encodes(self, spec: TensorSpec) -> bool:
        return spec.part != "vae"

    def bytes_estimate(self, shape: tuple[int, ...]) -> int:
        return 2 * math.prod(shape)

    def convert(self, unit: Sequence[SourceTensor]) -> Iterator[Encoded]:
        from lowmem_bagel.formats.fp16 import codec as fp16

        for tensor in unit:
            with naming(tensor.spec):
                half, report = fp16.convert(tensor.data, _own_memory(tensor.data))
            errors = {
                "weight_rel_l2": report.relative_l2,
                "largest_relative_loss": report.largest_relative_loss,
                "largest_absolute_loss": report.largest_absolute_loss,
                "values_below_normal": float(report.below_normal),
                "values_vanished": float(report.vanished),
            }
            yield Encoded(tensor, "fp16", {tensor.spec.name: half}, errors)

    @staticmethod
    def restore(record: TensorRecord, stored: Mapping[str, Tensor]) -> Tensor:
        return component(record, stored, "", record.shape, "float16")

    def config_entries(self, specs: Sequence[TensorSpec]) -> Mapping[str, Any]:
        return {}


def _own_memory(data: Tensor) -> Tensor | None:
    """The tensor's memory as float16, where its values have 16 bits."""
    import torch

    return data.view(torch.float16) if data.element_size() == 2 else None
