"""INT8: decoder linears with one scale per row, optionally rotated, optionally the embedding and lm_head too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_bagel.checkpoint.manifest import Option, TensorRecord, file_sha256
from lowmem_bagel.checkpoint.tensors import TensorSpec
from lowmem_bagel.errors import ConversionError

from .engine.base import Encoded, SourceTensor, component, in_decoder_linear, is_embedding, matrix_shape, naming
from .engine.rows import quantize_rows

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_bagel.formats.int8.rotation import Measurement

PROBE_TOKENS = 64
PROBE_OUTLIER_EVERY = 64
PROBE_OUTLIER_SIZE = 20.0


class Int8Converter:
    """See `formats.int8.codec`: `NAME.weight` int8 and `NAME.weight_scale` float32.

    Options:
        embeddings: quantise the embedding and lm_head as well.
        rotate: rotate the inputs of a linear (`formats.int8.rotation`) where that lowers its measured output error.
            Weights that multiply the same input are rotated all or none, and a rotated tensor's record says
            `rotation_group`.
        activations: a safetensors file to measure on, [tokens, in] under the name of the linear's first weight
            (q for q, k, v; gate for gate, up). Where it has none, random activations with outlier channels serve.
    """

    name: ClassVar[str] = "int8"
    version: ClassVar[int] = 1
    lossless: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Option]) -> None:
        unknown = sorted(options.keys() - {"embeddings", "rotate", "activations"})
        if unknown:
            raise ConversionError(f"--{unknown[0].replace('_', '-')} is not an option of int8; leave it out")
        self._embeddings = bool(options.get("embeddings"))
        self._rotate = bool(options.get("rotate"))
        recorded: dict[str, Option] = {"embeddings": self._embeddings, "rotate": self._rotate}
        self._activations = _ActivationFile(options.get("activations"))
        if self._activations.sha256:
            if not self._rotate:
                raise ConversionError("--activations serves --rotate; give both or none")
            recorded["activations_sha256"] = self._activations.sha256
        self.options: Mapping[str, Option] = recorded

    def encodes(self, spec: TensorSpec) -> bool:
        return in_decoder_linear(spec) or (self._embeddings and is_embedding(spec))

    def bytes_estimate(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) + 4 * shape[0]

    def convert(self, unit: Sequence[SourceTensor]) -> Iterator[Encoded]:
        from lowmem_bagel.formats.int8 import codec as int8
        from lowmem_bagel.formats.int8 import rotation

        verdict = self._measure(unit) if self._rotate and unit[0].spec.linear else None
        rotated = verdict is not None and verdict.keep
        for tensor in unit:
            with naming(tensor.spec):
                weight, scale, error = (
                    quantize_rows(tensor.data, rotation.quantize, rotation.dequantize)
                    if rotated
                    else int8.encode(tensor.data, tensor.empty)
                )
            errors = {"weight_rel_l2": error}
            options: dict[str, Option] = {}
            if verdict is not None:
                errors["output_rel_l2"] = min(verdict.plain, verdict.rotated)
                errors["output_rel_l2_without_rotation"] = verdict.plain
                if verdict.keep:
                    options["rotation_group"] = verdict.group
            stored = {tensor.spec.name: weight, f"{tensor.spec.name}_scale": scale}
            yield Encoded(tensor, "int8", stored, errors, options)

    @staticmethod
    def restore(record: TensorRecord, stored: Mapping[str, Tensor]) -> Tensor:
        import torch

        from lowmem_bagel.formats.int8 import codec as int8
        from lowmem_bagel.formats.int8 import rotation

        codec = rotation if "rotation_group" in record.options else int8
        weight = component(record, stored, "", matrix_shape(record), "int8")
        scale = component(record, stored, "_scale", record.shape[:1], "float32")
        dense: Tensor = codec.dequantize(weight, scale, torch.float32)
        return dense

    def config_entries(self, specs: Sequence[TensorSpec]) -> Mapping[str, Any]:
        return {}

    def _measure(self, unit: Sequence[SourceTensor]) -> Measurement:
        import torch

        from lowmem_bagel.formats.int8 import rotation

        fused = torch.cat([tensor.data for tensor in unit])
        first = unit[0].spec
        given = self._activations.get(first.name, fused.shape[1])
        with naming(first):
            return rotation.measure(fused, _probe(fused.shape[1]) if given is None else given)


class _ActivationFile:
    """Activations by tensor name; empty where no file was given."""

    def __init__(self, path: Option | None) -> None:
        from lowmem_bagel.checkpoint.safetensors_file import SafetensorsFile

        self.file = None if path is None else SafetensorsFile(Path(str(path)))
        self.sha256 = "" if self.file is None else file_sha256(self.file.path)

    def get(self, name: str, width: int) -> Tensor | None:
        if self.file is None or name not in self.file.entries:
            return None
        shape = self.file.entries[name].shape
        if len(shape) != 2 or shape[1] != width or not shape[0]:
            raise ConversionError(f"{self.file.path}: {name} has the shape {list(shape)}, and [tokens, {width}] is due")
        return self.file.tensor(name).float()


def _probe(width: int) -> Tensor:
    """Normal activations [64, width] with every 64th channel 20 times as large, the same for every call."""
    import torch

    x = torch.randn(PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))
    x[:, ::PROBE_OUTLIER_EVERY] *= PROBE_OUTLIER_SIZE
    return x
