"""Which build of PyTorch has code for which card, and the command that installs it. No torch here.

From PyTorch's release matrix (RELEASE.md and the requests for comments on releases 2.11, 2.14 and 2.15): CUDA 13 starts
at compute capability 7.5; the CUDA 12.6 builds, which end with 2.14, are the last for 5.0 to 7.0; Blackwell needs
CUDA 12.8 or newer. A CUDA 13 build needs driver 580 or newer, a CUDA 12 build 525.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Capability = tuple[int, int]

FIRST_OF_CUDA_13: Capability = (7, 5)
OLDEST: Capability = (5, 0)
CUDA_13_DRIVER = 580
CUDA_12_DRIVER = 525

_INDEX = "https://download.pytorch.org/whl/"
CPU_COMMAND = f"pip install --force-reinstall torch --index-url {_INDEX}cpu"
CUDA_13_COMMAND = f"pip install --force-reinstall torch --index-url {_INDEX}cu130"
CUDA_12_COMMAND = f'pip install --force-reinstall "torch<2.15" --index-url {_INDEX}cu126'


@dataclass(frozen=True)
class Build:
    """What to install for a card; `command` is None where no published build serves it."""

    command: str | None
    why: str


def build_for(capability: Capability, driver: int | None = None) -> Build:
    """The build for a card and, where known, the major version of its driver."""
    card = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        return Build(None, f"no current PyTorch build has code for {card}; use the CPU")
    if capability < FIRST_OF_CUDA_13:
        return Build(CUDA_12_COMMAND, f"{card} needs a CUDA 12.6 build of torch 2.14 or older; CUDA 13 starts at 7.5")
    if driver is None or driver >= CUDA_13_DRIVER:
        return Build(CUDA_13_COMMAND, f"{card} is served by the CUDA 13 builds")
    if capability < (9, 0) and driver >= CUDA_12_DRIVER:
        return Build(
            CUDA_12_COMMAND,
            f"driver {driver} is too old for CUDA 13 (needs {CUDA_13_DRIVER}); the CUDA 12.6 build runs on it",
        )
    return Build(CUDA_13_COMMAND, f"update the NVIDIA driver from {driver} to {CUDA_13_DRIVER} or newer first")


def covers(architectures: Iterable[str], capability: Capability) -> bool:
    """Whether a build with these architectures (`torch.cuda.get_arch_list()`) runs on a card.

    Machine code ("sm_86") runs on cards of the same major version with the same or a newer minor one, with the suffix
    "a" on exactly its own, with "f" as without; intermediate code ("compute_90") is compiled for any newer card.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        kind, suffix = match[1], match[4]
        have = int(match[2]), int(match[3])
        if suffix == "a":
            runs = have == capability
        elif kind == "compute" and not suffix:
            runs = have <= capability
        else:
            runs = have[0] == capability[0] and have <= capability
        if runs:
            return True
    return False
