"""What Triton makes of a kernel for a card that is not here: registers, shared memory, and the instructions of its
longest loop, read from the machine code by the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_bagel.errors import SettingError
from lowmem_bagel.kernels import triton_language

Instruction = tuple[int, str, str]
"""Its address, its name with what modifies it, its operands."""

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")


def machine_code(
    kernel: Any,
    capability: tuple[int, int],
    arguments: Mapping[str, str],
    constants: Mapping[str, object],
    whole_sixteens: Sequence[str],
    **options: int,
) -> dict[str, Any]:
    """Figures of a kernel whose arguments have these types in Triton's words; those in `whole_sixteens`, numbers or
    addresses, are multiples of 16. `options`: warps and stages. `spilled_bytes` are of a thread.

    Raises:
        SettingError: there is no Triton.
    """
    if triton_language.MISSING is not None:
        raise SettingError(f"{triton_language.MISSING}; install the triton package")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: arguments.get(name, "constexpr") for name in names},
        dict(constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in whole_sixteens},
    )
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, listing = (_said_by(tool, what, path) for what in ("-res-usage", "-sass"))
    registers, stack = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    assert registers is not None and stack is not None, "cuobjdump says no registers"
    return {
        "registers": int(registers[1]), "spilled_bytes": int(stack[1]), "shared_bytes": compiled.metadata.shared,
        "loop": dict(Counter(name.split(".")[0] for _, name, _ in longest_loop(instructions(listing))).most_common()),
    }  # fmt: skip


def instructions(listing: str) -> list[Instruction]:
    """Those of a listing of machine code."""
    found = filter(None, map(LINE.match, listing.splitlines()))
    return [(int(line[1], 16), line[2], line[3]) for line in found]


def longest_loop(found: Sequence[Instruction]) -> Sequence[Instruction]:
    """From where a branch goes back to, to that branch; empty where none goes back."""
    loops = [
        [one for one in found if int(back[-1], 16) <= one[0] <= at]
        for at, name, operands in found
        if name.startswith("BRA") and (back := re.findall(r"0x([0-9a-f]+)", operands)) and int(back[-1], 16) < at
    ]
    return max(loops, key=len, default=[])


def _said_by(tool: str, what: str, path: Path) -> str:
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout
