"""What a process takes of a machine while it measures: energy and memory as the driver says, RAM as the kernel does.

What cannot be known is None, with why in a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_bagel.errors import first_line

if TYPE_CHECKING:
    import torch

PROC = Path("/proc/self")
PEAK = b"5"
"""Written to clear_refs, begins the process's peak of RAM anew."""
WHAT = ("energy", "process", "device", "clock", "limit")
"""What a card is asked for."""
NO_CARD = "no NVIDIA GPU is used"
NO_PACKAGE = 'nvidia-ml-py is missing; install it with: pip install "lowmem-bagel[benchmarks]"'


class CardMeter:
    """One card, as the driver's own library (NVML) meters it.

    Args:
        library: the module `pynvml`, or what does as it does.
        identity: the card's UUID, "GPU-...", since the driver numbers cards in its own order.

    Attributes:
        why: what is not known, by its name: "energy", "process", "device", "clock", "limit".
    """

    def __init__(self, library: Any, identity: str) -> None:
        self.why: dict[str, str] = {}
        self._library = library
        self._card: Any = None
        try:
            library.nvmlInit()
            self._card = library.nvmlDeviceGetHandleByUUID(identity)
        except library.NVMLError as refusal:
            self.why = dict.fromkeys(WHAT, f"the driver: {first_line(refusal)}")

    def joules(self) -> float | None:
        """Since the driver was loaded; only differences mean something."""
        found = self._asked("energy", self._library.nvmlDeviceGetTotalEnergyConsumption)
        return None if found is None else float(found) / 1000

    def device_bytes(self) -> int | None:
        """In use on the card now, by whomever."""
        found = self._asked("device", self._library.nvmlDeviceGetMemoryInfo)
        return None if found is None else int(found.used)

    def process_bytes(self) -> int | None:
        """Of those, this process's."""
        listed = self._asked("process", self._library.nvmlDeviceGetComputeRunningProcesses)
        if listed is None:
            return None
        own = [process.usedGpuMemory for process in listed if process.pid == os.getpid()]
        if not own or own[0] is None:
            self.why["process"] = "the driver does not list this process with its memory, as in many containers"
            return None
        return int(own[0])

    def clock_mhz(self) -> int | None:
        """Of the multiprocessors, now."""
        found = self._asked(
            "clock", lambda card: self._library.nvmlDeviceGetClockInfo(card, self._library.NVML_CLOCK_SM)
        )
        return None if found is None else int(found)

    def limit_watts(self) -> float | None:
        """What the card may take at most."""
        found = self._asked("limit", self._library.nvmlDeviceGetPowerManagementLimit)
        return None if found is None else float(found) / 1000

    def _asked(self, what: str, ask: Callable[[Any], Any]) -> Any:
        if self._card is None:
            return None
        try:
            return ask(self._card)
        except self._library.NVMLError as refusal:
            self.why[what] = f"the driver: {first_line(refusal)}"
            return None


class NoMeter:
    """In place of a `CardMeter` where there is nothing to meter."""

    def __init__(self, why: str) -> None:
        self.why = dict.fromkeys(WHAT, why)

    def joules(self) -> None:
        return None

    def device_bytes(self) -> None:
        return None

    def process_bytes(self) -> None:
        return None

    def clock_mhz(self) -> None:
        return None

    def limit_watts(self) -> None:
        return None


def card_meter(device: torch.device) -> CardMeter | NoMeter:
    """What meters a torch device."""
    import torch

    if device.type != "cuda":
        return NoMeter(NO_CARD)
    try:
        import pynvml
    except ImportError:
        return NoMeter(NO_PACKAGE)
    return CardMeter(pynvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")


class RamMeter:
    """The most RAM that this process had at once since `begin`, page-locked memory included.

    The kernel keeps that peak itself, and begins it anew for who writes to clear_refs, so that nothing has to be
    sampled. What was freed before is given back first: else it would count.

    Attributes:
        why: why it cannot be known; empty where it can.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self.why = ""

    def begin(self) -> None:
        gc.collect()
        _give_back()
        try:
            (self._proc / "clear_refs").write_bytes(PEAK)
        except OSError as refusal:
            self.why = f"the peak cannot be begun anew here ({refusal.strerror})"

    def peak(self) -> int | None:
        """Bytes."""
        return None if self.why else self._line("VmHWM")

    def now(self) -> int | None:
        """Bytes."""
        return self._line("VmRSS")

    def _line(self, name: str) -> int | None:
        try:
            lines = (self._proc / "status").read_text(encoding="ascii", errors="replace").splitlines()
        except OSError as refusal:
            self.why = f"the system does not tell ({refusal.strerror})"
            return None
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


def _give_back() -> None:
    """Freed memory that the C library kept, to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call, and keeps less
        ctypes.CDLL(None).malloc_trim(0)
