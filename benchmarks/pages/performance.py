"""docs/performance.md: what a picture, an edit and an answer take, beside what other programs take; and the README.

Most records are our own measurements; `upstream_h200` holds what other programs took on the same kind of card, under
the conditions that it states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowmem_bagel.sampling.step_caches.speeds import SPEEDS

from ..rows import Row
from . import choosing
from .measured import (
    LIBRARIES,
    MEMORY,
    RUNS,
    SECONDS,
    TOKENS,
    WORDS,
    Columns,
    Measured,
    about,
    beside,
    card,
    measured,
    size,
)  # fmt: skip
from .page import Column, Page, Records, again, digits, prose, table

PICTURES = (
    "source", "source:24", "source:8", "dfloat11", "dfloat11:12", "dfloat11:8", "dfloat11:6", "int8", "int8:8", "nf4",
    "source:step_cache=taylorseer", "int8:step_cache=taylorseer", "source:step_cache=first-block",
    "int8:step_cache=first-block", "source::edit",
)  # fmt: skip
ANSWERS = ("source::ask", "dfloat11::ask", "int8::ask", "nf4::ask")
CACHED = tuple(name for name in PICTURES if "step_cache=" in name)
OFFLOAD = "source:24:offload=accelerate:timesteps=3"


def _rows(records: Records, names: tuple[str, ...]) -> list[Measured]:
    found = measured(records)
    return [found[name] for name in names]


def conditions(records: Records) -> str:
    e, limits, libraries = (records[run] for run in RUNS)
    versions, settings = e["versions"], e["settings"]
    return prose(
        f"Measured on one {card(e)} with PyTorch {versions['torch']} and Triton {versions['triton']}: random weights "
        f"of the 7B shape, pictures of {size(e)} and {settings['num_timesteps']} timesteps with the default guidance. "
        f"Rows without a star are of one run of commit {e['commit']}, those with one of a run of commit "
        f"{limits['commit']}; of the libraries' rows, what the first has not is of a run of commit "
        f"{libraries['commit']}. Seconds are of a whole request on a loaded model, {_repeats(records)}; GB are 1e9 "
        "bytes.",
        "Where a limit is given, the card was no smaller: PyTorch's allocator was limited, so that the process with "
        "its CUDA context stays under the limit. Arithmetic and copies were those of the large card; copies from "
        f"pinned memory ran at {limits['settings']['pinned_copy_gbps']:.1f} GB/s, which a card in an older slot does "
        "not reach.",
    )


def _repeats(records: Records) -> str:
    """How often was measured, and the widest spread of any row."""
    spreads: dict[bool, list[float]] = {True: [], False: []}
    for m in (m for run in RUNS for m in measured(records, run).values() if len(m.figures["runs"]) > 1):
        s, foreign = m.figures["seconds"], m.row.backend in LIBRARIES or m.row.offload != "native"
        spreads[foreign].append((s["max"] - s["min"]) / s["median"])
    return (
        f"the median of at most {records[RUNS[0]]['settings']['repeat']} after a short warm-up; of the rows measured "
        f"so often, none of ours spreads over more than {max(spreads[False]):.1%}, none of the libraries' over more "
        f"than {max(spreads[True]):.1%}"
    )


def pictures(records: Records) -> str:
    def predicted(m: Measured) -> str:
        said, used = m.figures["predicted"]["peak_bytes"], m.figures["device_used_bytes"]
        return f"{said / 1e9:.1f} ({said / used - 1:+.1%})"

    def streamed(m: Measured) -> str:
        count = m.figures["streamed_units"]
        return f"{count} from {m.figures['source']}" if count else "none"

    columns: Columns = {
        "": lambda m: m.label,
        **SECONDS,
        **MEMORY,
        "predicted": predicted,
        "streamed": streamed,
        "x bound": lambda m: f"{bound:.3f}" if (bound := m.figures.get("times_the_bound")) else "",
        "same bits": lambda m: {True: "yes", False: "no", None: "–"}[m.figures.get("equals_reference")],
        "others, s": lambda m: ", ".join(f"{about(o)} ({o['by']})" for o in beside(records, m.figures["row"])),
    }
    return table(columns, _rows(records, PICTURES))


def caches(records: Records) -> str:
    plain = {run: measured(records, run) for run in RUNS}
    columns: Columns = {
        "": lambda m: m.label,
        **SECONDS,
        "times faster": lambda m: f"{plain[m.run][m.row.format].seconds / m.seconds:.2f}",
        "evaluations computed": lambda m: f"{m.figures['evaluations_computed']} of {m.figures['evaluations']}",
        "change": lambda m: f"{m.figures['relative_l2_to_reference']:.2f}",
    }
    return table(columns, _rows(records, CACHED))


def cached_scenes(records: Records) -> str:
    """What the caches do to pictures of something: of the embedded model, which is judged."""
    results = records["accuracy_demo_caches"]["results"]

    def right(task: str) -> Column:
        return lambda name: "{right} of {total}".format(**results[name]["tasks"][task])

    def distance(task: str) -> Column:
        return lambda name: f"{results[name]['tasks'][task]['median_distance']:.2f}"

    columns: dict[str, Column] = {"": lambda name: WORDS.get(name, "no cache")}
    columns |= {"drawings right": right("drawings"), "distance": distance("drawings")}
    columns |= {"edits right": right("edits"), "distance ": distance("edits")}
    return table(columns, results)


def answers(records: Records) -> str:
    def others(m: Measured) -> str:
        return ", ".join(f"{o['tokens_per_second']:g} ({o['by']})" for o in beside(records, m.row.format))

    columns: Columns = {"": lambda m: m.label, **TOKENS, **MEMORY, "others, tokens/s": others}
    return table(columns, _rows(records, ANSWERS))


def library_versions(records: Records) -> str:
    versions = records[RUNS[0]]["versions"]
    return prose(
        f"bitsandbytes {versions['bitsandbytes']}, optimum-quanto {versions['optimum-quanto']} and the dfloat11 "
        f"package {versions['dfloat11']} (its kernel, launched by us) in the place of our kernels: the model, the "
        "sampler and all else are the same. A picture's row of ours is of the run that its libraries are of. "
        "*Change*: of the final latent against our row, relative L2."
    )


def library_pictures(records: Records) -> str:
    def change(m: Measured) -> str:
        found = m.figures.get("relative_l2_to_reference")
        return "" if found is None else f"{found:.2g}"

    columns: Columns = {
        "": lambda m: m.words,
        **SECONDS,
        "least to most": lambda m: f"{m.figures['seconds']['min']:.2f} to {m.figures['seconds']['max']:.2f}",
        **MEMORY,
        "change": change,
    }
    rows = [m for run in RUNS for m in _beside_libraries(records, run, "generate")]
    return table(columns, sorted(rows, key=lambda m: PICTURES.index(m.row.format)))


def library_answers(records: Records) -> str:
    ours, own = measured(records), TOKENS["tokens/s"]
    columns: Columns = {"text": lambda m: m.words, **TOKENS, "ours": lambda m: own(ours[f"{m.row.format}::ask"])}
    rows = (m for run in RUNS for m in _beside_libraries(records, run, "ask"))
    return table(columns, (m for m in rows if m.row.backend != "auto"))


def _beside_libraries(records: Records, run: str, task: str) -> Iterator[Measured]:
    """Of a run, the rows of the libraries' kernels and ours of the same formats, nothing else being set."""
    rows = measured(records, run).values()
    formats = {m.row.format for m in rows if m.row.backend in LIBRARIES and m.row.task == task}
    for m in rows:
        if m.row == Row(m.row.format, task=task, backend=m.row.backend) and m.row.format in formats:
            yield m


