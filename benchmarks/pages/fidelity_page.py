"""docs/fidelity.md: how far variants are from their source, of each record of `bench fidelity`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .page import Column, Page, Records, again, prose, table

DEMO, H200 = "fidelity_demo", "fidelity_h200"
MORE = {H200: ("fidelity_fp16_h200",)}
"""Records of variants that one has not, of the same model and material."""


def fidelity(name: str, records: Records) -> str:
    """A record's conditions and rows; columns of what it has not are left out."""
    record = records[name]
    settings, results, hardware = record["settings"], record["results"], record["hardware"]
    material, drawn = results["material"], bool(results["source"]["files"])
    pictures = f"{material['pictures']} pictures of {settings['num_timesteps']} timesteps, " if drawn else ""
    machine = hardware.get("gpu", hardware["cpu"])
    more = [records[other] for other in MORE.get(name, ())]
    rows = [row for one in (record, *more) for row in one["results"]["variants"] if row["state"] == "measured"]
    commits = [record["commit"], *(f"{other['commit']} ({_names(other)})" for other in more)]
    said = (
        f"The {settings['model']} in {results['source']['dtype']} on one {machine}, commit {', '.join(commits)}; "
        f"{pictures}{settings['trajectories']} ways of {settings['num_timesteps']} timesteps compared "
        f"step by step, {material['texts']} texts. Rows of arithmetic are beside float32."
    )
    columns = {head: make for head, make in COLUMNS.items() if drawn or head not in DRAWN}
    return f"{prose(said)}\n\n{table(columns, rows)}"


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(row["name"] for row in record["results"]["variants"])


def _share(name: str, row: Mapping[str, Any]) -> str:
    return f"{row['text'][name]:.1%}"


def _decibels(which: str, row: Mapping[str, Any]) -> str:
    found = row["pictures"]["psnr_db"][which]
    return "equal" if found == "inf" else f"{found:.1f}"


def _error(make: Callable[[Mapping[str, Any]], float | None]) -> Column:
    """Two digits, and 0 for what is exactly that."""

    def cell(row: Mapping[str, Any]) -> str:
        found = make(row)
        return "" if found is None else "0" if found == 0 else f"{found:.1e}"

    return cell


COLUMNS: Mapping[str, Column] = {
    "": lambda row: row["name"],
    "compared": lambda row: row["kind"] + (", exact" if row["exact"] else ""),
    "MB": lambda row: f"{row['stored_bytes'] / 1e6:.1f}",
    "KL, nats": _error(lambda row: row["text"]["kl_nats"]["mean"]),
    "largest": _error(lambda row: row["text"]["kl_nats"]["max"]),
    "same likeliest token": partial(_share, "top_agreement"),
    "PSNR, dB": partial(_decibels, "median"),
    "worst": partial(_decibels, "worst"),
    "SSIM": lambda row: f"{row['pictures']['ssim']['median']:.4f}",
    "first velocity, plain": _error(lambda row: row["velocity"]["first_plain"]),
    "guided": _error(lambda row: row["velocity"]["first_guided"]),
    "worst step": _error(lambda row: max(row["velocity"]["per_step"])),
    "last layer": _error(lambda row: row["layers"][-1] if row["layers"] else None),
}
DRAWN = ("PSNR, dB", "worst", "SSIM")

FIDELITY_PAGE = Page(
    "docs/fidelity.md",
    {
        "demo": partial(fidelity, DEMO),
        "h200": partial(fidelity, H200),
        "commands": partial(again, before={DEMO: "fidelity", H200: "fidelity"}),
    },
)
