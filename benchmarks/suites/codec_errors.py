"""Error of every lossy format, tensor by tensor: of the weight, and of the linear's output.

    python -m lowmem_bagel.benchmarks.suites.codec_errors [--out FILE]  random data at the 7B shapes
    python -m lowmem_bagel.benchmarks.suites.codec_errors --model FOLDER [--out FILE]  a checkpoint on its activations
    python -m lowmem_bagel.benchmarks.suites.codec_errors --weights FILE [--out FILE]  trained matrices on normal inputs

All errors are relative L2 against the source's weight in float32. "file" is the output with the stored weight and
exact activations; "arithmetic" is the output of the arithmetic that runs the format where it differs: W8A8 for int8,
the scaled fp16 matmul for fp16. "fp8" is no format of this project: it shows what one would cost beside INT8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import EXPERTS
from lowmem_bagel.formats import scaled_matmul as narrow
from lowmem_bagel.formats.base import Dequantized
from lowmem_bagel.formats.fp16 import codec as fp16
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8 import rotation
from lowmem_bagel.formats.measure import output_error, weight_error
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.model.names import FUSED, linear_module
from lowmem_bagel.ops.linear import Product, Weights
from lowmem_bagel.pipeline import BagelPipeline

from ..activations import record
from ..record import write_record

RESULTS = Path(__file__).parent.parent / "results"
SHAPES = {"q": (3584, 3584), "k": (512, 3584), "gate": (18944, 3584), "down": (3584, 18944)}
"""BAGEL-7B's decoder linears; v is like k, o like q, up like gate."""
TOKENS = 64
OUTLIER_CHANNELS = 8
OUTLIER_SIZE = 100.0
MIN_WEIGHTS = 100_000
"""Of a matrix that counts: smaller ones are position tables and the like."""


@dataclass(frozen=True)
class Row:
    tensor: str
    format: str
    weight: float
    file: float
    arithmetic: float


class Fp8(Product):
    """Weights and activations as e4m3 with one scale a row, as `torch._scaled_mm` multiplies them; exact products."""

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        rounded = fp8_dequantize(*fp8_quantize(x), x.dtype)
        return Dequantized(fp8_dequantize).multiply(rounded, weights)


def fp8_quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Any float [rows, n] -> (float8_e4m3fn [rows, n], float32 scales [rows, 1]), the largest of a row at the end of
    the range."""
    scale = rows.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_dequantize(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return stored.to(dtype) * scales.to(dtype)


def errors(name: str, weight: Tensor, x: Tensor) -> Iterator[Row]:
    """One row for each format; weight [out, in] of any float dtype, x [tokens, in]."""
    quantized = int8.quantize(weight)
    yield Row(
        name, "int8",
        weight_error(weight, *quantized, int8.dequantize),
        output_error(weight, *quantized, Dequantized(int8.dequantize), x),
        output_error(weight, *quantized, int8.IntMm(), x),
    )  # fmt: skip
    quantized = rotation.quantize(weight)
    rotate = rotation.Rotation(rotation.group_size(weight.shape[1]))
    yield Row(
        name, "int8 rotated",
        weight_error(weight, *quantized, rotation.dequantize),
        output_error(weight, *quantized, rotation.Rotated(Dequantized(int8.dequantize), rotate), x),
        output_error(weight, *quantized, rotation.Rotated(int8.IntMm(), rotate), x),
    )  # fmt: skip
    quantized = fp8_quantize(weight)
    yield Row(
        name, "fp8",
        weight_error(weight, *quantized, fp8_dequantize),
        output_error(weight, *quantized, Dequantized(fp8_dequantize), x),
        output_error(weight, *quantized, Fp8(), x),
    )  # fmt: skip
    quantized = nf4.quantize(weight)
    file = output_error(weight, *quantized, Dequantized(nf4.dequantize), x)
    yield Row(name, "nf4", weight_error(weight, *quantized, nf4.dequantize), file, file)
    half, report = fp16.convert(weight)

    def widened(stored: Tensor, _: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype)

    yield Row(
        name, "fp16",
        report.relative_l2,
        output_error(weight, half, half, Dequantized(widened), x),
        output_error(weight, half, half, narrow.Fp16Weights(narrow.UPCAST), x),
    )  # fmt: skip


def random_cases(seed: int = 0) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights: normal, and heavy-tailed (Student's t, 5 degrees). Activations: normal, and with outlier channels."""
    for name, (out_features, in_features) in SHAPES.items():
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(out_features, in_features, generator=generator)
        x = torch.randn(TOKENS, in_features, generator=generator)
        outliers = x.clone()
        outliers[:, torch.randperm(in_features, generator=generator)[:OUTLIER_CHANNELS]] *= OUTLIER_SIZE
        weight = (0.02 * normal).bfloat16()
        yield f"{name}: normal weight, normal input", weight, x
        yield f"{name}: normal weight, outlier channels", weight, outliers
        # A normal divided by an independent sqrt(chi2 / 5), scaled to the same variance.
        chi2 = sum(torch.randn(out_features, in_features, generator=generator).square_() for _ in range(5))
        assert isinstance(chi2, Tensor)
        heavy = normal.div_((chi2 / 5).sqrt_()).mul_(0.02 * (3 / 5) ** 0.5).bfloat16()
        yield f"{name}: heavy-tailed weight, normal input", heavy, x


