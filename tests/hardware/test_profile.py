"""The probe on good, odd and broken machines; facts about cards and torch builds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_bagel.diagnostics import probe as probing
from lowmem_bagel.diagnostics.probe import probe
from lowmem_bagel.errors import ConfigError, SettingError
from lowmem_bagel.formats.registry import packages
from lowmem_bagel.hardware import host
from lowmem_bagel.hardware.gpu_specs import CARDS, find_card
from lowmem_bagel.hardware.profile import FIRST_NATIVE_BF16, Availability, HardwareProfile
from lowmem_bagel.hardware.torch_builds import CUDA_12_COMMAND, CUDA_13_COMMAND, build_for, covers
from lowmem_bagel.planner.estimate import this_machine

CPU = torch.device("cpu")


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("injected\nsecond line")


@pytest.fixture(scope="module")
def here() -> HardwareProfile:
    return probe(measure=False)


def test_probe_finds_this_machine(here: HardwareProfile) -> None:
    assert here.torch_version == str(torch.__version__)
    assert 0 < here.ram_available <= here.ram_total
    assert here.cores >= 1
    assert "chunked" in here.attention
    assert set(here.packages) == {"bitsandbytes", "dfloat11", "quanto", "flash-attn", "triton", "nvrtc"}
    assert not here.assumed
    if not torch.cuda.is_available():
        assert here.device == "cpu"
        assert here.attention[0] == "sdpa"
        assert here.attention_refused["flash"] == "needs a CUDA GPU, not cpu"
        assert here.packages["triton"] == Availability(False, "needs a CUDA GPU")


@pytest.mark.gpu
def test_probe_finds_the_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    profile = probe()
    assert profile.device == "cuda"
    assert profile.torch_has_code
    assert 0 < profile.vram_free <= profile.vram_total
    assert profile.pinned_gbps is not None
    assert profile.pinned_gbps > 1
    assert profile.pageable_gbps is not None
    assert profile.problems == ()


def test_profile_is_frozen_and_goes_through_json(here: HardwareProfile) -> None:
    card = host.DriverCard("NVIDIA X", (8, 9), "580.1", 24 << 30)
    for profile in (here, replace(here, capability=(7, 5), driver_cards=(card, replace(card, capability=None)))):
        assert HardwareProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    with pytest.raises(FrozenInstanceError):
        here.cores = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [
        {"warp": 9},
        {"capability": "86"},
        {"capability": [8]},
        {"packages": {"x": {}}},
        {"driver_cards": [{}]},
        {"packages": 3},
    ],
)
def test_damaged_profile_is_refused(here: HardwareProfile, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="hardware profile"):
        HardwareProfile.from_json(here.to_json() | change)


def test_hypothetical_cards() -> None:
    old = HardwareProfile.hypothetical(11, (6, 1), 16, 12)
    assert (old.native_bf16, old.attention_dtype) == (False, "float16")
    assert old.attention == (), "nothing was tried"
    assert (old.vram_free, old.ram_total, old.pinned_gbps) == (11 << 30, 16 << 30, 12)
    new = HardwareProfile.hypothetical(24, (8, 9), 32, 25, kind="wsl2")
    assert new.native_bf16
    assert new.pin_limit == 16 << 30
    assert new.assumed
    none = HardwareProfile.hypothetical(0, None, 16, 0)
    assert (none.device, none.capability, none.vram_total) == ("cpu", None, 0)


HOST_PROBES = ("current_platform", "memory", "processor", "cores", "driver_cards")


@pytest.mark.parametrize("name", HOST_PROBES)
def test_a_failing_host_probe_is_a_recorded_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, name, fail)
    profile = probe(measure=False)
    assert any("RuntimeError: injected second line" in problem for problem in profile.problems)
    assert profile.attention


def test_everything_failing_still_gives_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in HOST_PROBES:
        monkeypatch.setattr(host, name, fail)
    monkeypatch.setattr(host, "disk_read_speed", fail)
    monkeypatch.setattr(probing, "try_attention", fail)
    monkeypatch.setattr(probing.importlib.util, "find_spec", fail)
    for name in ("is_available", "get_arch_list", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, fail)
    profile = probe(measure=True, disk_path=tmp_path)
    assert len(profile.problems) >= len(HOST_PROBES) + 3 + len(packages())
    assert profile.attention == ()
    assert profile.packages["quanto"] == Availability(False, "optimum-quanto: RuntimeError: injected second line")


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("DLL load failed"), RuntimeError("odd")])
def test_a_torch_that_cannot_be_imported(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise error

    monkeypatch.setattr(probing.importlib, "import_module", import_module)
    profile = probe()
    assert profile.torch_version is None
    assert profile.attention == ()
    assert profile.problems[0] == f"torch: {type(error).__name__}: {error}"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A pretended card; what computes on it is pretended too."""

    def pretend(capability: tuple[int, int] = (8, 9), archs: tuple[str, ...] = ("sm_80", "sm_90"), **more: Any) -> None:
        answers: dict[str, Any] = {
            "is_available": lambda: True,
            "get_device_name": lambda i=0: "NVIDIA Pretended",
            "get_device_capability": lambda i=0: capability,
            "get_arch_list": lambda: list(archs),
            "mem_get_info": lambda i=0: (20 << 30, 24 << 30),
        }
        for name, answer in (answers | more).items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(probing, "computes", lambda torch, card: True)
        monkeypatch.setattr(probing, "copy_speed", lambda pinned, free, card: 25.0 if pinned else 6.0)
        monkeypatch.setattr(probing, "try_attention", lambda *given: (("efficient",), {"flash": "too old"}))
        monkeypatch.setattr(probing, "why_no_triton", lambda device: None)
        monkeypatch.setattr(probing, "why_no_nvrtc", lambda device: "no NVRTC library")

    return pretend


