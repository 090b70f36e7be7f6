"""`lowmem-bagel bench codec-errors`: error of every lossy format, tensor by tensor: of the weight, and of the output.

On random data at the 7B shapes, or with --model on a checkpoint and its own activations. All errors are relative L2
against the source's weight in float32. "file" is the output with the stored weight and exact activations; "arithmetic"
is the output of the arithmetic that runs the format where it differs: W8A8 for int8, the scaled fp16 matmul for fp16.
"fp8" is no format of this project: it shows what one would cost beside INT8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from lowmem_bagel.checkpoint.config import BAGEL_7B
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES
from lowmem_bagel.checkpoint.tensors import EXPERTS, FUSED
from lowmem_bagel.formats import scaled_matmul
from lowmem_bagel.formats.base import Dequantize, Dequantized
from lowmem_bagel.formats.fp16 import codec as fp16
from lowmem_bagel.formats.gguf import codec as gguf
from lowmem_bagel.formats.gguf.spec import format_of
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8 import rotation
from lowmem_bagel.formats.measure import output_error, weight_error
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.model.names import linear_module
from lowmem_bagel.ops.linear import Product, Weights
from lowmem_bagel.pipeline import BagelPipeline

from ..activations import record
from ..options import Out
from ..record import write_record
from ..shapes import projections

TOKENS = 64
OUTLIER_CHANNELS = 8
OUTLIER_SIZE = 100.0
PROMPTS = ["a red circle", "a blue square left of a green triangle"]

Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


def codec_errors_command(
    model: Annotated[Path | None, typer.Option(help="A source checkpoint, on its own activations.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw while recording; may be repeated.")] = None,
    question: Annotated[str, typer.Option(help="What to ask about each picture.")] = "What is in the picture?",
    timesteps: Annotated[int, typer.Option(help="Of each picture.")] = 20,
    side: Annotated[int | None, typer.Option(help="Of the pictures, in pixels; else the model's own size.")] = None,
    activations: Annotated[Path | None, typer.Option(help="Write the recorded activations to this file.")] = None,
    out: Out = Path("codec_errors.json"),
) -> None:
    """Measure the error of every format on every matrix, and write a JSON record."""
    settings: dict[str, Any]
    if model is None:
        cases = random_cases()
        settings = {"tokens": TOKENS, "outlier_channels": OUTLIER_CHANNELS, "outlier_size": OUTLIER_SIZE, "seed": 0}
    else:
        pipeline = BagelPipeline.from_pretrained(model, device="cpu", dtype="float32")
        size = {} if side is None else {"height": side, "width": side}
        recorded = record(pipeline, prompt or PROMPTS, question, num_timesteps=timesteps, **size)
        if activations is not None:
            from safetensors.torch import save_file

            save_file(recorded, activations)
        cases = model_cases(model, recorded)
        settings = {
            "model": model.name, "prompts": prompt or PROMPTS, "question": question, "timesteps": timesteps,
            "side": side,
        }  # fmt: skip
    rows = []
    print(f"{'':44} {'format':>12} {'weight':>9} {'file':>9} {'arithmetic':>10}")
    for name, weight, x in cases:
        for row in errors(name, weight, x):
            rows.append(row)
            print(f"{row.tensor:44} {row.format:>12} {row.weight:9.5f} {row.file:9.5f} {row.arithmetic:10.5f}")
    write_record(out, "codec_errors", settings, [asdict(row) for row in rows])


@dataclass(frozen=True)
class TensorError:
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


def errors(name: str, weight: Tensor, x: Tensor) -> Iterator[TensorError]:
    """One row for each format; weight [out, in] of any float dtype, x [tokens, in]."""
    rotate = rotation.Rotation(rotation.group_size(weight.shape[1]))
    stored = Dequantized(int8.dequantize)
    forms: list[tuple[str, Quantize, Dequantize, Product, Product]] = [
        ("int8", int8.quantize, int8.dequantize, stored, int8.IntMm()),
        (
            "int8 rotated", rotation.quantize, rotation.dequantize, rotation.Rotated(stored, rotate),
            rotation.Rotated(int8.IntMm(), rotate),
        ),
        ("fp8", fp8_quantize, fp8_dequantize, Dequantized(fp8_dequantize), Fp8()),
        ("nf4", nf4.quantize, nf4.dequantize, Dequantized(nf4.dequantize), Dequantized(nf4.dequantize)),
        ("fp16", _halved, _widened, Dequantized(_widened), scaled_matmul.Fp16Weights(scaled_matmul.UPCAST)),
    ]  # fmt: skip
    for kind, block in BLOCK_TYPES.items():
        if weight.shape[1] % block.values == 0:
            values = partial(_decoded, kind)
            product = Dequantized(values)
            forms.append((format_of(kind), partial(_in_blocks, kind), values, product, product))
    for form, quantize, dequantize, file, arithmetic in forms:
        quantized = quantize(weight)
        of_weight = weight_error(weight, *quantized, dequantize)
        outputs = (output_error(weight, *quantized, matmul, x) for matmul in (file, arithmetic))
        yield TensorError(name, form, of_weight, *outputs)


def _halved(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 weights; there are no scales, so themselves in the place of these."""
    half = fp16.convert(weight)[0]
    return half, half


def _in_blocks(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of a GGUF type, which hold their scales."""
    blocks, _ = gguf.encode(weight.bfloat16(), kind)
    return blocks, blocks


def _decoded(kind: str, stored: Tensor, _: Tensor, dtype: torch.dtype) -> Tensor:
    block = BLOCK_TYPES[kind]
    return gguf.dequantize(stored, kind, (len(stored), stored.shape[1] // block.nbytes * block.values), dtype)


def _widened(stored: Tensor, _: Tensor, dtype: torch.dtype) -> Tensor:
    return stored.to(dtype)


def random_cases(seed: int = 0) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights: normal, and heavy-tailed (Student's t, 5 degrees). Activations: normal, and with outlier channels."""
    sizes = {name: projections(BAGEL_7B.decoder)[name] for name in ("q", "k", "gate", "down")}
    for name, (out_features, in_features) in sizes.items():
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
