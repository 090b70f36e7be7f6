"""A step cache that another distribution adds: one file, one entry point, and it is drawn with, planned and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.made_up import Distribution

from lowmem_bagel.pictures.saving import read_metadata
from lowmem_bagel.units import format_bytes

REPEAT = '''
from lowmem_bagel.sampling.step_caches.base import Setting, StepCache

class Repeat:
    """Computes every n-th evaluation and gives the same until the next."""

    def __init__(self, repeat_every):
        self.every, self.evaluation, self.hidden = int(repeat_every), -1, None

    def predict(self):
        self.evaluation += 1
        return self.hidden if self.evaluation % self.every else None

    def after_first_layer(self, entering, leaving):
        return None

    def store(self, hidden):
        self.hidden = hidden

REPEAT = StepCache(
    "repeat", "each step is given several times", Repeat, stored=lambda evaluations: 1,
    computed=lambda evaluations: -(-evaluations // 2), holds_result=True,
    settings=(Setting("repeat_every", 2, 1, 10, "steps for which one is given"),),
)
'''
DRAWING = ["generate", "a red circle", "--height", 64, "--width", 64, "--seed", 1]


@pytest.fixture(scope="module")
def repeat(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    return Distribution(tmp_path_factory.mktemp("made_up"), REPEAT, {"step_caches": {"repeat": "REPEAT"}})


def test_a_picture_is_drawn_with_it_on_the_command_line(repeat: Distribution) -> None:
    repeat.command(*DRAWING, "--num-timesteps", 7, "--step-cache", "repeat", "--repeat-every", 3, "-o", "out.png")
    made = read_metadata(repeat.folder / "out.png")
    assert (made["step_cache"], made["repeat_every"]) == ("repeat", 3.0)
    # Six evaluations of one branch, and those of the other that t > 0.4 guides.
    assert made["evaluations"] > 6
    assert made["evaluations_computed"] == 2 + -(-(made["evaluations"] - 6) // 3)


RUN = """
import json
from lowmem_bagel import BagelPipeline
from lowmem_bagel.demo_checkpoint import FOLDER
pipe = BagelPipeline.from_pretrained(FOLDER, device="cpu", step_cache="repeat")
settings = dict(height=64, width=64, num_timesteps=7, seed=1, cfg_text_scale=1)
found = {"reason": pipe.model.plan.reasons["step_cache"]}
for every in (1, 3):
    result = pipe.generate("a red circle", **settings, step_cache="repeat", repeat_every=every)
    found[every] = result.settings["evaluations_computed"]
try:
    pipe.generate("a red circle", **settings, step_cache="repeat", repeat_every=11)
except Exception as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


def test_its_own_setting_reaches_it(repeat: Distribution) -> None:
    found = json.loads(repeat.python(RUN))
    assert (found["1"], found["3"]) == (6, 2)
    assert found["refused"] == "repeat_every must be a number from 1 to 10, not 11"
    assert "25 of 49 steps are computed, the others predicted" in found["reason"]


def test_a_plan_counts_what_it_keeps_and_skips(repeat: Distribution) -> None:
    card = ["--vram", "12GB", "--compute-capability", "8.9", "--card", "RTX 3060", "--ram", "64GB"]
    asked = ["--shape", "bagel-7b", "--format", "int8", "--task", "generate", "--json", *card]
    plain, cached = (
        json.loads(repeat.command("plan", *asked, "--step-cache", name))["plan"] for name in ("none", "repeat")
    )
    assert "25 of 49 steps are computed" in cached["reasons"]["step_cache"]
    assert cached["prediction"]["seconds"] < 0.7 * plain["prediction"]["seconds"]
    states = format_bytes(2 * 4098 * 3584 * 2)  # one of each branch
    assert cached["reasons"]["step_cache"].startswith(f"keeps up to {states} more while it draws")


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    source = REPEAT.replace('"repeat", "each', '"taylorseer", "each')
    twice = Distribution(tmp_path, source, {"step_caches": {"repeat": "REPEAT"}})
    with pytest.raises(AssertionError, match="lowmem-bagel: two step caches are called 'taylorseer'; uninstall one of"):
        twice.command(*DRAWING)


def test_what_is_not_there_is_not_known(tmp_path: Path) -> None:
    nothing = Distribution(tmp_path, "", {})
    code = "from lowmem_bagel.sampling.step_caches.registry import step_caches; print(*step_caches())"
    assert "repeat" not in nothing.python(code).split()
