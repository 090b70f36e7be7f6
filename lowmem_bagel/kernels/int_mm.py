"""INT8 linears on a card whose int8 matmul Triton does not reach: `torch._int_mm`, with all around it fused.

Below compute capability 8.0 Triton has no int8 tensor cores, but its kernels for the activation and the result run, and
cuBLAS has the matmul.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import torch
from torch import Tensor

from ..quant.int8 import int_mm
from ..quant.linear import BLOCK_VALUES, row_blocks
from .fused import Quantized
from .int8_matmul import TritonInt8
from .triton_language import ceil_div, jit, tl


class FusedIntMm(TritonInt8):
    """Fused quantisation, `torch._int_mm`, fused scales and bias; the integer arithmetic of `quant.int8.IntMm`.

    Goes by blocks of tokens, which bounds the int32 product.
    """

    def __init__(self, block_values: int = BLOCK_VALUES) -> None:
        self.block_values = block_values

    def _multiply(
        self,
        activation: Quantized,
        like: Tensor,
        dtype: torch.dtype,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        values, token_scale = activation
        (tokens, k), n = values.shape, weight.shape[0]
        out = torch.empty(*like.shape[:-1], n, dtype=dtype, device=values.device)
        rows_out = out.view(tokens, n)
        for rows in row_blocks(tokens, max(k, n), self.block_values):
            apply_scales(int_mm(values[rows], weight), token_scale[rows], scales, bias, rows_out[rows])
        return out


def apply_scales(product: Tensor, token_scale: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = product * row_scale * token_scale + bias; product: int32 [M, N], token_scale: float32 [M], rows of out
    contiguous."""
    m, n = product.shape
    assert product.stride(1) == out.stride(1) == 1, "rows have gaps"
    _apply_scales[(ceil_div(n, 1024), m)](
        product, token_scale, row_scale, row_scale if bias is None else bias, out,
        product.stride(0), out.stride(0), n, HAS_BIAS=bias is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip


@jit
def _apply_scales(
    product_ptr, token_scale_ptr, row_scale_ptr, bias_ptr, out_ptr, product_stride, out_stride, n,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = column < n
    value = tl.load(product_ptr + row * product_stride + column, mask=inside, other=0).to(tl.float32)
    value = value * tl.load(row_scale_ptr + column, mask=inside, other=0) * tl.load(token_scale_ptr + row)
    if HAS_BIAS:
        value += tl.load(bias_ptr + column, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=inside)
