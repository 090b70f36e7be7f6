"""One kernel at one shape: compared with its reference, then timed beside the machine's ceilings and its rivals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_bagel.checkpoint.config import DecoderConfig
from lowmem_bagel.errors import SettingError
from lowmem_bagel.ops.errors import relative_l2

from .record import write_record
from .shapes import TINY, linears, shape_named
from .timing import Call, ceilings, compile_ahead, copies_beyond_cache, graph_seconds

EPS = 1e-6
LOT = 14
"""Cases whose kernels are compiled together."""

Run = Callable[[Any], Any]
"""A kernel or its rival as a function of the one input that is rotated, to be beyond the cache at every call."""
Rivals = Mapping[str, tuple[Run, Sequence[Any]]]
"""What else does the same, each with its inputs."""
Limits = Mapping[str, float]
"""The machine's ceilings, as `timing.ceilings` measures them."""


@dataclass(frozen=True)
class Setup:
    """What all cases of a run share.

    longest: tokens of the longest input. half: dtype of activations, where a kernel does not say its own. check_only:
    cases are compared with their references and not timed.
    """

    device: torch.device
    decoder: DecoderConfig
    longest: int
    check_only: bool
    half: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, shape: str, check_only: bool, seed: int) -> Setup:
        """On this machine's card.

        Raises:
            SettingError: an unknown shape, or no card.
        """
        decoder = shape_named(shape).decoder
        if not torch.cuda.is_available():
            raise SettingError("kernels are measured on an NVIDIA GPU that PyTorch can use, and there is none")
        torch.manual_seed(seed)
        return cls(
            torch.device("cuda"), decoder, 40 if decoder.hidden_size == TINY.decoder.hidden_size else 10_000, check_only
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return linears(self.decoder)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key and value heads, and the width of one."""
        return self.decoder.num_heads, self.decoder.num_kv_heads, self.decoder.head_dim

    @property
    def processors(self) -> int:
        on_card = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).multi_processor_count if on_card else 1

    @property
    def capability(self) -> tuple[int, int]:
        """The card's; Triton's interpreter does what the latest that is served does."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (9, 0)

    def tokens(self, *counts: int) -> list[int]:
        """These, as far as they are not too many for the shape."""
        return list(dict.fromkeys(min(count, self.longest) for count in counts))

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.half)

    def wide(self, *shape: int) -> Tensor:
        return self.random(*shape, dtype=torch.float32)

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, device=self.device, dtype=torch.int8)

    def packed(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=self.device, dtype=torch.uint8)

    def rotated(self, make: Callable[..., Tensor], *shape: int, most: int | None = None) -> list[Tensor]:
        """Enough fresh tensors to be beyond the cache together, or the most that there is room for."""
        first = make(*shape)
        count = 1 if self.check_only else copies_beyond_cache(first.nbytes)
        return [first, *(make(*shape) for _ in range(min(count, most or count) - 1))]


@dataclass
class Case:
    """One kernel at one shape. `work`: bytes moved or operations done by a call; `rivals`: what else does the same."""

    kernel: str
    shape: str
    run: Run
    reference: Run
    inputs: Sequence[Any]
    work: float
    unit: str = "B/s"
    matmuls: float = 2.0
    """Where `work` is operations: the ceiling in rates of the measured bf16 matmul; int8's is two of it."""
    reads: bool = False
    """Where `work` is bytes: they are read, and next to nothing is written."""
    tolerance: float = 5e-3
    overwrites: bool = False
    """What it is given: its first run is the one that is compared."""
    rivals: Rivals = field(default_factory=dict)

    def calls(self) -> list[Call]:
        return [partial(self.run, given) for given in self.inputs]

    def check(self) -> dict[str, Any]:
        """How far the kernel is from its reference, on poisoned memory."""
        # Cloned: where results are written to a place that both were given, the reference would overwrite the kernel's.
        found = _dense(_poisoned(self.run)(self.inputs[0])).clone()
        error = relative_l2(found, _dense(self.reference(self.inputs[0])))
        return {"kernel": self.kernel, "shape": self.shape, "error": error, "right": error <= self.tolerance}

    def measure(self, limits: Limits) -> dict[str, Any]:
        """The figures of the record, correctness first."""
        found = self.check()
        taken = graph_seconds(self.calls())
        memory = limits["read_bytes_s" if self.reads else "copy_bytes_s"]
        limit = memory if self.unit == "B/s" else self.matmuls * limits["half_matmul_ops_s"]
        return found | {
            "seconds": taken, "unit": self.unit, "rate": self.work / taken, "of_ceiling": self.work / taken / limit,
            "rivals": {
                name: graph_seconds([partial(run, given) for given in inputs])
                for name, (run, inputs) in self.rivals.items()
            },
        }  # fmt: skip


def measured(setup: Setup, cases: Iterator[Case], limits: Limits, threads: int = 8) -> Iterator[dict[str, Any]]:
    """Every case's figures, printed as they come; the kernels of some are compiled together before they are timed."""
    while lot := list(itertools.islice(cases, LOT)):
        if not setup.check_only:
            compile_ahead([case.calls()[0] for case in lot if not case.overwrites], threads)
        for case in lot:
            found = case.check() if setup.check_only else case.measure(limits)
            print(line(found), flush=True)
            yield found


def run_cases(
    name: str, setup: Setup, parts: Sequence[Callable[[Setup], Iterator[Case]]], out: Path, settings: Mapping[str, Any],
    threads: int = 8, more: Callable[[], Mapping[str, Any]] = dict,
) -> None:  # fmt: skip
    """Check and time all cases and write their record; exits with code 1 where a kernel is wrong.

    Args:
        more: what else the record is to hold, found after the cases.
    """
    limits = {} if setup.check_only else ceilings(setup.device)
    print({name: f"{value / 1e12:.3f} T" for name, value in limits.items()}, flush=True)
    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for cases in parts:
            found += measured(setup, cases(setup), limits, threads)
            torch.cuda.empty_cache()
        results = {"ceilings": limits, "kernels": found, **more()}
    write_record(out, name, {**settings, "check_only": setup.check_only}, results)
    wrong = [f"{case['kernel']} {case['shape']}" for case in found if not case["right"]]
    if wrong:
        raise SystemExit(f"wrong: {'; '.join(wrong)}")


def line(found: Mapping[str, Any]) -> str:
    """A case in one line."""
    shown = f"{found['kernel']:20} {found['shape']:28} "
    if "seconds" in found:
        scale, unit = (1e9, "GB/s") if found["unit"] == "B/s" else (1e12, "TOP/s")
        shown += f"{found['seconds'] * 1e6:8.1f} us {found['rate'] / scale:6.0f} {unit:5} {found['of_ceiling']:6.1%}  "
    rivals = "".join(f"  {name} {value * 1e6:.1f} us" for name, value in found.get("rivals", {}).items())
    return f"{shown}error {found['error']:.1e}{'' if found['right'] else ' WRONG'}{rivals}"


def _dense(output: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """One tensor to compare: narrowed values times their scales; q, k and v side by side; weights in a row."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list):
        return torch.cat(output)
    if len(output) == 2:
        return output[0].float() * output[1][:, None]
    return torch.cat(output, dim=2)


def _poisoned(run: Run) -> Run:
    """The call with every fresh tensor full of NaN or of the largest integer."""

    def poisoned(given: Any) -> Any:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return run(given)
        finally:
            torch.use_deterministic_algorithms(False)

    return poisoned