def upstream(records: Records) -> str:
    u = records["upstream_h200"]

    def figure(name: str) -> Column:
        return lambda other: f"{other[name]:g}" if name in other else ""

    columns: dict[str, Column] = {
        "": lambda other: other["name"],
        "s": about,
        "s a forward": figure("seconds_a_forward"),
        "allocated GB": figure("allocated_gb"),
        "reserved GB": figure("reserved_gb"),
        "tokens/s": figure("tokens_per_second"),
    }
    said = f"{u['conditions'][0].upper()}{u['conditions'][1:]}; {size(u)}, {u['settings']['num_timesteps']} timesteps."
    return f"{prose(said)}\n\n{table(columns, u['results'])}"


def floor(records: Records) -> str:
    found, denoise = records["floor_h200"]["results"], measured(records)["source"].figures["denoise_seconds"]
    bare = min(found["seconds"])
    return prose(
        f"The bare matmuls and attention of the same picture's {found['forwards']} forwards, one after the other "
        f"and nothing else, take {digits(bare)} s on such a card ({max(found['tflop_s']):.0f} TFLOP/s). Denoising "
        f"in bf16 takes {digits(denoise)} s, {denoise / bare:.3f} times as long: the rest is norms, rope, SwiGLU, "
        "guidance and the sampler. Only other arithmetic gets below this floor: INT8's products, step caches."
    )


