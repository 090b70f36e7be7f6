"""`lowmem-bagel bench profile`: where the time of one guided denoising step goes, kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Out, Shape, Size

if TYPE_CHECKING:
    from lowmem_bagel.pipeline import BagelPipeline

SHOWN = 25
NAME_WIDTH = 90


def profile_command(
    formats: Annotated[list[str], typer.Argument(help="Formats of random weights: source, int8, nf4, dfloat11.")],
    shape: Shape = "bagel-7b",
    size: Size = 1024,
    out: Out = Path("profile.json"),
) -> None:
    """Profile one step, guidance included, of each format; the sum over kernels is the device's busy time."""
    import torch

    from lowmem_bagel.pipeline import BagelPipeline

    from ..record import write_record
    from ..synthetic import synthetic_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {}
    for format in formats:
        torch.manual_seed(0)
        pipe = BagelPipeline.from_folder(synthetic_folder(format, shape, device), tasks=("generate",))
        results[format] = _profile(pipe, size, device)
        pipe.close()
        print(f"{format}: {results[format]['busy_ms']:.1f} ms of kernels a step")
        for row in results[format]["kernels"][:SHOWN]:
            print(f"  {row['ms']:8.2f} ms {row['calls']:6d} x {row['name'][:NAME_WIDTH]}")
    write_record(out, "profile", {"shape": shape, "size": size}, results)


def _profile(pipe: BagelPipeline, size: int, device: str) -> dict[str, Any]:
    """Kernels of the second of two guided steps, by total time."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    profiler = profile(activities=[activity])
    running = False

    def around_the_second_step(step: Any) -> None:
        nonlocal running
        if step.index == 0:
            profiler.start()
            running = True
        elif running:
            profiler.stop()
            running = False

    pipe.generate("a red fox", height=size, width=size, seed=0, num_timesteps=3)
    pipe.generate("a red fox", height=size, width=size, seed=0, num_timesteps=3, callback=around_the_second_step)
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    kernels = [
        {"name": event.key, "ms": getattr(event, spent) / 1000, "calls": event.count}
        for event in sorted(profiler.key_averages(), key=lambda event: -getattr(event, spent))
        if getattr(event, spent)
    ]
    return {"busy_ms": sum(kernel["ms"] for kernel in kernels), "kernels": kernels}
