"""DFloat11 on the CPU: bf16 weights to the format's components and back, bit for bit.

The format is the published one (`dfloat11` 0.5.0, arXiv 2504.11651) and the encoder's bytes are those of that package's
own encoder; `huffman.py` tells the few tensors apart that the package cannot store. Per group of weights the exponents
are Huffman-coded into one stream, and sign and mantissa bytes are stored plainly; `dfloat11_groups.py` describes the
components. A thread of a GPU owns 8 bytes of the stream (a window) and a block 512 windows, for which `gaps` says where
the first code begins and `output_positions` which weight that is.

All work is done by the loops of `dfloat11_loops.py` on plain threads, `threads` of them (default: one a usable core).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CheckpointError, ConversionError
from ..rows import Empty, roomy
from .groups import BLOCK_BYTES, BYTES_PER_THREAD, COMPONENTS, THREADS_PER_BLOCK
from .huffman import FIRST_POINTER, MAX_BITS, MAX_TABLES, CodeBook, code_book

MAX_WEIGHTS = 2**31 - 1
"""The format's kernel counts weights and bytes with 32 bits."""
_CHUNK = 1 << 18
"""Weights that one task encodes."""
_TASK_BLOCKS = 64
"""Blocks that one task decodes."""
_WINDOW_BITS = 8 * BYTES_PER_THREAD
_BLOCK_BITS = 8 * BLOCK_BYTES
_GAP_BYTES = THREADS_PER_BLOCK * 5 // 8

Bits = NDArray[np.uint16]


