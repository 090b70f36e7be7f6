"""The machine around the card: platform, memory, processor, disk, what the driver's own tool says. No torch here.

Every function may raise OSError or ValueError on an odd machine; `hardware.probe` turns that into a recorded reason.
`root` stands for the file system's root, so that tests can lay out a machine of their own.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Platform = Literal["linux", "wsl2", "windows", "macos"]

ROOT = Path("/")
MIB = 1 << 20
UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number of about this size."""


def current_platform(root: Path = ROOT) -> Platform:
    """Which of the four kinds of machine this is; other Unixes count as linux."""
    if sys.platform == "win32":
        return "windows"
    if sys.platform == "darwin":
        return "macos"
    try:
        kernel = (root / "proc/sys/kernel/osrelease").read_text()
    except OSError:
        kernel = platform.release()
    return "wsl2" if "microsoft" in kernel.lower() else "linux"


@dataclass(frozen=True)
class Memory:
    """Bytes of RAM this process may use in all, and may still take now."""

    total: int
    available: int


def memory(root: Path = ROOT) -> Memory:
    """RAM, with the limits of control groups (containers) respected."""
    if sys.platform == "win32":
        return _windows_memory()
    if sys.platform == "darwin":
        page = os.sysconf("SC_PAGE_SIZE")
        counts = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=10, check=True).stdout
        free = sum(int(n) for n in re.findall(r"Pages (?:free|inactive|speculative):\s+(\d+)", counts))
        return Memory(page * os.sysconf("SC_PHYS_PAGES"), page * free)
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE))
    total, available = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Memory(total, available)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of this process's control groups and their parents."""
    for base, own, names in _cgroup_folders(root, "memory"):
        limit_name, used_name = names
        for folder in (own, *own.parents):
            if base != folder and base not in folder.parents:
                break
            limit = _number(folder / limit_name)
            if limit is not None and limit < UNLIMITED:
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
                used = (_number(folder / used_name) or 0) - (int(cache[1]) if cache else 0)
                yield limit, max(0, used)


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[Path, Path, tuple[str, str]]]:
    """(top folder, this process's folder, names of the limit and usage files) for cgroup version 2 and 1."""
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, names = mounted, ("memory.max", "memory.current")
        elif controller in controllers.split(","):
            base, names = mounted / controller, ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = base / path.lstrip("/")
        # inside a container the path is the host's and its folder is mounted as the top
        yield base, own if own.is_dir() else base, names


def cores(root: Path = ROOT) -> int:
    """Processors this process may use, a control group's share rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for base, own, _ in _cgroup_folders(root, "cpu"):
        for folder in (own, *own.parents):
            if base != folder and base not in folder.parents:
                break
            quota = re.fullmatch(r"(\d+) (\d+)\s*", _text(folder / "cpu.max"))
            if quota:
                count = min(count, max(1, -(-int(quota[1]) // int(quota[2]))))
    return count


def processor(root: Path = ROOT) -> tuple[str, tuple[str, ...]]:
    """The processor's name and those of its features that matter here (cpuinfo's names), where they can be read."""
    text = _text(root / "proc/cpuinfo")
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    features = tuple(f for f in KNOWN_FEATURES if f in have)
    return (name[1].strip() if name else platform.processor() or platform.machine()), features


KNOWN_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def pinning_limit(total_ram: int, kind: Platform) -> int:
    """Bytes that can be page-locked: Windows and WSL2 stop near half of RAM, Linux has no limit of its own."""
    return {"windows": total_ram // 2, "wsl2": total_ram // 2, "linux": total_ram, "macos": 0}[kind]


def disk_read_speed(path: Path, seconds: float = 1.0, at_most: int = 1 << 30) -> float:
    """GB/s of reading the largest file at or below `path` from the start, its pages dropped from the cache first.

    Only where the system can drop them (`posix_fadvise`) is it the disk that is measured rather than the cache.

    Raises:
        ValueError: no file of at least 64 MiB is there.
    """
    files = [path] if path.is_file() else [p for p in path.glob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size, default=None)
    if largest is None or largest.stat().st_size < 64 * MIB:
        raise ValueError(f"no file of 64 MiB or more in {path} to read from")
    buffer = bytearray(8 * MIB)
    with largest.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        done, start = 0, time.perf_counter()
        while done < at_most and time.perf_counter() - start < seconds:
            got = file.readinto(buffer)
            if not got:
                break
            done += got
        return done / (time.perf_counter() - start) / 1e9


@dataclass(frozen=True)
class DriverCard:
    """A card as nvidia-smi sees it, whatever torch can do with it."""

    name: str
    capability: tuple[int, int] | None
    driver: str
    total: int

    @property
    def driver_major(self) -> int | None:
        head = self.driver.partition(".")[0]
        return int(head) if head.isdecimal() else None


def driver_cards() -> list[DriverCard]:
    """The cards nvidia-smi lists; none where there is no nvidia-smi. Raises OSError or ValueError if it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=name,compute_cap,driver_version,memory.total"
    command = [tool, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError("nvidia-smi does not answer") from error
    if done.returncode != 0:
        raise OSError(f"nvidia-smi failed: {' '.join((done.stdout + done.stderr).split())[:160]}")
    return [_driver_card(line) for line in done.stdout.splitlines() if line.strip()]


def driver_version(path: Path = Path("/sys/module/nvidia/version")) -> str:
    """The NVIDIA driver's, as Linux tells it at once, or nvidia-smi in a while; "unknown" where neither does."""
    try:
        return path.read_text().strip()
    except OSError:
        pass
    try:
        return next((card.driver for card in driver_cards()), "unknown")
    except (OSError, ValueError):
        return "unknown"


def _driver_card(line: str) -> DriverCard:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 4:
        raise ValueError(f"nvidia-smi gave {line.strip()[:80]!r}")
    name, capability, driver, total = fields
    parts = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return DriverCard(
        name,
        (int(parts[1]), int(parts[2])) if parts else None,
        driver,
        int(total) * MIB if total.isdecimal() else 0,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _windows_memory() -> Memory:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("rest", ctypes.c_uint64 * 5),
        )

    status = Status(length=ctypes.sizeof(Status))
    library: object = getattr(ctypes, "windll", None)
    kernel32 = getattr(library, "kernel32", None)
    if kernel32 is None or not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return Memory(int(status.total), int(status.available))
