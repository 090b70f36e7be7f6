"""`lowmem-bagel bench`: the registered benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import check_place
from .terminal import say

GROUP = "lowmem_bagel.benchmarks"


def bench_command(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which benchmark; without one they are listed.")] = None,
) -> None:
    """Run a benchmark; `bench NAME --help` shows its options."""
    from ..errors import SettingError

    found = {point.name: point for point in entry_points(group=GROUP)}
    if name in (None, "--help"):
        say("benchmarks: " + ", ".join(sorted(found)))
        return
    if name not in found:
        raise SettingError(f"unknown benchmark {name!r}; choose one of {', '.join(sorted(found))}")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name)(_checked(found[name].load()))
    app(context.args, prog_name=f"lowmem-bagel bench {name}", standalone_mode=False)


def _checked(run: Callable[..., None]) -> Callable[..., None]:
    """The benchmark, which refuses a record that it could not write before it measures for hours."""

    @wraps(run)
    def command(**given: Any) -> None:
        if isinstance(given.get("out"), Path):
            check_place(given["out"])
        run(**given)

    return command
