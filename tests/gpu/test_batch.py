"""A batch on real cards, a worker each, one of which is killed in the midst of a job."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.batch.here import done_here
from lowmem_bagel.batch.jobs import Job
from lowmem_bagel.batch.loading import Recipe
from lowmem_bagel.batch.processes import Processes, recipes_for
from lowmem_bagel.batch.team import handed_out

pytestmark = pytest.mark.gpu

OPTIONS = {"dtype": "bfloat16", "tasks": ("generate",)}


def job(id: str, **settings: Any) -> Job:
    settings = {"seed": 1, "height": 64, "width": 64, "num_timesteps": 5, **settings}
    return Job(id, 1, "d", "generate", id, (), f"{id}.png", settings)


@pytest.mark.parametrize("cards", [1, 2])
def test_a_killed_workers_job_is_done_again_to_the_same_picture(cards: int) -> None:
    if torch.cuda.device_count() < cards:
        pytest.skip(f"needs {cards} cards")
    jobs = [job("long", num_timesteps=1000), *(job(f"x{number}") for number in range(4))]
    team = Processes(recipes_for([f"cuda:{number}" for number in range(cards)], Recipe(CHECKPOINT, OPTIONS)))
    killed: list[str] = []

    def tell(worker: str, what: str, done: int, total: int) -> None:
        if what == "long" and done and not killed:
            killed.append(worker)
            os.kill(team.pid(worker), signal.SIGKILL)

    found = {outcome.result.id: outcome for outcome in handed_out(jobs, "m", team, tell, lambda _: None)}
    assert killed and {outcome.result.state for outcome in found.values()} == {"done"}
    here = BagelPipeline.from_pretrained(CHECKPOINT, device="cuda:0", **OPTIONS)
    for wanted in done_here(jobs, "m", here, lambda *_: None):
        assert found[wanted.result.id].content == wanted.content
