"""The Hadamard rotation: an exact identity in real arithmetic, and a smaller error where channels are outliers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numeric import FLOATS, HALF_STEP, gaussian, relative_l2

from lowmem_bagel.errors import ConversionError
from lowmem_bagel.formats.base import Dequantized
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8 import rotation
from lowmem_bagel.formats.int8.rotation import Measurement, Rotated, Rotation, group_size
from lowmem_bagel.formats.measure import output_error, weight_error
from lowmem_bagel.ops.linear import Weights

pytestmark = pytest.mark.usefixtures("poisoned")


def test_group_sizes() -> None:
    widths = {3584: 256, 18944: 256, 1152: 128, 4304: 16, 256: 256, 128: 128, 96: 32, 7: 1}
    assert {width: group_size(width) for width in widths} == widths


@pytest.mark.parametrize("order", [1, 2, 4, 16, 256])
def test_sylvesters_matrix_is_symmetric_orthogonal_and_of_signs(order: int) -> None:
    h = rotation.hadamard(order)
    assert torch.equal(h, h.t())
    assert torch.equal(h @ h, order * torch.eye(order))
    assert torch.equal(h.abs(), torch.ones(order, order))


@settings(max_examples=40)
@given(bits=st.integers(0, 8), groups=st.integers(1, 4), tokens=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_the_fast_transform_is_the_block_diagonal_matrix(bits: int, groups: int, tokens: int, seed: int) -> None:
    group = 1 << bits
    x = gaussian(tokens, groups * group, seed=seed)
    matrix = torch.block_diag(*[rotation.hadamard(group).double() / group**0.5] * groups)
    rotate = Rotation(group)
    assert relative_l2(rotate(x), x.double() @ matrix) < 1e-6
    assert relative_l2(rotate(rotate(x)), x) < 1e-6


@pytest.mark.parametrize("width", [3584, 18944, 96])
def test_rotating_both_sides_leaves_the_product(width: int) -> None:
    rotate = Rotation(group_size(width))
    weight, x = gaussian(8, width, std=0.02), gaussian(4, width, seed=1)
    assert relative_l2(F.linear(rotate(x), rotate(weight)), F.linear(x.double(), weight.double())) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_keep_their_dtype_and_round_once(dtype: torch.dtype) -> None:
    x = gaussian(3, 5, 512, dtype=dtype)
    rotated = Rotation(256)(x.transpose(0, 1))
    assert rotated.dtype == dtype
    assert rotated.shape == (5, 3, 512)
    assert relative_l2(rotated, Rotation(256)(x.transpose(0, 1).float())) <= HALF_STEP[dtype]


def test_a_rotation_made_while_a_model_is_built_on_the_meta_device_works_later() -> None:
    with torch.device("meta"):
        rotate = Rotation(64)
        assert rotate(torch.empty(2, 128)).is_meta
    x = gaussian(2, 128)
    assert relative_l2(rotate(x), Rotation(64)(x)) == 0


def test_a_single_outlier_is_spread_evenly_over_its_group() -> None:
    x = torch.zeros(1, 512)
    x[0, 37] = 16.0
    rotated = Rotation(256)(x)
    assert torch.equal(rotated.abs(), torch.cat((torch.ones(1, 256), torch.zeros(1, 256)), 1))


def test_the_stored_weight_is_the_rotated_one_and_dequantises_to_the_original() -> None:
    weight = gaussian(40, 768, std=0.02, dtype=torch.bfloat16)
    values, scale = rotation.quantize(weight)
    expected = int8.quantize(Rotation(256)(weight.float()))
    assert torch.equal(values, expected[0])
    assert torch.equal(scale, expected[1])
    assert weight_error(weight, values, scale, rotation.dequantize) < 0.01
    assert weight_error(weight, values, scale, int8.dequantize) > 0.5


def outlier_activations(tokens: int, width: int) -> torch.Tensor:
    x = gaussian(tokens, width, seed=1)
    x[:, ::97] *= 60
    return x


def test_rotation_is_kept_where_channels_are_outliers() -> None:
    weight = gaussian(96, 1024, std=0.02, dtype=torch.bfloat16)
    measured = rotation.measure(weight, outlier_activations(32, 1024))
    assert measured.group == 256
    assert measured.keep
    assert measured.rotated < 0.5 * measured.plain


def test_rotation_is_not_kept_for_gaussian_data() -> None:
    measured = rotation.measure(gaussian(96, 1024, std=0.02), gaussian(32, 1024, seed=1))
    assert not measured.keep
    assert not Measurement(plain=0.01, rotated=0.01, group=256).keep


def test_measured_errors_are_those_of_the_linears() -> None:
    weight, x = gaussian(48, 512, std=0.02), outlier_activations(16, 512)
    measured = rotation.measure(weight, x)
    exact = F.linear(x.double(), weight.double())
    values, scale = rotation.quantize(weight)
    rotated = Rotated(int8.IntMm(), Rotation(256)).product(x, Weights(values, scale))
    assert relative_l2(rotated, exact) == pytest.approx(measured.rotated, rel=1e-3)
    plain = int8.IntMm().product(x, Weights(*int8.quantize(weight)))
    assert relative_l2(plain, exact) == pytest.approx(measured.plain, rel=1e-3)
    # Weight-only arithmetic runs the same file.
    dequantized = Rotated(Dequantized(int8.dequantize), Rotation(256))
    assert output_error(weight, values, scale, dequantized, x) < 0.01


def test_what_forbids_a_graph_is_said_through_the_rotation() -> None:
    """A file all of whose linears are rotated would be captured in a graph by a library that asks the host."""
    library = int8.IntMm()
    library.graph_blocker = "it asks the host"
    assert Rotated(library, Rotation(256)).graph_blocker == "it asks the host"
    assert Rotated(int8.IntMm(), Rotation(256)).graph_blocker is None


def test_non_finite_weights_are_refused() -> None:
    weight = gaussian(4, 64)
    weight[1, 1] = float("nan")
    with pytest.raises(ConversionError, match="NaN"):
        rotation.quantize(weight)
