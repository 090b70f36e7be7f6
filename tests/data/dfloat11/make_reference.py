"""Makes the reference files beside it with the `dfloat11` package's own encoder.

    python make_reference.py SITE_PACKAGES/dfloat11/dfloat11_utils.py

The package itself needs a GPU to import; its encoder does not. Each file holds the bf16 weights it was made from, named
`weights.0`, `weights.1`, ..., and the components. `layer.safetensors` is laid out as published files are instead: the
components under the layer's name, the weights under their own names with `source.` before them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
LAYER = "language_model.model.layers.0"
ROWS_COLUMNS = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (96, 32), "mlp.up_proj": (96, 32), "mlp.down_proj": (32, 96),
}  # fmt: skip


def load_encoder(path: Path) -> ModuleType:
    """The package's `dfloat11_utils.py`, by path."""
    spec = importlib.util.spec_from_file_location("dfloat11_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_encode(encoder: ModuleType, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The components of a group, by the steps of the package's `compress_model`."""
    flat = [weight.flatten() for weight in weights]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _, counts = encoder.get_codec(torch.cat(flat))
        codec, _, table = encoder.get_32bit_codec(counts)
        luts = encoder.get_luts(table)
        exponents, plain, positions, gaps, splits = encoder.encode_weights(flat, codec, 8, 512)
    return {
        "luts": luts,
        "encoded_exponent": exponents.clone(),
        "sign_mantissa": plain,
        "output_positions": positions.view(torch.uint8),
        "gaps": gaps,
        "split_positions": splits,
    }


def weights_of(exponents: Tensor) -> Tensor:
    """bf16 weights with these exponents and random signs and mantissas."""
    signs, mantissas = torch.randint(0, 2, exponents.shape), torch.randint(0, 128, exponents.shape)
    return (signs << 15 | exponents << 7 | mantissas).to(torch.uint16).view(torch.bfloat16)


def fibonacci(symbols: int) -> list[int]:
    """Counts 1, 1, 2, 3, 5, ...: the longest codes for their sum."""
    counts = [1, 1]
    while len(counts) < symbols:
        counts.append(counts[-1] + counts[-2])
    return counts


def shuffled(counts: Sequence[int]) -> Tensor:
    """Exponents from 100 on that occur so often; the rarest comes last."""
    exponents = torch.repeat_interleave(torch.arange(100, 100 + len(counts)), torch.tensor(counts))
    rest = exponents[1:]
    return torch.cat([rest[torch.randperm(len(rest))], exponents[:1]])


def crossing(encoder: ModuleType, beyond: int) -> Tensor:
    """Weights whose last code begins in the first block of 32768 bits and ends `beyond` bits behind it."""
    counts = fibonacci(19)
    while True:
        _, all_counts = encoder.get_codec(weights_of(shuffled(counts)))
        codec, _, _ = encoder.get_32bit_codec(all_counts)
        table = codec.get_code_table()
        bits = sum(count * table[100 + k][0] for k, count in enumerate(counts))
        assert table[100][0] > beyond
        if bits == 32768 + beyond:
            return weights_of(shuffled(counts))
        assert bits < 32768 + beyond
        counts[-1] += 1


def groups(encoder: ModuleType) -> dict[str, list[Tensor]]:
    """Weights of the reference files."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.02).bfloat16()

    return {
        "normal": [normal(96, 320)],
        "three": [normal(40, 64), normal(1, 7), normal(33, 100)],
        "long_codes": [weights_of(shuffled(fibonacci(20)))],
        "ends_in_new_block": [crossing(encoder, 5)],
        "ends_on_byte_in_new_block": [crossing(encoder, 8)],
    }


def main(path: Path) -> None:
    encoder = load_encoder(path)
    for name, weights in groups(encoder).items():
        stored = {f"weights.{k}": weight for k, weight in enumerate(weights)}
        save_file(stored | package_encode(encoder, weights), HERE / f"{name}.safetensors")
    names = list(ROWS_COLUMNS)
    names += [name + "_moe_gen" if "attn" in name else name.replace("mlp", "mlp_moe_gen") for name in names]
    shapes = [*ROWS_COLUMNS.values()] * 2
    weights = [(torch.randn(shape) * 0.05).bfloat16() for shape in shapes]
    stored = {f"{LAYER}.{name}": part for name, part in package_encode(encoder, weights).items()}
    stored |= {f"source.{LAYER}.{name}.weight": weight for name, weight in zip(names, weights, strict=True)}
    save_file(stored, HERE / "layer.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
