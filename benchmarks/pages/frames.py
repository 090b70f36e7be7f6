"""docs/frames.md: what frames take, and what the demo checkpoint of frames does with held-out clips."""

from __future__ import annotations

from lowmem_bagel.hardware.profile import CONTEXT_BYTES

from .measured import Measured, card, measured
from .page import Column, Page, Records, digits, prose, table

TIMED = ("engine_frames_h200", "engine_frames_int8_h200", "engine_frames_turn_h200")
"""What a later one has too is the later one's."""
JUDGED = "accuracy_demo_frames"
STILLS, TRAINED = "accuracy_demo_frames_stills", "demo_frames_training"


def timed(records: Records) -> list[Measured]:
    """Every row once."""
    known = {one.row: one for name in TIMED for one in measured(records, name).values() if "seconds" in one.figures}
    return sorted(known.values(), key=lambda one: (one.row.format != "source", one.row.frame_mode, one.row.limit_gb))


def held(one: Measured) -> int:
    """Bytes of the card at the peak. What PyTorch reserved is of the last phase alone; tensors may have taken more in
    another."""
    return max(int(one.figures["reserved_bytes"]), int(one.figures["peak_bytes"])) + CONTEXT_BYTES


def frames(records: Records) -> str:
    rows = timed(records)
    columns: dict[str, Column] = {
        "": lambda one: one.words,
        "within": lambda one: f"{one.row.limit_gb:g} GB" if one.row.limit_gb else "all memory",
        "frames": lambda one: "in turn" if one.row.frame_mode == "turn" else "together",
        "s": lambda one: digits(one.seconds),
        "planned, s": lambda one: digits(one.figures["predicted"]["seconds"]),
        "peak, GB": lambda one: digits(held(one) / 1e9),
        "planned, GB": lambda one: digits(one.figures["predicted"]["peak_bytes"] / 1e9),
        "commit": lambda one: records[one.run]["commit"],
    }
    first, record = rows[0], records[TIMED[0]]
    said = prose(
        f"{first.row.frames} frames of {first.row.size}x{first.row.size}, {record['settings']['num_timesteps']} "
        f"timesteps, random weights of the published shape on one {card(record)}; the peak is what PyTorch held of the "
        "card, and the context."
    )
    return f"{said}\n\n{table(columns, rows)}"


def demo(records: Records) -> str:
    record, training = records[JUDGED], records[TRAINED]
    found, stills = record["results"], records[STILLS]["results"]["source"]["tasks"]
    futures = [run["tasks"]["future-unguided"] for name, run in found.items() if name.startswith("futures")]
    total, within, kept = (sum(task[name] for task in futures) for name in ("total", "within", "kept"))
    views = found["views"]["tasks"]
    others = " and ".join(
        f"{views[task]['right']} of {views[task]['total']} {words}"
        for task, words in (("view", "views of a picture's scene"), ("views", "pairs of views from a sentence"))
    )
    also = ", ".join(f"{stills[task]['right']} of {stills[task]['total']} {task}" for task in ("drawings", "edits"))
    minutes = sum(run["seconds"] for run in training["results"]) / 60
    return prose(
        f"Of {total} clips unlike those that it was trained on, all shapes are within 3 pixels of their places in all "
        f"four frames after the three that are shown in {within}, and all keep their shapes and colors in {kept}, "
        f"without guidance; right are {others}. It does less well than the other demo checkpoint with stills: {also} "
        f"right. Training went on from that one for {minutes:.0f} minutes on one {card(training)} "
        "([record](../benchmarks/results/accuracy_demo_frames.json))."
    )


FRAMES = Page("docs/frames.md", {"timed": frames, "demo": demo})
