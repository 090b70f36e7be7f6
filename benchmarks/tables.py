"""The page of performance, and the README's lines about it, from the committed records.

    python -m lowmem_bagel.benchmarks.tables

Every figure on the page is read from a record in `benchmarks/results`. Most are our own measurements;
`upstream_h200.json` holds what other programs took on the same kind of card, under the conditions that it states.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .engine_rows import Row

PICTURES = (
    "source", "source:24", "source:8", "dfloat11", "dfloat11:12", "dfloat11:8", "dfloat11:6", "int8", "int8:8", "nf4",
    "source:step_cache=taylorseer", "int8:step_cache=taylorseer", "source::edit",
)  # fmt: skip
ANSWERS = ("source::ask", "source::ask:backend=fixed-length", "dfloat11::ask", "int8::ask", "nf4::ask")
OFFLOAD = "source:24:offload=accelerate:timesteps=3"
FORMATS = {"source": "bf16", "dfloat11": "DFloat11", "int8": "INT8", "nf4": "NF4"}
OTHERS = {
    "taylorseer": "TaylorSeer", "fixed-length": "fixed-length", "edit": "edit", "bitsandbytes": "by bitsandbytes",
    "quanto": "by optimum-quanto", "dfloat11": "by the dfloat11 package's kernel",
}  # fmt: skip
WIDTH = 120
"""Columns of a page's paragraphs."""
BEGIN, END = "<!-- performance -->", "<!-- end of performance -->"

Figures = dict[str, Any]

app = typer.Typer()


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("benchmarks/results"),
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/performance.md"),
    readme: Annotated[Path, typer.Option(help="Page whose lines between two markers are written anew.")] = Path(
        "README.md"
    ),
) -> None:
    """Write the page of performance, and the README's lines about it, from the records."""
    records = Records.read(results)
    page.write_text(performance_page(records), encoding="utf-8")
    readme.write_text(with_summary(readme.read_text(encoding="utf-8"), records), encoding="utf-8")


@dataclass(frozen=True)
class Records:
    """The records that the page is made from, as they were written."""

    engine: Figures
    newer: Figures
    """Some of the rows measured again, by a later commit."""
    libraries: Figures
    floor: Figures
    upstream: Figures

    @classmethod
    def read(cls, folder: Path) -> Records:
        names = ("engine_h200", "engine_newer_h200", "libraries_h200", "floor_h200", "upstream_h200")
        return cls(*(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names))

    def row(self, name: str) -> Figures:
        """The newest figures of one row of `bench engine`."""
        rows = (figures for record in (self.newer, self.engine) for figures in record["results"])
        found: Figures = next(figures for figures in rows if figures["row"] == name)
        return found

    def label(self, name: str) -> str:
        """A row in words, with a star where its figures are of the later commit."""
        return _label(name) + (r" \*" if name in {figures["row"] for figures in self.newer["results"]} else "")

    def others(self, name: str) -> list[Figures]:
        """What other programs took for what a row of ours does."""
        return [figures for figures in self.upstream["results"] if figures["beside"] == name]


def performance_page(records: Records) -> str:
    """The whole page as Markdown."""
    parts = [
        _conditions(records), _pictures(records), _libraries(records), _others(records), _floor(records),
        _offload(records), _answers(records), _again(records),
    ]  # fmt: skip
    return "\n\n".join(["# Performance", *parts]) + "\n"


def summary(records: Records) -> str:
    """The most telling figures, for the README."""

    def seconds(row: str) -> str:
        return _digits(_seconds(records.row(row)))

    e, cached = records.engine, "source:step_cache=taylorseer"
    plain, fast = (records.others(row)[0] for row in ("source", cached))
    tokens = _digits(records.row("source::ask")["tokens_per_second"])
    return _prose(
        f"On one {_card(e)} a {_size(e)} picture of {e['settings']['num_timesteps']} timesteps takes "
        f"{seconds('source')} s in bf16 (the original code {plain['seconds']:g}) and {seconds(cached)} with TaylorSeer "
        f"({fast['seconds']:g}); within 8 GB of GPU memory, {seconds('int8:8')} s in INT8 and {seconds('dfloat11:8')} "
        f"losslessly. Text comes at {tokens} tokens/s ({plain['tokens_per_second']:g}). [More](docs/performance.md)."
    )


