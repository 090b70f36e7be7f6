"""Imported by what forks: conversions, done once, so that children need not wait for what a first one loads."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import torch

from support.killed_conversions import run
from support.paths import CHECKPOINT

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    for name in ("int8", "gguf-q8_0"):
        run(CHECKPOINT, Path(folder) / name, name)
gc.collect()
gc.freeze()  # or every child goes through all that was imported, and gets a copy of the pages that this writes to
