"""The command line from end to end, in this process: outputs, JSON, messages, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.command import Ran
from support.paths import ROOT
from support.pictures import noise

import lowmem_bagel
from lowmem_bagel.demo_checkpoint import FOLDER as DEMO

Cli = Callable[..., Ran]
SMALL = ("--height", 32, "--width", 48, "--num-timesteps", 3, "--seed", 0)
needs_demo = pytest.mark.skipif(
    not list(DEMO.glob("*.safetensors")), reason="the demo checkpoint is not in this checkout"
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(reference_checkpoint: Path) -> tuple[str, str]:
    return "--model", str(reference_checkpoint)


class TestHelp:
    def test_commands(self, cli: Cli) -> None:
        ran = cli("--help")
        assert ran.code == 0
        listed = re.findall(r"^  (\w+)  ", ran.out, re.MULTILINE)
        assert {"demo", "download", "inspect", "generate", "edit", "ask", "bench"} <= set(listed)
        said = ran.out.partition("Commands:\n")[2].splitlines()
        assert [line.split()[0] for line in said] == listed, "each in one line"
        assert all(len(line) < 80 and line.endswith(".") and "..." not in line for line in said), "whole lines"
        for command in listed:
            if command != "bench":
                ran = cli(command, "--help")
                assert ran.code == 0
                assert ran.out.startswith(f"Usage: lowmem-bagel {command} ")

    def test_without_arguments(self, cli: Cli) -> None:
        ran = cli()
        assert ran.code == 2
        assert "Usage: lowmem-bagel" in ran.out + ran.err

    def test_version(self, cli: Cli) -> None:
        assert cli("--version").out == f"lowmem-bagel {lowmem_bagel.__version__}\n"

    def test_version_is_the_distributions(self) -> None:
        assert f'version = "{lowmem_bagel.__version__}"' in (ROOT / "pyproject.toml").read_text()

    def test_readme_lists_the_commands(self, cli: Cli) -> None:
        readme = (ROOT / "README.md").read_text()
        table = [line.split("|")[1] for line in readme.splitlines() if line.startswith("| `")]
        named = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
        listed = set(re.findall(r"^  (\w+)  ", cli("--help").out, re.MULTILINE))
        assert listed <= named

    def test_ci_runs_the_readmes_test_command(self) -> None:
        readme, script = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
        assert "python -m pytest -n auto\n" in readme
        assert script.rstrip().endswith("\npython -m pytest -n auto")
        assert 'pip install -e ".[dev]"' in readme
        assert 'install --quiet -e ".[dev]"' in script


class TestGenerate:
    def test_picture_and_its_memory(self, cli: Cli, place: Path, model: tuple[str, str]) -> None:
        ran = cli("generate", "a red circle", *SMALL, "-o", "red.png", *model)
        assert (ran.code, ran.out) == (0, "")
        estimate, done = ran.err.splitlines()
        assert estimate.startswith("note: about ")
        assert re.fullmatch(r"red\.png: seed 0, \d+\.\d s", done)
        assert Image.open(place / "red.png").size == (48, 32)
        shown = cli("inspect", "red.png").out
        for line in ("prompt: a red circle", "seed: 0", "num_timesteps: 3", "height: 32", "cfg_renorm_type: global"):
            assert line in shown.splitlines()
        assert json.loads(cli("inspect", "red.png", "--json").out)["cfg_interval"] == [0.4, 1.0]

    def test_json(self, cli: Cli, place: Path, model: tuple[str, str]) -> None:
        ran = cli("generate", "a red circle", *SMALL, "--json", *model)
        record = json.loads(ran.out)
        assert (record["path"], record["seed"], record["width"]) == ("out.png", 0, 48)
        assert set(record["stats"]) == {"prefill", "denoise", "decode"}

    def test_settings_reach_the_pipeline(self, cli: Cli, model: tuple[str, str]) -> None:
        given = {
            "timestep_shift": 2.0, "cfg_text_scale": 3.0, "cfg_img_scale": 1.5, "cfg_renorm_type": "channel",
            "cfg_renorm_min": 0.2, "step_cache": "taylorseer", "max_think_tokens": 9,
        }  # fmt: skip
        options = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value)]
        ran = cli("generate", "x", *SMALL, *options, "--cfg-interval", 0.1, 0.9, "--json", *model)
        record = json.loads(ran.out)
        assert {name: record[name] for name in given} == given
        assert record["cfg_interval"] == [0.1, 0.9]

    def test_same_seed_same_picture(self, cli: Cli, place: Path, model: tuple[str, str]) -> None:
        for name in ("a.png", "b.png"):
            assert cli("generate", "a red circle", *SMALL, "-o", name, *model).code == 0
        assert (place / "a.png").read_bytes() == (place / "b.png").read_bytes()

    def test_think_prints_the_plan(self, cli: Cli, model: tuple[str, str], pipe: lowmem_bagel.BagelPipeline) -> None:
        ran = cli("generate", "a red circle", *SMALL, "--think", "--max-think-tokens", 5, *model)
        wanted = pipe.generate(
            "a red circle", height=32, width=48, num_timesteps=3, seed=0, think=True, max_think_tokens=5
        )
        assert ran.out == wanted.text + "\n"


class TestEditAndAsk:
    def test_edit_and_ask(self, cli: Cli, place: Path, small_pictures: lowmem_bagel.BagelPipeline) -> None:
        Image.fromarray(noise(40, 56)).save("in.png")
        model = ("--model", small_pictures.model.folder.path)
        assert cli("edit", "in.png", "make it red", "--num-timesteps", 3, "--seed", 0, *model).code == 0
        assert Image.open("out.png").size == (64, 32)
        wanted = small_pictures.edit("in.png", "make it red", num_timesteps=3, seed=0)
        assert wanted.image is not None
        assert Image.open("out.png").tobytes() == wanted.image.tobytes()
        ran = cli("ask", "what is it?", "--image", "in.png", "--max-new-tokens", 5, *model)
        assert ran.out == small_pictures.ask("what is it?", "in.png", max_new_tokens=5).text + "\n"

    def test_an_edit_may_have_another_size(self, cli: Cli, small_pictures: lowmem_bagel.BagelPipeline) -> None:
        Image.fromarray(noise(40, 56)).save("in.png")
        model = ("--model", small_pictures.model.folder.path)
        ran = cli("edit", "in.png", "make it red", "--height", 48, "--width", 32, "--num-timesteps", 2, *model)
        assert ran.code == 0, ran.err
        assert Image.open("out.png").size == (32, 48)

    def test_ask_json(self, cli: Cli, model: tuple[str, str]) -> None:
        record = json.loads(cli("ask", "what?", "--max-new-tokens", 4, "--json", *model).out)
        assert set(record["stats"]) == {"prefill", "answer"}
        assert record["max_new_tokens"] == 4


class TestInspect:
    def test_folder(self, cli: Cli, reference_checkpoint: Path) -> None:
        ran = cli("inspect", reference_checkpoint)
        assert ran.code == 0
        assert "source" in ran.out
        record = json.loads(cli("inspect", reference_checkpoint, "--json").out)
        assert record["total"]["weights"] == record["weights"] == sum(part["weights"] for part in record["parts"])

    def test_nothing_of_ours(self, cli: Cli, place: Path) -> None:
        Image.fromarray(noise()).save("photo.png")
        assert "carries no lowmem-bagel settings" in cli("inspect", "photo.png").error
        (place / "text.txt").write_text("hello")
        assert "not a PNG, JPEG or WebP picture" in cli("inspect", "text.txt").error


class TestBench:
    def test_listing_and_unknown(self, cli: Cli) -> None:
        listed = cli("bench").out.removeprefix("benchmarks: ").strip().split(", ")
        assert {"engine", "floor", "int8-tiles", "kernels"} <= set(listed) and listed == sorted(listed)
        assert "unknown benchmark 'fancy'; choose one of" in cli("bench", "fancy").error


class TestExitCodes:
    def test_a_fault_of_ours_keeps_its_traceback(self, model: tuple[str, str]) -> None:
        code = (
            "import lowmem_bagel.cli, lowmem_bagel.pictures.clips\n"
            "def broken(*_): raise RuntimeError('a bug')\n"
            "lowmem_bagel.pictures.clips.pictures_of = broken\n"
            "lowmem_bagel.cli.main()"
        )
        command = [sys.executable, "-c", code, "ask", "what?", "--image", "x.png", *model]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        assert ran.stderr.endswith("RuntimeError: a bug\n")

    def test_installed_command(self) -> None:
        """Found beside the interpreter, where pip puts it."""
        command = Path(sys.executable).parent / "lowmem-bagel"
        ran = subprocess.run([command, "inspect", "nowhere"], capture_output=True, text=True, check=False)
        assert ran.returncode == 2
        assert ran.stderr.startswith("lowmem-bagel: no such file or folder: nowhere")


@needs_demo
class TestDemo:
    def test_demo(self, cli: Cli, place: Path) -> None:
        """Few timesteps: what the model can do is measured elsewhere."""
        ran = cli("demo", "--num-timesteps", 3, "--out", "new/folder")
        assert ran.code == 0, ran.err
        names = {path.name for path in (place / "new" / "folder").iterdir()}
        assert names == {f"draw-{n}.png" for n in range(1, 5)} | {f"edit-{n}.png" for n in range(1, 4)} | {
            "contact-sheet.png"
        }
        assert len(re.findall("^ask ", ran.out, re.MULTILINE)) == 3
        assert cli("inspect", "new/folder/draw-1.png").code == 0

    def test_demo_is_the_default_model(self, cli: Cli, place: Path) -> None:
        ran = cli("generate", "a red circle", "--num-timesteps", 3)
        assert ran.code == 0
        assert "embedded demo checkpoint (coloured shapes)" in ran.err

    def test_frames_and_recipes_take_the_one_that_has_learnt_them(self, cli: Cli, place: Path) -> None:
        quick = "--num-timesteps", 2
        several = cli("generate", "a red circle moves up slowly on white", "--frames", 2, *quick, "-o", "clip.png")
        one = cli("views", "clip-01.png", "from the left", *quick)  # one frame, and a recipe all the same
        for ran in (several, one):
            assert ran.code == 0, ran.err
            assert "embedded demo checkpoint of frames" in ran.err
