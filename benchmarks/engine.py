"""`lowmem-bagel bench engine`: seconds and peak memory of every variant under every limit, in one run.

A row is a format, a limit and a task. The limit is enforced on torch's allocator, with room left for the context.
"""

from __future__ import annotations

import gc
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Row:
    """limit_gb: 1e9 bytes, 0 for none. task: generate, edit or ask."""

    format: str
    limit_gb: float = 0.0
    task: str = "generate"
    step_cache: str = "none"
    backend: str = "auto"

    @classmethod
    def parse(cls, text: str) -> Row:
        """From "format[:limit[:task[:step_cache[:backend]]]]"."""
        parts = text.split(":")
        limit = float(parts[1]) if len(parts) > 1 and parts[1] else 0.0
        return cls(
            parts[0],
            limit,
            *(part or default for part, default in zip(parts[2:], ("generate", "none", "auto"), strict=False)),
        )


@app.command("engine")
def engine_command(
    rows: Annotated[list[str], typer.Argument(help="format[:limit GB[:task[:step cache[:backend]]]]")],
    shape: Annotated[str, typer.Option(help="bagel-7b or tiny.")] = "bagel-7b",
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 1024,
    num_timesteps: Annotated[int, typer.Option(help="Timesteps a picture.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    repeat: Annotated[int, typer.Option(help="Measured runs of each row, after one warm-up.")] = 2,
    compare: Annotated[
        bool, typer.Option(help="Compare each limited picture with the unlimited one, bit by bit.")
    ] = True,
    out: Annotated[Path, typer.Option(help="JSON record to write.")] = Path("engine.json"),
) -> None:
    """Measure rows one after the other and write a JSON record after each."""
    from .record import write_record

    settings = {"shape": shape, "size": size, "num_timesteps": num_timesteps, "max_new_tokens": max_new_tokens}
    results: list[dict[str, Any]] = []
    latents: dict[tuple[str, str], Any] = {}
    for text in rows:
        row = Row.parse(text)
        start = time.perf_counter()
        try:
            found = _measure(row, shape, size, num_timesteps, max_new_tokens, repeat, latents if compare else None)
        except Exception as error:  # a row that fails is a result, and the others still count
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(found["traceback"], flush=True)
        results.append({"row": text, "wall_seconds": time.perf_counter() - start, **found})
        _free()
        write_record(out, "engine", settings, results)
        print(f"{text:28s}", _line(found), f"wall {results[-1]['wall_seconds']:.0f}", flush=True)


def _measure(
    row: Row, shape: str, size: int, steps: int, tokens: int, repeat: int, latents: dict[tuple[str, str], Any] | None
) -> dict[str, Any]:
    import torch

    from lowmem_bagel.pipeline import BagelPipeline

    from .performance import INSTRUCTION, PROMPT, QUESTION, picture, summary
    from .synthetic_variants import variant_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    start = time.perf_counter()
    pipe = BagelPipeline.from_folder(
        variant_folder(row.format, shape, device),
        backend=row.backend,
        tasks=(row.task,),  # type: ignore[arg-type]
        max_vram=int(row.limit_gb * 1e9) or None,
    )
    loaded = time.perf_counter() - start

    def run(count: int, length: int) -> Any:
        if row.task == "generate":
            return pipe.generate(
                PROMPT, height=size, width=size, seed=0, num_timesteps=count, step_cache=row.step_cache
            )
        if row.task == "edit":
            return pipe.edit(picture(size), INSTRUCTION, seed=0, num_timesteps=count, step_cache=row.step_cache)
        return pipe.ask(QUESTION, picture(size), max_new_tokens=length)

    run(3, 20)
    done = [run(steps, tokens) for _ in range(repeat)]
    plan = pipe.model.plan
    found: dict[str, Any] = summary(done) | {
        "load_seconds": loaded,
        "linears": plan.reasons.get("linears"),
        "attention": pipe.model.attention.name,
        "guidance_batch": plan.guidance_batch,
        "streamed_units": len(pipe.model.residency.streamed),
        "planned_streamed": len(plan.residency.streamed),
        "slots": plan.residency.slots,
        "staged": plan.residency.staged,
        "predicted": None if plan.prediction is None else vars(plan.prediction),
        "reasons": dict(plan.reasons),
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["device_used_bytes"] = total - free
    latent = done[-1].latent
    if latents is not None and latent is not None:
        key = (f"{row.format}:{row.task}:{row.step_cache}:{row.backend}", str(plan.guidance_batch))
        if key in latents:
            found["equals_resident"] = bool(torch.equal(latents[key], latent))
        latents.setdefault(key, latent)
    found["finite"] = True if latent is None else bool(latent.isfinite().all())
    pipe.close()
    return found


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0)


def _line(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])[:200]
    seconds = found["seconds"]
    peak, reserved = found["peak_bytes"] or 0, found.get("reserved_bytes", 0)
    predicted = (found["predicted"] or {}).get("peak_bytes", 0)
    phases = {name: round(phase["seconds"], 2) for name, phase in found["runs"][-1].items()}
    rate = f" {found['tokens_per_second']:.1f} tok/s" if "tokens_per_second" in found else ""
    return (
        f"{seconds['median']:.2f} s [{seconds['min']:.2f}, {seconds['max']:.2f}]{rate} peak {peak / 1e9:.2f} "
        f"reserved {reserved / 1e9:.2f} used {found.get('device_used_bytes', 0) / 1e9:.2f} "
        f"predicted {predicted / 1e9:.2f} "
        f"streamed {found['streamed_units']} batch {found['guidance_batch']} equal {found.get('equals_resident')} "
        f"finite {found['finite']} {phases} load {found['load_seconds']:.1f}"
    )


if __name__ == "__main__":
    app()
