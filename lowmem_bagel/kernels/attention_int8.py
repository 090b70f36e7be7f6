"""Attention whose scores are products of integers: INT8 queries and keys, values as they are.

Keys are smoothed: their mean over the tokens, which adds the same to all of a query's scores and so changes no weight,
is taken away before they are quantised, and with it the channels that stand far from zero for every token, which would
leave the others few of the 255 levels (the idea of SageAttention, arXiv 2410.02367). A query has its own scale, with
softmax's scale and log2(e) in it, as the weights are powers of two; BLOCK keys of a head share one. Products of
integers are exact; weights are rounded to the values' dtype and multiplied with float32 accumulation, softmax is online
(as in FlashAttention). What is not finite in a query, a key or a value leaves nothing finite of what it reaches.

Three kernels of a few microseconds prepare queries and keys; the fourth is a program for a tile of a head's queries.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..hardware.features import why_off
from ..ops.attention.base import AttentionBackend, AttentionRequest, Unavailable
from ..ops.attention.int8 import Int8
from ..ops.int8 import quantize_rows
from . import triton_language
from .elementwise import magnitude, whole_quotient
from .triton_language import TensorDescriptor, ceil_div, jit, tl

HEAD_DIMS = (32, 64, 128)
"""For larger ones an integer score would not fit into the bits of a float32 that `_as_float` has for it."""
BLOCK = 64
"""Keys that share a scale, and that a program takes at a time."""
CHUNK = 256
"""Keys that a program sums up."""
ROWS = 32
"""Queries of a head that a program quantises."""


@dataclass(frozen=True)
class Launch:
    """How the fourth kernel is launched. tile: queries a program; bulk: by bulk copies (descriptors), which Hopper has
    for whole tiles."""

    tile: int
    warps: int
    stages: int
    bulk: bool = False


PLAIN = Launch(128, 8, 3)
"""64 KiB of shared memory and no spilled register on every card since 8.0; 493 us for 4098 tokens on an H200."""
HOPPER = Launch(128, 4, 3, bulk=True)
"""446 us there."""


class Quantized(NamedTuple):
    """q: int8 [H, T, d]; q_scale: float32 [H, T], with softmax's scale and log2(e) in it; k: int8 [KV, S', d], where S'
    is S in whole blocks, zeros behind the last key; k_scale: float32 [KV, S' / BLOCK]."""

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor


def launch_for(capability: tuple[int, int]) -> Launch:
    """What was the fastest of what runs on a card of this capability."""
    return HOPPER if capability[0] == 9 else PLAIN


def make(request: AttentionRequest, companion: AttentionBackend) -> AttentionBackend:
    """The backend on a card; raises `Unavailable` where Triton or the kernel for such heads is missing."""
    missing = why_off("triton") or triton_language.MISSING
    if missing:
        raise Unavailable(missing)
    if request.head_dim not in HEAD_DIMS:
        raise Unavailable(f"is for heads of {', '.join(map(str, HEAD_DIMS))}, not of {request.head_dim}")
    capability = request.capability()
    assert capability is not None, "no card"
    return Int8(partial(attention_int8, launch=launch_for(capability)), companion)


def smoothed(k: Tensor) -> Tensor:
    """Keys without their mean over the tokens, in float32; k: [S, KV, d]."""
    return k.float() - k.float().mean(0)


def quantize_reference(q: Tensor, k: Tensor) -> Quantized:
    """q: [T, H, d], any float dtype; k: [S, KV, d], smoothed or not."""
    depth, kv_heads = q.shape[2], k.shape[1]
    q8, q_scale = quantize_rows(q.float().transpose(0, 1))
    whole = torch.nn.functional.pad(k.float(), (0, 0, 0, 0, 0, -k.shape[0] % BLOCK))
    blocks = whole.transpose(0, 1).reshape(kv_heads, -1, BLOCK * depth)
    k8, k_scale = quantize_rows(blocks)
    return Quantized(
        q8, q_scale.squeeze(-1) * _factor(depth), k8.view(kv_heads, len(whole), depth), k_scale.squeeze(-1)
    )


def attend_reference(prepared: Quantized, v: Tensor) -> Tensor:
    """softmax of the integers' scores times v [S, KV, d] -> [T, H, d] in v's dtype, with every score in memory."""
    (heads, _, _), (keys, kv_heads, _) = prepared.q.shape, v.shape
    k, scale, values = (
        x.repeat_interleave(heads // kv_heads, dim=0)
        for x in (prepared.k, prepared.k_scale.repeat_interleave(BLOCK, dim=1), v.transpose(0, 1))
    )
    integers = prepared.q.float() @ k.float().mT  # below 2^24: exact
    scores = (integers * (prepared.q_scale[:, :, None] * scale[:, None, :]))[:, :, :keys]
    weights = (scores - scores.amax(-1, keepdim=True)).exp2()
    mixed = weights.to(v.dtype).float() @ values.float() / weights.sum(-1, keepdim=True)
    return mixed.to(v.dtype).transpose(0, 1).contiguous()


def attention_int8_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [T, H, d]; k, v: [S, KV, d], head h reads key/value head h // (H / KV) -> [T, H, d]."""
    return attend_reference(quantize_reference(q, smoothed(k)), v)


def attention_int8(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> Tensor:
    """Like `attention_int8_reference`; each may have gaps between tokens and between heads."""
    assert q.dtype == k.dtype == v.dtype, "queries, keys and values are of one dtype"
    return attend(quantize(q, k), v, launch)


def quantize(q: Tensor, k: Tensor) -> Quantized:
    """Like `quantize_reference` of smoothed keys."""
    (queries, heads, depth), (keys, kv_heads, _) = q.shape, k.shape
    assert depth in HEAD_DIMS, f"heads of {depth}"
    assert q.stride(2) == k.stride(2) == 1, "heads have gaps"
    blocks, chunks = ceil_div(keys, BLOCK), ceil_div(keys, CHUNK)

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    sums = room(kv_heads, chunks, depth)
    found = Quantized(
        room(heads, queries, depth, dtype=torch.int8),
        room(heads, queries),
        room(kv_heads, blocks * BLOCK, depth, dtype=torch.int8),
        room(kv_heads, blocks),
    )
    _sum_keys[(chunks, kv_heads)](k, sums, keys, k.stride(0), k.stride(1), D=depth, CHUNK=CHUNK, num_warps=8)
    _quantize_keys[(blocks, kv_heads)](
        k, sums, found.k, found.k_scale, keys, chunks, k.stride(0), k.stride(1), D=depth, BLOCK=BLOCK, num_warps=4
    )
    _quantize_queries[(ceil_div(queries, ROWS), heads)](
        q, found.q, found.q_scale, queries, q.stride(0), q.stride(1), _factor(depth), D=depth, ROWS=ROWS, num_warps=4
    )
    return found


def attend(prepared: Quantized, v: Tensor, launch: Launch) -> Tensor:
    """Like `attend_reference`."""
    q, q_scale, k, k_scale = prepared
    (heads, queries, depth), (keys, kv_heads, _) = q.shape, v.shape
    assert v.stride(2) == 1, "heads have gaps"
    assert k_scale.shape[1] == ceil_div(keys, BLOCK), "keys and values differ in number"
    operands: tuple[object, object, object] = q, k, v
    if launch.bulk:
        operands = (
            TensorDescriptor.from_tensor(q, [1, launch.tile, depth]),
            TensorDescriptor.from_tensor(k, [1, BLOCK, depth]),
            TensorDescriptor.from_tensor(v, [BLOCK, 1, depth]),
        )
    out = torch.empty(queries, heads, depth, dtype=v.dtype, device=v.device)
    attend_tile[(ceil_div(queries, launch.tile), heads)](
        *operands, q_scale, k_scale, out, queries, keys, v.stride(0), v.stride(1),
        HEADS=heads, GROUP=heads // kv_heads, D=depth, TILE=launch.tile, BLOCK=BLOCK, BULK=launch.bulk,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def _factor(depth: int) -> float:
    return math.log2(math.e) / math.sqrt(depth)


@partial(jit, varying=["keys"])
def _sum_keys(k_ptr, sums_ptr, keys, token_stride, head_stride, D: tl.constexpr, CHUNK: tl.constexpr):
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    depth, token = tl.arange(0, D), chunk * CHUNK + tl.arange(0, CHUNK)
    at = k_ptr + head * head_stride + token.to(tl.int64)[:, None] * token_stride + depth[None, :]
    value = tl.load(at, mask=(token < keys)[:, None], other=0).to(tl.float32)
    tl.store(sums_ptr + (head * tl.num_programs(0) + chunk) * D + depth, tl.sum(value, axis=0))


@partial(jit, varying=["keys", "chunks"])
def _quantize_keys(
    k_ptr, sums_ptr, values_ptr, scales_ptr, keys, chunks, token_stride, head_stride,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    depth, row, some = tl.arange(0, D), tl.arange(0, BLOCK), tl.arange(0, 16)
    total = tl.zeros((16, D), tl.float32)
    for start in range(0, chunks, 16):
        chunk = start + some
        at = sums_ptr + (head * chunks + chunk)[:, None] * D + depth[None, :]
        total += tl.load(at, mask=(chunk < chunks)[:, None], other=0)
    mean = tl.sum(total, axis=0) / keys
    token = block * BLOCK + row
    seen = (token < keys)[:, None]
    at = k_ptr + head * head_stride + token.to(tl.int64)[:, None] * token_stride + depth[None, :]
    value = tl.where(seen, tl.load(at, mask=seen, other=0).to(tl.float32) - mean[None, :], 0)
    scale = tl.div_rn(tl.max(tl.max(magnitude(value), axis=1), axis=0).to(tl.float32, bitcast=True), 127.0)
    block = head * tl.num_programs(0) + block
    tl.store(values_ptr + (block * BLOCK + row)[:, None] * D + depth[None, :], whole_quotient(value, scale))
    tl.store(scales_ptr + block, scale)


@partial(jit, varying=["queries"])
def _quantize_queries(
    q_ptr, values_ptr, scales_ptr, queries, token_stride, head_stride, factor, D: tl.constexpr, ROWS: tl.constexpr
):
    head = tl.program_id(1).to(tl.int64)
    depth, token = tl.arange(0, D), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = token < queries
    at = q_ptr + head * head_stride + token.to(tl.int64)[:, None] * token_stride + depth[None, :]
    value = tl.load(at, mask=live[:, None], other=0).to(tl.float32)
    scale = tl.div_rn(tl.max(magnitude(value), axis=1).to(tl.float32, bitcast=True), 127.0)
    row = head * queries + token
    whole = whole_quotient(value, scale[:, None])
    tl.store(values_ptr + row[:, None] * D + depth[None, :], whole, mask=live[:, None])
    tl.store(scales_ptr + row, scale * factor, mask=live)


@jit
def _as_float(score):
    """A sum of at most 2^22 in size as a float32: by its bits behind those of 1.5 * 2^23, faster than converted."""
    return (score + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@jit
def _take_in(state, q, scale, k, v, seen, MASKED: tl.constexpr):
    """The next block of keys and values, k [D, BLOCK], v [BLOCK, D]; `scale` has the queries' and the keys'."""
    highest, total, mixed = state
    score = _as_float(tl.dot(q, k, out_dtype=tl.int32))
    if MASKED:
        score = tl.where(seen[None, :], score * scale[:, None], float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
    else:
        higher = tl.maximum(highest, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale[:, None] - higher[:, None])
    fade = tl.exp2(highest - higher)
    mixed = tl.dot(weight.to(v.dtype), v, mixed * fade[:, None])
    return higher, total * fade + tl.sum(weight, 1), mixed


@jit
def _key_block(k, v, kv, start, keys, token_stride, head_stride, D: tl.constexpr, BLOCK: tl.constexpr,
               BULK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """k transposed, and v: nothing is read behind the last value, and the keys there are zeros."""
    if BULK:
        key, value = k.load([kv, start, 0]).reshape(BLOCK, D).T, v.load([start, kv, 0]).reshape(BLOCK, D)
    else:
        depth, token = tl.arange(0, D), start + tl.arange(0, BLOCK)
        key = tl.load(k + kv.to(tl.int64) * tl.cdiv(keys, BLOCK) * BLOCK * D + token[None, :] * D + depth[:, None])
        at = v + kv.to(tl.int64) * head_stride + token.to(tl.int64)[:, None] * token_stride + depth[None, :]
        value = tl.load(at, mask=(token < keys)[:, None], other=0) if MASKED else tl.load(at)
    return key, value


@partial(jit, varying=["queries", "keys"])
def attend_tile(
    q, k, v, q_scale_ptr, k_scale_ptr, out_ptr, queries, keys, token_stride, head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * TILE, tl.program_id(1)
    kv, token, depth = head // GROUP, first + tl.arange(0, TILE), tl.arange(0, D)
    live, row = token < queries, head.to(tl.int64) * queries + token
    if BULK:
        tile = q.load([head, first, 0]).reshape(TILE, D)
    else:
        tile = tl.load(q + row[:, None] * D + depth[None, :], mask=live[:, None], other=0)
    scale = tl.load(q_scale_ptr + row, mask=live, other=0)
    k_scale_ptr += kv * tl.cdiv(keys, BLOCK)
    seen = keys // BLOCK * BLOCK + tl.arange(0, BLOCK) < keys
    highest, total = tl.full((TILE,), float("-inf"), tl.float32), tl.zeros((TILE,), tl.float32)
    mixed = tl.zeros((TILE, D), tl.float32)
    for block in range(keys // BLOCK):
        key, value = _key_block(k, v, kv, block * BLOCK, keys, token_stride, head_stride, D, BLOCK, BULK, False)
        block_scale = scale * tl.load(k_scale_ptr + block)
        highest, total, mixed = _take_in((highest, total, mixed), tile, block_scale, key, value, seen, False)
    if keys % BLOCK != 0:
        block = keys // BLOCK
        key, value = _key_block(k, v, kv, block * BLOCK, keys, token_stride, head_stride, D, BLOCK, BULK, True)
        block_scale = scale * tl.load(k_scale_ptr + block)
        highest, total, mixed = _take_in((highest, total, mixed), tile, block_scale, key, value, seen, True)
    target = out_ptr + (token.to(tl.int64) * HEADS + head)[:, None] * D + depth[None, :]
    tl.store(target, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])
