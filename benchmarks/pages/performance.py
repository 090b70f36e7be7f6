"""The pages of performance and of the kernels, and the README's lines about them, from the committed records.

    python -m lowmem_bagel.benchmarks.pages.performance

Every figure on the pages is read from a record in `benchmarks/results`. Most are our own measurements;
`upstream_h200.json` holds what other programs took on the same kind of card, under the conditions that it states.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..rows import Row
from .kernels import KernelRecords, kernel_page
from .markdown import command, digits, prose, replaced, section, table

PICTURES = (
    "source", "source:24", "source:8", "dfloat11", "dfloat11:12", "dfloat11:8", "dfloat11:6", "int8", "int8:8", "nf4",
    "source:step_cache=taylorseer", "int8:step_cache=taylorseer", "source:step_cache=first-block",
    "int8:step_cache=first-block", "source::edit",
)  # fmt: skip
ANSWERS = ("source::ask", "dfloat11::ask", "int8::ask", "nf4::ask")
CACHED = tuple(name for name in PICTURES if "step_cache=" in name)
LIBRARIES = ("bitsandbytes", "quanto", "dfloat11")
"""Backends that are other people's kernels."""
OFFLOAD = "source:24:offload=accelerate:timesteps=3"
FORMATS = {"source": "bf16", "dfloat11": "DFloat11", "int8": "INT8", "nf4": "NF4"}
OTHERS = {
    "taylorseer": "TaylorSeer", "first-block": "first-block cache", "edit": "edit",
    "bitsandbytes": "by bitsandbytes",
    "quanto": "by optimum-quanto", "dfloat11": "by the dfloat11 package's kernel",
}  # fmt: skip
BEGIN, END = "<!-- performance -->", "<!-- end of performance -->"
DEMO_BEGIN, DEMO_END = "<!-- demo -->", "<!-- end of demo -->"

Figures = dict[str, Any]

app = typer.Typer()


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("benchmarks/results"),
    page: Annotated[Path, typer.Option(help="Page of performance to write.")] = Path("docs/performance.md"),
    kernels: Annotated[Path, typer.Option(help="Page of the kernels to write.")] = Path("docs/kernels.md"),
    readme: Annotated[Path, typer.Option(help="Page whose lines between two markers are written anew.")] = Path(
        "README.md"
    ),
) -> None:
    """Write the pages, and the README's lines about them, from the records."""
    records = Records.read(results)
    page.write_text(performance_page(records), encoding="utf-8")
    kernels.write_text(kernel_page(KernelRecords.read(results)), encoding="utf-8")
    readme.write_text(with_summary(readme.read_text(encoding="utf-8"), records), encoding="utf-8")


@dataclass(frozen=True)
class Records:
    """The records that the page is made from, as they were written."""

    engine: Figures
    limits: Figures
    """Rows under a limit, and what else did not fit into the first run; what is compared is in the same run."""
    floor: Figures
    upstream: Figures
    demo: Figures
    """The embedded model on held-out scenes."""
    demo_training: Figures
    demo_caches: Figures
    """The embedded model with step caches, beside it without."""

    @classmethod
    def read(cls, folder: Path) -> Records:
        names = (
            "engine_h200", "engine_limits_h200", "floor_h200", "upstream_h200", "accuracy_demo_source",
            "demo_training", "accuracy_demo_caches",
        )  # fmt: skip
        return cls(*(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names))

    @property
    def runs(self) -> tuple[Figures, Figures]:
        return self.engine, self.limits

    def row(self, name: str) -> Figures:
        """The figures of one row of `bench engine`, of the first run that has it."""
        found: Figures = next(f for run in self.runs for f in run["results"] if f["row"] == name)
        return found

    def label(self, name: str) -> str:
        """A row in words, with a star where its figures are of the second run."""
        return _label(name) + ("" if name in {figures["row"] for figures in self.engine["results"]} else r" \*")

    def others(self, name: str) -> list[Figures]:
        """What other programs took for what a row of ours does."""
        return [figures for figures in self.upstream["results"] if figures["beside"] == name]


def performance_page(records: Records) -> str:
    """The whole page as Markdown."""
    parts = [
        _conditions(records), _pictures(records), _step_caches(records), _answers(records), _libraries(records),
        _others(records), _floor(records), _offload(records), _again(records),
    ]  # fmt: skip
    return "\n\n".join(["# Performance", *parts]) + "\n"


