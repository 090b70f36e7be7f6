"""The lossless CUDA kernels against the CPU codecs: their own source emulated on the CPU, and on a GPU where one is."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_emulation
from torch import Tensor

import lowmem_bagel
from lowmem_bagel.formats.dfloat11 import codec
from lowmem_bagel.formats.dfloat11 import kernels as dfloat11
from lowmem_bagel.formats.dfloat11.huffman import END, code_book
from lowmem_bagel.formats.int8 import pairs
from lowmem_bagel.kernels import nvrtc

needs_compiler = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="the emulation needs g++")
COMPONENTS = ("encoded_exponent", "sign_mantissa", "output_positions", "gaps")


@dataclass(frozen=True)
class Target:
    """Where kernels run: `descending` is the order of an emulated block's threads, None on a GPU."""

    device: torch.device
    descending: bool | None

    def module(self, source: str, blocks: int = 3, **defines: int) -> Any:
        if self.descending is None:
            return nvrtc.load(source, self.device, defines)
        return cuda_emulation.Module(source, defines, self.descending, blocks)


CPU = torch.device("cpu")


@pytest.fixture(
    params=[
        pytest.param("ascending", marks=needs_compiler),
        pytest.param("descending", marks=needs_compiler),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def target(request: pytest.FixtureRequest) -> Target:
    if request.param != "cuda":
        return Target(CPU, request.param == "descending")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    device = torch.device("cuda")
    if reason := nvrtc.why_unavailable(device):
        pytest.skip(reason)
    return Target(device, None)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16).cpu()


def aligned(tensor: Tensor, device: torch.device = CPU) -> Tensor:
    """A flat copy on `device` at a multiple of 16 bytes."""
    flat = tensor.flatten()
    room = torch.empty(flat.nbytes + 16, dtype=torch.uint8, device=device)
    skip = -room.data_ptr() % 16
    copy = room[skip : skip + flat.nbytes].view(tensor.dtype)
    return copy.copy_(flat)


def poisoned(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return aligned(torch.full((numel,), float("nan"), dtype=dtype), device)


# ---------------------------------------------------------------------------------------------------------- DFloat11


@dataclass
class Group:
    weight: Tensor
    tensors: dict[str, Tensor]
    group: dfloat11.KernelGroup


def make_group(weight: Tensor, device: torch.device) -> Group:
    encoded = codec.encode([weight])
    tensors = {name: aligned(encoded.tensors[name], device) for name in COMPONENTS}
    return Group(weight.flatten(), tensors, dfloat11.KernelGroup.of_tensors(encoded.luts, **tensors))


def gaussian(n: int, scale: float = 0.02) -> Tensor:
    return (torch.randn(n) * scale).bfloat16()


def assorted_weights() -> list[Tensor]:
    wild = torch.randn(9_000) * torch.randn(9_000).mul(6).exp()
    special = gaussian(2_000)
    special[::97] = (
        torch.tensor([float("inf"), -float("inf"), float("nan"), 1e-40, 0.0, -0.0]).bfloat16().repeat(4)[:21]
    )
    return [
        gaussian(30_011),
        gaussian(1),
        gaussian(7, 1.0),
        gaussian(8),
        gaussian(12_000, 0.5),
        torch.full((40_000,), 0.25).bfloat16(),
        torch.zeros(3_000).bfloat16(),
        wild.bfloat16(),
        special,
        gaussian(25_000, 3e-4),
    ]


def decode(
    target: Target, groups: list[Group], dtype: torch.dtype, **options: Any
) -> tuple[dfloat11.CudaDecoder, Tensor]:
    module = target.module(dfloat11.SOURCE, options.pop("blocks", 3), TABLE_BITS=options.get("table_bits", 11))
    decoder = dfloat11.CudaDecoder([g.group for g in groups], target.device, dtype, module, **options)
    out = poisoned(decoder.numel, dtype, target.device)
    decoder.decode_into(out)
    return decoder, out


@pytest.mark.parametrize(("table_bits", "blocks"), [(11, 1), (11, 3), (11, 64), (8, 3), (12, 3)])
def test_dfloat11_equal_bits(target: Target, table_bits: int, blocks: int) -> None:
    groups = [make_group(weight, target.device) for weight in assorted_weights()]
    decoder, out = decode(target, groups, torch.bfloat16, table_bits=table_bits, blocks=blocks)
    written = torch.zeros(decoder.numel, dtype=torch.bool)
    for begin, group in zip(decoder.offsets, groups, strict=True):
        end = begin + group.weight.numel()
        assert begin % 8 == 0
        assert torch.equal(bits(out[begin:end]), bits(group.weight))
        written[begin:end] = True
    assert out[~written.to(out.device)].isnan().all(), "wrote between the groups"
    assert decoder.found() == 0


def test_dfloat11_fp16(target: Target) -> None:
    weights = [gaussian(20_000), gaussian(5_000, 1e-6), gaussian(3_000, 300.0)]
    groups = [make_group(weight, target.device) for weight in weights]
    decoder, out = decode(target, groups, torch.float16)
    for begin, weight in zip(decoder.offsets, weights, strict=True):
        assert torch.equal(bits(out[begin : begin + weight.numel()]), bits(weight.to(torch.float16)))
    assert decoder.found() == 0

    weights[0][12_345] = 65_536.0
    groups[0] = make_group(weights[0], target.device)
    decoder, out = decode(target, groups, torch.float16)
    assert decoder.found() == dfloat11.Status.FP16_OVERFLOW
    infinite = make_group(torch.tensor([float("inf"), 1.0]).bfloat16(), target.device)
    decoder, out = decode(target, [infinite], torch.float16)
    assert out[:2].tolist() == [float("inf"), 1.0]
    assert decoder.found() == 0, "an infinite weight is not an overflow"


def test_dfloat11_from_a_slot(target: Target) -> None:
    """Streamed groups lie at offsets from a slot's address, which differs from call to call."""
    weights = [gaussian(14_000), gaussian(9_001)]
    groups = [make_group(weight, target.device) for weight in weights]
    layout: list[dfloat11.KernelGroup] = []
    pieces: list[tuple[int, Tensor]] = []
    size = 0
    for group in groups:
        offsets = {}
        for name, tensor in group.tensors.items():
            offsets[name] = size
            pieces.append((size, tensor))
            size += (tensor.numel() + 15) // 16 * 16
        g = group.group
        layout.append(dfloat11.KernelGroup(g.luts, g.positions, g.weights, g.encoded_bytes, **offsets))
    module = target.module(dfloat11.SOURCE, TABLE_BITS=11)
    decoder = dfloat11.CudaDecoder(layout, target.device, torch.bfloat16, module)
    for _ in range(2):
        slot = aligned(torch.randint(0, 256, (size,), dtype=torch.uint8), target.device)
        for offset, tensor in pieces:
            slot[offset : offset + tensor.numel()] = tensor
        out = poisoned(decoder.numel, torch.bfloat16, target.device)
        decoder.decode_into(out, slot.data_ptr())
        for begin, weight in zip(decoder.offsets, weights, strict=True):
            assert torch.equal(bits(out[begin : begin + weight.numel()]), bits(weight))


def test_dfloat11_reports_corruption(target: Target) -> None:
    group = make_group(gaussian(40_000), target.device)
    group.tensors["encoded_exponent"][500:9000] = 0x5A
    decoder, _ = decode(target, [group], torch.bfloat16)
    assert decoder.found() == dfloat11.Status.COUNT_MISMATCH


def code_lengths(encoded: codec.Encoded, weight: Tensor) -> Tensor:
    return encoded.luts[-1][(weight.view(torch.int16) >> 7 & 0xFF).long()].long()


def block_and_a_byte() -> tuple[Tensor, codec.Encoded]:
    """Weights whose stream is a block and one byte, of which the last code, longer than a byte, is the end."""
    while True:
        weight, n, lacking = gaussian(14_000), 11_500, 1
        while lacking > 0:
            encoded = codec.encode([weight[:n]])
            lengths = code_lengths(encoded, weight[:n])
            lacking = 4097 * 8 - int(lengths.sum())
            n += max(1, lacking // 8)  # most codes are shorter by far
        if lacking == 0 and lengths.max() > 8:
            reordered = weight[: len(lengths)][lengths.argsort()]
            return reordered, codec.encode([reordered])


def test_dfloat11_block_that_no_weight_begins_in(target: Target) -> None:
    """Such a block lacks its position in the file; a loader may have added it."""
    weight, encoded = block_and_a_byte()
    assert encoded.num_blocks == 2
    assert encoded.output_positions.numel() == 2 * 4
    group = make_group(weight, target.device)
    positions = torch.from_numpy(encoded.positions().astype(np.uint32).view(np.uint8))
    assert positions.numel() == 3 * 4
    tensors = group.tensors | {"output_positions": aligned(positions, target.device)}
    completed = dfloat11.KernelGroup.of_tensors(encoded.luts, **tensors)
    for form in (group.group, completed):
        decoder, out = decode(target, [Group(weight, tensors, form)], torch.bfloat16)
        assert torch.equal(bits(out[: len(weight)]), bits(weight))
        assert decoder.found() == 0


@pytest.mark.parametrize("scale", [0.02, 1e4])
@pytest.mark.parametrize("table_bits", [9, 11])
def test_step_tables_against_codes(scale: float, table_bits: int) -> None:
    """Every entry of the multi-symbol tables, against the codes as strings of 0 and 1."""
    weight = (torch.randn(50_000) * scale * torch.randn(50_000).mul(3).exp()).bfloat16()
    exponents = (weight.view(torch.int16).int() >> 7 & 0xFF).numpy()
    book = code_book(np.bincount(exponents, minlength=256))
    codes = {format(value, f"0{size}b"): symbol for symbol, (size, value) in book.codes.items() if symbol != END}
    steps, symbols = dfloat11.step_tables(book.luts, table_bits)
    multiple = 0
    for entry in range(2**table_bits):
        text, found, begins = format(entry, f"0{table_bits}b"), [], []
        at = 0
        while len(found) < 4:
            size = next((n for n in range(1, table_bits - at + 1) if text[at : at + n] in codes), None)
            if size is None:
                break
            found.append(codes[text[at : at + size]])
            begins.append(at)
            at += size
        step, word = int(steps[entry]), int(symbols[entry])
        assert (step >> 8 & 7, step & 63) == (len(found), at), text
        assert [step >> shift & 15 for shift in (16, 20, 24)] == [*begins[1:], 0, 0, 0][:3]
        rotated = [(s >> 1) | (s & 1) << 7 for s in found]
        assert word == sum(byte << (8 * i) for i, byte in enumerate(rotated))
        multiple += len(found) > 1
    assert multiple > 2**table_bits // 2


class Fence:
    """Tensors that end (to 15 bytes) where a page begins that may not be touched; a touch kills the process."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        page = mmap.PAGESIZE
        size = (tensor.nbytes + 15) // 16 * 16
        room = (size + page - 1) // page * page
        memory = mmap.mmap(-1, room + page)
        self.maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0) == 0
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
        return copy.copy_(tensor.flatten())


@pytest.fixture(scope="module")
def sample() -> codec.Encoded:
    torch.manual_seed(11)
    return codec.encode([gaussian(26_000) * torch.randn(26_000).exp().bfloat16()])


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="fences use mprotect")
@settings(max_examples=80)
@given(seed=st.integers(0, 2**32 - 1), damage=st.sets(st.sampled_from(["luts", *COMPONENTS]), min_size=1))
def test_dfloat11_stays_in_bounds_on_anything(sample: codec.Encoded, seed: int, damage: set[str]) -> None:
    rng = np.random.default_rng(seed)

    def damaged(name: str) -> Tensor:
        tensor = sample.tensors[name].clone()
        if name in damage:
            places = torch.from_numpy(rng.integers(0, tensor.numel(), rng.integers(1, tensor.numel())))
            tensor.view(-1)[places] = torch.from_numpy(rng.integers(0, 256, len(places), dtype=np.uint8))
        return tensor

    fence = Fence()
    luts = damaged("luts").numpy()
    tensors = {name: fence(damaged(name)) for name in COMPONENTS}
    positions = np.frombuffer(sample.output_positions.numpy().tobytes(), "<u4")
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    group = dfloat11.KernelGroup(luts, positions, sample.num_weights, sample.encoded_exponent.numel(), **addresses)
    decoder = dfloat11.CudaDecoder(
        [group], CPU, torch.bfloat16, cuda_emulation.Module(dfloat11.SOURCE, {"TABLE_BITS": 11})
    )
    guarded = aligned(torch.full((decoder.numel + 1024,), 7.0, dtype=torch.bfloat16))
    decoder.decode_into(guarded[512 : 512 + decoder.numel])
    assert (guarded[:512] == 7).all()
    assert (guarded[512 + sample.num_weights :] == 7).all()


# ------------------------------------------------------------------------------------------------------------- NVRTC


def test_why_unavailable_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not cpu" in (nvrtc.why_unavailable(CPU) or "")
    for name in [n for n in sys.modules if n == "cuda" or n.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = nvrtc.why_unavailable(torch.device("cuda"))
    assert reason is not None
    assert 'pip install "cuda-bindings==' in reason
    assert "\n" not in reason


@pytest.fixture(scope="module")
def compiler() -> None:
    binding = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    try:
        binding.nvrtcVersion()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"NVRTC cannot be loaded: {error}")


CAPABILITIES = (50, 52, 60, 61, 70, 75, 80, 86, 89, 90, 100, 120)
SOURCES: dict[str, tuple[tuple[int, ...], tuple[dict[str, int], ...]]] = {
    "formats/dfloat11/dfloat11.cu": (CAPABILITIES, ({},)),
    "kernels/prologues.cu": (CAPABILITIES, ({"THREADS": 1024, "QUADS": 5},)),
    "kernels/epilogues.cu": (CAPABILITIES, ({},)),
    "formats/int8/packed.cu": (CAPABILITIES, ({},)),
    "formats/int8/clusters.cu": ((90,), pairs.KINDS),
    "formats/nf4/packed.cu": (CAPABILITIES, ({},)),
    "formats/gguf/packed.cu": (CAPABILITIES, tuple({"KIND": kind} for kind in (4, 5, 6, 8))),
    "kernels/attend_token.cu": (CAPABILITIES, ({"DIM": 128, "GROUP": 7},)),
}
"""The GPUs that each is for, and what it is told, one after the other."""


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", SOURCES)
def test_sources_compile(source: str, capability: int) -> None:
    from cuda.bindings import nvrtc as binding

    capabilities, told = SOURCES[source]
    if capability not in capabilities or capability not in binding.nvrtcGetSupportedArchs()[1]:
        pytest.skip("not for this GPU, or not by this compiler")
    for bf16, sizes in itertools.product((0, 1), told):
        defines = {"BF16_ARITHMETIC": bf16, **sizes}
        image = nvrtc.compile_image(source, nvrtc.source_text(source), capability, defines)
        assert image.startswith(b"\x7fELF")


def test_every_source_is_compiled() -> None:
    package = Path(lowmem_bagel.__file__).parent
    assert {path.relative_to(package).as_posix() for path in package.rglob("*.cu")} == set(SOURCES)


def test_every_header_is_in_a_source() -> None:
    """Or nothing would compile it; and numbers of 16 bits are made in one place."""
    headers = {path.name: path.read_text(encoding="utf-8") for path in Path(nvrtc.__file__).parent.glob("*.cuh")}
    texts = {source: nvrtc.source_text(source) for source in SOURCES}
    assert {"common.cuh", "halves.cuh"} <= set(headers)
    for header, text in headers.items():
        own = text.rpartition("#include")[2].partition("\n")[2]
        assert any(own in source for source in texts.values()), header
    for source, text in texts.items():
        assert "#include" not in text
        for function in ("fp16_bits", "fp16_value", "bf16_bits", "bf16_value"):
            assert len(re.findall(rf"__ \w+ {function}\(", text)) == 1, (source, function)


@pytest.mark.usefixtures("compiler")
def test_compiler_errors_are_shown() -> None:
    with pytest.raises(nvrtc.CudaError, match="undefined_name"):
        nvrtc.compile_image("broken.cu", 'extern "C" __global__ void f(int* p) { *p = undefined_name; }', 80, {})


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A made-up driver that demands, as the real one, a context of the calling thread; waiting on a stream makes it."""
    here, driver, torchs = threading.local(), MagicMock(), MagicMock()

    def needs_context(*values: Any) -> Callable[..., Any]:
        return lambda *_: (0, *values) if hasattr(here, "context") else (CudaStatus(201),)

    driver.cuCtxGetCurrent.side_effect = lambda: (0, getattr(here, "context", 0))
    torchs.query.side_effect = lambda: setattr(here, "context", 1)
    torchs.cuda_stream = 7
    driver.cuModuleLoadData.side_effect = needs_context("module")
    driver.cuModuleGetFunction.side_effect = lambda _, name: needs_context(name)()
    driver.cuLaunchKernel.side_effect = needs_context()
    monkeypatch.setitem(sys.modules, "cuda", MagicMock(bindings=MagicMock(driver=driver)))
    monkeypatch.setitem(sys.modules, "cuda.bindings", MagicMock(driver=driver))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: torchs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return driver


class CudaStatus(int):
    name = "CUDA_ERROR_INVALID_CONTEXT"


def test_a_thread_that_has_used_no_card_yet_can_launch(driver: MagicMock) -> None:
    kernel = nvrtc.Module(b"", torch.device("cuda", 0)).kernel("decode", 0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(kernel, (1, 1), 32, [ctypes.c_int32(1)]).result()
        pool.submit(nvrtc.Module(b"", torch.device("cuda", 0)).kernel, "another").result()
    assert driver.cuLaunchKernel.call_count == 1


def test_a_smaller_request_leaves_a_larger_kernel_its_shared_memory(driver: MagicMock) -> None:
    """What is allowed belongs to the function, and kernels of one name are one function to the driver."""
    allowed: dict[str, int] = {}
    driver.cuFuncSetAttribute.side_effect = lambda function, _, size: (allowed.update({function: size}) or 0,)
    module = nvrtc.Module(b"", torch.device("cuda", 0))
    sizes = (60_000, 90_000, 70_000, 1_000, 90_000)
    kernels = [module.kernel("tokens_8", size) for size in sizes]
    assert [kernel.shared_bytes for kernel in kernels] == [*sizes]
    assert allowed == {b"tokens_8": 90_000}
    module.kernel("tokens_1", 1_000)
    assert b"tokens_1" not in allowed
