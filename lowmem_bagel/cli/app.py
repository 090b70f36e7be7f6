"""The commands, by name. Their modules import typer alone; what they need comes in when they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from .ask import ask_command
from .bench import bench_command
from .convert import convert_command, verify_command
from .demo import demo_command
from .doctor import doctor_command
from .download import download_command
from .inspect import inspect_command
from .pictures import edit_command, generate_command
from .plan import plan_command

app = typer.Typer(
    name="lowmem-bagel",
    help="BAGEL-7B-MoT on the GPU you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"lowmem-bagel {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """BAGEL-7B-MoT on the GPU you have."""


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "download": download_command,
    "convert": convert_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "plan": plan_command,
    "doctor": doctor_command,
    "generate": generate_command,
    "edit": edit_command,
    "ask": ask_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.command(
    "bench", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(bench_command)
