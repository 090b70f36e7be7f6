"""Flags are the options that are declared: none is missing, none has lost its help, and all reach where they belong."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import Ran

from lowmem_bagel import BagelPipeline
from lowmem_bagel.cli import batch
from lowmem_bagel.cli.convert import convert_options, format_flags
from lowmem_bagel.cli.options import flag_of, help_of, parameter, takes
from lowmem_bagel.cli.serve import serve_options
from lowmem_bagel.planner.load_options import load_options
from lowmem_bagel.settings import LoadOptions, Option, TextSettings, options_of, picture_options

Cli = Callable[..., Ran]
SHOWN: dict[str, Callable[[], tuple[Option, ...]]] = {
    "generate": lambda: picture_options() + load_options(),
    "edit": lambda: picture_options(editing=True) + load_options(),
    "ask": lambda: options_of(TextSettings) + load_options(),
    "plan": lambda: load_options(planning=True),
    "demo": load_options,
    "convert": format_flags,
    "batch": lambda: batch.batch_options() + batch.load_flags(),
    "serve": lambda: serve_options() + load_options(planning=True),
}


@pytest.mark.parametrize("command", SHOWN)
def test_help_has_every_option(cli: Cli, command: str) -> None:
    shown = re.sub(r"(?<=\w-) ", "", " ".join(cli(command, "--help").out.split()))  # lines break at hyphens too
    for option in SHOWN[command]():
        said = rf"{flag_of(option)} (<.+?>(\.\.\.)? )?{re.escape(help_of(option))}"
        assert re.search(said, shown), (option.name, shown)


def test_help_says_the_commands_own_defaults(cli: Cli) -> None:
    said = {command: " ".join(cli(command, "--help").out.split()) for command in ("generate", "edit")}
    assert "Guidance by the picture; default 1." in said["generate"]
    assert "Guidance by the picture; default 2." in said["edit"]
    assert "Timesteps guided: from, to; default 0.4 1." in said["generate"]


def test_what_a_request_tells_is_not_asked_for_beside_it(cli: Cli) -> None:
    assert not {"tasks", "size"} & {option.name for option in load_options()}
    assert {"tasks", "size", "step_cache"} <= {option.name for option in load_options(planning=True)}
    assert "--size" not in cli("generate", "--help").out


def test_only_what_is_given_is_handed_on_and_nought_is_something() -> None:
    found: dict[str, Any] = {}

    planned = {option.name for option in load_options(planning=True)}  # for an answer's length too

    @takes(
        settings=lambda: [o for o in options_of(TextSettings) if o.name not in planned],
        loading=lambda: load_options(planning=True),
    )
    def command(question: str, settings: Any, loading: Any) -> None:
        found.update(question=question, settings=settings, loading=loading)

    made = command.made()
    given = dict.fromkeys(inspect.signature(made).parameters)
    said = {"question": "what?", "seed": 0, "do_sample": False, "think": True, "tune": True}
    made(**given | said | {"size": "48x32", "tasks": "ask"})
    assert found["settings"] == {"seed": 0, "think": True}
    assert found["loading"] == {"size": (32, 48), "tasks": ("ask",), "tune": False}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (Option(name="a", kind="whole", help="A"), "A."),
        (Option(name="a", kind="whole", help="A", default=0), "A; default 0."),
        (Option(name="a", kind="flag", help="A", default=False), "A."),
        (Option(name="a", kind="flag", help="Be A", default=True), "Do not be A."),
        (Option(name="a", kind="text", help="A", default="x", choices=("x", "y")), "A: x, y; default x."),
        (Option(name="a", kind="sides", help="A", default=(32, 48)), "A; default 48x32."),
    ],
)
def test_lines_of_help(option: Option, said: str) -> None:
    assert help_of(option) == said
    assert parameter(option).default is (False if option.kind == "flag" else None)


def test_the_pipelines_keywords_are_the_options() -> None:
    taken = inspect.signature(BagelPipeline.from_pretrained).parameters
    options = {option.name: option.default for option in options_of(LoadOptions)}
    assert {name: known.default for name, known in taken.items()} == {
        "path": inspect.Parameter.empty, **options, "progress": None
    }  # fmt: skip
    described = inspect.getdoc(BagelPipeline.from_pretrained) or ""
    for name in taken:
        assert re.search(rf"^    {name}: ", described, re.MULTILINE), name


def test_an_unknown_keyword_is_refused(reference_checkpoint: Path) -> None:
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'devise'; known are attention, .*base, .*context_store, device"
    ):
        BagelPipeline.from_pretrained(reference_checkpoint, devise="cpu")
    with pytest.raises(TypeError):
        BagelPipeline.from_pretrained(reference_checkpoint, "cpu")
    assert BagelPipeline.from_pretrained(path=reference_checkpoint, device="cpu").model.plan.device == "cpu"


def test_every_format_option_is_a_flag_once() -> None:
    names = [option.name for option in format_flags()]
    assert sorted(names) == sorted({option.name for _, option in convert_options()})


def test_sides_have_one_form(cli: Cli) -> None:
    error = cli("plan", "--shape", "bagel-7b", "--ram", "8GB", "--size", "1x2x3").error
    assert error == "--size must be like 1024 or 768x1024, not '1x2x3'"
