"""Options of loading that only change the plan: ours, and one that another distribution adds with one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.made_up import Distribution
from support.paths import CHECKPOINT

from lowmem_bagel.errors import SettingError
from lowmem_bagel.planner.load_options import OURS, added_options, load_options, options_from, with_added
from lowmem_bagel.planner.plan import Plan

MADE_UP = """
from dataclasses import replace

class MadeUp:
    name = "made_up"
    help = "How much is made up"
    default = 1
    choices = ()

    def apply(self, plan, value):
        return replace(plan, guidance_batch=False, reasons=plan.reasons | {"made_up": f"{value} of it, as asked for"})

MADE_UP = MadeUp()
"""
PYTHON = """
import json
from lowmem_bagel import BagelPipeline
from lowmem_bagel.demo_checkpoint import FOLDER
found = []
for given in ({}, {"made_up": 1}, {"made_up": 3}):
    plan = BagelPipeline.from_pretrained(FOLDER, device="cpu", **given).model.plan
    found.append([plan.guidance_batch, plan.reasons.get("made_up")])
for wrong in ("3", None):
    try:
        BagelPipeline.from_pretrained(FOLDER, made_up=wrong)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""
TOLD = """
import lowmem_bagel.pipeline as pipeline
from lowmem_bagel.cli import main
made = pipeline.BagelPipeline.__init__
def told(self, model, *inputs):
    print(model.plan.reasons["made_up"])
    made(self, model, *inputs)
pipeline.BagelPipeline.__init__ = told
main()
"""


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    folder = tmp_path_factory.mktemp("made_up")
    return Distribution(folder, MADE_UP, {"load_options": {"made-up": "MADE_UP"}})


def test_it_is_a_keyword(made_up: Distribution) -> None:
    unsaid, default, asked, text, nothing = json.loads(made_up.python(PYTHON))
    assert unsaid == default == [True, None]
    assert asked == [False, "3 of it, as asked for"]
    assert text == "SettingError: made_up must be a whole number, not '3'"
    assert nothing == "SettingError: made_up must be a whole number, not None"


def test_it_is_a_flag(made_up: Distribution) -> None:
    for command in ("generate", "edit", "ask", "plan", "demo"):
        assert "How much is made up; default 1." in " ".join(made_up.command(command, "--help").split())
    ran = made_up.python(TOLD, "ask", "What color is the circle?", "--max-new-tokens", 2, "--made-up", 3, "--json")
    reason, answer = ran.split("\n", 1)
    assert reason == "3 of it, as asked for"
    assert json.loads(answer)["max_new_tokens"] == 2
    plan = json.loads(made_up.command("plan", CHECKPOINT, "--ram", "16GB", "--made-up", 3, "--json"))["plan"]
    assert plan["reasons"]["made_up"] == "3 of it, as asked for"


def test_looking_for_it_is_left_to_the_commands_that_have_it(tmp_path: Path) -> None:
    heavy = Distribution(tmp_path, "raise RuntimeError('imported')", {"load_options": {"made-up": "MADE_UP"}})
    assert "generate" in heavy.command("--help")
    heavy.command("inspect", CHECKPOINT)
    with pytest.raises(AssertionError, match="RuntimeError: imported"):
        heavy.command("generate", "--help")


@pytest.mark.parametrize("name", ["max_vram", "seed", "as_json"])
def test_two_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    source = MADE_UP.replace('name = "made_up"', f'name = "{name}"')
    twice = Distribution(tmp_path, source, {"load_options": {"made-up": "MADE_UP"}})
    with pytest.raises(AssertionError, match=f"lowmem-bagel: two (load )?options are called '{name}'; uninstall"):
        twice.command("ask", "What?")


class Doubled:
    name, help, default, choices = "doubled", "Some text", "a", ("a", "b")

    def apply(self, plan: Plan, value: Any) -> Plan:
        raise SettingError(f"{value}, of all things")


def test_adding_one_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_bagel.planner.load_options.OURS", (*OURS, Doubled()))
    assert "doubled" in added_options()
    assert next(option for option in load_options() if option.name == "doubled").choices == ("a", "b")
    plan = Plan("cpu", "float32", "float32", "float32")
    assert with_added(plan, options_from({"doubled": "a"})) == plan
    with pytest.raises(SettingError, match="b, of all things"):
        with_added(plan, options_from({"doubled": "b"}))
    with pytest.raises(SettingError, match="unknown doubled 'c'; choose one of a, b"):
        options_from({"doubled": "c"})
