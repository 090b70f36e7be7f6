"""Workers that are actors of Ray: on two of this machine, one killed in the midst of a job."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from support.batch import MODEL, SMALL, contents, jobs_file
from support.command import Ran
from support.paths import CHECKPOINT

from lowmem_bagel.batch.jobs import Job
from lowmem_bagel.batch.loading import Recipe
from lowmem_bagel.batch.ray_team import RayTeam, Share, _check_answers, _everywhere, share_of
from lowmem_bagel.batch.team import handed_out
from lowmem_bagel.batch.work import Work
from lowmem_bagel.errors import CheckpointError, MissingExtraError, SettingError

RECIPE = Recipe(CHECKPOINT, {"device": "cpu", "dtype": "float32"}, threads=1)


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """A Ray of two cores on this machine, which those who ask for one find."""
    ray = pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        about = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=2, num_gpus=0, object_store_memory=80 << 20, **about)
    signal.signal(signal.SIGTERM, before)
    yield
    ray.shutdown()


class Deadly(RayTeam):
    """Kills the first worker that does the job "long", in its midst."""

    killed = False

    def give(self, worker: str, work: Work) -> None:
        if work.job.id == "long" and not self.killed:
            self.killed = True
            threading.Timer(0.1, os.kill, (self.pid(worker), signal.SIGKILL)).start()
        super().give(worker, work)


@pytest.mark.usefixtures("started")
class TestActors:
    def test_the_model_must_be_there(self, tmp_path: Path) -> None:
        team = RayTeam("local", 1, Recipe(tmp_path / "nowhere"))
        job = Job("x", 1, "d", "generate", "x", (), "x.png", {"seed": 1, **SMALL})
        with pytest.raises(
            CheckpointError, match=r"no such folder: .*\(on .*the same path on every machine"
        ) as refused:
            list(handed_out([job], "m", team, lambda *_: None, lambda _: None))
        assert "\n" not in str(refused.value)

    def test_without_cards_workers_must_be_counted(self) -> None:
        with pytest.raises(SettingError, match="this Ray has no cards; --ray-workers N"):
            RayTeam("local", None, RECIPE)
        assert sys.stdout is not sys.stderr

    def test_the_command_does_a_killed_workers_job_again_to_the_same_picture(
        self, cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three actors in all: each takes seconds to import PyTorch."""
        monkeypatch.chdir(tmp_path)
        others = ({"prompt": f"{number}", **SMALL} for number in range(4))
        jobs_file(tmp_path / "jobs.jsonl", {"id": "long", "prompt": "x", **SMALL, "num_timesteps": 200}, *others, "{")
        relative = os.path.relpath(CHECKPOINT)
        ran = cli("batch", "jobs.jsonl", "here", "--model", relative, "--device", "cpu")
        assert ran.code == 2
        monkeypatch.setattr("lowmem_bagel.batch.ray_team.RayTeam", Deadly)
        flags = ("--ray", "local", "--ray-workers", 2, "--json")
        ran = cli("batch", "jobs.jsonl", "out", "--model", relative, "--device", "cpu", *flags)
        assert ran.code == 2 and ran.out.startswith('{\n "jobs": 6,\n "done": 5,'), ran
        assert ran.err.count("died (") == 1 and "while it did long" in ran.err
        assert contents(tmp_path / "out") == contents(tmp_path / "here")


def test_a_worker_a_card() -> None:
    two_and_four: list[Mapping[str, float]] = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 4.0}, {"CPU": 8.0}]
    assert share_of(two_and_four, None, True) == Share(6, 1, 1, 4)
    assert share_of(two_and_four, 3, True) == Share(3, 1, 1, 4)
    assert share_of(two_and_four, 3, False) == Share(3, 0, 8, 1)
    assert share_of(two_and_four, 12, False) == Share(12, 0, 2, 4)
    assert share_of([{"CPU": 2.0}], 5, True) == Share(5, 0, 1, 5)
    for machines, why in (([{"CPU": 2.0}], "no cards"), ([{}], "neither cards nor cores"), ([], "neither cards")):
        with pytest.raises(SettingError, match=why):
            share_of(machines, None, True)


def test_addresses() -> None:
    for fine in ("local", "auto"):
        _check_answers(fine)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for prefix in ("", "ray://"):
            _check_answers(f"{prefix}127.0.0.1:{port}")
    for wrong in ("", "here", "127.0.0.1", "127.0.0.1:", ":1", "127.0.0.1:x", "127.0.0.1:99999"):
        with pytest.raises(SettingError, match="takes HOST:PORT of a Ray"):
            _check_answers(wrong)
    with pytest.raises(SettingError, match=f"no Ray answers at 127.0.0.1:{port}"):
        _check_answers(f"127.0.0.1:{port}")


def test_paths_are_whole_for_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = _everywhere(Recipe(Path("model"), {"base": "base", "lora": ("a:0.5", "/b"), "dtype": "auto"}))
    assert recipe.path == tmp_path / "model"
    assert recipe.options == {"base": f"{tmp_path}/base", "lora": (f"{tmp_path}/a:0.5", "/b"), "dtype": "auto"}
    assert _everywhere(Recipe(None)) == Recipe(None)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "lowmem-bagel\[ray\]"'):
        RayTeam("local", 1, RECIPE)


def test_options_that_contradict(cli: Callable[..., Ran], tmp_path: Path) -> None:
    jobs = jobs_file(tmp_path / "jobs.jsonl", {"prompt": "a"})
    for flags, why in (
        (("--ray", "local", "--devices", "0"), "give one of"),
        (("--ray", "local", "--device", "cuda:1"), "Ray's to give"),
        (("--ray-workers", "2"), "say where it is with --ray"),
        (("--ray", "local", "--ray-workers", "0"), "ray_workers must be a whole number"),
    ):
        assert why in cli("batch", jobs, tmp_path / "out", "--model", MODEL[1], *flags).error
    assert not (tmp_path / "out").exists()
