"""Every warning is an error, and every file that stays open is told: nothing is said in the usual course of things."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import CHECKPOINT

from lowmem_bagel.demo_checkpoint import FOLDER

COMMANDS: list[list[str]] = [
    ["demo", "--num-timesteps", "2", "--out", "drawn"],
    *(["convert", str(CHECKPOINT), form, "--to", form] for form in ("int8", "dfloat11", "fp16")),
    ["verify", "int8", "--source", str(CHECKPOINT)],
    ["inspect", "int8"],
    ["inspect", "drawn/draw-1.png", "--json"],
    ["plan", "dfloat11"],
    ["ask", "what?", "--image", "drawn/draw-1.png", "--max-new-tokens", "2"],
    ["ask", "what?", "--max-new-tokens", "2", "--model", "int8"],
]
PROGRAM = f"""
import gc, sys
from lowmem_bagel.cli import main
for arguments in {json.dumps(COMMANDS)}:
    sys.argv = ["lowmem-bagel", *arguments]
    try:
        main()
    except SystemExit as exit:
        assert exit.code == 0, arguments
gc.collect()  # once: what nothing holds any more waits for it, and each goes through all that there is
"""


@pytest.mark.skipif(not list(FOLDER.glob("*.safetensors")), reason="the demo checkpoint is not in this checkout")
def test_no_command_warns_or_leaves_a_file_open(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.splitlines() if not line.startswith(("note: about", "Using the embedded"))]
    assert not said
