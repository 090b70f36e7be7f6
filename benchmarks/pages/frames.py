"""docs/frames.md: what frames take, and what the demo checkpoint of frames does with held-out clips."""

from __future__ import annotations

from .measured import Measured, card, measured
from .page import Column, Page, Records, digits, prose, table

TIMED, JUDGED, TRAINED = "engine_frames_h200", "accuracy_demo_frames", "demo_frames_training"


def frames(records: Records) -> str:
    record = records[TIMED]
    rows = [one for one in measured(records, TIMED).values() if "seconds" in one.figures]
    columns: dict[str, Column] = {
        "": lambda one: one.words,
        "within": lambda one: f"{one.row.limit_gb:g} GB" if one.row.limit_gb else "all memory",
        "frames": lambda one: "in turn" if one.row.frame_mode == "turn" else "together",
        "s": lambda one: digits(one.seconds),
        "planned, s": lambda one: digits(one.figures["predicted"]["seconds"]),
        "peak, GB": lambda one: digits(one.figures["reserved_bytes"] / 1e9),
        "planned, GB": lambda one: digits(one.figures["predicted"]["peak_bytes"] / 1e9),
    }
    first: Measured = rows[0]
    said = prose(
        f"{first.row.frames} frames of {first.row.size}x{first.row.size}, {record['settings']['num_timesteps']} "
        f"timesteps, random weights of the published shape on one {card(record)}, commit {record['commit']}; the peak "
        "is what PyTorch reserved. INT8 and frames in turn within a limit were not timed:"
    )
    return f"{said}\n\n{table(columns, rows)}"


def demo(records: Records) -> str:
    found, training = records[JUDGED]["results"]["source"]["tasks"], records[TRAINED]
    future, guided = found["future-unguided"], found.get("future")
    told = f"; guided as edits are, {guided['within']} and {guided['kept']}" if guided else ""
    stills = ", ".join(
        f"{found[task]['right']} of {found[task]['total']} {task}" for task in ("drawings", "edits", "answers")
    )
    others = ", ".join(
        f"{found[task]['right']} of {found[task]['total']} {words}"
        for task, words in (("view", "pictures seen from one or two other sides"), ("views", "pairs of views"))
        if task in found
    )
    minutes = sum(run["seconds"] for run in training["results"]) / 60
    return prose(
        f"Of {future['total']} clips unlike those that it was trained on, the shapes of all four frames that come "
        f"after three are within 3 pixels of their places in {future['within']}, and all shapes and colors are kept in "
        f"{future['kept']}, without guidance{told}. Right are {others}. Of stills it does right {stills}, as the other "
        f"demo checkpoint. Training went on from that one for {minutes:.0f} minutes on one {card(training)} "
        "([record](../benchmarks/results/accuracy_demo_frames.json))."
    )


FRAMES = Page("docs/frames.md", {"timed": frames})
