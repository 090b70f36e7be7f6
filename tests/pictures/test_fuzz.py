"""Damaged pictures and absurd headers: our exception or a picture, within seconds and a gigabyte, starting nothing.

More of them by hand, and a record: see `support.fuzz`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from support import picture_fuzz
from support.fuzz import Tally, keep
from support.picture_files import damaged, samples

from lowmem_bagel.errors import ImageError
from lowmem_bagel.pictures.opening import open_picture

COUNT, SEED = int(os.environ.get("FUZZ_INPUTS", "600")), int(os.environ.get("FUZZ_SEED", "0"))


@pytest.mark.timeout(60 + COUNT // 20)
def test_no_damage_leads_astray() -> None:
    """In a process of its own, whose memory is its pictures' alone."""
    command = [sys.executable, picture_fuzz.__file__, str(COUNT), str(SEED)]
    started = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert ran.returncode == 0, ran.stderr[-2000:]
    *failures, summary = map(json.loads, ran.stdout.splitlines())
    assert not failures, failures[:5]
    assert summary["tried"] == COUNT
    refused, (worst, _) = COUNT - summary["opened"], summary["longest"]
    keep(Tally("pictures", SEED, COUNT, refused, seconds, worst, peak_bytes=summary["peak_bytes"]))
    assert COUNT // 10 < summary["opened"] < COUNT * 9 // 10


def test_the_samples_are_pictures() -> None:
    for name, data in samples().items():
        assert open_picture(data).image.mode == "RGB", name


def test_damage_is_found() -> None:
    """The fuzz would pass on inputs that change nothing."""
    from random import Random

    files = samples()
    refused = 0
    for index, name in enumerate(sorted(files) * 3):
        try:
            open_picture(damaged(files[name], Random(index)))
        except ImageError:
            refused += 1
    assert refused > len(files)