def model_cases(folder: Path, activations: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The checkpoint's fused linears that were used, with the activations recorded for them."""
    model = ModelFolder.open(folder)
    for layer in range(model.config.decoder.num_layers):
        for expert in EXPERTS:
            for fused, shorts in FUSED.items():
                names = [f"{linear_module(layer, expert, short)}.weight" for short in shorts]
                if names[0] in activations:
                    weight = torch.cat([model.tensor(name) for name in names])
                    yield f"layer {layer} {expert} {fused}", weight, activations[names[0]]


def weight_cases(path: Path, seed: int = 0) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The large matrices of a safetensors file, in bf16, on normal activations."""
    for name, tensor in load_file(path).items():
        if tensor.dim() == 2 and tensor.numel() >= MIN_WEIGHTS and tensor.shape[1] % nf4.BLOCK == 0:
            x = torch.randn(TOKENS, tensor.shape[1], generator=torch.Generator().manual_seed(seed))
            yield name, tensor.bfloat16(), x


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of the lossy formats, tensor by tensor.")
    parser.add_argument("--model", type=Path, help="a source checkpoint; without it, random data at the 7B shapes")
    parser.add_argument("--weights", type=Path, help="a safetensors file of trained weights")
    parser.add_argument("--prompt", action="append", help="what to draw while recording; may be repeated")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--timesteps", type=int, default=20)
    parser.add_argument("--side", type=int, help="of the pictures, in pixels; without it, the model's own size")
    parser.add_argument("--activations", type=Path, help="write the recorded activations to this safetensors file")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    settings: dict[str, Any]
    if arguments.weights is not None:
        cases = weight_cases(arguments.weights)
        settings = {"weights": list(arguments.weights.parts[-3:]), "tokens": TOKENS, "seed": 0}
        out = arguments.out or RESULTS / "codec_errors_trained.json"
    elif arguments.model is None:
        cases = random_cases()
        settings = {"tokens": TOKENS, "outlier_channels": OUTLIER_CHANNELS, "outlier_size": OUTLIER_SIZE, "seed": 0}
        out = arguments.out or RESULTS / "codec_errors_random.json"
    else:
        prompts = arguments.prompt or ["a red circle", "a blue square left of a green triangle"]
        pipeline = BagelPipeline.from_pretrained(arguments.model, device="cpu", dtype="float32")
        size = {} if arguments.side is None else {"height": arguments.side, "width": arguments.side}
        activations = record(pipeline, prompts, arguments.question, num_timesteps=arguments.timesteps, **size)
        if arguments.activations is not None:
            save_file(activations, arguments.activations)
        cases = model_cases(arguments.model, activations)
        settings = {
            "model": arguments.model.name, "prompts": prompts, "question": arguments.question,
            "timesteps": arguments.timesteps, "side": arguments.side,
        }  # fmt: skip
        out = arguments.out or RESULTS / f"codec_errors_{arguments.model.name}.json"
    rows = []
    print(f"{'':44} {'format':>12} {'weight':>9} {'file':>9} {'arithmetic':>10}")
    for name, weight, x in cases:
        for row in errors(name, weight, x):
            rows.append(row)
            print(f"{row.tensor:44} {row.format:>12} {row.weight:9.5f} {row.file:9.5f} {row.arithmetic:10.5f}")
    settings["seconds"] = round(time.perf_counter() - started, 1)
    write_record(out, "codec_errors", settings, [asdict(row) for row in rows])
    print(f"written to {out}")


if __name__ == "__main__":
    main()
