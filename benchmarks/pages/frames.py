"""docs/frames.md: what frames take, and what the demo checkpoint of frames does with held-out clips."""

from __future__ import annotations

from collections import Counter

from lowmem_bagel.hardware.profile import CONTEXT_BYTES

from .measured import Measured, card, measured
from .page import Column, Page, Records, digits, prose, table

TIMED = ("engine_frames_h200", "engine_frames_int8_h200", "engine_frames_turn_h200")
"""What a later one has too is the later one's."""
JUDGED = "accuracy_demo_frames"
STILLS, TRAINED = "accuracy_demo_frames_stills", "demo_frames_training"
BEFORE = "accuracy_demo_source"
"""Stills and answers of the checkpoint that training went on from."""
TRIED = "demo_frames_trials"


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
    light, without = (_futures(found, task) for task in ("future-light", "future-unguided"))
    views = found["views"]["tasks"]
    others = " and ".join(
        f"{views[task]['right']} of {views[task]['total']} {words}"
        for task, words in (("view", "views of a picture's scene"), ("views", "pairs of views from a sentence"))
    )
    before = records[BEFORE]["results"]
    also = ", ".join(
        f"{stills[task]['right']} of {stills[task]['total']} {task} ({before[task]['right']})"
        for task in ("drawings", "edits", "answers")
    )
    (run,) = training["results"]
    return prose(
        f"Of {light['total']} clips unlike those that it was trained on, all shapes are within 3 pixels of their "
        f"places in all four frames after the three that are shown in {light['within']}, and all keep their shapes "
        f"and colors in {light['kept']}, with light guidance (1.5 by text and by pictures); in {without['within']} "
        f"and {without['kept']} without. Right are {others}. What the other demo checkpoint does it has not unlearnt: "
        f"right are, with the other's in brackets, {also} ([record](../benchmarks/results/{STILLS}.json)). Training "
        f"went on from that one, its feed-forward layers widened to {run['settings']['intermediate_size']}, for "
        f"{run['settings']['until'] / 60:.0f} minutes on one {card(training)} "
        f"([record](../benchmarks/results/{JUDGED}.json))."
    )


def _futures(found: Records, task: str) -> Counter[str]:
    """What all runs of a task say together."""
    runs = [run["tasks"][task] for run in found.values() if task in run["tasks"]]
    return sum((Counter({name: run[name] for name in ("total", "within", "kept")}) for run in runs), Counter())


def guidance(records: Records) -> str:
    """Of futures, as the trainer's sampler draws them."""
    record = records[TRIED]
    rows = sorted(record["results"]["guidance"], key=lambda row: (row["num_timesteps"], row["kept"]))
    columns: dict[str, Column] = {
        "by text": lambda row: f"{row['cfg_text_scale']:g}",
        "by pictures": lambda row: f"{row['cfg_img_scale']:g}",
        "timesteps": lambda row: str(row["num_timesteps"]),
        "in their places": lambda row: str(row["within"]),
        "shapes and colors kept": lambda row: str(row["kept"]),
        "all right": lambda row: str(row["right"]),
    }
    tried = record["results"]
    further, half, between, alike = (
        tried[name] for name in ("further", "half batches", "between", "tasks weighed alike")
    )
    shipped = between["shipped"]
    said = prose(
        f"Futures of {rows[0]['total']} other clips that were not trained on, by guidance, drawn by the trainer on one "
        f"{card(record)} with the weights of before, in layers of {shipped['intermediate_size']}:"
    )
    most, judged = between["shares"][-1], half["measured"]["future_unguided"]
    rates, kept = ([run[of][name] for run in further] for of, name in (("settings", "rate"), ("future", "kept")))
    drawn = [run["drawings_right"] for run in further]
    lost = prose(
        f"Those layers drew {shipped['drawings_right']} of {shipped['drawings']} stills right after "
        f"{shipped['training_seconds'] / 60:.0f} minutes of training, and this did not help: training on for "
        f"{further[0]['settings']['seconds']} s more, with more stills and at {min(rates):g} to {max(rates):g} of the "
        f"learning rate, kept {min(kept)} to {max(kept)} without guidance, not "
        f"{tried['guidance'][0]['kept']}, and drew no better ({min(drawn)} to {max(drawn)} for "
        f"{tried['stills']['drawings_right']} of {rows[0]['total']}). Batches of half the size in a training from the "
        f"other checkpoint, {half['steps']} steps in {half['settings']['until'] / 60:.0f} minutes, kept "
        f"{judged['kept']} of {judged['total']}. Weights between both checkpoints' drew {most['drawings_right']} but "
        f"had forgotten futures {most['share']:.0%} of the way: {most['futures_right_of_50']} of 50 right for "
        f"{shipped['futures_right_of_50']}. What helped: wider layers, trained a little longer, with losses of "
        f"drawings, edits and futures that count more. With all tasks weighed alike such a run drew "
        f"{alike['judged']['drawings_right']} right, and of futures {alike['judged']['future-light']['within']} are in "
        f"their places and {alike['judged']['future-light']['kept']} kept "
        f"([record](../benchmarks/results/{TRIED}.json))."
    )
    return f"{said}\n\n{table(columns, rows)}\n\n{lost}"


FRAMES = Page("docs/frames.md", {"timed": frames, "demo": demo, "guidance": guidance})
