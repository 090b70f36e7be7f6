"""The lossless GPU kernels: equal bits first, then speed beside the machine's ceiling and the published kernel.

    python -m lowmem_bagel.benchmarks.suites.kernels_lossless RECORD.json [--tune] [--check-only]

Needs an NVIDIA GPU, `cuda-bindings` and Triton (for its timer, which empties the cache before every repetition). Where
the `dfloat11` package is installed, its kernel decodes the same groups; the package itself is not imported.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_bagel.formats.dfloat11 import codec
from lowmem_bagel.formats.dfloat11 import kernels as dfloat11
from lowmem_bagel.kernels import nvrtc

from ..record import write_record
from ..timing import ceilings

LAYER = {
    "q": (3584, 3584), "k": (512, 3584), "v": (512, 3584), "o": (3584, 3584),
    "gate": (18944, 3584), "up": (18944, 3584), "down": (3584, 18944),
}  # fmt: skip
"""The linears of one expert's layer of BAGEL-7B-MoT: rows, columns."""
STANDARD_DEVIATION = 0.02
Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file to write")
    parser.add_argument("--tune", action="store_true", help="time the kernels' compile-time settings too")
    parser.add_argument("--check-only", action="store_true", help="no timing: for compute-sanitizer")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random weights")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    if reason := nvrtc.why_unavailable(device):
        raise SystemExit(f"the kernels cannot run here: {reason}")
    torch.manual_seed(options.seed)

    results: Result = {"dfloat11_exact": check_dfloat11(device)}
    print("all bits and errors as they must be")
    if not options.check_only:
        limits = ceilings(device)
        ceiling, reading = limits["copy_bytes_s"] / 1e9, limits["read_bytes_s"] / 1e9
        results |= {"copy_gb_s": ceiling, "read_gb_s": reading}
        print(f"ceilings: copy {ceiling:.0f} GB/s (read + written), reading alone {reading:.0f} GB/s")
        results["dfloat11"] = time_dfloat11(device, ceiling, options.tune)
    write_record(options.record, "kernels_lossless", {"seed": options.seed}, results)


def median_ms(work: Callable[[], object], milliseconds: int = 60) -> float:
    from triton.testing import do_bench

    return float(do_bench(work, warmup=20, rep=milliseconds, return_mode="median"))


def random_weights(*shape: int, device: torch.device) -> Tensor:
    return (torch.randn(*shape, device=device) * STANDARD_DEVIATION).bfloat16()


# ---------------------------------------------------------------------------------------------------------- DFloat11


class DeviceGroup:
    """An encoded group on the device, and the weights that it must decode to."""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        self.weight = weight.flatten()
        encoded = codec.encode([self.weight.cpu()])
        self.tensors = [
            encoded.luts, encoded.encoded_exponent, encoded.sign_mantissa, encoded.output_positions, encoded.gaps,
        ]  # fmt: skip
        self.tensors = [tensor.clone().to(device) for tensor in self.tensors]
        self.group = dfloat11.Group.of_tensors(*self.tensors)
        self.nbytes = encoded.nbytes


def decode_poisoned(decoder: dfloat11.Decoder) -> Tensor:
    out = torch.full((decoder.numel,), float("nan"), dtype=decoder.dtype, device=decoder.device)
    decoder.decode_into(out)
    return out