def test_a_card_that_works(card: Callable[..., None]) -> None:
    card()
    profile = probe()
    assert (profile.device, profile.capability, profile.torch_has_code) == ("cuda", (8, 9), True)
    assert (profile.vram_free, profile.vram_total) == (20 << 30, 24 << 30)
    assert (profile.pinned_gbps, profile.pageable_gbps) == (25.0, 6.0)
    assert (profile.native_bf16, profile.attention_dtype) == (True, "bfloat16")
    assert profile.packages["triton"] == Availability(True, "runs")
    assert profile.packages["nvrtc"] == Availability(False, "no NVRTC library")


def test_emulated_bfloat16_is_not_native(card: Callable[..., None]) -> None:
    card((7, 5), ("sm_75",))
    profile = probe()
    assert not profile.native_bf16
    assert profile.attention_dtype == "float16"


def test_the_card_that_is_asked_for_is_probed(card: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question and trial is about it, not about the first card or torch's current one."""
    asked = []
    card(
        get_device_name=lambda i: ("NVIDIA New", "NVIDIA Old")[i],
        get_device_capability=lambda i: ((8, 9), (7, 5))[i],
        mem_get_info=lambda i: ((20 << 30, 24 << 30), (3 << 30, 8 << 30))[i],
        device_count=lambda: 2,
    )
    monkeypatch.setattr(probing, "computes", lambda torch, card: card == 1)
    monkeypatch.setattr(probing, "try_attention", lambda *given: asked.append(given) or ((), {}))
    monkeypatch.setattr(probing, "why_no_triton", lambda device: asked.append(device))
    profile = this_machine("cuda:1")
    assert (profile.device_name, profile.capability, profile.native_bf16) == ("NVIDIA Old", (7, 5), False)
    assert (profile.vram_free, profile.vram_total) == (3 << 30, 8 << 30)
    assert asked == [("cuda:1", "float16", False), torch.device("cuda", 1)]
    assert probe(measure=False).device == "cpu", "the first card does not compute"
    for device, reason in (("cuda:2", "2 CUDA devices are usable"), ("cuda:one", "unknown device")):
        with pytest.raises(SettingError, match=reason):
            this_machine(device)


def test_a_card_without_code_for_it_is_not_used(card: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    card((6, 1), ("sm_75", "sm_80"))
    monkeypatch.setattr(probing, "computes", fail)
    profile = probe()
    assert (profile.device, profile.torch_has_code, profile.capability) == ("cpu", False, (6, 1))
    assert any("a computation on the card" in problem for problem in profile.problems)


@pytest.mark.parametrize("name", ["get_device_name", "get_device_capability", "get_arch_list", "mem_get_info"])
def test_each_question_to_the_card_may_fail(name: str, card: Callable[..., None]) -> None:
    card(**{name: fail})
    profile = probe()
    assert profile.device == "cuda"
    assert len(profile.problems) == 1


@pytest.mark.parametrize("name", ["copy_speed", "try_attention", "why_no_triton", "why_no_nvrtc"])
def test_each_trial_on_the_card_may_fail(name: str, card: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    card()
    monkeypatch.setattr(probing, name, fail)
    assert any("injected" in problem for problem in probe().problems)


# That its trial passes is a case of support/triton_kernels.py.
def test_triton_trial_notices_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_bagel.kernels import triton_language

    monkeypatch.setattr(triton_language, "MISSING", "Triton cannot be imported (gone)")
    assert probing.why_no_triton(CPU) == "Triton cannot be imported (gone)"


def test_nvrtc_reason_without_a_card() -> None:
    assert "cpu" in (probing.why_no_nvrtc(CPU) or "")


# --- host


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       33554432 kB\nMemFree: 1000 kB\nMemAvailable:   16777216 kB\n"
GB = 1 << 30


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="reads /proc")
@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 32, 16),
        (
            {
                "proc/self/cgroup": "0::/user/me\n",
                "sys/fs/cgroup/user/me/memory.max": "max\n",
                "sys/fs/cgroup/user/memory.max": str(8 * GB),
                "sys/fs/cgroup/user/memory.current": str(6 * GB),
                "sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {1 * GB}\n",
            },
            8,
            3,
        ),
        (
            {  # inside a container the host's path is not there and the own folder is the top
                "proc/self/cgroup": "0::/docker/abc\n",
                "sys/fs/cgroup/memory.max": str(4 * GB),
                "sys/fs/cgroup/memory.current": str(5 * GB),
            },
            4,
            0,
        ),
        (
            {
                "proc/self/cgroup": "9:cpu,cpuacct:/a\n4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(16 * GB),
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(2 * GB),
                "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {1 * GB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            16,
            15,
        ),
    ],
)
def test_memory_respects_control_groups(tmp_path: Path, files: dict[str, str], total: int, available: int) -> None:
    memory = host.memory(tree(tmp_path, {"proc/meminfo": MEMINFO} | files))
    assert memory == host.Memory(total * GB, available * GB)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="reads /proc")
