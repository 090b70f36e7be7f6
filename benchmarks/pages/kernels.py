"""docs/kernels.md: what each reaches of the machine's ceiling, and what else does the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from lowmem_bagel.checkpoint.config import BAGEL_7B
from lowmem_bagel.formats.registry import formats
from lowmem_bagel.planner.facts import ModelFacts

from .measured import FORMATS as TITLES
from .measured import card, measured, size
from .page import Column, Page, Records, again, digits, prose, table

Figures = Mapping[str, Any]
FP8 = "_scaled_mm fp8"
FORMATS = ("int8", "int8 rotated", "fp8")
BESIDE = ("int8", "gguf-q8_0", "gguf-q6_k", "gguf-q5_k", "gguf-q4_k", "nf4")
OUTLIERS = "inputs with outlier channels"
PICTURE_TOKENS = ("4096", "8192")
"""Of a 1024x1024 picture: one branch of guidance, or two in a batch."""


def conditions(records: Records) -> str:
    k, lossless = records["kernels_h200"], records["kernels_lossless_h200"]["results"]
    limits, versions = k["results"]["ceilings"], k["versions"]
    return prose(
        f"Measured on one {card(k)} with PyTorch {versions['torch']} and Triton {versions['triton']}, commit "
        f"{k['commit']}, at BAGEL-7B's shapes. Its ceilings, measured by the same program: "
        f"{limits['copy_bytes_s'] / 1e9:.0f} GB/s copied (read and written), {limits['read_bytes_s'] / 1e9:.0f} GB/s "
        f"read alone, {limits['half_matmul_ops_s'] / 1e12:.0f} TFLOP/s in a bf16 matmul of 8192x8192x8192; an int8 "
        "ceiling is twice that. The lossless kernels' run measured "
        f"{lossless['copy_gb_s']:.0f} and {lossless['read_gb_s']:.0f} GB/s. "
        "Inputs are fresh and beyond the cache; every result was compared with the kernel's reference on poisoned "
        "memory before it was timed.",
    )


def bits(records: Records) -> str:
    found = records["kernels_lossless_h200"]["results"]["dfloat11"]
    return prose(
        f"{found['bits_per_weight']:.2f} bits a weight. GB/s of bf16 written; the share of the ceiling counts the "
        "compressed bytes read as well. Beside it the dfloat11 package's own kernel on the same bytes."
    )


def decoding(records: Records) -> str:
    found = records["kernels_lossless_h200"]["results"]["dfloat11"]
    columns: dict[str, Column] = {
        "": lambda name: "a whole layer" if name == "layer" else name,
        "GB/s": lambda name: f"{found[name]['gb_s']:.0f}",
        "of ceiling": lambda name: f"{found[name]['of_ceiling']:.0%}",
        "the package's, GB/s": lambda name: f"{found[name]['published_gb_s']:.0f}",
        "times faster": lambda name: f"{found[name]['gb_s'] / found[name]['published_gb_s']:.2f}",
    }
    return table(columns, (name for name, figures in found.items() if isinstance(figures, Mapping)))


def triton(records: Records) -> str:
    return _cases(records["kernels_h200"])


def steps(records: Records) -> str:
    return _cases(records["kernels_steps_h200"])


def _cases(record: Figures) -> str:
    """A table of timed kernels."""

    def rate(f: Figures) -> str:
        scale, unit = (1e9, "GB/s") if f["unit"] == "B/s" else (1e12, "TOP/s")
        return f"{f['rate'] / scale:.0f} {unit}"

    columns: dict[str, Column] = {
        "kernel": lambda f: f["kernel"],
        "shape": lambda f: f["shape"].replace(" x ", "x"),
        "us": lambda f: digits(f["seconds"] * 1e6),
        "rate": rate,
        "of ceiling": lambda f: f"{f['of_ceiling']:.0%}",
        "error": lambda f: f"{f['error']:.0e}",
        "others": lambda f: ", ".join(f"{name} {digits(taken * 1e6)}" for name, taken in f["rivals"].items()),
    }
    return table(columns, record["results"]["kernels"])


def step_conditions(records: Records) -> str:
    record = records["kernels_steps_h200"]
    limits = record["results"]["ceilings"]
    return prose(
        f"Commit {record['commit']}; ceilings of that run: {limits['copy_bytes_s'] / 1e9:.0f} GB/s copied, "
        f"{limits['read_bytes_s'] / 1e9:.0f} GB/s read."
    )


def fp8(records: Records) -> str:
    shares = [
        f["rivals"][FP8] / f["seconds"]
        for f in records["kernels_h200"]["results"]["kernels"]
        if f["kernel"] == "int8_matmul" and FP8 in f["rivals"] and f["shape"].split()[1] in PICTURE_TOKENS
    ]
    errors = median_errors(records)

    def error(format: str) -> Column:
        return lambda name: f"{errors[name][format]:.3f}"

    columns: dict[str, Column] = {"": str, **{format: error(format) for format in FORMATS}}
    said = prose(
        f"With {' or '.join(PICTURE_TOKENS)} tokens, PyTorch's fp8 matmul with row and token scales takes "
        f"{min(shares):.2f} to {max(shares):.2f} of the time of ours in int8, and as many bytes. Its results are "
        "off by more, as three bits of mantissa are (relative L2 of a linear's output, medians):"
    )
    return f"{said}\n\n{table(columns, errors)}"


def gguf(records: Records) -> str:
    """Size and errors of GGUF's types beside INT8 and NF4, on the embedded model; seconds at the published shape."""
    found = records["codec_errors_demo_checkpoint"]["results"]
    shape = BAGEL_7B.decoder.hidden_size, BAGEL_7B.decoder.hidden_size
    timed = [records[name] for name in ("report_h200", "report_gguf_h200")]
    rows = {row["row"]: row for record in timed for row in record["results"]["rows"]}

    def error(what: str) -> Column:
        return lambda name: f"{median(f[what] for f in found if f['format'] == name):.4f}"

    columns: dict[str, Column] = {
        "": lambda name: TITLES[name],
        "bits a weight": lambda name: f"{8 * formats()[name].nbytes(shape) / math.prod(shape):.2f}",
        "GB of layers": lambda name: f"{_layers(name):.1f}",
        "error of weights": error("weight"),
        "of outputs": error("file"),
        "a picture, s": lambda name: digits(rows[f"{name}::generate"]["seconds"]["median"]),
        "tokens/s": lambda name: f"{rows[f'{name}::ask']['tokens_per_second']:.0f}",
    }
    ours, types = (record["commit"] for record in timed)
    said = prose(f"Seconds and tokens are of one {card(timed[0])}: INT8 and NF4 at commit {ours}, GGUF at {types}.")
    return f"{table(columns, BESIDE)}\n\n{said}"


