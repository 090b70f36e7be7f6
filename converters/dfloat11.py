"""DFloat11: decoder linears, embedding and lm_head without loss, each a group of its own, so that one expert can live
or stream without the other. The folder also loads in the `dfloat11` package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_bagel.checkpoint.manifest import Option, TensorRecord
from lowmem_bagel.checkpoint.tensors import TensorSpec
from lowmem_bagel.errors import ConversionError

from .engine.base import Encoded, SourceTensor, in_decoder_linear, is_embedding, naming, refuse_options

if TYPE_CHECKING:
    from torch import Tensor


class Dfloat11Converter:
    """See `formats.dfloat11.codec`. What was encoded is decoded again and compared bit for bit before it is written."""

    name: ClassVar[str] = "dfloat11"
    version: ClassVar[int] = 1
    lossless: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, Option]) -> None:
        refuse_options(self.name, options)
        self.options: Mapping[str, Option] = {}

    def encodes(self, spec: TensorSpec) -> bool:
        return in_decoder_linear(spec) or is_embedding(spec)

    def bytes_estimate(self, shape: tuple[int, ...]) -> int:
        """Trained weights take 10.9 bits and get 12. Others may take up to 19, which only encoding them shows."""
        return math.prod(shape) * 12 // 8 + 8192

    def convert(self, unit: Sequence[SourceTensor]) -> Iterator[Encoded]:
        from lowmem_bagel.formats.dfloat11 import codec as dfloat11
        from lowmem_bagel.formats.dfloat11.groups import stored_name

        for tensor in unit:
            with naming(tensor.spec):
                encoded = dfloat11.encode([tensor.data], empty=tensor.empty)
                if not dfloat11.matches(encoded, [tensor.data]):
                    raise ConversionError("did not decode to its own bits; report this, and check the memory")
            module = tensor.spec.name.removesuffix(".weight")
            stored = {stored_name(module, name): value for name, value in encoded.tensors.items()}
            yield Encoded(tensor, self.name, stored)

    @staticmethod
    def restore(record: TensorRecord, stored: Mapping[str, Tensor]) -> Tensor:
        from lowmem_bagel.formats.dfloat11 import codec as dfloat11

        components = {name.rpartition(".")[2]: tensor for name, tensor in stored.items()}
        encoded = dfloat11.from_tensors(components, record.name.removesuffix(".weight"))
        return dfloat11.decode_weights(encoded, [record.shape], name=record.name)[0]

    def config_entries(self, specs: Sequence[TensorSpec]) -> Mapping[str, Any]:
        from lowmem_bagel.formats.dfloat11.groups import own_config

        return {"dfloat11_config": own_config(any(spec.routed is not None for spec in specs))}
