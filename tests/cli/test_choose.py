"""`lowmem-bagel choose`: its table, its commands and its refusals; and that `doctor` says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Ran

from lowmem_bagel.cli.doctor import _chosen
from lowmem_bagel.cli.machine import machine

Cli = Callable[..., Ran]


def test_a_known_card_needs_its_name_alone(cli: Cli) -> None:
    ran = cli("choose", "--card", "4090")
    first, *commands = ran.out.splitlines()[:4]
    assert ran.code == 0 and "on RTX 4090: about" in first and first.endswith("(predicted)")
    assert commands[0].strip() == "lowmem-bagel download"
    assert "--to int8" in commands[1] and "--model bagel-int8 --speed fast" in commands[2]
    assert len(ran.out.splitlines()) < len(cli("choose", "--card", "4090", "--all").out.splitlines())


def test_json_holds_every_choice(cli: Cli) -> None:
    found = json.loads(cli("choose", "--card", "T4", "--task", "ask", "--json").out)
    assert found["machine"]["vram_bytes"] == 15 << 30 and not found["machine"]["here"]
    assert found["choices"][0]["why"] == "recommended"
    assert {"fp16", "int8", "dfloat11", "nf4"} <= {choice["format"] for choice in found["choices"]}
    assert found["commands"][-1].startswith("lowmem-bagel ask ")


def test_folders_are_chosen_from(cli: Cli, reference_checkpoint: Path, tmp_path: Path) -> None:
    assert cli("convert", reference_checkpoint, tmp_path / "small int8", "--to", "int8").code == 0
    options = ("--card", "RTX 3060", "--size", "64", "--max-vram", "6GB", "--json")
    found = json.loads(cli("choose", reference_checkpoint, tmp_path / "small int8", *options).out)
    folders = {(choice["format"], Path(choice["folder"]).name) for choice in found["choices"]}
    assert {
        ("source", reference_checkpoint.name),
        ("int8", "small int8"),
        ("int8", reference_checkpoint.name),
    } <= folders
    assert not any("download" in command for command in found["commands"])
    assert "--width 64 --height 64 --max-vram 6GB" in found["commands"][-1]
    alone = json.loads(cli("choose", tmp_path / "small int8", *options).out)
    assert len(alone["commands"]) == 1 and "'" in alone["commands"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--card", "RTX 9999"), "unknown card 'RTX 9999'.*one of GTX 1080 Ti"),
        (("--vram", "12GB"), "--compute-capability must be like 8.9"),
        (("--compute-capability", "8.9"), "needs --card, or --vram"),
        (("--pcie", "12"), "needs --card, or --vram"),
        (("--card", "T4", "--pcie", "-1"), "--pcie must be a speed"),
        (("--card", "T4", "--vram", "2GB"), "nothing fits on T4"),
        (("--card", "T4", "--size", "0"), "--size must be like 1024"),
        (("--card", "T4", "--shape", "bagel-8b"), "unknown shape 'bagel-8b'"),
        (("nowhere", "--card", "T4"), "no such folder"),
    ],
)
def test_mistakes_are_one_line(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    import re

    assert re.search(words, cli("choose", *arguments).error)


def test_an_unknown_card_that_is_described_will_do(cli: Cli) -> None:
    described = ("--card", "RTX 9999", "--vram", "12GB", "--compute-capability", "8.9")
    assert "on RTX 9999" in cli("choose", *described).out
    assert "those of RTX" in cli("plan", "--shape", "bagel-7b", *described).out


def test_doctor_recommends_what_choose_does(cli: Cli) -> None:
    for card in ("RTX 4090", "T4"):
        line, commands = _chosen(machine(card, None, None, None, None))
        out = cli("choose", "--card", card).out
        assert out.splitlines()[0] == line
        assert [said.strip() for said in out.splitlines()[1 : 1 + len(commands)]] == commands
    assert _chosen(machine("", None, None, "4GB", None))[1] == []


def test_torch_is_not_waited_for() -> None:
    code = "import sys; from lowmem_bagel.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code, "choose", "--card", "T4"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