def _layers(name: str) -> float:
    """1e9 bytes of the decoder's layers of the published shape."""
    return sum(unit.nbytes(2) for unit in ModelFacts.of_config(BAGEL_7B, name).units.values()) / 1e9


def median_errors(records: Records) -> dict[str, dict[str, float]]:
    """Of each of FORMATS, the relative L2 of a linear's output, the median over the matrices of each kind of data."""
    made_up, demo = (records[f"codec_errors_{name}"]["results"] for name in ("random", "demo_checkpoint"))
    data = {
        "normal weights and inputs": [f for f in made_up if "normal weight, normal" in f["tensor"]],
        "heavy-tailed weights": [f for f in made_up if "heavy" in f["tensor"]],
        OUTLIERS: [f for f in made_up if "outlier" in f["tensor"]],
        "the embedded model on its own activations": demo,
    }
    return {
        name: {format: median(f["arithmetic"] for f in found if f["format"] == format) for format in FORMATS}
        for name, found in data.items()
    }


def tiles(records: Records) -> str:
    record = records["int8_tiles_h200"]
    found, layers = record["results"], record["results"]["layers"]
    columns: dict[str, Column] = {
        "tokens": lambda row: str(row["tokens"]),
        "by estimate, ms": lambda row: digits(row["estimated_seconds"] * 1e3),
        "by measurement, ms": lambda row: digits(row["measured_seconds"] * 1e3),
        "": lambda row: f"{row['measured_seconds'] / row['estimated_seconds'] - 1:+.1%}",
    }
    best = min(found["linears"], key=lambda row: row["measured_seconds"] / row["estimated_seconds"])
    gain = 1 - best["measured_seconds"] / best["estimated_seconds"]
    said = prose(
        f"On one {card(record)} compiling took {found['compile_seconds']:.1f} s and timing "
        f"{found['compare_seconds']:.1f} s. What all layers' linears then take, by the tiles that were estimated (for "
        f"this kind of card) and by those that were measured; of the single ones {best['linear']} with "
        f"{best['tokens']} tokens gains most, {gain:.0%}:"
    )
    pairs = {row["tokens"]: row["estimated_seconds"] for row in layers}
    saved = [1 - pairs[2 * tokens] / (2 * pairs[tokens]) for tokens in (2048, 4096)]
    batch = prose(
        "The same table says what it would bring to draw two clients' pictures in one batch: "
        f"{saved[0]:.0%} of the linears' time at 512x512 with two branches of guidance (2048 tokens a picture, then "
        f"4096) and {saved[1]:.0%} where 4096 become 8192. A server gains next to nothing by that, and the first "
        "picture comes twice as late: `serve` draws one after the other."
    )
    return f"{said}\n\n{table(columns, layers)}\n\n{batch}"


