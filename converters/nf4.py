"""NF4: decoder linears in 4-bit NormalFloat, in the bytes that bitsandbytes makes and reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_bagel.checkpoint.manifest import Option, TensorRecord
from lowmem_bagel.checkpoint.tensors import TensorSpec

from .engine.base import (
    Encoded,
    SourceTensor,
    component,
    in_decoder_linear,
    matrix_shape,
    naming,
    refuse_options,
)

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64


class Nf4Converter:
    """See `formats.nf4.codec`: `NAME.weight` uint8 and `NAME.weight_absmax` float32."""

    name: ClassVar[str] = "nf4"
    version: ClassVar[int] = 1
    lossless: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Option]) -> None:
        refuse_options(self.name, options)
        self.options: Mapping[str, Option] = {}

    def encodes(self, spec: TensorSpec) -> bool:
        return in_decoder_linear(spec)

    def bytes_estimate(self, shape: tuple[int, ...]) -> int:
        weights = math.prod(shape)
        return weights // 2 + 4 * (weights // BLOCK)

    def convert(self, unit: Sequence[SourceTensor]) -> Iterator[Encoded]:
        from lowmem_bagel.formats.nf4 import codec as nf4
        from lowmem_bagel.formats.nf4.spec import side_by_side

        for tensor in unit:
            data, (rows, width) = tensor.data, tensor.data.shape
            together = side_by_side((rows, width))
            if tensor.spec.routed is not None and data.numel() == together[0] * together[1]:
                data = data.reshape(together)
            with naming(tensor.spec):
                weight, absmax, error = nf4.encode(data, tensor.empty)
            stored = {tensor.spec.name: weight.view(rows, width // 2), f"{tensor.spec.name}_absmax": absmax}
            yield Encoded(tensor, "nf4", stored, {"weight_rel_l2": error})

    @staticmethod
    def restore(record: TensorRecord, stored: Mapping[str, Tensor]) -> Tensor:
        import torch

        from lowmem_bagel.formats.nf4 import codec as nf4
        from lowmem_bagel.formats.nf4.spec import SPEC

        shapes = (part.shape(matrix_shape(record)) for part in SPEC.parts)
        weight = component(record, stored, "", next(shapes), "uint8")
        absmax = component(record, stored, "_absmax", next(shapes), "float32")
        return nf4.dequantize(weight, absmax, torch.float32)

    def config_entries(self, specs: Sequence[TensorSpec]) -> Mapping[str, Any]:
        return {}
