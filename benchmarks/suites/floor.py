"""`lowmem-bagel bench floor`: what a picture's matmuls and attention alone take, one after the other for as long as a
picture: what no runtime can be faster than with the same kernels.

A card under full load lowers its clock to stay within its power, so a bound from a short burst would be too low. The
weights are random, as many as are beyond the cache; norms, activations and everything else are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Out, Shape, Size, Timesteps

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_bagel.checkpoint.config import BagelConfig

WEIGHT_SETS = 4
TEXT_TOKENS = 32
"""Of the prompt, which the picture's tokens see."""


def floor_command(
    shape: Shape = "bagel-7b",
    size: Size = 1024,
    num_timesteps: Timesteps = 50,
    repeat: Annotated[int, typer.Option(help="Measured runs, after one warm-up of a tenth.")] = 2,
    out: Out = Path("floor.json"),
) -> None:
    """Measure the matmuls and the attention of a picture's forwards, and write a JSON record."""
    import torch

    from lowmem_bagel.planner.workload import guided_steps
    from lowmem_bagel.settings import PictureSettings, defaults_of, options_of

    from ..record import write_record
    from ..shapes import linears, shape_named
    from ..timing import elapsed_seconds

    config = shape_named(shape)
    decoder, tokens = config.decoder, (size // config.token_pixels) ** 2
    defaults = defaults_of(options_of(PictureSettings))
    guided = guided_steps(num_timesteps, defaults["timestep_shift"], defaults["cfg_interval"])
    single = num_timesteps - 1 - guided
    with torch.inference_mode():
        passes = {branches: _layers(config, tokens, branches) for branches in (1, 2)}

        def picture(share: float = 1.0) -> None:
            for branches, count in ((2, guided), (1, single)):
                for _ in range(max(1, round(count * share))):
                    passes[branches]()

        picture(0.1)
        seconds = [elapsed_seconds(picture) for _ in range(repeat)]
    weights = decoder.num_layers * sum(rows * columns for rows, columns in linears(decoder).values())
    attention = 2 * decoder.num_layers * decoder.hidden_size * tokens * (tokens + TEXT_TOKENS)
    operations = 2 * (weights * tokens + attention) * (2 * guided + single)
    results = {
        "seconds": seconds, "forwards": 2 * guided + single, "operations": operations,
        "tflop_s": [operations / taken / 1e12 for taken in seconds],
    }  # fmt: skip
    write_record(out, "floor", {"shape": shape, "size": size, "num_timesteps": num_timesteps}, results)
    print(f"{results['forwards']} forwards: {', '.join(f'{s:.2f}' for s in seconds)} s")


def _layers(config: BagelConfig, tokens: int, branches: int) -> Callable[[], None]:
    """A pass over all layers: four matmuls of all branches together, and each branch's attention."""
    import torch
    import torch.nn.functional as F

    from lowmem_bagel.ops.attention.select import select_backend

    from ..shapes import linears

    d = config.decoder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads: dict[str, Any] = {"num_heads": d.num_heads, "num_kv_heads": d.num_kv_heads, "head_dim": d.head_dim}
    attend = select_backend("auto", device=device, dtype=torch.bfloat16, **heads).backend

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * 0.02).bfloat16()

    weights = [{name: random(*shape) for name, shape in linears(d).items()} for _ in range(WEIGHT_SETS)]
    narrow, broad = (random(branches * tokens, width) for width in (d.hidden_size, d.intermediate_size))
    q = random(1, tokens, d.num_heads, d.head_dim)
    k, v = (random(1, tokens + TEXT_TOKENS, d.num_kv_heads, d.head_dim) for _ in range(2))

    def run() -> None:
        for layer in range(d.num_layers):
            each = weights[layer % WEIGHT_SETS]
            F.linear(narrow, each["qkv"])
            for _ in range(branches):
                attend(q, k, v, None)
            F.linear(narrow, each["o"])
            F.linear(narrow, each["gate_up"])
            F.linear(broad, each["down"])

    return run