def test_platform_cores_and_processor(tmp_path: Path) -> None:
    files = {
        "proc/sys/kernel/osrelease": "5.15.153.1-microsoft-standard-WSL2\n",
        "proc/cpuinfo": "model name\t: Fast CPU\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16x\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": "50000 100000\n",
    }
    assert host.current_platform(tree(tmp_path, files)) == "wsl2"
    assert host.cores(tmp_path) == 1
    assert host.processor(tmp_path) == ("Fast CPU", ("avx2", "avx512_bf16"))
    tree(tmp_path, {"proc/sys/kernel/osrelease": "6.8.0-generic\n"})
    assert host.current_platform(tmp_path) == "linux"
    with pytest.raises(OSError, match="meminfo"):
        host.memory(tmp_path)


def test_pinning_limits() -> None:
    assert host.pinning_limit(32, "linux") == 32
    assert host.pinning_limit(32, "windows") == host.pinning_limit(32, "wsl2") == 16


def test_disk_speed_reads_the_largest_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of 64 MiB"):
        host.disk_read_speed(tmp_path)
    (tmp_path / "weights").write_bytes(bytes(64 << 20))
    assert 0.01 < host.disk_read_speed(tmp_path) < 1000


def answer(monkeypatch: pytest.MonkeyPatch, code: int, text: str) -> None:
    monkeypatch.setattr(host.shutil, "which", lambda name: name)
    done = subprocess.CompletedProcess([], code, text, "")
    monkeypatch.setattr(host.subprocess, "run", lambda *args, **kwargs: done)


def test_nvidia_smi_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 0, "Tesla T4, 7.5, 535.104.05, 15360\nOdd, [N/A], 580, [N/A]\n")
    first, second = host.driver_cards()
    assert first == host.DriverCard("Tesla T4", (7, 5), "535.104.05", 15360 << 20)
    assert first.driver_major == 535
    assert (second.capability, second.total) == (None, 0)
    answer(monkeypatch, 9, "NVIDIA-SMI has failed\nbecause")
    with pytest.raises(OSError, match="NVIDIA-SMI has failed because"):
        host.driver_cards()
    answer(monkeypatch, 0, "garbage\n")
    with pytest.raises(ValueError, match="garbage"):
        host.driver_cards()
    monkeypatch.setattr(host.shutil, "which", lambda name: None)
    assert host.driver_cards() == []


