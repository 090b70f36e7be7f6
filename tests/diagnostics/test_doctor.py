"""The doctor's verdicts, and that it answers on any machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lowmem_bagel.cli.doctor import doctor_command, finding_rows, rows
from lowmem_bagel.diagnostics import probe as probing
from lowmem_bagel.diagnostics import trials
from lowmem_bagel.diagnostics.advice import diagnose
from lowmem_bagel.diagnostics.trials import Findings, try_all
from lowmem_bagel.hardware import host
from lowmem_bagel.hardware.profile import Availability, HardwareProfile
from lowmem_bagel.hardware.torch_builds import CPU_COMMAND, CUDA_12_COMMAND, CUDA_13_COMMAND

GB = 1 << 30
ON_CPU = HardwareProfile(torch_version="2.13.0+cpu", attention=("sdpa", "chunked"), ram_total=16 * GB)
PASCAL = host.DriverCard("NVIDIA GeForce GTX 1080 Ti", (6, 1), "580.10", 11 * GB)
ADA = host.DriverCard("NVIDIA GeForce RTX 4090", (8, 9), "580.10", 24 * GB)
READY = replace(
    ON_CPU,
    device="cuda",
    device_name=ADA.name,
    capability=(8, 9),
    vram_total=24 * GB,
    vram_free=23 * GB,
    native_bf16=True,
    torch_version="2.14.0+cu130",
    torch_cuda="13.0",
    torch_archs=("sm_80", "sm_90"),
    torch_has_code=True,
    driver_cards=(ADA,),
)


@pytest.mark.parametrize(
    ("profile", "level", "command", "words"),
    [
        (READY, "ready", "lowmem-bagel demo", ("RTX 4090", "bfloat16", "sdpa")),
        (replace(READY, capability=(7, 5), native_bf16=False), "ready", "lowmem-bagel demo", ("float16",)),
        (ON_CPU, "limited", "lowmem-bagel demo", ("no NVIDIA card found",)),
        (replace(ON_CPU, platform="macos"), "limited", "lowmem-bagel demo", ("MPS",)),
        (replace(ON_CPU, torch_version=None), "blocked", CPU_COMMAND, ("cannot be imported",)),
        (replace(ON_CPU, torch_version=None, driver_cards=(ADA,)), "blocked", CUDA_13_COMMAND, ("8.9",)),
        (replace(ON_CPU, attention=()), "blocked", CPU_COMMAND, ("no attention backend",)),
        (replace(ON_CPU, driver_cards=(ADA,)), "limited", CUDA_13_COMMAND, ("RTX 4090 is not used", "CPU build")),
        (replace(ON_CPU, driver_cards=(PASCAL,)), "limited", CUDA_12_COMMAND, ("CUDA 13 starts at 7.5",)),
        (
            replace(ON_CPU, torch_cuda="13.0", driver_cards=(replace(ADA, driver="550.54"),)),
            "limited",
            CUDA_12_COMMAND,
            ("driver is too old", "550"),
        ),
        (
            replace(READY, device="cpu", capability=(6, 1), torch_has_code=False, driver_cards=(PASCAL,)),
            "limited",
            CUDA_12_COMMAND,
            ("no code for it", "sm_80", "12.6 build of torch 2.14 or older"),
        ),
        (
            replace(READY, device="cpu", problems=("a computation on the card: RuntimeError: no kernel image",)),
            "limited",
            CUDA_13_COMMAND,
            ("no kernel image",),
        ),
        (
            replace(ON_CPU, torch_cuda="13.0", driver_cards=(ADA,), problems=("CUDA_VISIBLE_DEVICES=-1 decides",)),
            "limited",
            "unset CUDA_VISIBLE_DEVICES",
            ("CUDA_VISIBLE_DEVICES=-1",),
        ),
        (
            replace(
                ON_CPU,
                platform="windows",
                torch_cuda="13.0",
                driver_cards=(ADA,),
                problems=("CUDA_VISIBLE_DEVICES=-1 decides",),
            ),
            "limited",
            "set CUDA_VISIBLE_DEVICES=",
            ("CUDA_VISIBLE_DEVICES=-1",),
        ),
        (
            replace(ON_CPU, driver_cards=(replace(ADA, capability=(3, 5), name="Tesla K40"),)),
            "limited",
            "lowmem-bagel demo",
            ("Tesla K40", "use the CPU"),
        ),
        (replace(ON_CPU, driver_cards=(replace(ADA, capability=None),)), "limited", CUDA_13_COMMAND, ("unknown",)),
    ],
)
def test_verdict(profile: HardwareProfile, level: str, command: str, words: tuple[str, ...]) -> None:
    diagnosis = diagnose(profile)
    assert (diagnosis.level, diagnosis.command) == (level, command)
    for word in words:
        assert word in diagnosis.summary
    assert "\n" not in diagnosis.summary


def test_notes() -> None:
    missing = {"triton": Availability(False, "gone"), "nvrtc": Availability(False, "no library")}
    profile = replace(READY, packages=missing, platform="wsl2", pin_limit=8 * GB, pinned_gbps=6.0, pageable_gbps=5.9)
    notes = " | ".join(diagnose(profile).notes)
    for words in ("8.0 GB", "no Triton (gone)", "no NVRTC (no library)", "hardly faster"):
        assert words in notes
    assert diagnose(READY).notes == ()


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(doctor_command)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_doctor_prints_a_verdict_and_the_next_command() -> None:
    output = run("--no-measure")
    assert str(torch.__version__) in output
    assert output.strip().splitlines()[-1].startswith("next: ")


def test_doctor_json_holds_the_profile() -> None:
    answer = json.loads(run("--json", "--no-measure"))
    assert HardwareProfile.from_json(answer["profile"]).torch_version == str(torch.__version__)
    assert answer["verdict"]["level"] in ("ready", "limited", "blocked")
    assert answer["abilities"]["backends"]["int8"]["native"]["available"]
    assert "rope" in answer["abilities"]["kernels"]


def test_abilities_of_a_processor() -> None:
    able = try_all(replace(ON_CPU, packages={"bitsandbytes": Availability(False, "not installed (pip install it)")}))
    shown = dict(finding_rows(able))
    assert shown["our kernels"] == "none"
    assert shown["  none of them"] == "needs a CUDA GPU, not cpu"
    assert "native" in shown["int8 by"]
    assert "bitsandbytes" not in shown["int8 by"]
    assert shown["  not bitsandbytes"] == "not installed (pip install it)"
    assert {"native", "cpu"} <= set(shown["dfloat11 by"].split(", "))
    assert not able.backends["int8"]["bitsandbytes"].available
    assert able.problems == ()


def test_abilities_of_a_card_are_those_of_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"gemv": "its trial was wrong", "fused": "no Triton", "nf4": "no Triton"}
    monkeypatch.setattr(trials, "kernel_report", lambda device: {"rope": None, **refused})
    able = try_all(replace(READY, packages={"nvrtc": Availability(False, "no library")}))
    shown = dict(finding_rows(able))
    assert (shown["our kernels"], shown["  not gemv"]) == ("rope", "its trial was wrong")
    assert shown["  not fused"] == "nor nf4: no Triton"
    assert able.backends["dfloat11"]["native"].reason == "no library"
    assert try_all(READY).backends["dfloat11"]["native"].available


def test_abilities_that_cannot_be_looked_at_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "kernel_report", fail)
    assert try_all(ON_CPU).problems == ("kernels: OSError: injected [/bold]",)
    assert try_all(replace(ON_CPU, torch_version=None)) == Findings()


def test_doctor_shows_what_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "sdpa,triton")
    output = run("--no-measure")
    assert "sdpa, triton (LOWMEM_BAGEL_DISABLE)" in output
    assert "chunked, math" in output
    profile = json.loads(run("--json", "--no-measure"))["profile"]
    assert "sdpa" not in profile["attention"]
    assert profile["attention_refused"]["sdpa"] == "switched off by LOWMEM_BAGEL_DISABLE"


def test_doctor_says_why_a_disk_speed_is_missing(tmp_path: Path) -> None:
    assert "problem: disk speed: ValueError: no file of 64 MiB or more" in run(str(tmp_path / "missing"))


def fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError("injected [/bold]")


PROBES = [
    (host, "current_platform"),
    (host, "memory"),
    (host, "processor"),
    (host, "cores"),
    (host, "driver_cards"),
    (probing, "try_attention"),
    (probing.importlib, "import_module"),
    (probing.importlib.util, "find_spec"),
    (torch.cuda, "is_available"),
]


@pytest.mark.parametrize("place", [*PROBES, None], ids=lambda place: place[1] if place else "all")
@pytest.mark.parametrize("option", ["--measure", "--json"])
def test_doctor_answers_when_probes_fail(
    place: tuple[Any, str] | None, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in [place] if place else PROBES:
        monkeypatch.setattr(owner, name, fail)
    output = run(option)
    assert "injected [/bold]" in output
    if option == "--json":
        assert json.loads(output)["verdict"]["command"]


TEXT = st.text(max_size=20)
CAPABILITY = st.none() | st.tuples(st.integers(0, 20), st.integers(0, 9))
CARDS = st.lists(st.builds(host.DriverCard, TEXT, CAPABILITY, TEXT, st.integers(0, 1 << 40)), max_size=2)
PROFILES = st.builds(
    HardwareProfile,
    device=st.sampled_from(["cuda", "cpu"]),
    device_name=TEXT,
    capability=CAPABILITY,
    native_bf16=st.booleans(),
    attention=st.lists(TEXT, max_size=2).map(tuple),
    attention_refused=st.dictionaries(TEXT, TEXT, max_size=2),
    pinned_gbps=st.none() | st.floats(0, 100),
    pageable_gbps=st.none() | st.floats(0, 100),
    platform=st.sampled_from(["linux", "wsl2", "windows", "macos"]),
    pin_limit=st.integers(0, 1 << 40),
    cpu_features=st.lists(TEXT, max_size=2).map(tuple),
    torch_version=st.none() | TEXT,
    torch_cuda=st.none() | TEXT,
    torch_archs=st.lists(TEXT, max_size=2).map(tuple),
    torch_has_code=st.none() | st.booleans(),
    packages=st.dictionaries(TEXT, st.builds(Availability, st.booleans(), TEXT), max_size=2),
    driver_cards=CARDS.map(tuple),
    problems=st.lists(TEXT, max_size=2).map(tuple),
)


@settings(max_examples=150)
@example(HardwareProfile(capability=(7, 5), torch_version="2.11", problems=()))
@example(HardwareProfile(driver_cards=(host.DriverCard("", (0, 0), "¹", 0),)))  # a digit, and no number
@given(PROFILES)
def test_any_profile_gets_a_verdict_and_a_table(profile: HardwareProfile) -> None:
    assert diagnose(profile).command
    table = list(rows(profile))
    assert table[0][0] == "card"
    for name, refusal in profile.attention_refused.items():
        assert (f"  not {name}", refusal) in table
    assert HardwareProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