def summary(records: Records) -> str:
    """The most telling figures, for the README."""

    def seconds(row: str) -> str:
        return digits(_seconds(records.row(row)))

    e, cached = records.engine, "source:step_cache=taylorseer"
    plain, fast = (records.others(row)[0] for row in ("source", cached))
    tokens = digits(records.row("source::ask")["tokens_per_second"])
    return prose(
        f"On one {_card(e)} a {_size(e)} picture of {e['settings']['num_timesteps']} timesteps takes "
        f"{seconds('source')} s in bf16 (the original code {plain['seconds']:g}) and {seconds(cached)} with TaylorSeer "
        f"({fast['seconds']:g}); within 8 GB of GPU memory, {seconds('int8:8')} s in INT8 and {seconds('dfloat11:8')} "
        f"losslessly. Text comes at {tokens} tokens/s ({plain['tokens_per_second']:g}). [More](docs/performance.md)."
    )


def demo_summary(records: Records) -> str:
    """What the embedded model can do, for the README."""
    found = records.demo["results"]
    right = {task: f"{found[task]['right']} of {found[task]['total']}" for task in ("drawings", "edits", "answers")}
    (shipped,) = (run for run in records.demo_training["results"] if run["shipped"])
    return prose(
        f"Of scenes unlike those that it was trained on it draws {right['drawings']} right, edits {right['edits']} and "
        f"answers {right['answers']} questions ([record](benchmarks/results/accuracy_demo_source.json)). One run of "
        f"{shipped['seconds'] / 60:.0f} minutes on one {_card(records.demo_training)} made it from nothing: `python -m "
        "lowmem_bagel.benchmarks.demo.make OUT`."
    )


def with_summary(page: str, records: Records) -> str:
    """The page with what is between its markers replaced by the summaries."""
    page = replaced(page, DEMO_BEGIN, DEMO_END, demo_summary(records))
    return replaced(page, BEGIN, END, summary(records))


def _conditions(records: Records) -> str:
    e, limits = records.runs
    versions, settings = e["versions"], e["settings"]
    return prose(
        "Made by `python -m lowmem_bagel.benchmarks.pages.performance` from the records in `benchmarks/results`.",
        f"Measured on one {_card(e)} with PyTorch {versions['torch']} and Triton {versions['triton']}: random weights "
        f"of the 7B shape, pictures of {_size(e)} and {settings['num_timesteps']} timesteps with the default guidance. "
        f"Rows without a star are of one run of commit {e['commit']}, those with one of a run of commit "
        f"{limits['commit']}. Seconds are of a whole request on a loaded model, {_runs(records)}; GB are 1e9 bytes.",
        "Where a limit is given, the card was no smaller: PyTorch's allocator was limited, so that the process with "
        "its CUDA context stays under the limit. ComputeConfig and copies were those of the large card; copies from "
        f"pinned memory ran at {limits['settings']['pinned_copy_gbps']:.1f} GB/s, which a card in an older slot does "
        "not reach.",
    )


def _runs(records: Records) -> str:
    """How often was measured, and the widest spread of any row."""
    spreads: dict[bool, list[float]] = {True: [], False: []}
    for figures in (f for run in records.runs for f in run["results"] if len(f["runs"]) > 1):
        row, s = Row.parse(figures["row"]), figures["seconds"]
        ours = row.backend not in LIBRARIES and row.offload == "native"
        spreads[ours].append((s["max"] - s["min"]) / s["median"])
    return (
        f"the median of at most {records.engine['settings']['repeat']} after a short warm-up; of the rows measured so "
        f"often, none of ours spreads over more than {max(spreads[True]):.1%}, none of the libraries' over more than "
        f"{max(spreads[False]):.1%}"
    )


def _pictures(records: Records) -> str:
    def cells(name: str) -> Iterator[str]:
        f, bound = records.row(name), records.row(name).get("times_the_bound")
        others = ", ".join(f"{_about(o)} ({o['by']})" for o in records.others(name))
        yield from (records.label(name), digits(_seconds(f)), *_gigabytes(f), _predicted(f), _streamed(f))
        yield from (f"{bound:.3f}" if bound else "", _same(f), others)

    names = ("", "s", "allocated", "reserved", "in use", "predicted", "streamed", "x bound", "same bits", "others, s")
    return section(
        "Pictures",
        table(names, map(cells, PICTURES)),
        prose(
            "Memory in GB: allocated by tensors at most, reserved by PyTorch at most, and in use on the whole card "
            "when the run ended, with the CUDA context and the kernels that rows before it had loaded. *Predicted*: "
            "what the planner said of the last before the run, and by how much it was off. *Streamed*: layer units of "
            "56 that were copied to the card in every pass. *Bound*: of a streamed picture's denoising, the longer of "
            "the resident picture's and of the bytes copied at the speed above, in the same run. *Same bits*: as the "
            "resident picture of that format; step caches change the picture. *Others*: what upstream's code and the "
            "libraries take, see below."
        ),
    )