# --- torch builds and cards

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "in_126", "in_130"),
    [
        ((5, 2), True, False),
        ((6, 1), True, False),
        ((7, 0), True, False),
        ((7, 5), True, True),
        ((8, 9), True, True),
        ((9, 0), True, True),
        ((10, 3), False, True),
        ((12, 0), False, True),
        ((13, 0), False, True),
        ((3, 7), False, False),
    ],
)
def test_which_build_has_code_for_which_card(capability: tuple[int, int], in_126: bool, in_130: bool) -> None:
    assert covers(CU126, capability) is in_126
    assert covers(CU130, capability) is in_130


def test_suffixed_architectures() -> None:
    assert covers(["sm_90a"], (9, 0))
    assert not covers(["sm_120a", "sm_90a", "odd"], (12, 1))
    assert covers(["sm_120f"], (12, 1))
    assert not covers(["compute_90a"], (10, 0))


@pytest.mark.parametrize(
    ("capability", "driver", "command"),
    [
        ((6, 1), None, CUDA_12_COMMAND),
        ((7, 0), 580, CUDA_12_COMMAND),
        ((7, 5), 580, CUDA_13_COMMAND),
        ((8, 6), None, CUDA_13_COMMAND),
        ((8, 6), 535, CUDA_12_COMMAND),
        ((12, 0), 570, CUDA_13_COMMAND),
        ((3, 5), None, None),
    ],
)
def test_install_command(capability: tuple[int, int], driver: int | None, command: str | None) -> None:
    assert build_for(capability, driver).command == command


PC_CARDS = ((5, 0), (5, 2), (6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))


@given(st.sampled_from(PC_CARDS), st.none() | st.integers(300, 700))
def test_an_install_command_names_a_build_that_serves_the_card(capability: tuple[int, int], driver: int | None) -> None:
    build = build_for(capability, driver)
    archs = {CUDA_12_COMMAND: CU126, CUDA_13_COMMAND: CU130}
    assert build.command is not None
    assert covers(archs[build.command], capability)


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), "RTX 4090"),
        ("Tesla T4", (7, 5), "T4"),
        ("Tesla V100-SXM2-16GB", (7, 0), "V100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100"),
        ("NVIDIA H200", (9, 0), "H200"),
        ("GeForce GTX 1080 Ti", (6, 1), "GTX 1080 Ti"),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), "RTX 2080 Ti"),
    ],
)
def test_known_cards(name: str, capability: tuple[int, int], expected: str) -> None:
    match = find_card(name, capability)
    assert (match.card.name, match.assumption) == (expected, "")
    assert match.card.capability == capability


@pytest.mark.parametrize(
    ("name", "capability", "memory", "stand_in"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", (8, 9), 16, "RTX 4080"),
        ("NVIDIA GeForce RTX 4080 SUPER", (8, 9), None, "RTX 4060"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 16, "RTX 4080"),
        ("", (8, 9), 24, "RTX 4090"),
        ("NVIDIA B200", (10, 0), None, "H100"),
        ("GTX 980", (5, 2), 4, "GTX 1080 Ti"),
        ("Jetson", (8, 7), 24, "RTX 3090"),
    ],
)
def test_unknown_cards_get_a_stand_in_that_is_said(
    name: str, capability: tuple[int, int], memory: float | None, stand_in: str
) -> None:
    match = find_card(name, capability, memory)
    assert match.card.name == stand_in
    assert stand_in in match.assumption


def test_card_rates_hang_together() -> None:
    for card in CARDS:
        assert (card.bf16_tflops is not None) == (card.capability >= FIRST_NATIVE_BF16)
        assert card.fp16_tflops >= card.fp32_tflops
        assert find_card(card.name, card.capability).card is card


@pytest.mark.parametrize("module", ["nothing_there", "nothing_there.inner", "nothing_there.inner.most"])
def test_a_missing_package_is_told_in_one_way(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it would be part of another package that is missing, as optimum.quanto is."""
    monkeypatch.setattr(probing, "backend_packages", lambda: {"quanto": (module, "optimum-quanto")})
    profile = probe(measure=False)
    assert profile.packages["quanto"] == Availability(False, "not installed (pip install optimum-quanto)")
    assert not [problem for problem in profile.problems if "nothing_there" in problem]
