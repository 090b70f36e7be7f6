"""`lowmem-bagel bench kernels-lossless`: DFloat11's decoder on this machine's GPU, as `kernels` does it.

Equal bits first, then GB/s of bf16 written; "of ceiling" counts the compressed bytes read as well. The rival is the
published kernel on the same bytes, where the `dfloat11` package is installed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from lowmem_bagel.errors import MissingExtraError, SettingError
from lowmem_bagel.formats.dfloat11 import codec
from lowmem_bagel.formats.dfloat11 import kernels as dfloat11

from ..baselines import dfloat11 as package
from ..cases import Case, Setup, measured
from ..options import CheckOnly, Out, Seed, Shape
from ..record import write_record
from ..shapes import projections
from ..timing import ceilings, copies_beyond_cache, graph_seconds

STANDARD_DEVIATION = 0.02
AnyDecoder = dfloat11.CudaDecoder | package.PackageDecoder


def kernels_lossless_command(
    shape: Shape = "bagel-7b",
    tune: Annotated[bool, typer.Option("--tune", help="Time the kernel's compile-time settings too.")] = False,
    seed: Seed = 0,
    check_only: CheckOnly = False,
    out: Out = Path("kernels_lossless.json"),
) -> None:
    """Decode a layer's groups, compare every bit, time it, and write a JSON record."""
    setup = Setup.of(shape, check_only, seed)
    if reason := dfloat11.why_unavailable(setup.device):
        raise SettingError(f"the kernel cannot run here: {reason}")
    layer = {name: DeviceGroup(setup, *size) for name, size in projections(setup.decoder).items()}
    sets = {"layer": [*layer], "qkv": [*"qkv"]} | {name: [name] for name in ("o", "gate", "down")}
    groups = {name: [layer[part] for part in parts] for name, parts in sets.items()}
    limits = {} if check_only else ceilings(setup.device)
    found = {f["shape"]: f for f in measured(setup, cases(setup, groups), limits)}
    results: dict[str, Any] = {"dfloat11_exact": {"groups": len(layer), "weights": _weights(groups["layer"])}}
    if not check_only:
        bits = 8 * sum(g.nbytes for g in groups["layer"]) / _weights(groups["layer"])
        results |= {"copy_gb_s": limits["copy_bytes_s"] / 1e9, "read_gb_s": limits["read_bytes_s"] / 1e9}
        results["dfloat11"] = {"bits_per_weight": bits} | {name: _row(f, groups[name]) for name, f in found.items()}
        if tune:
            results["dfloat11"]["tuning"] = list(_tuned(setup, groups["layer"]))
    write_record(out, "kernels_lossless", {"seed": seed, "tune": tune, "check_only": check_only}, results)
    if not all(f["right"] for f in found.values()):
        raise SystemExit("wrong bits")


class DeviceGroup:
    """An encoded group on the device, and the weights that it must decode to."""

    def __init__(self, on: Setup, *shape: int) -> None:
        self.weight = (on.wide(*shape) * STANDARD_DEVIATION).bfloat16().flatten()
        encoded = codec.encode([self.weight.cpu()])
        self.nbytes = encoded.nbytes
        self.components = [
            tensor.clone().to(on.device)
            for tensor in (
                encoded.luts, encoded.encoded_exponent, encoded.sign_mantissa, encoded.output_positions, encoded.gaps,
            )
        ]  # fmt: skip


class Copy:
    """Groups at addresses of their own, and poisoned room for their weights, with what decodes the one to the other."""

    def __init__(self, groups: Sequence[DeviceGroup], **options: Any) -> None:
        device = groups[0].weight.device
        self.components = [[tensor.clone() for tensor in g.components] for g in groups]
        self._weights = [g.weight for g in groups]
        self.groups = [dfloat11.KernelGroup.of_tensors(*components) for components in self.components]
        self.decoder: AnyDecoder = dfloat11.CudaDecoder(self.groups, device, torch.bfloat16, **options)
        self.out = torch.full((self.decoder.numel,), float("nan"), dtype=torch.bfloat16, device=device)

    def by_package(self, launch: package.Launch) -> Copy:
        """The same, decoded by the package's kernel."""
        other = copy.copy(self)
        other.decoder = package.PackageDecoder(self.groups, self.out.device, torch.bfloat16, launch)
        return other

    def decode(self) -> list[Tensor]:
        self.decoder.decode_into(self.out)
        return [
            self.out[begin : begin + len(weight)]
            for begin, weight in zip(self.decoder.offsets, self._weights, strict=True)
        ]

    def weights(self) -> list[Tensor]:
        return self._weights


def cases(on: Setup, groups: Mapping[str, Sequence[DeviceGroup]]) -> Iterator[Case]:
    """A layer's linears, in the sets that are decoded together."""
    launch = None
    if not on.check_only:
        try:
            launch, _ = package.launcher(on.device)
        except MissingExtraError as missing:
            print(f"{missing}: its kernel is not timed")
    for name, chosen in groups.items():
        nbytes = sum(g.nbytes + g.weight.nbytes for g in chosen)
        copies = [Copy(chosen) for _ in range(1 if on.check_only else copies_beyond_cache(nbytes))]
        theirs = [] if launch is None else [each.by_package(launch) for each in copies]
        rivals = {"published": (Copy.decode, theirs)} if theirs else {}
        yield Case("DFloat11", name, Copy.decode, Copy.weights, copies, nbytes, tolerance=0, rivals=rivals)


def _row(f: Mapping[str, Any], groups: Sequence[DeviceGroup]) -> dict[str, float]:
    """A case in the record's terms."""
    written = 2 * _weights(groups) / 1e9
    theirs = {f"{name}_gb_s": written / taken for name, taken in f["rivals"].items()}
    return {"ms": 1e3 * f["seconds"], "gb_s": written / f["seconds"], "of_ceiling": f["of_ceiling"], **theirs}


def _tuned(on: Setup, groups: Sequence[DeviceGroup]) -> Iterator[dict[str, Any]]:
    for table_bits, blocks, pieces in itertools.product((10, 11, 12), (2, 3, 4), (1, 3)):
        defines = {"BLOCKS_PER_MULTIPROCESSOR": blocks, "EARLY_PIECES": pieces}
        module = dfloat11.decoder_module(on.device, table_bits, **defines)
        copies = [Copy(groups, module=module, table_bits=table_bits) for _ in range(2)]
        taken = graph_seconds([each.decode for each in copies])
        yield {"table_bits": table_bits, **defines, "ms": 1e3 * taken, "gb_s": 2 * _weights(groups) / taken / 1e9}
        print(f"  table_bits {table_bits} {defines}: {1e6 * taken:.0f} us", flush=True)


def _weights(groups: Sequence[DeviceGroup]) -> int:
    return sum(g.weight.numel() for g in groups)
