"""`lowmem-bagel bench attention`: attention of INT8 scores beside cuDNN's and flash's, at a picture's tokens.

Seconds are of a call, in a CUDA graph; those of `int8` have the preparation of queries and keys in them, which is also
timed alone. Errors are against float64, also with keys of which channels stand off for all tokens. With `--compiled`
nothing is run: what the compiler makes of the kernel for cards that are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from lowmem_bagel.kernels import attention_int8
from lowmem_bagel.ops.attention.select import OUTLIERS, reference_attention, select_backend
from lowmem_bagel.ops.errors import relative_l2

from ..cases import Setup
from ..machine_code import machine_code
from ..options import Out, Seed, Shape
from ..record import write_record
from ..shapes import shape_named
from ..timing import Call, graph_seconds

TOKENS = (1026, 4098, 8196)
TEXT_TOKENS = 32
"""Of the prompt, which the picture's tokens see."""
SETS = 4
"""Inputs that are rotated: what another layer left in the cache is no help."""
CHECKED = 256
"""Queries whose results are compared."""
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0))
INTEGERS = {"queries": "i32", "keys": "i32", "token_stride": "i32", "head_stride": "i32"}

Timer = Callable[[Sequence[Call]], float]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """q [1, T, H, d]; k and v [1, S, KV, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


def attention_command(
    shape: Shape = "bagel-7b",
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile for other cards; run nothing.")] = False,
    seed: Seed = 0,
    out: Out = Path("attention.json"),
) -> None:
    """Time attention of INT8 scores beside other backends, or compile it for other cards; write a JSON record."""
    if compiled:
        decoder = shape_named(shape).decoder
        made = list(compiled_rows(decoder.num_heads, decoder.num_kv_heads, decoder.head_dim))
        write_record(out, "attention compiled for cards that are not here", {"shape": shape}, made)
        return
    setup = Setup.of(shape, False, seed)
    found = []
    with torch.inference_mode():
        for row in rows(setup, ways(setup), graph_seconds):
            print(
                f"{row['tokens']:5} tokens  {row['way']:36} {row['seconds'] * 1e6:8.1f} us  {row['errors']}", flush=True
            )
            found.append(row)
    write_record(out, "attention", {"shape": shape, "seed": seed, "text_tokens": TEXT_TOKENS}, found)


def ways(setup: Setup) -> Mapping[str, Attend]:
    """What is compared, by name; that the backends are right was tried."""
    heads, kv_heads, width = setup.heads
    where: dict[str, Any] = {"device": setup.device, "dtype": setup.half}
    found: dict[str, Attend] = {
        name: select_backend(name, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, **where).backend
        for name in ("cudnn", "flash", "int8")
    }
    chosen = attention_int8.launch_for(setup.capability)
    for launch in {attention_int8.PLAIN, chosen} - {chosen}:
        found[f"int8, launched as before {setup.capability[0]}.0"] = partial(_whole, launch=launch)
    return found


def _whole(q: Tensor, k: Tensor, v: Tensor, launch: attention_int8.Launch) -> Tensor:
    return attention_int8.attention_int8(q[0], k[0], v[0], launch)[None]


def rows(setup: Setup, compared: Mapping[str, Attend], timer: Timer) -> Iterator[dict[str, Any]]:
    """Each way at each number of tokens, and the preparation of `int8` alone, which has no result to compare."""
    heads, _, width = setup.heads
    for tokens in setup.tokens(*TOKENS):
        keys = tokens + TEXT_TOKENS
        sets = [inputs(setup, tokens, 0.0) for _ in range(SETS)]
        tried = {"normal": sets[0], "outlier keys": inputs(setup, tokens, OUTLIERS)}
        for name, attend in compared.items():
            seconds = timer([partial(attend, *given) for given in sets])
            yield {
                "way": name, "tokens": tokens, "keys": keys, "seconds": seconds,
                "tflop_s": 4 * tokens * keys * heads * width / seconds / 1e12,
                "errors": {kind: errors(attend, given) for kind, given in tried.items()},
            }  # fmt: skip
        prepare = [partial(attention_int8.quantize, q[0], k[0]) for q, k, _ in sets]
        yield {
            "way": "int8's preparation", "tokens": tokens, "keys": keys, "seconds": timer(prepare),
            "tflop_s": None, "errors": {},
        }  # fmt: skip


def inputs(setup: Setup, tokens: int, outliers: float) -> Inputs:
    """Random ones; every eighth channel of the keys stands `outliers` times its spread off, for all tokens alike."""
    heads, kv_heads, width = setup.heads
    keys = tokens + TEXT_TOKENS
    k = setup.wide(1, keys, kv_heads, width)
    k[..., ::8] += outliers
    return Inputs(setup.random(1, tokens, heads, width), k.to(setup.half), setup.random(1, keys, kv_heads, width))


def errors(attend: Attend, given: Inputs) -> dict[str, float]:
    """Relative L2, and the largest difference beside the largest value, of some queries against float64."""
    some = torch.linspace(0, given.q.shape[1] - 1, min(CHECKED, given.q.shape[1]), device=given.q.device).long()
    exact = reference_attention(given.q[:, some], given.k, given.v)
    found = attend(*given)[:, some].double()
    return {
        "relative_l2": relative_l2(found, exact),
        "largest": float((found - exact).abs().max() / exact.abs().max()),
    }


def compiled_rows(heads: int, kv_heads: int, width: int) -> Iterator[dict[str, Any]]:
    """The kernel for each capability and dtype, as it is launched there."""
    for capability in CAPABILITIES:
        launch = attention_int8.launch_for(capability)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            pointers = {
                "q": "*i8", "k": "*i8", "v": f"*{name}",
                "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "out_ptr": f"*{name}",
            }  # fmt: skip
            constants = {
                "HEADS": heads, "GROUP": heads // kv_heads, "D": width,
                "TILE": launch.tile, "BLOCK": attention_int8.BLOCK, "BULK": launch.bulk,
            }  # fmt: skip
            figures = machine_code(
                attention_int8.attend_tile, capability, pointers | INTEGERS, constants,
                [*pointers, "token_stride", "head_stride"], num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            yield {
                "capability": list(capability), "dtype": str(dtype).removeprefix("torch."), "queries": launch.tile,
                "keys": attention_int8.BLOCK, "warps": launch.warps, "stages": launch.stages, **figures,
            }  # fmt: skip
