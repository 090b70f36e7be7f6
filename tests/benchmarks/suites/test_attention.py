"""`bench attention`: what is timed is right, and what is read from machine code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem_bagel.benchmarks.cases import Setup
from lowmem_bagel.benchmarks.machine_code import instructions, longest_loop
from lowmem_bagel.benchmarks.record import read_records
from lowmem_bagel.benchmarks.suites import attention
from lowmem_bagel.benchmarks.timing import Call
from support.command import Ran
from support.paths import RESULTS

from lowmem_bagel.checkpoint.config import DecoderConfig
from lowmem_bagel.kernels import attention_int8, triton_language
from lowmem_bagel.ops.attention.select import reference_attention

SMALL = Setup(torch.device("cpu"), DecoderConfig(64, 1, 4, 2, 32, 128, 1e6, 1e-6), 140, False, torch.bfloat16)
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
                                                               /* 0x000fe40000000f00 */
        /*0010*/                   IMMA.16832.S8.S8 R4, R8.ROW, R2.COL, R4 ;  /* 0x0 */
        /*0020*/              @!P0 FADD.FTZ R3, R3, R4 ;       /* 0x0 */
        /*0030*/               @P1 BRA.U UP0, 0x10 ;           /* 0x0 */
        /*0040*/                   BRA 0x60 ;                  /* 0x0 */
        /*0050*/                   BRA 0x50;                   /* 0x0 */
"""


def test_rows_are_of_results_that_were_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(calls: Sequence[Call]) -> float:
        assert len(calls) == attention.SETS
        return 1e-3

    def integers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, smooth: bool) -> torch.Tensor:
        k = attention_int8.smoothed(k[0]) if smooth else k[0]
        return attention_int8.attend_reference(attention_int8.quantize_reference(q[0], k), v[0])[None]

    ways = {
        "exact": reference_attention,
        "int8": partial(integers, smooth=True),
        "raw": partial(integers, smooth=False),
    }
    found = list(attention.rows(replace(SMALL, longest=140), ways, timer))
    assert [row["way"] for row in found] == [*ways, "int8's preparation"]
    exact, smooth, raw, _ = (row["errors"] for row in found)
    for kind in ("normal", "outlier keys"):
        assert exact[kind]["relative_l2"] < 1e-6
        assert 1e-3 < smooth[kind]["relative_l2"] < 0.02
    assert raw["outlier keys"]["relative_l2"] > 3 * smooth["outlier keys"]["relative_l2"]
    assert found[0]["tflop_s"] == pytest.approx(4 * 140 * 172 * SMALL.decoder.num_heads * SMALL.decoder.head_dim / 1e9)


def test_the_longest_loop_is_read_from_a_listing() -> None:
    found = instructions(LISTING)
    assert len(found) == 6
    assert [name for _, name, _ in longest_loop(found)] == ["IMMA.16832.S8.S8", "FADD.FTZ", "BRA.U"]
    assert longest_loop(found[:2]) == []


@pytest.mark.skipif(triton_language.MISSING is not None, reason=str(triton_language.MISSING))
def test_the_compilers_record_is_written_as_the_committed_one(
    tmp_path: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CAPABILITIES", ((8, 6),))
    assert cli("bench", "attention", "--compiled", "--out", tmp_path / "new.json").code == 0
    new = json.loads((tmp_path / "new.json").read_text())["results"]
    old = [row for row in read_records(RESULTS)["attention_int8_compiled"]["results"] if row["capability"] == [8, 6]]
    fixed = ("capability", "dtype", "queries", "keys", "warps", "stages", "spilled_bytes", "shared_bytes")
    assert len(new) == len(old) == 2

    def of(row: dict[str, Any]) -> list[Any]:
        return [row[name] for name in fixed] + [row["loop"][name] for name in ("IMMA", "HMMA")]

    for row, before in zip(new, old, strict=True):
        assert row.keys() == before.keys()
        assert of(row) == of(before), "the kernel or its launch changed: lowmem-bagel bench attention --compiled"
