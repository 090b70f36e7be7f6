"""GGUF: one file that is complete in itself, its decoder linears in blocks of one type.

All linears have that type; there are no mixes such as other programs' Q4_K_M. Rows that are no whole blocks of a K type
(of 256 values) are Q8_0, and what is no whole block of that (32) is kept. Everything else is stored as other variants
have it: bf16, and the VAE in its own dtype.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES
from lowmem_bagel.checkpoint.gguf_file import ARCHITECTURE, HELD
from lowmem_bagel.checkpoint.manifest import Option, TensorRecord
from lowmem_bagel.checkpoint.tensors import TensorSpec
from lowmem_bagel.errors import CheckpointError, ConversionError
from lowmem_bagel.files import UTF_16

from .engine.base import Encoded, SourceTensor, component, in_decoder_linear, naming
from .engine.disk import PAGE_BYTES
from .engine.one_file import OneFile
from .engine.shards import Shard
from .engine.source import SourceCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "gguf-"
FILE_TYPES = {"Q8_0": 7, "Q6_K": 18, "Q5_K": 16, "Q4_K": 14}
"""What `general.file_type` says: mostly this type."""
QUANTIZATION_VERSION = 2


class GgufConverter:
    """One type of blocks; a subclass a type."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    lossless: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Option]) -> None:
        unknown = sorted(options.keys() - {"type"})
        if unknown:
            raise ConversionError(f"--{unknown[0].replace('_', '-')} is not an option of gguf; leave it out")
        said = options.get("type", self._kind().lower())
        if said != self._kind().lower():
            raise ConversionError(f"--type {said} is not {self.name}; give --to gguf with it")
        self.options: Mapping[str, Option] = {"type": self._kind()}

    @classmethod
    def _kind(cls) -> str:
        return cls.name.removeprefix(FORMAT).upper()

    def encodes(self, spec: TensorSpec) -> bool:
        return in_decoder_linear(spec) and self._kind_of(_width(spec.shape)) is not None

    def bytes_estimate(self, shape: tuple[int, ...]) -> int:
        kind = self._kind_of(shape[-1])
        return 2 * math.prod(shape) if kind is None else BLOCK_TYPES[kind].bytes_of(shape)

    def convert(self, unit: Sequence[SourceTensor]) -> Iterator[Encoded]:
        from lowmem_bagel.formats.gguf.codec import encode

        for tensor in unit:
            kind = self._kind_of(tensor.shape[-1])
            assert kind is not None
            with naming(tensor.spec):
                blocks, error = encode(tensor.data, kind, tensor.empty)
            yield Encoded(tensor, FORMAT + kind.lower(), {tensor.spec.name: blocks}, {"weight_rel_l2": error})

    @staticmethod
    def restore(record: TensorRecord, stored: Mapping[str, Tensor]) -> Tensor:
        import torch

        from lowmem_bagel.checkpoint.gguf_blocks import decoded

        kind = record.encoding.removeprefix(FORMAT).upper()
        if kind not in BLOCK_TYPES or record.shape[-1] % BLOCK_TYPES[kind].values:
            raise CheckpointError(f"{record.name}: cannot be {record.encoding}; convert again")
        blocks = component(record, stored, "", (BLOCK_TYPES[kind].bytes_of(record.shape),), "uint8")
        return decoded(blocks, kind, record.shape, torch.float32)

    def config_entries(self, specs: Sequence[TensorSpec]) -> Mapping[str, Any]:
        return {}

    def one_file(self, checkpoint: SourceCheckpoint, shards: list[Shard]) -> OneFile:
        """See `engine.one_file`."""
        specs = [spec for shard in shards for unit in shard.units for spec in unit.specs]
        kinds = {spec.name: self._stored_as(checkpoint, spec) for spec in specs}
        header = _header(checkpoint, self._kind(), {spec: kinds[spec.name] for spec in specs})
        places, end = {}, len(header)
        for spec in specs:
            places[spec.name] = end
            end += -(-_nbytes(checkpoint, spec, kinds[spec.name]) // PAGE_BYTES) * PAGE_BYTES
        return OneFile(f"{ARCHITECTURE}-{self._kind()}.gguf", header, places)

    def _kind_of(self, width: int) -> str | None:
        """The type of a linear with rows of so many values."""
        return next((kind for kind in (self._kind(), "Q8_0") if not width % BLOCK_TYPES[kind].values), None)

    def _stored_as(self, checkpoint: SourceCheckpoint, spec: TensorSpec) -> str:
        kind = self._kind_of(_width(spec.shape)) if self.encodes(spec) else checkpoint.dtype(spec)
        assert kind is not None
        return kind


class Q8_0Converter(GgufConverter):
    name = "gguf-q8_0"


class Q6KConverter(GgufConverter):
    name = "gguf-q6_k"


class Q5KConverter(GgufConverter):
    name = "gguf-q5_k"


class Q4KConverter(GgufConverter):
    name = "gguf-q4_k"


CONVERTERS: Mapping[str, type[GgufConverter]] = {
    kind.name: kind for kind in (Q8_0Converter, Q6KConverter, Q5KConverter, Q4KConverter)
}


def by_type(options: Mapping[str, Option]) -> GgufConverter:
    """The converter for `--to gguf`.

    Raises:
        ConversionError: no such type, or another option.
    """
    said = str(options.get("type", "q8_0"))
    make = CONVERTERS.get(FORMAT + said.lower())
    if make is None:
        types = ", ".join(name.removeprefix(FORMAT) for name in CONVERTERS)
        raise ConversionError(f"--type {said} is none that gguf is written in; choose one of {types}")
    return make({**options, "type": said.lower()} if "type" in options else options)


def _width(shape: tuple[int | None, ...]) -> int:
    width = shape[-1]
    assert width is not None
    return width


def _nbytes(checkpoint: SourceCheckpoint, spec: TensorSpec, kind: str) -> int:
    block = BLOCK_TYPES.get(kind)
    return checkpoint.nbytes(spec) if block is None else block.bytes_of(checkpoint.shape(spec))


def _header(checkpoint: SourceCheckpoint, kind: str, specs: Mapping[TensorSpec, str]) -> bytes:
    """What stands before the data, as the package `gguf` lays it out, padded to whole pages.

    Every tensor begins with a page: so it can be written and read past the system's cache.
    """
    import numpy as np

    from lowmem_bagel.formats.extras import require

    gguf = require("gguf", "gguf", "gguf")
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_name(checkpoint.path.name or ARCHITECTURE)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_custom_alignment(PAGE_BYTES)
    for name, data in checkpoint.copied.items():
        writer.add_string(HELD + name, _text(data))
    for spec, stored in specs.items():
        shape, nbytes = checkpoint.shape(spec), _nbytes(checkpoint, spec, stored)
        # Bytes are none of these, so that the shape is taken as it is.
        writer.add_tensor_info(spec.name, shape, np.dtype(np.uint16), nbytes, gguf.GGMLQuantizationType[stored])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % PAGE_BYTES)


def _text(data: bytes) -> str:
    """A small file's text; a license in an old encoding loses letters."""
    if data.startswith(UTF_16):
        return data.decode("utf-16", errors="replace")
    return data.removeprefix(codecs.BOM_UTF8).decode(errors="replace")