def check_dfloat11(device: torch.device) -> Result:
    """Random sizes and distributions in one launch, in bf16 and fp16, in a graph on another stream; corrupt data.

    Raises:
        AssertionError: a bit differs or a status bit is wrong.
    """
    rng = np.random.default_rng(torch.initial_seed() % 2**32)
    sizes = [1, 2, 7, 8, 9, 4095, 11_700, 12_345, *rng.integers(1, 3_000_000, 12).tolist()]
    weights = [random_weights(n, device=device) * float(10 ** rng.uniform(-3, 2)) for n in sizes]
    weights.append(torch.full((100_000,), 0.5, device=device, dtype=torch.bfloat16))
    weights.append((torch.randn(200_000, device=device) * torch.randn(200_000, device=device).mul(8).exp()).bfloat16())
    groups = [DeviceGroup(weight, device) for weight in weights]
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [g for g in groups if dtype == torch.bfloat16 or g.weight.abs().max() < 60000]
        decoder = dfloat11.Decoder([g.group for g in narrow], device, dtype)
        assert_decoded(decoder, decode_poisoned(decoder), narrow)
        assert decoder.found() == 0

        out = torch.full((decoder.numel,), float("nan"), dtype=dtype, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoder.decode_into(out)
        graph.replay()
        assert_decoded(decoder, out, narrow)
    wide = dfloat11.Decoder([groups[-1].group], device, torch.float16)
    decode_poisoned(wide)
    assert wide.found() == dfloat11.Status.FP16_OVERFLOW

    big = max(groups, key=lambda g: g.group.tiles)
    big.tensors[1][1000:100_000].random_(0, 255)
    damaged = dfloat11.Decoder([big.group], device, torch.bfloat16)
    decode_poisoned(damaged)
    assert damaged.found() == dfloat11.Status.COUNT_MISMATCH
    return {"groups": len(groups), "weights": sum(sizes), "largest_lut_count": max(len(g.group.luts) for g in groups)}


def assert_decoded(decoder: dfloat11.Decoder, out: Tensor, groups: Sequence[DeviceGroup]) -> None:
    for begin, group in zip(decoder.offsets, groups, strict=True):
        got = out[begin : begin + group.weight.numel()]
        assert torch.equal(got.view(torch.int16), group.weight.to(decoder.dtype).view(torch.int16)), group.group


def time_dfloat11(device: torch.device, ceiling: float, tune: bool) -> Result:
    groups = {name: DeviceGroup(random_weights(*shape, device=device), device) for name, shape in LAYER.items()}
    results: Result = {"bits_per_weight": 8 * sum(g.nbytes for g in groups.values()) / count_weights(groups.values())}
    sets = {"layer": list(groups.values()), "qkv": [groups[n] for n in "qkv"]}
    sets |= {name: [groups[name]] for name in ("o", "gate", "down")}
    published = published_kernel(device)
    print(f"{'DFloat11':10} {'ours GB/s':>10} {'of ceiling':>10} {'published':>10}   (GB/s of bf16 written)")
    for name, chosen in sets.items():
        ours = dfloat11.Decoder([g.group for g in chosen], device, torch.bfloat16)
        out = decode_poisoned(ours)
        assert_decoded(ours, out, chosen)
        row = speed(chosen, median_ms(functools.partial(ours.decode_into, out)), ceiling)
        if published:
            flat = [torch.full_like(g.weight, float("nan")) for g in chosen]
            theirs = PublishedDecoder(published, chosen, flat)
            row["published_gb_s"] = speed(chosen, median_ms(theirs), ceiling)["gb_s"]
            assert all(torch.equal(f, g.weight) for f, g in zip(flat, chosen, strict=True))
        results[name] = row
        print(
            f"{name:10} {row['gb_s']:10.0f} {row['of_ceiling']:10.2f} {row.get('published_gb_s', float('nan')):10.0f}"
        )
    if tune:
        results["tuning"] = list(tune_dfloat11(device, sets["layer"], ceiling))
    return results


def count_weights(groups: Any) -> int:
    return sum(g.weight.numel() for g in groups)


def speed(groups: Sequence[DeviceGroup], milliseconds: float, ceiling: float) -> Result:
    """GB/s of bf16 written; its share of what the machine copies counts the compressed bytes read as well."""
    written = 2 * count_weights(groups)
    moved = written + sum(g.nbytes for g in groups)
    return {
        "ms": milliseconds,
        "gb_s": written / milliseconds / 1e6,
        "of_ceiling": moved / milliseconds / 1e6 / ceiling,
    }


def tune_dfloat11(device: torch.device, groups: Sequence[DeviceGroup], ceiling: float) -> Iterator[Result]:
    for table_bits, blocks, pieces in itertools.product((10, 11, 12), (2, 3, 4), (1, 3)):
        defines = {"BLOCKS_PER_MULTIPROCESSOR": blocks, "EARLY_PIECES": pieces}
        module = dfloat11.load(device, table_bits, **defines)
        decoder = dfloat11.Decoder([g.group for g in groups], device, torch.bfloat16, module, table_bits)
        out = decode_poisoned(decoder)
        assert_decoded(decoder, out, groups)
        row = {"table_bits": table_bits, **defines}
        row |= speed(groups, median_ms(functools.partial(decoder.decode_into, out), 30), ceiling)
        print(f"  table_bits {table_bits} blocks {blocks} early pieces {pieces}: {row['gb_s']:.0f} GB/s")
        yield row


def published_kernel(device: torch.device) -> nvrtc.Module | None:
    """The `dfloat11` package's own kernel, from its PTX file; None where the package is not installed."""
    spec = importlib.util.find_spec("dfloat11")
    if spec is None or not spec.submodule_search_locations:
        print("the dfloat11 package is not installed: its kernel is not timed")
        return None
    ptx = Path(spec.submodule_search_locations[0]) / "decode.ptx"
    return nvrtc.Module(ptx.read_bytes() + b"\0", device)


class PublishedDecoder:
    """Launches the published kernel once for each group, as its package does."""

    def __init__(self, module: nvrtc.Module, groups: Sequence[DeviceGroup], outputs: Sequence[Tensor]) -> None:
        self.launches: list[tuple[nvrtc.Kernel, tuple[int, int], list[Any]]] = []
        for group, out in zip(groups, outputs, strict=True):
            luts, encoded, signs, positions, gaps = group.tensors
            kernel = module.kernel("decode", 512 * 4 + 4 + group.group.largest_tile * 2)
            sizes = [ctypes.c_int32(n) for n in (len(luts), encoded.numel(), signs.numel())]
            blocks = -(-encoded.numel() // 4096)
            self.launches.append((kernel, (blocks, 1), [luts, encoded, signs, positions, gaps, out, *sizes]))

    def __call__(self) -> None:
        for kernel, grid, arguments in self.launches:
            kernel(grid, 512, arguments)


if __name__ == "__main__":
    main()
