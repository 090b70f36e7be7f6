"""`lowmem-bagel bench fidelity`: how far variants are from their source, in texts, pictures, velocities and layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...options import Out, Seed

if TYPE_CHECKING:
    from .measure import Wanted
    from .subjects import Checkpoint, RandomWeights

LEAST = {"num_timesteps": 2, "size": 16, "max_new_tokens": 1}
QUICK = {"pictures": 2, "texts": 4, "num_timesteps": 10, "judged": 0}


def fidelity_command(
    folder: Annotated[Path | None, typer.Argument(help="Checkpoint; without one the embedded demo checkpoint.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead of a folder: random weights of bagel-7b, tiny, ..., in RAM.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Of the shape's decoder; default: all.")] = None,
    variants: Annotated[str, typer.Option(help="Formats, or variants' folders, commas between.")] = "dfloat11,int8,nf4",
    step_caches: Annotated[str, typer.Option(help="The source with a step cache, commas between.")] = "",
    adapters: Annotated[Path | None, typer.Option(help="LoRA adapter, or a folder of some.")] = None,
    arithmetic: Annotated[str, typer.Option(help="The source in other dtypes against float32, commas between.")] = "",
    material: Annotated[Path | None, typer.Option(help="Folder of your own prompts (*.txt) and pictures.")] = None,
    pictures: Annotated[int, typer.Option(help="Drawn with each; none of random weights.")] = 8,
    texts: Annotated[int, typer.Option(help="Texts and questions for the distributions of tokens.")] = 16,
    trajectories: Annotated[int, typer.Option(help="Pictures whose velocities are compared at every step.")] = 2,
    size: Annotated[int, typer.Option(help="Height and width in pixels, as far as the model reaches.")] = 1024,
    num_timesteps: Annotated[int, typer.Option(help="Timesteps a picture.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    judged: Annotated[
        int, typer.Option(help="Answers, drawings and edits for the demo checkpoint's judge, so many of each.")
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few pictures, texts and timesteps; nothing judged.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Arithmetic of the source and of its variants.")] = "auto",
    seed: Seed = 2026,
    out: Out = Path("fidelity.json"),
) -> None:
    """Compare variants, step caches, adapters and arithmetic with the source; a JSON record is written after each."""
    from ...record import write_record
    from .material import built_in, read_material
    from .measure import Terms, measure_fidelity
    from .observe import Work

    counts = {"pictures": pictures, "texts": texts, "num_timesteps": num_timesteps, "judged": judged}
    counts = {name: min(value, QUICK.get(name, value)) if quick else value for name, value in counts.items()}
    wanted = _wanted(variants, step_caches, adapters, arithmetic, shape is not None)
    _check(counts | {"trajectories": trajectories, "size": size, "max_new_tokens": max_new_tokens})
    subject = _subject(folder, shape, layers, device, seed)
    found = built_in(seed, max(counts["pictures"], counts["texts"])) if material is None else read_material(material)
    work = Work(
        found.bounded(max(counts["pictures"], trajectories), counts["texts"]), size, counts["num_timesteps"],
        max_new_tokens, trajectories, bool(counts["pictures"]) and not subject.random, seed,
    )  # fmt: skip
    place = out.parent / f"{out.stem}_pictures"
    terms = Terms(device, dtype, work, counts["judged"], place)
    settings = {
        "model": shape or (folder.name if folder else "demo checkpoint"), "layers": layers, **counts, "size": size,
        "trajectories": trajectories, "max_new_tokens": max_new_tokens, "device": device, "dtype": dtype, "seed": seed,
    }  # fmt: skip

    def report(results: dict[str, Any]) -> None:
        write_record(out, "fidelity", settings, results)
        if results["variants"]:
            print(line(results["variants"][-1]), flush=True)

    measure_fidelity(subject, wanted, terms, report)


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    shown = f"{row['kind']:11} {row['name']:14} "
    if row["state"] != "measured":
        return f"{shown}{row['state']}: {row['why']}"
    text, drawn, velocity = row["text"], row["pictures"], row["velocity"]
    parts = ["exact" if row["exact"] else ""]
    parts.append(f"KL {text['kl_nats']['mean']:.2e} (most {text['kl_nats']['max']:.2e})" if text else "")
    parts.append(
        f"PSNR {float(drawn['psnr_db']['median']):.1f} dB, SSIM {drawn['ssim']['median']:.4f}" if drawn else ""
    )
    if velocity:
        parts.append(f"velocity {velocity['first_plain']:.2e} plain, {velocity['first_guided']:.2e} guided")
    return shown + "; ".join(part for part in (*parts, f"{row['seconds']:.0f} s") if part)


def _check(counts: dict[str, int]) -> None:
    """Raises SettingError where one is too small; none need be larger than 0 that `LEAST` does not name."""
    from lowmem_bagel.errors import SettingError

    for name, value in counts.items():
        least = LEAST.get(name, 0)
        if value < least:
            raise SettingError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def _wanted(variants: str, step_caches: str, adapters: Path | None, arithmetic: str, random: bool) -> Wanted:
    """What the options name, refused before anything is measured.

    Raises:
        SettingError: something unknown, or adapters of random weights.
    """
    from lowmem_bagel.errors import SettingError
    from lowmem_bagel.sampling.step_caches.registry import step_cache
    from lowmem_bagel.settings import DTYPES

    from .measure import Wanted
    from .subjects import adapters_in, check_variants

    named, caches, dtypes = (_listed(text) for text in (variants, step_caches, arithmetic))
    check_variants(named, random)
    for name in caches:
        step_cache(name)
    for name in dtypes:
        if name not in DTYPES:
            raise SettingError(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}")
    if adapters is not None and random:
        raise SettingError("random weights have no adapters; leave --adapters out, or give a checkpoint's folder")
    return Wanted(named, caches, adapters_in(adapters) if adapters else {}, dtypes)


def _subject(
    folder: Path | None, shape: str | None, layers: int | None, device: str, seed: int
) -> Checkpoint | RandomWeights:
    """Raises SettingError where both are given, or layers of a folder."""
    import torch

    from lowmem_bagel.demo_checkpoint import FOLDER
    from lowmem_bagel.errors import SettingError

    from .subjects import Checkpoint, RandomWeights

    if shape is None:
        if layers is not None:
            raise SettingError("--layers is for --shape; a checkpoint has the layers that it has")
        if folder is None:  # its matrices are so small that more threads would only wait for each other
            torch.set_num_threads(1)
        return Checkpoint(folder or FOLDER)
    if folder is not None:
        raise SettingError("give a folder or --shape, not both")
    on_card = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return RandomWeights(shape, layers, "cuda" if on_card else "cpu", seed)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