def _step_caches(records: Records) -> str:
    def cells(name: str) -> Iterator[str]:
        f, plain = records.row(name), records.row(Row.parse(name).format)
        yield from (records.label(name), digits(_seconds(f)), f"{_seconds(plain) / _seconds(f):.2f}")
        yield from (f"{f['evaluations_computed']} of {f['evaluations']}", f"{f['relative_l2_to_reference']:.2f}")

    def judged(name: str) -> Iterator[str]:
        yield OTHERS.get(name, "no cache")
        tasks = records.demo_caches["results"][name]["tasks"]
        for task in ("drawings", "edits"):
            yield f"{tasks[task]['right']} of {tasks[task]['total']}"
            yield f"{tasks[task]['median_distance']:.2f}"

    return section(
        "Step caches",
        table(("", "s", "times faster", "evaluations computed", "change"), map(cells, CACHED)),
        prose(
            "*Change*: of the final latent against the same format without a cache, relative L2. The weights are "
            "random, and so is what they draw. What the caches do to pictures of something is measured with the "
            f"embedded model, {records.demo_caches['settings']['num_timesteps']} timesteps too: how many scenes come "
            "out as told, and how far the median picture is from the one without a cache, its mean in levels of 255:"
        ),
        table(
            ("", "drawings right", "distance", "edits right", "distance"), map(judged, records.demo_caches["results"])
        ),
    )


def _libraries(records: Records) -> str:
    def cells(f: Figures) -> Iterator[str]:
        spread, change = f["seconds"], f.get("relative_l2_to_reference")
        yield from (_label(f["row"]), digits(_seconds(f)), f"{spread['min']:.2f} to {spread['max']:.2f}")
        yield from (*_gigabytes(f), "" if change is None else f"{change:.2g}")

    def spoken(f: Figures) -> Iterator[str]:
        ours = records.row(f"{Row.parse(f['row']).format}::ask")
        yield from (_label(f["row"]), digits(f["tokens_per_second"]), digits(ours["tokens_per_second"]))

    drawn = [f for run in records.runs for f in _beside_libraries(run, "generate")]
    drawn.sort(key=lambda f: PICTURES.index(Row.parse(f["row"]).format))
    said = [f for run in records.runs for f in _beside_libraries(run, "ask") if Row.parse(f["row"]).backend != "auto"]
    versions = records.engine["versions"]
    return section(
        "The libraries' kernels on our files",
        prose(
            f"bitsandbytes {versions['bitsandbytes']}, optimum-quanto {versions['optimum-quanto']} and the dfloat11 "
            f"package {versions['dfloat11']} (its kernel, launched by us) in the place of our kernels: the model, the "
            "sampler and all else are the same. A picture's row of ours is of the run that its libraries are of. "
            "*Change*: of the final latent against our row, relative L2."
        ),
        table(("", "s", "least to most", "allocated", "reserved", "in use", "change"), map(cells, drawn)),
        table(("text", "tokens/s", "ours"), map(spoken, said)),
    )


def _beside_libraries(run: Figures, task: str) -> Iterator[Figures]:
    """Of a run, the rows of the libraries' kernels and ours of the same formats, nothing else being set."""
    rows = [(Row.parse(figures["row"]), figures) for figures in run["results"]]
    formats = {row.format for row, _ in rows if row.backend in LIBRARIES and row.task == task}
    for row, figures in rows:
        plain = row == Row(row.format, task=task, backend=row.backend)
        if plain and row.format in formats and row.backend in ("auto", *LIBRARIES):
            yield figures


def _others(records: Records) -> str:
    u = records.upstream

    def cells(o: Figures) -> Iterator[str]:
        figures = ("seconds_a_forward", "allocated_gb", "reserved_gb", "tokens_per_second")
        yield from (o["name"], _about(o), *(f"{o[name]:g}" if name in o else "" for name in figures))

    sentence = (
        f"{u['conditions'][0].upper()}{u['conditions'][1:]}; {_size(u)}, {u['settings']['num_timesteps']} timesteps."
    )
    names = ("", "s", "s a forward", "allocated GB", "reserved GB", "tokens/s")
    return section("Upstream's code and the libraries", prose(sentence), table(names, map(cells, u["results"])))


