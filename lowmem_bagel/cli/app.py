"""The commands, by name. Their modules import typer alone; what they need comes in when they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .ask import ask_command
from .batch import batch_command
from .bench import bench_command
from .chat import chat_command
from .choose import choose_command
from .convert import convert_command, verify_command
from .demo import demo_command
from .doctor import doctor_command
from .download import download_command
from .inspect import inspect_command
from .options import Command
from .pictures import edit_command, generate_command
from .plan import plan_command
from .recipes import future_command, navigate_command, views_command
from .serve import serve_command
from .terminal import say

COMMANDS: Mapping[str, Command | Callable[..., None]] = {
    "demo": demo_command,
    "download": download_command,
    "convert": convert_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "plan": plan_command,
    "choose": choose_command,
    "doctor": doctor_command,
    "generate": generate_command,
    "edit": edit_command,
    "ask": ask_command,
    "chat": chat_command,
    "future": future_command,
    "views": views_command,
    "navigate": navigate_command,
    "batch": batch_command,
    "serve": serve_command,
    "bench": bench_command,
}
PASSED_ON: Mapping[str, Any] = {
    "add_help_option": False, "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}
}  # fmt: skip
"""Of `bench`: its arguments are a benchmark's."""
STYLE: Mapping[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


class Made(Mapping[str, Any]):
    """typer's commands by name, each made when it is asked for: only then are its options looked up."""

    def __getitem__(self, name: str) -> Any:
        known = COMMANDS[name]
        alone = typer.Typer(**STYLE)
        settings = PASSED_ON if name == "bench" else {}
        alone.command(name, **settings)(known.made() if isinstance(known, Command) else known)
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(TyperGroup):
    """The program's commands, each listed in one whole line: the first of its description."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = Made()  # type: ignore[assignment]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        runs = {name: known.run if isinstance(known, Command) else known for name, known in COMMANDS.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, (run.__doc__ or "").partition("\n")[0]) for name, run in runs.items()])


app = typer.Typer(
    name="lowmem-bagel", cls=Commands, help="BAGEL-7B-MoT on the GPU you have.", no_args_is_help=True, **STYLE
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        say(f"lowmem-bagel {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """BAGEL-7B-MoT on the GPU you have."""
