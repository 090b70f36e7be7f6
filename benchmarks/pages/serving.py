"""docs/serving.md: what the server costs beside its pipeline, and what kept contexts save."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from .measured import card
from .page import Page, Records, prose


def cost(records: Records) -> str:
    record = records["serving_h200"]
    settings, (found,) = record["settings"], record["results"]
    rates = ", ".join(f"{of['pictures_a_minute']:.2f} for {number}" for number, of in found["clients"].items())
    direct, served = (median(found[way]) for way in ("pipeline_seconds", "api_seconds"))
    pieces = found.get("api_pieces")
    return prose(
        f"On one {card(record)}, commit {record['commit']}, random weights in {found['row']}, "
        f"{settings['size']}x{settings['size']}, {settings['num_timesteps']} timesteps: a picture takes {direct:.2f} s "
        f"by the pipeline and {served:.2f} s through the API, {found['api_share']:.1%} more. Pictures a minute by the "
        f"number of clients: {rates}. The pictures of random weights are noise, the most that a PNG can have to write. "
        + (_of_what(pieces) if pieces else "PNGs were written with more effort then than now.")
    )


def _of_what(pieces: Mapping[str, float]) -> str:
    named = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in pieces.items() if name != "drawing")
    return f"Of the API's time, in ms beside the drawing: {named}."


def contexts(records: Records) -> str:
    record = records["contexts_h200"]
    size, (found,) = record["settings"]["size"], record["results"]
    took = {name: f"{seconds * 1e3:.0f}" for name, seconds in found["seconds"].items()}
    return prose(
        f"On one {card(record)} in {found['row']}, of a picture of {size}x{size}: the first question's first token is "
        f"there after {took['first']} ms, a second one's after {took['second']} ({found['second_over_first']:.2f} of "
        f"it), the same answer to the bit; an edit's contexts take {took['edit']} ms, and {took['edit_again']} when it "
        "is made again. A question and the token that starts its answer took a pass each over all layers then, and the "
        "time to launch it; now they take one together."
    )


def page(records: Records) -> str:
    record = records["serving_page_cpu"]
    found = record["results"]
    took = {name: median(start[name] for start in found["starts"]) for name in found["starts"][0]}
    (few, before), (many, after) = found["rss_bytes"][0], found["rss_bytes"][-1]
    return prose(
        f"On {record['hardware']['cores']} cores that other work shared, the demo checkpoint: the command "
        f"listens after {took['listening']:.1f} s, its page is there after {took['page']:.1f} and its model after "
        f"{took['ready']:.1f}. The process holds {before / 1e6:.0f} MB after {few} answers "
        f"and {after / 1e6:.0f} after {many}. A picture's last preview differs from the picture by "
        f"{found['previews']['error']:.1f} of 255."
    )


SERVING = Page("docs/serving.md", {"cost": cost, "contexts": contexts, "page": page})
