"""Compiles Triton's kernels for a card that is not here, at the settings that BAGEL-7B has them launched with there.

    python -m support.card_compiler 86,120 1 2 4 8      (from the folder of the tests)

prints JSON: by card, what was compiled, with shared memory, registers and spills, and the kernels that nothing reached.
First come the trials of loading, then a layer of the model in each format, with tensors that have no memory, under a
Triton driver that only names the card; so what is compiled is what they launch. The numbers behind the cards are those
of few tokens, powers of two. One process a card, two at a time: Triton keeps compiled kernels by device, not by card.

What a compiler made of the same before is taken from tests/data/compiled_kernels.json, by a hash of all that it is
given, but for some chosen at random in every run, which are compiled and compared. With `--afresh` nothing is taken
from there; with `--renew` the file is written again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import re
import sys
import tempfile
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple

from support.paths import DATA

DEVICE = "meta"
KIB = 1024
SHARED = {75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Bytes of shared memory that a block can have, by compute capability (CUDA C++ Programming Guide, 5.1)."""
PROCESSORS = {75: 40, 80: 108, 86: 28, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of a card of each kind: RTX 2070, A100, 3060, 4090, H100, B200, 5090."""
BLOCKS = (
    (1, 2, 4096), (2, 2, 4096), (1, 2, 1024), (3, 2, 1024), (2, 2, 2304), (1, 0, 4096),
    (1, 17, 0), (1, 33, 0), (1, 64, 0), (1, 65, 0), (1, 200, 0), (1, 700, 0), (1, 4902, 0), (1, 1026, 0),
)  # fmt: skip
"""Branches, und tokens and gen tokens: pictures with their two markers, prompts, and pictures that are looked at."""
RECORD = DATA / "compiled_kernels.json"
"""By card, and by a kernel's name and `given_to_the_compiler`: what it was compiled to."""
COMPARED = 0.005
"""The share of what is on record that is compiled all the same."""
NEVER_LAUNCHED = "_probe"
"""The function that shows whether Triton interprets."""


class Result(NamedTuple):
    """What a kernel was compiled to: bytes of shared memory, registers of a thread, bytes spilled."""

    shared: int
    registers: int
    spilled: int


Known = Mapping[str, Result]
"""What is on record for a card."""


@dataclass(frozen=True)
class Compiled:
    """One kernel at one setting. case: who came to it first, "trial", "model" or "more". key: of the record. error: of
    the compiler. stood: what the record says where it was compiled again."""

    kernel: str
    case: str
    settings: str
    key: str = ""
    result: Result | None = None
    stood: Result | None = None
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


def given_to_the_compiler(source: Any, backend: Any, options: Any) -> str:
    """A kernel's name and a hash of what decides what it is compiled to: as Triton's own cache has it, but with
    Triton's version for the bytes of its files, which differ from one Python to another."""
    import triton

    given = f"{triton.__version__}-{source.hash()}-{backend.hash()}-{options.hash()}"
    return f"{source.name} {hashlib.sha256(given.encode()).hexdigest()[:20]}"


class Recorder:
    """Stands in Triton's way to launch: what would be launched is only compiled, and noted."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.case = ""
        self.compiled: list[Compiled] = []
        self.reached: set[Any] = set()
        self.launched = ("", "", "")

    def instead_of_running(self, run: Callable[..., Any]) -> Callable[..., None]:
        def record(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self.reached |= {function, *(value for value in options.values() if is_kernel(value))}
            settings = {name: value for name, value in options.items() if isinstance(value, bool | int)}
            self.launched = (function.fn.__name__, self.case, json.dumps(settings))
            try:
                run(function, *args, grid=grid, warmup=True, **options)
            except Exception as error:  # what compilers raise is the finding
                line = " ".join(str(error).split())[:300]
                self.compiled.append(Compiled(*self.launched, error=f"{type(error).__name__}: {line}"))

        return record

    def instead_of_compiling(self, compile: Callable[..., Any]) -> Callable[..., Any]:
        """Of what this process has not compiled before."""

        def record(function: Any, key: Any, signature: Any, device: int, values: Any, options: Any, *rest: Any) -> Any:
            kernels, _, _, backend, _ = function.device_caches[device]
            name = given_to_the_compiler(function.ASTSource(function, signature, values, rest[0]), backend, options)
            stood = self.known.get(name)
            if stood is not None and random.random() >= COMPARED:
                self.compiled.append(Compiled(*self.launched, name, stood))
                kernels[key] = stood  # is only asked for whether it is there
                return stood
            output = io.StringIO()
            with redirect_stdout(output):
                compiled = compile(function, key, signature, device, values, options, *rest)
            found = result(output.getvalue(), compiled.metadata.shared)
            self.compiled.append(Compiled(*self.launched, name, found, stood))
            return compiled

        return record


def result(report: str, shared: int) -> Result:
    """What the assembler's report says."""
    found = [re.search(pattern, report) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill stores")]
    registers, spilled = (int(match[1]) for match in found if match is not None)
    return Result(shared, registers, spilled)


def is_kernel(value: object) -> bool:
    from triton.runtime.jit import JITFunction

    return isinstance(value, JITFunction)


def stand_in(arch: int, known: Known) -> Recorder:
    """From now on in this process "cuda" is a card of this architecture, "meta" tensors lie on it, and what is launched
    is compiled and noted."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    from lowmem_bagel.formats.int8.tiles import Tiles
    from lowmem_bagel.kernels import dependent_launch

    properties = SimpleNamespace(multi_processor_count=PROCESSORS[arch])
    # Of what has no memory no number counts.
    torch.randn = lambda *shape, **_: torch.empty(*shape, device=DEVICE)
    torch.randint = lambda low, high, shape, dtype, **_: torch.empty(shape, dtype=dtype, device=DEVICE)
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    torch.cuda.get_device_properties = lambda device=None: properties
    cuda, of, overlaps = torch.device("cuda", 0), Tiles.of, dependent_launch.overlaps
    Tiles.of = lambda device: of(cuda)
    dependent_launch.overlaps = lambda device: overlaps(cuda)
    triton.runtime.driver.set_active(NamingDriver(arch))
    triton.knobs.nvidia.dump_ptxas_log = True
    recorder = Recorder(known)
    JITFunction.run = recorder.instead_of_running(JITFunction.run)
    JITFunction._do_compile = recorder.instead_of_compiling(JITFunction._do_compile)
    return recorder


def without_dynamo() -> None:
    """Computing on the meta device imports PyTorch's compiler, to keep it off functions that nobody compiles."""
    import torch

    instead = ModuleType("torch._dynamo")
    instead.__dict__["disable"] = lambda function, *_, **__: function
    sys.modules["torch._dynamo"] = torch._dynamo = instead


def everything_jit() -> dict[Any, str]:
    """Every Triton function of the package, launched or called by others. Each is made to begin at no line: Triton
    would take one for another wherever a line is added above it."""
    found = []
    for room in ("kernels", "formats", "diagnostics"):
        package = importlib.import_module(f"lowmem_bagel.{room}")
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                if is_kernel(value) and value.fn.__module__ == info.name and name != NEVER_LAUNCHED:
                    found.append((value, f"{info.name}.{name}"))
    for function, _ in found:
        function.starting_line_number = 0
    return dict(found)


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


def run_trials(kernels: Mapping[str, Any]) -> None:
    """What loading the model launches to see whether kernels are right."""
    import torch

    from lowmem_bagel.checkpoint.config import BAGEL_MOE_7B
    from lowmem_bagel.kernels.trial_inputs import Sizes

    for kernel in kernels.values():
        for _ in kernel.trial(torch.device(DEVICE), Sizes(BAGEL_MOE_7B.decoder, torch.bfloat16)):
            pass


def run_attention(arch: int, tokens: int, keys: int) -> None:
    """A picture's tokens through attention of integers, as the model's heads and any half dtype have it."""
    import torch

    from lowmem_bagel.kernels.attention_int8 import attention_int8, launch_for
    from lowmem_bagel.ops.attention.base import PUBLISHED_HEADS

    heads, kv_heads, d = PUBLISHED_HEADS
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (
            torch.empty(rows, n, d, dtype=dtype, device=DEVICE)
            for rows, n in ((tokens, heads), (keys, kv_heads), (keys, kv_heads))
        )
        attention_int8(q, k, v, launch_for(divmod(arch, 10)))


class Model:
    """A layer of the 7B model, one with routed experts, and the logits, in what Triton's kernels serve, on tensors
    without memory."""

    def __init__(self, arch: int) -> None:
        import torch

        from lowmem_bagel.checkpoint.config import BAGEL_MOE_7B
        from lowmem_bagel.formats.base import encoded_linear
        from lowmem_bagel.formats.dense.triton import TritonDense
        from lowmem_bagel.formats.gguf.kernels import TritonBlocks
        from lowmem_bagel.formats.gguf.spec import SPECS as GGUF
        from lowmem_bagel.formats.int8.kernels import TritonInt8
        from lowmem_bagel.formats.int8.spec import SPEC as INT8
        from lowmem_bagel.formats.int8.tiles import Tiles
        from lowmem_bagel.formats.nf4.kernels import TritonNf4
        from lowmem_bagel.formats.nf4.spec import SPEC as NF4
        from lowmem_bagel.kernels.rope import qk_norm_rope
        from lowmem_bagel.model.decoder import ExpertLayer
        from lowmem_bagel.ops.linear import DenseLinear, Linear

        self.decoder, self.dtype = BAGEL_MOE_7B.decoder, torch.bfloat16
        dense = TritonDense(PROCESSORS[arch] if arch // 10 == 9 else 0, groups=True)
        int8 = TritonInt8(Tiles.of(torch.device(DEVICE)), groups=True)
        encoded = {"int8": (INT8, int8), "nf4": (NF4, TritonNf4(dense))}

        heads = tuple(encoded.values())
        routed = ("bf16", *encoded, "gguf-q8_0")  # whose rows are no whole blocks of a K type
        encoded |= {spec.name: (spec, TritonBlocks(spec.parts[0].dtype, dense)) for spec in GGUF}

        def layer(form: str, number: int, expert: Literal["und", "gen"]) -> ExpertLayer:
            def linear(_: int, __: object, name: str, in_features: int, out_features: int) -> Linear:
                if form == "bf16":
                    return DenseLinear(in_features, out_features, name == "qkv", self.dtype, dense)
                spec, product = encoded[form]
                bias = self.dtype if name == "qkv" else None
                return encoded_linear(spec, in_features, out_features, product, bias)

            return ExpertLayer(BAGEL_MOE_7B, number, expert, linear, self.dtype, qk_norm_rope)

        with torch.device(DEVICE):
            self.layers = {form: layer(form, 0, "und") for form in ("bf16", *encoded)}
            self.routed = [layer(form, 1, "gen") for form in routed]
            h, vocabulary = self.decoder.hidden_size, self.decoder.vocab_size
            self.heads = [DenseLinear(h, vocabulary, False, self.dtype, dense)]
            self.heads += [encoded_linear(spec, h, vocabulary, product, None) for spec, product in heads]

    def draw(self, layer: Any, branches: int, marks: int, latents: int) -> None:
        """A block's two parts through a layer, in one room for both as the decoder has it."""
        import torch

        c = self.decoder
        rooms = layer.room(branches, marks + latents, torch.device(DEVICE))
        for part, length in enumerate((marks, latents)):
            if length:
                q, k, v = (room.split((marks, latents), dim=1)[part] for room in rooms)
                table = torch.empty(branches, length, 1, c.head_dim, device=DEVICE)
                hidden = torch.empty(branches, length, c.hidden_size, dtype=self.dtype, device=DEVICE)
                layer.project(hidden, (table, table), (q, k, v))
                layer.finish(hidden, q.split([1] * branches))

    def say(self, layer: Any, head: Any, table_on_card: bool) -> None:
        """One token of text through a layer, its logits and the next token."""
        import torch

        from lowmem_bagel.kernels.decode_attention import attend_token
        from lowmem_bagel.kernels.elementwise import next_token
        from lowmem_bagel.ops.linear import RMSNorm

        c = self.decoder

        def some(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=DEVICE)

        hidden, at = some(1, c.hidden_size), some(2, dtype=torch.int32)
        keys, values = (some(9000, c.num_kv_heads, c.head_dim) for _ in range(2))
        tables = tuple(some(4000, c.head_dim, dtype=torch.float32) for _ in range(2))
        position, length = at.split(1)
        qkv = layer.raw_qkv(hidden)[0]
        attended = attend_token(qkv, layer.q_norm, layer.k_norm, layer.eps, tables, position, keys, values, length)
        hidden = layer.finish(hidden, [attended[None]])
        logits = head(hidden, RMSNorm(some(c.hidden_size), layer.eps))[0]
        table = some(c.vocab_size, c.hidden_size) if table_on_card else None
        next_token(logits, table, some(1, dtype=torch.int64), hidden, at)

    def run(self) -> None:
        """Everything that requests have it launch, as far as another setting comes of it."""
        for layer in (*self.layers.values(), *self.routed):
            for branches, marks, latents in BLOCKS:
                self.draw(layer, branches, marks, latents)
        for layer in self.layers.values():
            for table_on_card in (True, False):
                self.say(layer, self.heads[0], table_on_card)


def run_more(model: Model, few: Sequence[int], offered: Container[str]) -> None:
    """What a request launches where it was measured to be faster, every tile; or not at all today: more tokens by what
    reads a weight once, encoded weights of the logits; and Triton's own trial."""
    import torch

    from lowmem_bagel.diagnostics.triton_trial import _increment
    from lowmem_bagel.formats.int8.kernels import int8_matmul
    from lowmem_bagel.formats.int8.tiles import Tiles
    from lowmem_bagel.formats.nf4.kernels import nf4_gemv
    from lowmem_bagel.kernels.gemv import gemv, gemv_options
    from lowmem_bagel.kernels.trial_inputs import Sizes, layer_calls
    from lowmem_bagel.ops.linear import After, Before, Product, Rows, SwiGLU, Weights, joined

    class ReadOnce(Product):
        def __init__(self, fusing: bool) -> None:
            self.fusing = fusing

        def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> torch.Tensor:
            weight, scales, bias = weights
            options = gemv_options(before, after) | {"bias": bias}
            if weight.dtype == torch.uint8:
                assert scales is not None
                return nf4_gemv(joined(x), weight, scales, **options)
            return gemv(joined(x), weight, scale=scales, **options)

        def fuses(self, tokens: int, before: Before, after: After) -> bool:
            return isinstance(after, SwiGLU) and self.fusing

    device, sizes = torch.device(DEVICE), Sizes(model.decoder, model.dtype)
    for tokens, fusing in itertools.product(few, (False, True)):
        if tokens == 1 and not fusing:  # one token's SwiGLU is its product's end
            continue
        for call in layer_calls(sizes, device, tokens, ReadOnce(fusing)):
            n, k, floats = call.n, call.k, {"dtype": torch.float32, "device": DEVICE}
            weights = [Weights(torch.empty(n, k, dtype=model.dtype, device=DEVICE))]
            if "int8_matmul" in offered:
                weights += [Weights(torch.empty(n, k, dtype=torch.int8, device=DEVICE), torch.empty(n, **floats))]
            codes = torch.empty(n, k // 2, dtype=torch.uint8, device=DEVICE)
            weights += [Weights(codes, torch.empty(n, k // 64, **floats))]
            for form in weights:
                ReadOnce(fusing).product(call.x, form._replace(bias=call.bias), call.before, call.after)
    if "int8_matmul" in offered:
        for head in model.heads:
            model.say(model.layers["bf16"], head, True)
        tiles = Tiles.of(device)
        for n, k, has_bias in sizes.linears:
            for tile in tiles.candidates(k):
                values, weight = (torch.empty(rows, k, dtype=torch.int8, device=DEVICE) for rows in (4096, n))
                scales = [torch.empty(rows, dtype=torch.float32, device=DEVICE) for rows in (4096, n)]
                bias = torch.empty(n, dtype=model.dtype, device=DEVICE) if has_bias else None
                int8_matmul(values, scales[0], weight, scales[1], bias, model.dtype, tile, tiles.processors)
    _increment[(2,)](torch.empty(128, dtype=torch.int32, device=DEVICE), 100, BLOCK=64)


def compile_for(arch: int, few: Sequence[int], known: Known) -> dict[str, Any]:
    """What `main` prints of a card, in a process that is this card's from then on."""
    from lowmem_bagel.diagnostics.trials import triton_kernels
    from lowmem_bagel.formats.spec import TENSOR_CORES

    capability = divmod(arch, 10)
    recorder = stand_in(arch, known)
    offered = {name: kernel for name, kernel in triton_kernels().items() if kernel.unmet(capability) is None}
    model = Model(arch)
    recorder.case = "trial"
    run_trials(offered)
    if capability >= TENSOR_CORES:
        run_attention(arch, 130, 201)  # as `ops.attention.select` tries it
        recorder.case = "model"
        model.run()
        for tokens, keys in ((4098, 4130), (8196, 8240), (1026, 1026)):
            run_attention(arch, tokens, keys)
    recorder.case = "more"
    run_more(model, few, offered)
    functions = everything_jit()
    reached = with_called(recorder.reached)
    return {
        "offered": sorted(offered),
        "compiled": [asdict(found) for found in recorder.compiled],
        "left_out": sorted(name for function, name in functions.items() if function not in reached),
    }


def compile_afresh(arch: int, few: Sequence[int], known: Known) -> dict[str, Any]:
    """The same, and nothing from Triton's own cache: an old result would come without its report."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        return compile_for(arch, few, known)


def compile_all(archs: Sequence[int], few: Sequence[int], known: Mapping[int, Known]) -> dict[int, dict[str, Any]]:
    """Of every card, by forks of this process, which has imported everything first."""
    without_dynamo()
    importlib.import_module("sympy")  # as computing on the meta device does
    importlib.import_module("triton.runtime.cache").triton_key()  # reads all of Triton, and is kept
    everything_jit()
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        found = pool.starmap(compile_afresh, [(arch, few, known.get(arch, {})) for arch in archs], chunksize=1)
    return dict(zip(archs, found, strict=True))


def on_record(path: Path = RECORD) -> dict[int, Known]:
    """By card."""
    record = json.loads(path.read_text())
    return {int(arch): {key: Result(*found) for key, found in known.items()} for arch, known in record.items()}


def renew(found: Mapping[int, Mapping[str, Any]], path: Path = RECORD) -> None:
    """Writes what was compiled."""
    lines = []
    for arch, card in found.items():
        right = {one["key"]: one["result"] for one in card["compiled"] if not one["error"]}
        entries = ",\n".join(f"    {json.dumps(key)}: {json.dumps(right[key])}" for key in sorted(right))
        lines.append(f'  "{arch}": {{\n{entries}\n  }}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards")
    parser.add_argument("few", nargs="*", type=int)
    parser.add_argument("--afresh", action="store_true")
    parser.add_argument("--renew", action="store_true")
    asked = parser.parse_args(arguments)
    known = {} if asked.afresh else on_record()
    found = compile_all([int(card) for card in asked.cards.split(",")], asked.few, known)
    if asked.renew:
        renew(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