def pairs(records: Records) -> str:
    """INT8's products of many tokens by pairs of blocks beside the tiles before them."""
    record = records["int8_pairs_h200"]
    found = record["results"]
    columns: dict[str, Column] = {
        "": lambda row: row["linear"],
        "tokens": lambda row: str(row["tokens"]),
        "by tiles, us": lambda row: digits(row["tiles_seconds"] * 1e6),
        "by pairs, us": lambda row: digits(row["pairs_seconds"] * 1e6),
        "of the tiles'": lambda row: f"{row['pairs_seconds'] / row['tiles_seconds']:.2f}",
    }
    pictures = {
        (task, way): median(run["seconds"] for run in found["pictures"] if (run["task"], run["way"]) == (task, way))
        for task, way in {(run["task"], run["way"]) for run in found["pictures"]}
    }
    layer = {
        way: median(run["layer_seconds"] for run in found["on_and_on"] if run["way"] == way)
        for way in ("tiles", "pairs")
    }
    clocks = {
        way: median(run["clock_mhz"] for run in found["on_and_on"] if run["way"] == way) for way in ("tiles", "pairs")
    }
    assert found["latents_as_before"]
    before, after, edit, edited = (pictures[task, way] for task in ("generate", "edit") for way in ("before", "all"))
    alone, quantising = (pictures["generate", f"{part} alone"] for part in ("pairs", "quantising"))
    said = prose(
        f"On one {card(record)}, by turns in one process: a picture of {size(record)} took {before:.2f} s and takes "
        f"{after:.2f} ({alone:.2f} by this kernel alone, {quantising:.2f} by the new quantising alone), an edit "
        f"{edit:.2f} and {edited:.2f}, to the bit as before. On and on the card is bound by its power: a layer's "
        f"products with SwiGLU and its quantising take {layer['tiles'] * 1e3:.2f} ms by tiles at "
        f"{clocks['tiles']:.0f} MHz and {layer['pairs'] * 1e3:.2f} ms by pairs at {clocks['pairs']:.0f} MHz. Single "
        "products, after a rest:"
    )
    return f"{said}\n\n{table(columns, found['kernels'])}"


def _moe_pictures(records: Records) -> str:
    record = records["engine_moe_h200"]
    named = [f"{digits(m.seconds)} s in {TITLES[m.row.format]}" for m in measured(records, "engine_moe_h200").values()]
    return f"A picture of {size(record)} by BAGEL-MoE takes {' and '.join(named)} (commit {record['commit']})."


def routed(records: Records) -> str:
    record = records["routed_h200"]
    found = record["results"]["kernels"]
    mlps = [f for f in found if f["kernel"].startswith("MLP")]
    products = [f["rivals"]["grouped_matmul"] / f["seconds"] for f in found if f["kernel"] == "int8_grouped"]
    theirs = {
        f["shape"]: f["rivals"]["torch._grouped_mm, rows gathered"] for f in found if "grouped_matmul" in f["kernel"]
    }
    torchs = [theirs[f["shape"]] / f["seconds"] for f in found if f["kernel"] == "int8_grouped"]
    columns: dict[str, Column] = {
        "": lambda f: f["kernel"],
        "tokens": lambda f: f["shape"].split()[0],
        "us": lambda f: digits(f["seconds"] * 1e6),
        "the whole MLP": lambda f: digits(f["rivals"][f["kernel"].replace("MLP", "whole")] * 1e6),
        "routed in bf16": lambda f: digits(f["rivals"].get("routed, bf16", f["seconds"]) * 1e6),
    }
    said = prose(
        f"On one {card(record)}, commit {record['commit']}: the products in INT8 are {min(products):.2f} to "
        f"{max(products):.2f} times as fast as `grouped_matmul` in bf16, and {min(torchs):.2f} to {max(torchs):.2f} "
        "times as PyTorch's grouped product in bf16 with the rows gathered before, which is faster than ours in bf16 "
        f"and is not used. {_moe_pictures(records)} A whole MLP, routing and all, beside the MLP of 18944 that its "
        "experts were cut of:"
    )
    return f"{said}\n\n{table(columns, mlps)}"


