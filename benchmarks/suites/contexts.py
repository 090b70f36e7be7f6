"""`lowmem-bagel bench contexts`: what it saves to keep contexts that repeat.

Two questions about one picture, and one edit twice: seconds until the first token, and of an edit's prefill, with an
empty store, with what the request before left in it, and whether the results are the same to the bit. Beside them what
lies between a question and its first token, piece by piece, and how many passes over the layers that takes.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Out, Shape, Size
from ..rows import Row

if TYPE_CHECKING:
    from lowmem_bagel.generation.results import Result
    from lowmem_bagel.pipeline import BagelPipeline

QUESTIONS = ("what is in the picture?", "which color is the largest part of it, and what is beside that?")
INSTRUCTION = "make it blue"
PLACES = ("auto", "device", "host")


def contexts_command(
    rows: Annotated[list[str], typer.Argument(help="format[:limit GB] of random weights; a folder for a format.")],
    shape: Shape = "bagel-7b",
    size: Size = 1024,
    store: Annotated[str, typer.Option(help="As the option context_store.")] = "auto",
    place: Annotated[
        str, typer.Option(help=f"Where contexts are kept, whatever is planned: {', '.join(PLACES)}.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 32,
    repeat: Annotated[int, typer.Option(help="Measured rounds, after one warm-up.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    out: Out = Path("contexts.json"),
) -> None:
    """Measure rows one after the other and write a JSON record after each."""
    from lowmem_bagel.errors import SettingError

    from ..record import write_record

    if place not in PLACES:
        raise SettingError(f"unknown place {place!r}; choose one of {', '.join(PLACES)}")
    settings = {"shape": shape, "size": size, "store": store, "place": place, "tokens": tokens, "repeat": repeat}
    results: list[dict[str, Any]] = []
    for text in rows:
        pipe = _loaded(Row.parse(text), shape, device, store, place)
        try:
            results.append({"row": text, **measure(pipe, size, tokens, repeat)})
        finally:
            pipe.close()
        write_record(out, "contexts", settings, results)
        print(f"{text:20s}", _line(results[-1]), flush=True)


def _loaded(row: Row, shape: str, device: str, store: str, place: str) -> BagelPipeline:
    from dataclasses import replace

    import torch

    from lowmem_bagel.checkpoint.folder import ModelFolder
    from lowmem_bagel.errors import SettingError
    from lowmem_bagel.pipeline import BagelPipeline
    from lowmem_bagel.planner.estimate import plan_for
    from lowmem_bagel.planner.plan import ContextRoom
    from lowmem_bagel.runtime.loader import load_model
    from lowmem_bagel.settings import LoadOptions

    from ..synthetic import synthetic_folder

    torch.manual_seed(0)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_folder = Path(row.format).is_dir()
    folder = ModelFolder.open(row.format) if is_folder else synthetic_folder(row.format, shape, device)
    options = LoadOptions(
        device=device, max_vram=int(row.limit_gb * 1e9) or None, tasks=("ask", "edit"), context_store=store,
        backend=row.backend, dtype=row.dtype, attention=row.attention, tune=bool(row.tune),
    )  # fmt: skip
    plan = plan_for(folder, options)
    if plan.context_store is None:
        raise SettingError(f"no contexts are kept: {plan.reasons.get('context store', 'the store is off')}")
    if place != "auto":
        room = ContextRoom("pinned" if place == "host" else "device", plan.context_store.nbytes)
        plan = replace(plan, context_store=room)
    return BagelPipeline(load_model(folder, plan))


def measure(pipe: BagelPipeline, size: int, tokens: int, repeat: int) -> dict[str, Any]:
    """One row's figures."""
    from ..context_pieces import passes, pieces
    from ..measuring import picture

    store, shown = pipe.model.context_store, picture(size)
    assert store is not None
    rounds: list[dict[str, float]] = []
    same = True
    for _ in range(repeat + 1):
        store.clear()
        alone = _ask(pipe, QUESTIONS[1], shown, tokens)
        store.clear()
        first = _ask(pipe, QUESTIONS[0], shown, tokens)
        second = _ask(pipe, QUESTIONS[1], shown, tokens)
        held = store.nbytes
        store.clear()
        edits = [_edit(pipe, shown) for _ in range(2)]
        rounds.append({
            "first": first[0], "second": second[0], "second_alone": alone[0],
            "first_prefill": first[1].stats.phases["prefill"].seconds,
            "second_prefill": second[1].stats.phases["prefill"].seconds,
            "edit": edits[0].stats.phases["prefill"].seconds, "edit_again": edits[1].stats.phases["prefill"].seconds,
        })  # fmt: skip
        latents = [edit.latent for edit in edits]
        assert latents[0] is not None and latents[1] is not None
        same = same and second[1].token_ids == alone[1].token_ids and latents[0].equal(latents[1])
    store.clear()
    passed = {which: passes(pipe, QUESTIONS[1], shown) for which in ("first", "second")}
    seconds = {name: statistics.median(found[name] for found in rounds[1:]) for name in rounds[0]}
    room = pipe.model.plan.context_store
    return {
        "seconds": seconds,
        "passes": passed,
        "pieces": pieces(pipe, QUESTIONS[1], shown, repeat),
        "rounds": rounds[1:],
        "second_over_first": seconds["second"] / seconds["first"],
        "edit_again_over_edit": seconds["edit_again"] / seconds["edit"],
        "same_bits": same,
        "kept_bytes": held,
        "room": None if room is None else vars(room),
        "streamed_units": len(pipe.model.residency.streamed),
        "linears": pipe.model.plan.reasons.get("linears"),
        "attention": pipe.model.attention.name,
    }


def _ask(pipe: BagelPipeline, question: str, shown: Any, tokens: int) -> tuple[float, Result]:
    """Seconds until the first token, and the answer."""
    at: list[float] = []
    start = time.perf_counter()
    answer = pipe.ask(question, shown, max_new_tokens=tokens, callback=lambda _: at.append(time.perf_counter()))
    # A model of random weights may end its answer with the first token, which the callback then does not get.
    return (at[0] if at else time.perf_counter()) - start, answer


def _edit(pipe: BagelPipeline, shown: Any) -> Result:
    return pipe.edit(shown, INSTRUCTION, seed=0, num_timesteps=2)


def _line(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    return (
        f"first token {seconds['first'] * 1e3:.1f} ms, of a second question {seconds['second'] * 1e3:.1f} ms "
        f"({found['second_over_first']:.3f}; its prefill {seconds['second_prefill'] * 1e3:.1f}), "
        f"of that alone {seconds['second_alone'] * 1e3:.1f} ms; "
        f"prefill of an edit {seconds['edit'] * 1e3:.1f} ms, again {seconds['edit_again'] * 1e3:.1f} ms; "
        f"same bits {found['same_bits']}, {found['kept_bytes'] / 1e6:.0f} MB kept in {found['room']}"
    )
