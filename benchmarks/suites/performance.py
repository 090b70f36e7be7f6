"""`lowmem-bagel bench performance`: seconds per phase and peak memory of a picture, an edit and an answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

    from lowmem_bagel.generation.results import Result
    from lowmem_bagel.pipeline import BagelPipeline

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

PROMPT = "a photo of a red fox in the snow"
INSTRUCTION = "make the fox blue"
QUESTION = "what is in the picture?"


@app.command("performance")
def performance_command(
    shape: Annotated[str, typer.Option(help="Random weights at this shape: bagel-7b or tiny.")] = "bagel-7b",
    model: Annotated[Path | None, typer.Option(help="Measure this folder instead of random weights.")] = None,
    tasks: Annotated[str, typer.Option(help="Some of generate,edit,ask.")] = "generate,edit,ask",
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 1024,
    num_timesteps: Annotated[int, typer.Option(help="Timesteps a picture.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.")] = 128,
    step_cache: Annotated[str, typer.Option(help="none, taylorseer or first-block.")] = "none",
    repeat: Annotated[int, typer.Option(help="Measured runs of each task, after one warm-up.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="ComputeConfig.")] = "auto",
    attention: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    out: Annotated[Path, typer.Option(help="JSON record to write.")] = Path("performance.json"),
) -> None:
    """Measure one model on one machine and write a JSON record."""
    from ..record import write_record

    wanted = tasks.split(",")
    pipe, load_seconds = _timed(lambda: _pipeline(shape, model, wanted, device, dtype, attention, step_cache))
    shown = picture(size)
    runs: dict[str, Callable[[int], Result]] = {
        "generate": lambda steps: pipe.generate(
            PROMPT, height=size, width=size, seed=0, num_timesteps=steps, step_cache=step_cache
        ),
        "edit": lambda steps: pipe.edit(shown, INSTRUCTION, seed=0, num_timesteps=steps, step_cache=step_cache),
        "ask": lambda steps: pipe.ask(QUESTION, shown, max_new_tokens=max_new_tokens),
    }
    results: dict[str, Any] = {"load_seconds": load_seconds}
    for task in wanted:
        runs[task](3)
        results[task] = summary([runs[task](num_timesteps) for _ in range(repeat)])
        print(task, results[task]["seconds"], f"peak {results[task]['peak_bytes'] or 0:,} bytes")
    plan = asdict(pipe.model.plan)
    settings = {
        "model": str(model) if model else f"random weights, {shape}",
        "size": size,
        "num_timesteps": num_timesteps,
        "max_new_tokens": max_new_tokens,
        "step_cache": step_cache,
        "attention": pipe.model.attention.name,
        "plan": plan,
    }
    write_record(out, "performance", settings, results)


def _pipeline(
    shape: str, model: Path | None, tasks: list[str], device: str, dtype: str, attention: str, step_cache: str
) -> BagelPipeline:
    import torch

    from lowmem_bagel.pipeline import BagelPipeline

    from ..synthetic import synthetic_folder

    options: dict[str, Any] = {
        "device": device, "dtype": dtype, "attention": attention, "tasks": tasks, "step_cache": step_cache,
    }  # fmt: skip
    if model is not None:
        return BagelPipeline.from_pretrained(model, **options)
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    return BagelPipeline.from_folder(synthetic_folder(shape, where), **options)


def picture(size: int) -> Image.Image:
    """A picture with structure at every scale, so that nothing in it is degenerate."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    values = np.zeros((size, size, 3))
    side = 2
    while side <= size:
        noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        values += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=float) / side
        side *= 2
    values = (values - values.min()) / (values.max() - values.min())
    return Image.fromarray((values * 255).astype(np.uint8))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = work()
    return value, time.perf_counter() - start


def summary(results: list[Result]) -> dict[str, Any]:
    """Median and spread of seconds, peak memory, and the phases of every run."""
    seconds = [r.stats.seconds for r in results]
    peaks = [r.stats.peak_bytes for r in results if r.stats.peak_bytes is not None]
    found: dict[str, Any] = {
        "seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "peak_bytes": max(peaks, default=None),
        "runs": [r.stats.to_json() for r in results],
    }
    if results[0].image is None:
        rates = [(len(r.token_ids) - 1) / r.stats.phases["answer"].seconds for r in results]
        found["tokens_per_second"] = statistics.median(rates)
        found["tokens"] = len(results[0].token_ids)
    return found


if __name__ == "__main__":
    app()
