"""Odd command lines, in this process: done, or refused with exit code 2 and one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from support.command import ATTACK, drives_a_terminal
from support.fuzz import fuzz
from support.paths import CHECKPOINT

from lowmem_bagel.cli import main
from lowmem_bagel.cli.app import COMMANDS
from lowmem_bagel.cli.options import Command, flag_of

INPUTS = 150

VALUES = (
    "", "0", "1", "-1", "0.5", "nan", "inf", "-inf", "1e999", "2", "16", "32", "1024", "99999999999999999999",
    "8GB", "0GB", "1e30GB", "-1GB", "24GB", "1,2", "32x48", "0x0", "9" * 5000, "auto", "cpu", "cuda", "bfloat16",
    "int8", "gguf", "und", "all", "bagel-7b", "8.9", "0.0", "99.99", "taylorseer", "first-block", "generate,ask", ",",
    "x", "é中", "a b", ATTACK, "\0", "\udcff", "\ud800", "--", "-", "~", "~no-such-user/x", "/", ".", "..", "/dev/null",
    "/dev/zero", "/proc/self/mem", "nowhere/x", "x" * 300, "x/" * 3000, "file.png", "out.png", "-o",
)  # fmt: skip
WORDS = {
    "demo": 0, "convert": 2, "inspect": 1, "verify": 1, "plan": 1, "doctor": 0, "generate": 1, "edit": 2, "ask": 1,
    "batch": 2, "bench": 1, "": 0, "nonsense": 1,
}  # fmt: skip
"""Commands and how many arguments they take. What `download` does with its own is part of the hub's tests."""
SMALL = ["--num-timesteps", "2", "--height", "32", "--width", "32"]
QUICK = {"generate": SMALL, "edit": SMALL, "ask": ["--max-new-tokens", "2"]}
SLOW = ("demo", "doctor")
"""These work for seconds where nothing is wrong: here something always is."""


OTHER_FLAGS = (
    "--model", "--json", "--out", "-o", "--image", "--tensors", "--source", "--to", "--shape", "--vram", "--card",
    "--compute-capability", "--ram", "--pcie", "--format", "--shard-size", "--experts", "--help", "--nonsense",
)  # fmt: skip


def flags(name: str) -> list[str]:
    known = COMMANDS.get(name)
    groups = known.groups.values() if isinstance(known, Command) else ()
    return [*OTHER_FLAGS, *(flag_of(option) for options in groups for option in options())]


def command_line(random: Random, folder: Path) -> list[str]:
    values = (*VALUES, str(folder))
    name = random.choice(list(WORDS))
    words = random.choices(values, k=max(0, WORDS[name] + random.choice((-1, 0, 0, 0, 1))))
    for flag in random.choices(flags(name), k=random.choice((0, 1, 2, 4))):
        words += [flag, random.choice(values)] if random.random() < 0.8 else [flag]
    if name in ("generate", "edit", "ask"):
        # Loading a model takes its time; mostly there is none.
        words += ["--model", str(CHECKPOINT) if random.random() < 0.01 else random.choice(("nowhere", "."))]
        words += QUICK[name]
    if name in SLOW:
        words = ["--nonsense", *words]
    return [name, *words] if name else words


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "here"  # ".." is asked for too
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "file.png").write_bytes(b"no picture")
    (folder / "model").mkdir()
    os.mkfifo(folder / "model" / "llm_config.json")
    import lowmem_bagel.converters.engine.registry

    import lowmem_bagel.pipeline  # noqa: F401  # what takes its time, once

    def make(random: Random) -> Callable[[], object]:
        arguments = command_line(random, folder / "model")

        def run() -> None:
            monkeypatch.setattr("sys.argv", ["lowmem-bagel", *arguments])
            capfd.readouterr()
            try:
                main()
            finally:
                said = capfd.readouterr()
                assert not drives_a_terminal(said.out + said.err), (arguments, said)
                assert "Traceback" not in said.err

        return run

    fuzz("command lines", make, INPUTS, tmp_path)