def with_summary(page: str, records: Records) -> str:
    """The page with what is between its two markers replaced by the summary."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{summary(records)}\n{END}{after}"


def _conditions(records: Records) -> str:
    e = records.engine
    versions, settings = e["versions"], e["settings"]
    return _prose(
        "Made by `python -m lowmem_bagel.benchmarks.tables` from the records in `benchmarks/results`.",
        f"Measured on one {_card(e)} with PyTorch {versions['torch']} and Triton {versions['triton']}, commit "
        f"{e['commit']}: random weights of the 7B shape, pictures of {_size(e)} and {settings['num_timesteps']} "
        f"timesteps with the default guidance. {_runs(e)} Rows with a star are of commit {records.newer['commit']}, "
        "likewise run once. Seconds are of a whole request on a loaded model; GB are 1e9 bytes.",
        "Where a limit is given, the card was no smaller: PyTorch's allocator was limited, so that the process with "
        "its CUDA context stays under the limit. Arithmetic and copies were those of the large card; copies from "
        f"pinned memory ran at {settings['pinned_copy_gbps']:.1f} GB/s, which a card in an older slot does not reach.",
    )


def _runs(record: Figures) -> str:
    repeat = record["settings"]["repeat"]
    if repeat == 1:
        return "Each row was run once, after a short warm-up, so nothing is known of its spread."
    return f"Seconds are the median of at most {repeat} runs, after a short warm-up."


def _pictures(records: Records) -> str:
    lines = _head(
        "", "s", "allocated", "reserved", "in use", "predicted", "streamed", "x bound", "same bits", "others, s"
    )
    for name in PICTURES:
        f = records.row(name)
        others = ", ".join(f"{_about(o)} ({o['by']})" for o in records.others(name))
        bound = f.get("times_the_bound")
        lines.append(
            _line(
                records.label(name), _digits(_seconds(f)), *_gigabytes(f), _predicted(f), _streamed(f),
                f"{bound:.3f}" if bound else "", _same(f), others,
            )
        )  # fmt: skip
    unplanned = any("step_cache=" in name and "step_cache" not in records.row(name)["reasons"] for name in PICTURES)
    return _section(
        "Pictures",
        "\n".join(lines),
        _prose(
            "Memory in GB: allocated by tensors at most, reserved by PyTorch at most, and in use on the whole card, "
            "with the CUDA context, when the run ended. *Predicted*: what the planner of that commit said of the last "
            "before the run, and by how much it was off. *Streamed*: layer units of 56 that were copied to the card in "
            "every pass. *Bound*: of a streamed picture's denoising, the longer of the resident picture's and of the "
            "bytes copied at the speed above, in the same run. *Same bits*: as the resident picture of that format"
            + ("; step caches change the picture, and no memory was planned for them here. " if unplanned else ". ")
            + "*Others*: what upstream's code and the libraries take, see below."
        ),
    )


def _libraries(records: Records) -> str:
    record = records.libraries
    lines = _head("", "s", "least to most", "allocated", "reserved", "in use", "change")
    for f in record["results"]:
        spread, change = f["seconds"], f.get("relative_l2_to_reference")
        lines.append(
            _line(
                _label(f["row"]), _digits(_seconds(f)), f"{spread['min']:.2f} to {spread['max']:.2f}", *_gigabytes(f),
                "" if change is None else f"{change:.2g}",
            )
        )  # fmt: skip
    versions = record["versions"]
    return _section(
        "The libraries' kernels on our files",
        _prose(
            f"bitsandbytes {versions['bitsandbytes']}, optimum-quanto {versions['optimum-quanto']} and the dfloat11 "
            f"package {versions['dfloat11']} (its kernel, launched by us) in the place of our kernels, beside ours in "
            f"one run of commit {record['commit']}: the model, the sampler and all else are the same. *Change*: of the "
            f"final latent against our row, relative L2. {_runs(record)}"
        ),
        "\n".join(lines),
    )


def _others(records: Records) -> str:
    u = records.upstream
    lines = _head("", "s", "s a forward", "allocated GB", "reserved GB", "tokens/s")
    for o in u["results"]:
        figures = ("seconds_a_forward", "allocated_gb", "reserved_gb", "tokens_per_second")
        lines.append(_line(o["name"], _about(o), *(f"{o[name]:g}" if name in o else "" for name in figures)))
    sentence = (
        f"{u['conditions'][0].upper()}{u['conditions'][1:]}; {_size(u)}, {u['settings']['num_timesteps']} timesteps."
    )
    return _section("Upstream's code and the libraries", _prose(sentence), "\n".join(lines))


def _floor(records: Records) -> str:
    found, denoise = records.floor["results"], records.row("source")["denoise_seconds"]
    bare = min(found["seconds"])
    return _section(
        "The floor",
        _prose(
            f"The bare matmuls and attention of the same picture's {found['forwards']} forwards, one after the other "
            f"and nothing else, take {_digits(bare)} s on such a card ({max(found['tflop_s']):.0f} TFLOP/s). Denoising "
            f"in bf16 takes {_digits(denoise)} s, {denoise / bare:.3f} times as long: the rest is norms, rope, SwiGLU, "
            "guidance and the sampler. Only other arithmetic gets below this floor: INT8's products, step caches."
        ),
    )


def _offload(records: Records) -> str:
    f, ours = records.row(OFFLOAD), records.row("source:24")
    whole = f["extrapolated_seconds"]
    return _section(
        "accelerate's offload",
        _prose(
            f"In the same run, bf16 under {Row.parse(OFFLOAD).limit_gb:g} GB with accelerate's hooks in place of our "
            f"streaming, and all else equal: {_digits(whole)} s a picture, {whole / _seconds(ours):.1f} times our "
            f"{_digits(_seconds(ours))} s. It is extrapolated, {f['extrapolated']}."
        ),
    )


def _answers(records: Records) -> str:
    lines = _head("", "tokens/s", "allocated", "reserved", "in use", "others, tokens/s")
    for name in ANSWERS:
        f, row = records.row(name), Row.parse(name)
        beside = [o for o in records.others(row.format) if row.backend == "auto"]
        others = ", ".join(f"{o['tokens_per_second']:g} ({o['by']})" for o in beside)
        lines.append(_line(records.label(name), _digits(f["tokens_per_second"]), *_gigabytes(f), others))
    tokens = records.row(ANSWERS[0])["tokens"]
    return _section(
        "Text",
        _prose(
            f"An answer of {tokens} tokens about a {_size(records.engine)} picture, all weights resident; memory as "
            "above. Fixed-length is another lossless form of bf16 weights (`--backend fixed-length`)."
        ),
        "\n".join(lines),
    )


def _again(records: Records) -> str:
    e, f = records.engine, records.floor
    commands = [
        f"lowmem-bagel bench engine --repeat {e['settings']['repeat']} {_sized(e)} "
        f"--max-new-tokens {e['settings']['max_new_tokens']} --out benchmarks/results/engine_h200.json "
        + " ".join(figures["row"] for figures in e["results"]),
        f"lowmem-bagel bench floor --repeat {len(f['results']['seconds'])} {_sized(f)} "
        "--out benchmarks/results/floor_h200.json",
        "python -m lowmem_bagel.benchmarks.tables",
    ]
    return _section(
        "Measuring again",
        _prose(
            "In a checkout, on a card; the weights are made up, so nothing has to be downloaded. The last command "
            "writes this page. `lowmem-bagel bench engine --preset libraries --repeat 2` made the libraries' table."
        ),
        "\n".join(map(_command, commands)),
    )


def _sized(record: Figures) -> str:
    return f"--size {record['settings']['size']} --num-timesteps {record['settings']['num_timesteps']}"


def _section(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"## {title}", *paragraphs])


def _prose(*paragraphs: str) -> str:
    return "\n\n".join(_filled(paragraph, WIDTH) for paragraph in paragraphs)


def _command(text: str) -> str:
    """An indented block, its lines joined by backslashes."""
    first, *rest = _filled(text, WIDTH - 10).splitlines()
    return " \\\n".join([f"    {first}", *(f"        {line}" for line in rest)])


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)


def _head(*names: str) -> list[str]:
    return [_line(*names), "|---" * len(names) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


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


def _digits(value: float) -> str:
    """Three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _card(record: Figures) -> str:
    return str(record["hardware"]["gpu"]).removeprefix("NVIDIA ")


def _size(record: Figures) -> str:
    return "{0}x{0}".format(record["settings"]["size"])


if __name__ == "__main__":
    app()