def _floor(records: Records) -> str:
    found, denoise = records.floor["results"], records.row("source")["denoise_seconds"]
    bare = min(found["seconds"])
    return section(
        "The floor",
        prose(
            f"The bare matmuls and attention of the same picture's {found['forwards']} forwards, one after the other "
            f"and nothing else, take {digits(bare)} s on such a card ({max(found['tflop_s']):.0f} TFLOP/s). Denoising "
            f"in bf16 takes {digits(denoise)} s, {denoise / bare:.3f} times as long: the rest is norms, rope, SwiGLU, "
            "guidance and the sampler. Only other arithmetic gets below this floor: INT8's products, step caches."
        ),
    )


def _offload(records: Records) -> str:
    f, ours = records.row(OFFLOAD), records.row("source:24")
    whole = f["extrapolated_seconds"]
    return section(
        "accelerate's offload",
        prose(
            f"In the same run, bf16 under {Row.parse(OFFLOAD).limit_gb:g} GB with accelerate's hooks in place of our "
            f"streaming, and all else equal: {digits(whole)} s a picture, {whole / _seconds(ours):.1f} times our "
            f"{digits(_seconds(ours))} s. It is extrapolated, {f['extrapolated']}."
        ),
    )


def _answers(records: Records) -> str:
    def cells(name: str) -> Iterator[str]:
        f, row = records.row(name), Row.parse(name)
        beside = [o for o in records.others(row.format) if row.backend == "auto"]
        others = ", ".join(f"{o['tokens_per_second']:g} ({o['by']})" for o in beside)
        yield from (records.label(name), digits(f["tokens_per_second"]), *_gigabytes(f), others)

    tokens = records.row(ANSWERS[0])["tokens"]
    return section(
        "Text",
        prose(
            f"An answer of {tokens} tokens about a {_size(records.engine)} picture, all weights resident; memory as "
            "above."
        ),
        table(("", "tokens/s", "allocated", "reserved", "in use", "others, tokens/s"), map(cells, ANSWERS)),
    )


def _again(records: Records) -> str:
    f = records.floor
    commands = [
        f"lowmem-bagel bench engine --repeat {run['settings']['repeat']} {_sized(run)} "
        f"--max-new-tokens {run['settings']['max_new_tokens']} --out benchmarks/results/{name}.json "
        + " ".join(figures["row"] for figures in run["results"] if "fixed-length" not in figures["row"])
        for name, run in zip(("engine_h200", "engine_limits_h200"), records.runs, strict=True)
    ] + [
        f"lowmem-bagel bench floor --repeat {len(f['results']['seconds'])} {_sized(f)} "
        "--out benchmarks/results/floor_h200.json",
        "python -m lowmem_bagel.benchmarks.pages.performance",
    ]
    return section(
        "Measuring again",
        prose(
            "In a checkout, on a card; the weights are made up, so nothing has to be downloaded. The last command "
            "writes this page and [the kernels' own](kernels.md)."
        ),
        "\n".join(map(command, commands)),
    )


def _sized(record: Figures) -> str:
    return f"--size {record['settings']['size']} --num-timesteps {record['settings']['num_timesteps']}"


def _label(name: str) -> str:
    """A row in words, such as "bf16, TaylorSeer" or "INT8 under 8 GB"."""
    row = Row.parse(name)
    limit = f" under {row.limit_gb:g} GB" if row.limit_gb else ""
    others = (OTHERS[part] for part in (row.task, row.step_cache, row.backend) if part in OTHERS)
    return ", ".join([FORMATS[row.format] + limit, *others])


def _gigabytes(figures: Figures) -> Iterator[str]:
    for name in ("peak_bytes", "reserved_bytes", "device_used_bytes"):
        yield f"{figures[name] / 1e9:.1f}"


def _predicted(figures: Figures) -> str:
    predicted, used = figures["predicted"]["peak_bytes"], figures["device_used_bytes"]
    return f"{predicted / 1e9:.1f} ({predicted / used - 1:+.1%})"


def _streamed(figures: Figures) -> str:
    count = figures["streamed_units"]
    return f"{count} from {figures['source']}" if count else "none"


def _same(figures: Figures) -> str:
    return {True: "yes", False: "no", None: "–"}[figures.get("equals_reference")]


def _seconds(figures: Figures) -> float:
    return float(figures["seconds"]["median"])


def _about(other: Figures) -> str:
    return f"about {other['seconds']:g}" if other.get("about") else f"{other['seconds']:g}"


def _card(record: Figures) -> str:
    return str(record["hardware"]["gpu"]).removeprefix("NVIDIA ")


def _size(record: Figures) -> str:
    return "{0}x{0}".format(record["settings"]["size"])


if __name__ == "__main__":
    app()
