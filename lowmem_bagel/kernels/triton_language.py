"""Triton, where it can be imported: the one place that imports it.

Kernel files say `from .triton_language import jit, tl`. Without Triton they still import, so that their references
and the reasons in `availability` can be had; only a launch would fail, and `availability` keeps it from happening.
They do not postpone annotations: Triton's interpreter recognises `tl.constexpr` by its value.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

__all__ = [
    "MISSING",
    "VERSION",
    "TensorDescriptor",
    "ceil_div",
    "interpreted",
    "jit",
    "next_power_of_2",
    "tl",
]

MISSING: str | None = None
"""Why there is no Triton, in words; None where there is one."""

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except Exception as error:  # a broken installation raises more than ImportError, and all of it means the same
    MISSING = f"Triton cannot be imported ({type(error).__name__}: {error})"
    triton = None
    tl: Any = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[no-redef]
    TensorDescriptor: Any = None  # type: ignore[no-redef]


VERSION: str = getattr(triton, "__version__", "none")
"""Triton's."""


class _NotCompiled:
    """Stands where a kernel would be, on a machine without Triton."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        raise AssertionError(f"a Triton kernel was launched although {MISSING}")


def jit(function: Callable[..., Any], varying: Sequence[str] = ()) -> Any:
    """triton.jit, or a stand-in that refuses to launch. No variants are compiled for values of `varying` arguments."""
    return _NotCompiled() if triton is None else triton.jit(function, do_not_specialize=varying)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported): on the CPU."""
    return triton is not None and not isinstance(_probe, triton.JITFunction)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _empty() -> None:
    pass


_probe = jit(_empty)