@dataclass(frozen=True)
class Encoded:
    """The components of one group, as they are stored; CPU tensors. See `COMPONENTS` for shapes.

    `encoded_exponent` may be a view of a slightly larger allocation.
    """

    luts: Tensor
    encoded_exponent: Tensor
    sign_mantissa: Tensor
    output_positions: Tensor
    gaps: Tensor
    split_positions: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Component -> tensor."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def num_weights(self) -> int:
        return self.sign_mantissa.numel()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def num_blocks(self) -> int:
        """Blocks of the format's kernel: 512 threads of 8 bytes."""
        return -(-self.encoded_exponent.numel() // BLOCK_BYTES)

    def positions(self) -> NDArray[np.int64]:
        """int64 [num_blocks + 1]: the first weight of each block, then the number of weights.

        A last block that no code begins in may lack its entry in the file; it is filled in here.
        """
        stored = np.frombuffer(self.output_positions.numpy().tobytes(), dtype="<u4").astype(np.int64)
        return np.append(stored, stored[-1:]) if stored.size == self.num_blocks else stored

    def sizes(self) -> list[int]:
        """Number of weights of each tensor of the group."""
        edges = [0, *self.split_positions.tolist(), self.num_weights]
        return [last - first for first, last in pairwise(edges)]


def encode(weights: Sequence[Tensor], *, threads: int | None = None, empty: Empty = roomy) -> Encoded:
    """Encode the bf16 CPU tensors of one group, of any shapes; any bit pattern is kept. No weight is copied.

    Raises:
        ConversionError: there is nothing to encode, or more than 2^31 - 1 weights.
    """
    parts = [_bits(weight) for weight in weights]
    edges = np.cumsum([0, *(part.size for part in parts)])
    total = int(edges[-1])
    if not 0 < total <= MAX_WEIGHTS:
        raise ConversionError(f"a DFloat11 group must have 1 to {MAX_WEIGHTS} weights, not {total}")
    chunks = [part[i : i + _CHUNK] for part in parts for i in range(0, part.size, _CHUNK)]
    firsts = np.cumsum([0, *(chunk.size for chunk in chunks)])
    sign_mantissa = empty((total,), torch.uint8).numpy()
    counts = np.zeros((len(chunks), 256), np.int64)

    def split(k: int) -> None:
        import_loops().split(chunks[k], sign_mantissa[firsts[k] : firsts[k + 1]], counts[k])

    _each(split, len(chunks), threads)
    book = code_book(counts.sum(0))
    stream, gaps, positions = _encode_exponents(chunks, firsts, counts, book, threads, empty)
    return Encoded(
        luts=torch.from_numpy(book.luts),
        encoded_exponent=torch.from_numpy(stream),
        sign_mantissa=torch.from_numpy(sign_mantissa),
        output_positions=torch.from_numpy(positions.view(np.uint8)),
        gaps=torch.from_numpy(gaps),
        split_positions=torch.tensor(edges[1:-1].tolist(), dtype=torch.int64),
    )


def decode(encoded: Encoded, out: Tensor | None = None, *, threads: int | None = None, name: str = "weights") -> Tensor:
    """All weights of a group in one flat tensor [num_weights], in `out` where it is given: contiguous, bf16 or fp16.

    fp16 rounds what it cannot hold (small values); infinities and NaN pass. `name` is for messages.

    Raises:
        CheckpointError: a component is damaged, or a finite weight overflows fp16.
    """
    if out is None:
        out = torch.empty(encoded.num_weights, dtype=torch.bfloat16)
    assert out.numel() == encoded.num_weights, (out.shape, encoded.num_weights)
    assert out.dtype in (torch.bfloat16, torch.float16), out.dtype
    flat = out.view(-1)

    def put(first: int, bits: Bits) -> None:
        piece = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        narrow = piece.to(torch.float16)
        if not torch.equal(narrow.isinf(), piece.isinf()):
            largest = piece[piece.isfinite()].abs().max().item()
            raise CheckpointError(f"{name}: the weight {largest:g} overflows fp16; use a bf16 variant")
        flat[first : first + narrow.numel()] = narrow

    if out.dtype == torch.float16:
        _decode_blocks(encoded, None, put, threads, name)
    else:
        _decode_blocks(encoded, _bits(flat), None, threads, name)
    return out


def decode_weights(
    encoded: Encoded, shapes: Sequence[Sequence[int]], *, threads: int | None = None, name: str = "weights"
) -> list[Tensor]:
    """The weights of a group as bf16 tensors of these shapes: views of one allocation.

    Raises:
        CheckpointError: a component is damaged or the shapes do not fit.
    """
    check_shapes(encoded, shapes, name)
    pieces = torch.tensor_split(decode(encoded, threads=threads, name=name), encoded.split_positions)
    return [piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]


def matches(encoded: Encoded, weights: Sequence[Tensor], *, threads: int | None = None) -> bool:
    """Whether a group decodes to exactly these bf16 tensors, bit for bit, with every gap and position right.

    Decodes piece by piece: needs little memory.
    """
    parts = [_bits(weight) for weight in weights]
    if encoded.sizes() != [part.size for part in parts]:
        return False
    edges = np.cumsum([0, *(part.size for part in parts)]).tolist()
    differing: list[int] = []

    def compare(first: int, bits: Bits) -> None:
        for part, start in zip(parts, edges, strict=False):
            low, high = max(first, start), min(first + bits.size, start + part.size)
            if low < high and not np.array_equal(part[low - start : high - start], bits[low - first : high - first]):
                differing.append(low)

    try:
        _decode_blocks(encoded, None, compare, threads, "weights")
    except CheckpointError:
        return False
    return not differing


def from_tensors(tensors: Mapping[str, Tensor], name: str) -> Encoded:
    """A group from the stored components of module `name`, after checking all that can be checked without decoding.

    After it, decoding stays inside the components whatever the stream holds. Entries of `luts` are symbols or lead to
    an existing table; a symbol's length may be 0 where no code reaches it, so a decoder must stop there or clamp.

    Raises:
        CheckpointError: a component is missing, of the wrong dtype or shape, or inconsistent with the others.
    """

    def damaged(component: str, what: str) -> CheckpointError:
        return CheckpointError(f"{name}.{component}: {what}; convert the checkpoint with --to dfloat11 instead")

    for component, dtype in COMPONENTS.items():
        if component not in tensors:
            raise damaged(component, "missing")
        expected = torch.int64 if dtype == "I64" else torch.uint8
        if tensors[component].dtype != expected:
            raise damaged(component, f"must be {expected}, not {tensors[component].dtype}")
        if tensors[component].dim() != (2 if component == "luts" else 1):
            raise damaged(component, f"has the wrong shape {list(tensors[component].shape)}")
    encoded = Encoded(**{component: tensors[component].contiguous() for component in COMPONENTS})
    blocks, total = encoded.num_blocks, encoded.num_weights
    if not 0 < total <= MAX_WEIGHTS:
        raise damaged("sign_mantissa", f"{total} weights")
    if not 0 < encoded.encoded_exponent.numel() <= MAX_WEIGHTS:
        raise damaged("encoded_exponent", f"{encoded.encoded_exponent.numel()} bytes")
    if encoded.gaps.numel() != _GAP_BYTES * blocks:
        raise damaged("gaps", f"{encoded.gaps.numel()} bytes for {blocks} blocks")
    if encoded.output_positions.numel() not in (4 * (blocks + 1), 4 * max(2, blocks)):
        raise damaged("output_positions", f"{encoded.output_positions.numel()} bytes for {blocks} blocks")
    positions = encoded.positions()
    steps = np.diff(positions)
    if positions[0] != 0 or positions[-1] != total or steps.min() < 0 or steps.max() > _BLOCK_BITS:
        raise damaged("output_positions", "they do not rise from 0 to the number of weights")
    if any(size <= 0 for size in encoded.sizes()):
        raise damaged("split_positions", "they do not rise within the number of weights")
    _check_luts(encoded.luts.numpy(), damaged)
    return encoded


def check_shapes(encoded: Encoded, shapes: Sequence[Sequence[int]], name: str) -> None:
    """Refuse a group whose tensors are not of these shapes.

    Raises:
        CheckpointError
    """
    expected = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    if encoded.sizes() != expected:
        raise CheckpointError(f"{name}: holds weights of {encoded.sizes()} values, not {expected}; wrong checkpoint?")


def _check_luts(luts: NDArray[np.uint8], damaged: Callable[[str, str], CheckpointError]) -> None:
    tables = luts.shape[0] - 1
    if luts.shape[1] != 256 or not 1 <= tables <= MAX_TABLES:
        raise damaged("luts", f"has the wrong shape {list(luts.shape)}")
    if luts[-1].max() > MAX_BITS:
        raise damaged("luts", f"a code of {luts[-1].max()} bits")
    # An entry of the last lookup is a symbol, not a pointer, so only tables that are read earlier count.
    level = {0}
    for _ in range(3):
        entries = luts[sorted(level)].astype(np.int64)
        level = {256 - int(entry) for entry in np.unique(entries[entries >= FIRST_POINTER])}
        if level and max(level) >= tables:
            raise damaged("luts", f"an entry leads to table {max(level)} of {tables}")


def _encode_exponents(
    chunks: Sequence[Bits],
    firsts: NDArray[np.int64],
    counts: NDArray[np.int64],
    book: CodeBook,
    threads: int | None,
    empty: Empty,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint32]]:
    """The stream, its packed gaps and its block positions. The counts of each chunk say where its codes begin."""
    starts = np.cumsum([0, *(counts @ book.lengths()).tolist()])
    bits = int(starts[-1])
    nbytes = -(-bits // 8)
    blocks = -(-nbytes // BLOCK_BYTES)
    words = empty((-(-bits // _WINDOW_BITS),), torch.int64).numpy().view(np.uint64)
    gaps = np.zeros(blocks * THREADS_PER_BLOCK, np.uint8)
    positions = np.zeros(blocks + 1, np.uint32)
    codes, lengths = book.left_aligned(), book.lengths().astype(np.uint64)
    ends = np.zeros((len(chunks), 2), np.uint64)

    def encode_chunk(k: int) -> None:
        ends[k] = import_loops().encode(
            chunks[k], codes, lengths, int(starts[k]), int(firsts[k]), words, gaps, positions
        )  # fmt: skip

    _each(encode_chunk, len(chunks), threads)
    stream = words.view(">u8")
    for edge in starts[starts % _WINDOW_BITS != 0] // _WINDOW_BITS:
        stream[edge] = 0
    for k, (head, tail) in enumerate(ends):
        if starts[k] % _WINDOW_BITS:
            stream[starts[k] // _WINDOW_BITS] |= head
        if starts[k + 1] % _WINDOW_BITS:
            stream[starts[k + 1] // _WINDOW_BITS] |= tail
    if bits % 8:
        stream[-1] |= np.uint64(book.end_mark() >> bits % _WINDOW_BITS)
    else:
        # The package enters a last window or block that no code begins in only for the sake of a broken byte.
        window = bits // _WINDOW_BITS
        if window < gaps.size and gaps[window] == bits % _WINDOW_BITS:
            gaps[window] = 0
        if positions[blocks - 1] == firsts[-1]:
            positions = positions[:-1]
    positions[-1] = firsts[-1]
    packed = empty((blocks * _GAP_BYTES,), torch.uint8).numpy()
    import_loops().pack_gaps(gaps, packed)
    return words.view(np.uint8)[:nbytes], packed, positions


def _decode_blocks(
    encoded: Encoded, out: Bits | None, put: Callable[[int, Bits], None] | None, threads: int | None, name: str
) -> None:
    """Decode into `out`, or hand each run of weights to `put(index of the first, bits)` on the worker's thread.

    Raises:
        CheckpointError: the stream does not agree with its tables, gaps and positions.
    """
    loops = import_loops()
    stream, luts, gaps = encoded.encoded_exponent.numpy(), encoded.luts.numpy(), encoded.gaps.numpy()
    positions, sign_mantissa = encoded.positions(), encoded.sign_mantissa.numpy()
    table = np.empty(1 << loops.PEEK, np.uint64)
    loops.peek_table(luts, table)
    blocks = encoded.num_blocks

    def task(k: int) -> None:
        first, last = k * _TASK_BLOCKS, min(blocks, (k + 1) * _TASK_BLOCKS)
        start, end = positions[first], positions[last]
        piece = np.empty(end - start, np.uint16) if out is None else out[start:end]
        bad = loops.decode(stream, luts, table, gaps, positions, sign_mantissa, first, last, piece)
        if bad >= 0:
            raise CheckpointError(
                f"{name}: the codes of block {bad} are damaged; convert the checkpoint with --to dfloat11"
            )
        if put is not None:
            put(int(start), piece)

    _each(task, -(-blocks // _TASK_BLOCKS), threads)


def _bits(tensor: Tensor) -> Bits:
    """The bit patterns of a bf16 CPU tensor, flat; shares its memory where it is contiguous."""
    assert tensor.dtype == torch.bfloat16, tensor.dtype
    assert tensor.device.type == "cpu", tensor.device
    bits: Bits = tensor.detach().reshape(-1).view(torch.int16).numpy().view(np.uint16)
    return bits


def _each(task: Callable[[int], None], count: int, threads: int | None) -> None:
    """task(0) ... task(count - 1), on up to `threads` threads; the first exception of a task is raised."""
    workers = min(count, threads or len(os.sched_getaffinity(0)))
    if workers <= 1:
        for k in range(count):
            task(k)
        return
    with ThreadPoolExecutor(workers) as pool:
        results: Iterator[None] = pool.map(task, range(count))
        for _ in results:
            pass


def import_loops() -> Any:
    """The compiled loops, with numba, which takes half a second: at the first use, and before threads read weights,
    since beside eight of them it takes twice as long and a third of their speed meanwhile."""
    from . import loops as dfloat11_loops

    return dfloat11_loops
