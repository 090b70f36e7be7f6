"""The page of the kernels says what the records say, and the records say that every kernel was right."""

from __future__ import annotations

from copy import deepcopy

from lowmem_bagel.benchmarks.pages.kernels import FP8, KERNELS, OUTLIERS, median_errors
from lowmem_bagel.benchmarks.record import read_records
from support.paths import RESULTS, ROOT

RECORDS = read_records(RESULTS)
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_figures_that_change_change_the_page() -> None:
    changed = deepcopy(RECORDS)
    changed["kernels_h200"]["results"]["kernels"][0]["seconds"] *= 2
    changed["kernels_steps_h200"]["results"]["kernels"][0]["seconds"] *= 2
    changed["kernels_lossless_h200"]["results"]["dfloat11"]["layer"]["gb_s"] *= 2
    for row in changed["codec_errors_demo_checkpoint"]["results"]:
        row["arithmetic"] *= 2
    before = PAGE.splitlines()
    assert len([line for line in KERNELS.text(changed, PAGE).splitlines() if line not in before]) == 4


def test_every_kernel_was_right_and_could_run() -> None:
    found = RECORDS["kernels_h200"]["results"]
    assert all(case["right"] for case in found["kernels"])
    assert not [status for status in found["availability"] if status["reason"]]
    # Above the ceiling would mean that what is measured stays in the cache, or that the ceiling is none.
    steps = RECORDS["kernels_steps_h200"]["results"]["kernels"]
    assert all(case["right"] for case in steps)
    assert all(0 < case["of_ceiling"] < 1 for case in (*found["kernels"], *steps))
    assert RECORDS["kernels_lossless_h200"]["results"]["dfloat11_exact"]["weights"] > 0
    assert (
        RECORDS["sanitizer_h200"].count("ERROR SUMMARY: 0 errors")
        == RECORDS["sanitizer_h200"].count("$ compute-sanitizer")
        == 4
    )


def test_the_records_say_of_fp8_what_the_page_says() -> None:
    for data, errors in median_errors(RECORDS).items():
        assert errors["int8 rotated"] < errors["fp8"]
        assert (errors["int8"] > errors["fp8"]) == (data == OUTLIERS), data


def test_fp8_was_timed_beside_int8_at_the_pictures_sizes() -> None:
    timed = [case["shape"] for case in RECORDS["kernels_h200"]["results"]["kernels"] if FP8 in case["rivals"]]
    for linear in ("qkv", "o", "gate_up", "down"):
        assert {f"{linear} {tokens}" for tokens in (4096, 8192)} <= {" ".join(shape.split()[:2]) for shape in timed}
