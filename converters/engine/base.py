"""What a converter is, and what passes between it and the engine.

A new format is one file with one class, registered under the entry-point group `lowmem_bagel.converters`. The class
says which tensors it encodes and how; reading, sharding, checksums, crash safety and the manifest are the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lowmem_bagel.checkpoint.manifest import Option, TensorRecord
from lowmem_bagel.checkpoint.tensors import TensorSpec
from lowmem_bagel.errors import CheckpointError, ConversionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DECODER_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Unit:
    """Tensors that are converted together: weights that multiply the same input (q, k, v; gate, up; a linear of
    all routed experts), else one."""

    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the source in private memory: the converter may overwrite it.

    `dtype` is the source's, by safetensors' name; `sha256` is over the source's bytes. `empty(shape, dtype)` gives
    memory for what is stored; any other will do too. Where `data` was rounded to bf16, `rounding` is what that cost,
    |data - source| / |source|.
    """

    spec: TensorSpec
    dtype: str
    shape: tuple[int, ...]
    data: Tensor
    sha256: str
    empty: Callable[[Sequence[int], torch.dtype], Tensor] = field(repr=False, compare=False)
    rounding: float | None = None


@dataclass(frozen=True)
class Encoded:
    """One tensor as it will be stored: `stored` maps stored names to contiguous CPU tensors."""

    source: SourceTensor
    encoding: str
    stored: Mapping[str, Tensor]
    errors: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)


class Converter(Protocol):
    """One format. The class is called with the options that the user gave and raises ConversionError for others.

    Tensors come in bf16, as loading rounds them, and the VAE's in their own dtype. So do those that a format encodes
    with a loss, float32 sums with adapters among them; a class with an attribute `as_stored` that is true gets all in
    the source's.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    lossless: ClassVar[bool]

    @property
    def options(self) -> Mapping[str, Option]:
        """What was chosen; recorded in the manifest and part of the conversion's identity."""

    def encodes(self, spec: TensorSpec) -> bool:
        """Whether this tensor is encoded; the others are kept as they are."""

    def bytes_estimate(self, shape: tuple[int, ...]) -> int:
        """About how many bytes an encoded tensor will take: what the disk space is checked by, and no limit."""

    def convert(self, unit: Sequence[SourceTensor]) -> Iterator[Encoded]:
        """Encode a unit's tensors, in order.

        Raises:
            ConversionError: naming the tensor that the format cannot hold.
        """

    @staticmethod
    def restore(record: TensorRecord, stored: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the runtime will see it, shape `record.shape`: the inverse of `convert` up to its loss. All
        that it needs besides the stored tensors is in the record.

        Raises:
            CheckpointError: the stored tensors are not what the record says.
        """

    def config_entries(self, specs: Sequence[TensorSpec]) -> Mapping[str, Any]:
        """Keys to add to the folder's `config.json`, for other software that reads the format."""


def in_decoder_linear(spec: TensorSpec) -> bool:
    """The weights that every quantising format encodes; norms, biases and the small layers around are kept."""
    return spec.linear in DECODER_LINEARS


def is_embedding(spec: TensorSpec) -> bool:
    return spec.part in ("embedding", "lm_head")


@contextmanager
def naming(spec: TensorSpec) -> Iterator[None]:
    """Adds the tensor's name to what a codec complains of."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"tensor {spec.name} {error}") from error


def matrix_shape(record: TensorRecord) -> tuple[int, int]:
    """Raises CheckpointError unless the tensor is a matrix."""
    if len(record.shape) != 2:
        raise CheckpointError(f"{record.name}: is no matrix and cannot be {record.encoding}; convert again")
    return record.shape[0], record.shape[1]


def component(
    record: TensorRecord, stored: Mapping[str, Tensor], suffix: str, shape: tuple[int, ...], dtype: str
) -> Tensor:
    """The stored tensor `record.name + suffix`; `dtype` is torch's name for it.

    Raises:
        CheckpointError: it is missing or has another shape or dtype.
    """
    name = record.name + suffix
    tensor = stored.get(name)
    if tensor is None or tuple(tensor.shape) != shape or str(tensor.dtype) != f"torch.{dtype}":
        raise CheckpointError(f"{name}: must be stored as {dtype} {list(shape)}; convert again")
    return tensor


def refuse_options(format_name: str, options: Mapping[str, object]) -> None:
    """For converters without options.

    Raises:
        ConversionError: an option was given.
    """
    if options:
        raise ConversionError(f"--{min(options).replace('_', '-')} is not an option of {format_name}; leave it out")
