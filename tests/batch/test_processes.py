"""Workers that are processes: killed in the midst of a job, dying of one, and left behind by who started them."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import forkserver
from support.batch import SMALL
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.batch.jobs import Job
from lowmem_bagel.batch.loading import Recipe
from lowmem_bagel.batch.processes import Processes, recipes_for, worker_devices
from lowmem_bagel.batch.team import Event, handed_out
from lowmem_bagel.errors import DoesNotFitError, SettingError
from lowmem_bagel.hardware.host import memory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
RECIPE = Recipe(CHECKPOINT, {"device": "cpu", "dtype": "float32"}, threads=1)


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that have imported everything when they begin."""
    return forkserver.context()


def job(id: str, **settings: Any) -> Job:
    return Job(id, 1, "d", "generate", id, (), f"{id}.png", {"seed": 1, **SMALL, **settings})


def test_a_killed_workers_job_is_done_again_to_the_same_picture(context: Any, pipe: BagelPipeline) -> None:
    team = Processes({"a": RECIPE, "b": RECIPE}, context)
    killed: list[str] = []

    def tell(worker: str, what: str, done: int, total: int) -> None:
        if what == "long" and done and not killed:
            killed.append(worker)
            os.kill(team.pid(worker), signal.SIGKILL)

    notes: list[str] = []
    jobs = [job("long", num_timesteps=60), job("x"), job("y")]
    outcomes = {outcome.result.id: outcome for outcome in handed_out(jobs, "m", team, tell, notes.append)}
    assert notes == [f"{killed[0]} was ended by SIGKILL while it did long"]
    assert {id: outcome.result.state for id, outcome in outcomes.items()} == dict.fromkeys(("long", "x", "y"), "done")
    wanted = pipe.generate("long", seed=1, **{**SMALL, "num_timesteps": 60})
    assert wanted.image is not None
    assert Image.open(io.BytesIO(outcomes["long"].content)).tobytes() == wanted.image.tobytes()


def test_a_job_that_kills_its_workers_has_failed(context: Any) -> None:
    team = Processes({"a": RECIPE}, context)

    def tell(worker: str, what: str, done: int, total: int) -> None:
        if what == "bad" and done:
            os.kill(team.pid(worker), signal.SIGKILL)

    outcomes = list(handed_out([job("bad", num_timesteps=400), job("x")], "m", team, tell, lambda _: None))
    assert [(outcome.result.id, outcome.result.state) for outcome in outcomes] == [("bad", "failed"), ("x", "done")]
    assert outcomes[0].result.why == "2 workers died of it: the last one was ended by SIGKILL"


def test_a_worker_that_cannot_load_says_why(context: Any, tmp_path: Path) -> None:
    team = Processes({"a": Recipe(tmp_path / "nowhere")}, context)
    team.start("a")
    event = team.event()
    assert (event.kind, str(event.error).split(";")[0]) == ("refused", f"no such folder: {tmp_path / 'nowhere'}")
    team.close()


def start_and_wait(end: Any) -> None:
    """A process that has a worker, and is killed."""
    team = Processes({"a": RECIPE}, multiprocessing.get_context("fork"))
    team.start("a")
    end.send((team.pid("a"), team.event().kind))
    time.sleep(60)


def test_a_worker_ends_with_who_started_it(context: Any) -> None:
    ours, theirs = context.Pipe()
    process = context.Process(target=start_and_wait, args=(theirs,))
    process.start()
    worker, kind = ours.recv()
    assert kind == "loaded"
    process.kill()
    process.join()
    until = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":  # ended, and nobody has asked how
            break
        time.sleep(0.01)
    assert time.monotonic() < until


def test_close_ends_what_runs(context: Any) -> None:
    team = Processes({"a": RECIPE, "b": RECIPE}, context)
    for worker in team.workers:
        team.start(worker)
    pids = [team.pid(worker) for worker in team.workers]
    assert isinstance(team.event(), Event)
    team.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_devices_are_cards_or_the_processor() -> None:
    assert worker_devices("0,1") == ["cuda:0", "cuda:1"]
    assert worker_devices("cuda:2, cpu,cpu") == ["cuda:2", "cpu", "cpu"]
    for wrong in ("", "gpu", "0,,1", "-1", "cuda", "cuda:x", "\u0663"):
        with pytest.raises(SettingError, match="devices must be numbers of cards"):
            worker_devices(wrong)
    with pytest.raises(SettingError, match="devices names cuda:0 twice; a card has one worker"):
        worker_devices("0,cuda:0")


def test_workers_of_one_machine_share_its_memory_and_its_cores() -> None:
    made = recipes_for(["cuda:1", "cpu", "cpu"], Recipe(None, {"dtype": "float32"}))
    assert [*made] == ["cuda:1", "cpu (1)", "cpu (2)"]
    assert [recipe.sharers for recipe in made.values()] == [3, 3, 3]
    assert made["cuda:1"].threads is None and (made["cpu (1)"].threads or 0) >= 1
    assert made["cpu (2)"].options == {"dtype": "float32", "device": "cpu"}


def test_a_part_of_the_memory_is_what_a_worker_plans_with() -> None:
    whole = Recipe(CHECKPOINT, {"device": "cpu", "max_ram": "8GB"})
    assert [replace(whole, sharers=sharers)._part() for sharers in (1, 2)] == [{}, {"max_ram": 4_000_000_000}]
    (part,) = replace(whole, options={}, sharers=4)._part().values()
    assert 0 < part <= memory().total // 4
    with pytest.raises(DoesNotFitError):
        replace(whole, options={"device": "cpu", "max_ram": "2MB"}, sharers=2).load()