COMPILED, ATTENTION, JUDGED = "attention_int8_compiled", "attention_h200", "accuracy_demo_attention"
MULTIPLIES = {"IMMA": "of INT8", "HMMA": "of halves", "MUFU": "powers of two"}


def attention(records: Records) -> str:
    """What the compiler made of it for other cards, and the embedded model's pictures by it; below them, where there is
    such a record, what it took on a card."""
    measured = [_attention_measured(records[ATTENTION])] if ATTENTION in records else []
    return "\n\n".join([_attention_compiled(records), _attention_judged(records[JUDGED]), *measured])


def _attention_judged(record: Figures) -> str:
    before, now = (record["results"][way]["tasks"] for way in ("source", "float32:int8"))
    tasks = (f"{now[task]['right']} of {now[task]['total']} {task} ({before[task]['right']})" for task in now)
    distances = (f"{now[task]['median_distance']:.2f} levels of 255 ({task})" for task in ("drawings", "edits"))
    return prose(
        "The embedded model in float32 with every block attended to by the kernel's reference, its small pictures too, "
        f"gets right {', '.join(tasks)}, in brackets by exact attention; the median picture is off by "
        f"{' and '.join(distances)}."
    )


def _attention_compiled(records: Records) -> str:
    found = [row for row in records[COMPILED]["results"] if row["dtype"] == "bfloat16"]
    columns: dict[str, Column] = {
        "compute capability": lambda row: ".".join(map(str, row["capability"])),
        "queries and keys a tile": lambda row: f"{row['queries']}, {row['keys']}",
        "warps": lambda row: str(row["warps"]),
        "registers": lambda row: str(row["registers"]),
        "spilled": lambda row: f"{row['spilled_bytes']} bytes",
        "shared memory": lambda row: f"{row['shared_bytes'] / 1024:.0f} KiB",
        "instructions a tile and warp": lambda row: str(sum(row["loop"].values())),
        **{words: _instructions(name) for name, words in MULTIPLIES.items()},
    }
    return table(columns, found)


def _instructions(name: str) -> Column:
    return lambda row: str(row["loop"].get(name, 0))


def _attention_measured(record: Figures) -> str:
    columns: dict[str, Column] = {
        "tokens": lambda row: str(row["tokens"]),
        "": lambda row: row["way"],
        "us": lambda row: digits(row["seconds"] * 1e6),
        "TFLOP/s": lambda row: "" if row["tflop_s"] is None else f"{row['tflop_s']:.0f}",
        "error": lambda row: f"{row['errors']['normal']['relative_l2']:.4f}" if row["errors"] else "",
        "with outlier keys": lambda row: f"{row['errors']['outlier keys']['relative_l2']:.4f}" if row["errors"] else "",
    }
    said = prose(f"On one {card(record)}, commit {record['commit']}; errors are relative L2 against float64.")
    return f"{said}\n\n{table(columns, record['results'])}"


def sanitizer(records: Records) -> str:
    return "\n".join(f"    {line}" if line else "" for line in records["sanitizer_h200"].splitlines())


def commands(records: Records) -> str:
    demo = "codec-errors --model lowmem_bagel/demo_checkpoint --timesteps 12 --out RECORD"
    return again(
        records,
        {
            "kernels_h200": "kernels --out RECORD",
            "kernels_lossless_h200": "kernels-lossless --tune --out RECORD",
            "kernels_steps_h200": "kernels-steps --out RECORD",
            "int8_tiles_h200": "int8-tiles --out RECORD",
            "routed_h200": "routed --out RECORD",
            **({ATTENTION: "attention --out RECORD"} if ATTENTION in records else {}),
            COMPILED: "attention --compiled --out RECORD",
            JUDGED: "accuracy --out RECORD",
            "codec_errors_random": "codec-errors --out RECORD",
            "codec_errors_demo_checkpoint": demo,
        },
    )


KERNELS = Page("docs/kernels.md", {
    "conditions": conditions,
    "bits": bits,
    "decoding": decoding,
    "Triton": triton,
    "step conditions": step_conditions,
    "steps": steps,
    "fp8": fp8,
    "gguf": gguf,
    "pairs": pairs,
    "tiles": tiles,
    "routed": routed,
    "attention": attention,
    "sanitizer": sanitizer,
    "commands": commands,
})  # fmt: skip
