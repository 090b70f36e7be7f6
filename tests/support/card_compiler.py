"""Compiles Triton's kernels for a card that is not here, at the settings that BAGEL-7B has them launched with there.

    python -m support.card_compiler 86 1 2 4 8          (from the folder of the tests)

prints JSON: what was compiled, with shared memory, registers and spills, and the kernels that no case reached. The
functions of the product are called with tensors that have no memory, under a Triton driver that only names the card; so
what is compiled is what they launch. The numbers behind the card's are those of few tokens, powers of two. One process
a card: Triton keeps compiled kernels by device, not by card.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import pkgutil
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

KIB = 1024
SHARED = {75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Bytes of shared memory that a block can have, by compute capability (CUDA C++ Programming Guide, 5.1)."""
PROCESSORS = {75: 40, 80: 108, 86: 28, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of a card of each kind: RTX 2070, A100, 3060, 4090, H100, B200, 5090."""
MANY_TOKENS = (2, 16, 17, 64, 65, 200, 512, 1026, 4096, 4098, 8196)
"""A marker's two, prompts, pictures of 512x512 and 1024x1024 with and without their markers, with one and two
branches."""


NEVER_LAUNCHED = "_probe"
"""The function that shows whether Triton interprets."""


@dataclass(frozen=True)
class Compiled:
    """One kernel at one setting. error: why it did not compile."""

    kernel: str
    case: str
    settings: str
    seconds: float
    shared: int = 0
    registers: int = 0
    spilled: int = 0
    error: str = ""


class NamingDriver:
    """What Triton asks a driver for when it compiles."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Stands in Triton's way to launch: what would be launched is only compiled, and noted."""

    def __init__(self) -> None:
        self.case = ""
        self.compiled: list[Compiled] = []
        self.reached: set[Any] = set()

    def instead_of(self, run: Callable[..., Any]) -> Callable[..., None]:
        def record(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self.reached |= {function, *(value for value in options.values() if is_kernel(value))}
            settings = {name: value for name, value in options.items() if isinstance(value, bool | int)}
            about = (function.fn.__name__, self.case, json.dumps(settings))
            output, began = io.StringIO(), time.perf_counter()
            try:
                with redirect_stdout(output):
                    compiled = run(function, *args, grid=grid, warmup=True, **options)
            except Exception as error:  # what compilers raise is the finding
                line = " ".join(str(error).split())[:300]
                self.compiled.append(
                    Compiled(*about, time.perf_counter() - began, error=f"{type(error).__name__}: {line}")
                )
                return
            report = output.getvalue()
            if not report:  # compiled before
                return
            found = [re.search(pattern, report) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill stores")]
            registers, spilled = (int(match[1]) for match in found if match is not None)
            taken = time.perf_counter() - began
            self.compiled.append(Compiled(*about, taken, compiled.metadata.shared, registers, spilled))

        return record


def is_kernel(value: object) -> bool:
    from triton.runtime.jit import JITFunction

    return isinstance(value, JITFunction)


@contextmanager
def card(arch: int) -> Iterator[Recorder]:
    """Inside, "cuda" is a card of this architecture that compiles and computes nothing."""
    import torch
    import triton
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime.jit import JITFunction

    properties = SimpleNamespace(multi_processor_count=PROCESSORS[arch], major=arch // 10, minor=arch % 10)
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    torch.cuda.get_device_properties = lambda device=None: properties
    triton.runtime.driver.set_active(NamingDriver(arch))
    triton.knobs.nvidia.dump_ptxas_log = True
    recorder = Recorder()
    JITFunction.run = recorder.instead_of(JITFunction.run)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield recorder


def everything_jit() -> dict[Any, str]:
    """Every Triton function of the package, launched or called by others."""
    found = {}
    for room in ("kernels", "formats", "diagnostics"):
        package = importlib.import_module(f"lowmem_bagel.{room}")
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                if is_kernel(value) and value.fn.__module__ == info.name and name != NEVER_LAUNCHED:
                    found[value] = f"{info.name}.{name}"
    return found


def with_called(functions: set[Any]) -> set[Any]:
    """The functions and, through and through, those that their code names."""
    known, waiting = set(functions), list(functions)
    while waiting:
        python = waiting.pop().fn
        called = {python.__globals__.get(name) for name in python.__code__.co_names}
        fresh = {value for value in called if is_kernel(value)} - known
        known |= fresh
        waiting += fresh
    return known


def cases(arch: int, few: Sequence[int]) -> Mapping[str, Callable[[], None]]:
    """By the names of `diagnostics.trials.triton_kernels`: what the 7B model has launched, for few and MANY_TOKENS."""
    import torch
    from torch import Tensor

    from lowmem_bagel.diagnostics.triton_trial import _increment
    from lowmem_bagel.formats.int8 import kernels as int8
    from lowmem_bagel.formats.nf4 import kernels as nf4
    from lowmem_bagel.kernels import decode_attention, elementwise, gemv, rope, swiglu_matmul
    from lowmem_bagel.planner.facts import BAGEL_7B

    c = BAGEL_7B.decoder
    h, middle, vocabulary, qkv, d = c.hidden_size, c.intermediate_size, c.vocab_size, sum(c.qkv_rows), c.head_dim
    processors, eps = PROCESSORS[arch], c.rms_norm_eps

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    def floats(*shape: int) -> Tensor:
        return some(*shape, dtype=torch.float32)

    def layer(multiply: Callable[..., Tensor]) -> None:
        """The products of a layer, and of the vocabulary's logits, by what reads the weight once."""
        normed = {"norm": some(h), "eps": eps, "dtype": torch.bfloat16}
        for t in few:
            multiply(some(t, h), qkv, bias=some(qkv), **normed)
            multiply(some(t, h), h, residual=some(t, h))
            if t != 2:  # one token's SwiGLU is its product's end, two tokens' the next one's beginning
                multiply(some(t, h), 2 * middle, swiglu_output=True, **normed)
                multiply(some(t, middle), h, residual=some(t, h))
            if t != 1:
                multiply(some(t, h), 2 * middle, **normed)
                multiply(some(t, 2 * middle), h, swiglu_input=True, residual=some(t, h))
        multiply(some(1, h), vocabulary, **normed)

    def inner(x: Tensor, options: Mapping[str, Any]) -> int:
        return x.shape[1] // (2 if options.get("swiglu_input") else 1)

    def dense(x: Tensor, n: int, **options: Any) -> Tensor:
        return gemv.gemv(x, some(n, inner(x, options)), **options)

    def by_int8(x: Tensor, n: int, **options: Any) -> Tensor:
        return gemv.gemv(x, some(n, inner(x, options), dtype=torch.int8), scale=floats(n), **options)

    def by_nf4(x: Tensor, n: int, **options: Any) -> Tensor:
        k = inner(x, options)
        return nf4.nf4_gemv(x, some(n, k // 2, dtype=torch.uint8), floats(n, k // 64), **options)

    def int8_products() -> None:
        bulk = int8.TritonInt8(torch.device("cuda")).bulk
        layers = ((qkv, h, some(qkv)), (h, h, None), (2 * middle, h, None), (h, middle, None))
        for m, (n, k, bias) in itertools.product(MANY_TOKENS, layers):
            tile = int8.choose_tile(m, n, k, processors, bulk)
            values, weight = some(m, k, dtype=torch.int8), some(n, k, dtype=torch.int8)
            int8.int8_matmul(values, floats(m), weight, floats(n), bias, torch.bfloat16, tile, processors)
        layer(by_int8)

    def around() -> None:
        for t in (2, 4098):
            elementwise.quantize(some(t, h))
            elementwise.quantize(some(t, middle))
            elementwise.rms_norm_quantize(some(t, h), some(h), eps)
            elementwise.swiglu_quantize(some(t, 2 * middle))
            elementwise.rms_norm_fused(some(t, h), some(h), eps)
            elementwise.swiglu_fused(some(t, 2 * middle))

    def nf4_products() -> None:
        for n, k in ((qkv, h), (h, h), (2 * middle, h), (h, middle)):
            nf4.nf4_dequantize(some(n, k // 2, dtype=torch.uint8), floats(n, k // 64), torch.bfloat16)
        layer(by_nf4)

    def rotated() -> None:
        """The understanding part of a block and the drawn one, in one room for both as the decoder has it."""
        for branches, (und, gen) in itertools.product((1, 2), ((2, 4096), (0, 1024), (17, 0))):
            rooms = [some(branches, und + gen, heads, d) for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
            for part, length in enumerate((und, gen)):
                if length:
                    q, k, v = (room.split((und, gen), dim=1)[part] for room in rooms)
                    table = (floats(branches, length, 1, d), floats(branches, length, 1, d))
                    x = some(branches, length, qkv)
                    rope.qk_norm_rope(x, some(d), some(d), eps, table, c.num_heads, c.num_kv_heads, (q, k, v))

    def attention() -> None:
        keys, values = (some(9000, c.num_kv_heads, d) for _ in range(2))
        position, length = some(2, dtype=torch.int32).split(1)
        tables = (floats(4000, d), floats(4000, d))
        decode_attention.attend_token(some(qkv), some(d), some(d), eps, tables, position, keys, values, length)

    def next_token() -> None:
        for table in (some(vocabulary, h), None):
            token, at = some(1, dtype=torch.int64), some(2, dtype=torch.int32)
            elementwise.next_token(some(vocabulary), table, token, some(1, h), at)

    def swiglu_in_matmul() -> None:
        for t in (512, 4098, 8196):
            swiglu_matmul.swiglu_matmul(some(t, h), some(2 * middle, h), processors)

    def triton_itself() -> None:
        _increment[(2,)](some(128, dtype=torch.int32), 100, BLOCK=64)

    return {
        "fused": around,
        "gemv": lambda: layer(dense),
        "nf4": nf4_products,
        "rope": rotated,
        "int8_matmul": int8_products,
        "swiglu_matmul": swiglu_in_matmul,
        "decode_attention": attention,
        "next_token": next_token,
        "triton": triton_itself,
    }


def compile_for(arch: int, few: Sequence[int]) -> dict[str, Any]:
    """What `main` prints."""
    from lowmem_bagel.diagnostics.trials import triton_kernels

    kernels = triton_kernels()

    with card(arch) as recorder:
        named = cases(arch, few)
        assert named.keys() == {*kernels, "triton"}, "a kernel without a case, or a case without a kernel"
        offered = [n for n in named if n == "triton" or kernels[n].unmet(divmod(arch, 10)) is None]
        for recorder.case in offered:
            named[recorder.case]()
    functions = everything_jit()
    reached = with_called(recorder.reached)
    return {
        "offered": offered,
        "compiled": [asdict(found) for found in recorder.compiled],
        "left_out": sorted(name for function, name in functions.items() if function not in reached),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # an old result would come without its report
        os.environ["TRITON_CACHE_DIR"] = folder
        print(json.dumps(compile_for(int(sys.argv[1]), [int(tokens) for tokens in sys.argv[2:]])))