def offload(records: Records) -> str:
    theirs = measured(records)[OFFLOAD]
    ours = measured(records, theirs.run)["source:24"]
    whole = theirs.figures["extrapolated_seconds"]
    return prose(
        f"In the same run, bf16{theirs.limit} with accelerate's hooks in place of our streaming, and all else equal: "
        f"{digits(whole)} s a picture, {whole / ours.seconds:.1f} times our {digits(ours.seconds)} s. It is "
        f"extrapolated, {theirs.figures['extrapolated']}."
    )


def commands(records: Records) -> str:
    def settings(name: str, **more: Any) -> str:
        chosen = {n: records[name]["settings"][n] for n in ("size", "num_timesteps")} | more
        return " ".join(f"--{n.replace('_', '-')} {value}" for n, value in chosen.items())

    made_by = {
        run: f"engine --repeat {records[run]['settings']['repeat']} "
        f"{settings(run, max_new_tokens=records[run]['settings']['max_new_tokens'])} --out RECORD "
        + " ".join(measured(records, run))
        for run in RUNS
    }
    repeat = len(records["floor_h200"]["results"]["seconds"])
    return again(records, {**made_by, "floor_h200": f"floor --repeat {repeat} {settings('floor_h200')} --out RECORD"})


def summary(records: Records) -> str:
    """The most telling figures, for the README."""
    e, cached, ours = records[RUNS[0]], "source:step_cache=taylorseer", measured(records)
    plain, fast = (beside(records, row)[0] for row in ("source", cached))
    seconds = {row: digits(ours[row].seconds) for row in ("source", cached, "int8:8", "dfloat11:8")}
    return prose(
        f"On one {card(e)} a {size(e)} picture of {e['settings']['num_timesteps']} timesteps takes "
        f"{seconds['source']} s in bf16 (the original code {plain['seconds']:g}) and {seconds[cached]} with TaylorSeer "
        f"({fast['seconds']:g}); within 8 GB of GPU memory, {seconds['int8:8']} s in INT8 and {seconds['dfloat11:8']} "
        f"losslessly. Text comes at {TOKENS['tokens/s'](ours['source::ask'])} tokens/s "
        f"({plain['tokens_per_second']:g}). {_fast(records)} [More](docs/performance.md)."
    )


def _fast(records: Records) -> str:
    """What the fastest speed takes, by the card's report."""
    taken = {row["row"]: row["seconds"]["median"] for row in records["report_h200"]["results"]["rows"]}
    cache, edits = SPEEDS["fast"].drawing, SPEEDS["fast"].editing
    drawn = {name: digits(taken[f"{name}::generate:step_cache={cache}"]) for name in ("int8", "source")}
    small = digits(taken[f"dfloat11:8:generate:step_cache={cache}"])
    edited = taken.get(f"int8::edit:step_cache={edits}")
    edit = "" if edited is None else f", and an edit {digits(edited)} in INT8"
    return (
        f"With `--speed fast` it is {drawn['int8']} s in INT8, {drawn['source']} in bf16, {small} in DFloat11 within "
        f"8 GB{edit} ([what that changes](docs/faster-pictures.md))."
    )


def demo(records: Records) -> str:
    """What the embedded model can do, for the README."""
    found, training = records["accuracy_demo_source"]["results"], records["demo_training"]
    found = found["source"]["tasks"] if "source" in found else found  # as records were before `bench accuracy`
    right = {task: f"{found[task]['right']} of {found[task]['total']}" for task in ("drawings", "edits", "answers")}
    (shipped,) = (run for run in training["results"] if run["shipped"])
    return prose(
        f"Of scenes unlike those that it was trained on it draws {right['drawings']} right, edits {right['edits']} and "
        f"answers {right['answers']} questions ([record](benchmarks/results/accuracy_demo_source.json)). One run of "
        f"{shipped['seconds'] / 60:.0f} minutes on one {card(training)} made it from nothing: `python -m "
        "lowmem_bagel.benchmarks.demo.make OUT`."
    )


PERFORMANCE = Page("docs/performance.md", {
    "conditions": conditions,
    "pictures": pictures,
    "step caches": caches,
    "step caches on scenes": cached_scenes,
    "answers": answers,
    "versions": library_versions,
    "libraries' pictures": library_pictures,
    "libraries' answers": library_answers,
    "upstream": upstream,
    "floor": floor,
    "offload": offload,
    "commands": commands,
})  # fmt: skip
README = Page("README.md", {"performance": summary, "demo": demo, "cards": choosing.summary})
