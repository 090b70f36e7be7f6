"""A user's mistake at the command line: exit code 2, one line that says what to do, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import Q, change_json, change_tensors
from support.command import INTERRUPTIBLE, Ran
from support.forked import Forked
from support.pictures import file_size_limit, noise, one_bit_png

Cli = Callable[..., Ran]


def listing(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(cli: Cli, place: Path, reference_checkpoint: Path) -> Callable[..., str]:
    """Runs a command that must be refused before anything is loaded or written; gives its line."""

    def run(*arguments: object, model: Path | None = reference_checkpoint) -> str:
        before = listing(place)
        chosen = [] if model is None else ["--model", model]
        error = cli(*arguments, *chosen).error
        assert listing(place) == before
        return error

    return run


class TestFolders:
    def test_no_such_folder(self, refused: Callable[..., str], place: Path) -> None:
        for command in (["generate", "a circle"], ["ask", "what?"]):
            assert "no such folder" in refused(*command, model=place / "nowhere")
        assert "no such file or folder" in refused("inspect", place / "nowhere", model=None)

    def test_a_file_for_a_folder(self, refused: Callable[..., str], place: Path) -> None:
        (place / "model.safetensors").write_bytes(b"x")
        said = refused("generate", "a circle", model=place / "model.safetensors")
        assert "model.safetensors: truncated or not a safetensors file" in said
        (place / "notes.txt").write_bytes(b"x")
        assert "no file of weights" in refused("generate", "a circle", model=place / "notes.txt")

    @pytest.mark.parametrize("name", ["ema.safetensors", "llm_config.json", "vit_config.json"])
    def test_missing_file(self, refused: Callable[..., str], spoilable: Path, name: str) -> None:
        (spoilable / name).unlink()
        assert f"{name} is missing" in refused("generate", "a circle", model=spoilable)
        assert f"{name} is missing" in refused("inspect", spoilable, model=None)

    @pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
    def test_truncated_file_names_the_tensor(self, refused: Callable[..., str], spoilable: Path, name: str) -> None:
        path = spoilable / name
        path.write_bytes(path.read_bytes()[:-10])
        error = refused("ask", "what?", model=spoilable)
        assert f"{name}: tensor " in error
        assert "truncated" in error

    def test_corrupt_header(self, refused: Callable[..., str], spoilable: Path) -> None:
        path = spoilable / "ema.safetensors"
        content = bytearray(path.read_bytes())
        content[20] = 0xFF
        path.write_bytes(content)
        assert "its header is damaged" in refused("generate", "a circle", model=spoilable)

    def test_missing_tensor_is_named(self, refused: Callable[..., str], spoilable: Path) -> None:
        change_tensors(spoilable, **{Q: None})
        assert f"tensor {Q} is missing" in refused("generate", "a circle", model=spoilable)

    def test_wrong_configuration(self, refused: Callable[..., str], spoilable: Path) -> None:
        change_json(spoilable / "llm_config.json", hidden_size="many")
        assert "llm_config.json: hidden_size must be" in refused("generate", "a circle", model=spoilable)
        (spoilable / "llm_config.json").write_text("{")
        assert "not a readable JSON file" in refused("generate", "a circle", model=spoilable)

    def test_damaged_tokenizer(self, refused: Callable[..., str], spoilable: Path) -> None:
        (spoilable / "tokenizer.json").write_text("{}")
        assert "tokenizer.json: damaged" in refused("ask", "what?", model=spoilable)

    def test_pickle(self, refused: Callable[..., str], spoilable: Path) -> None:
        (spoilable / "ema.safetensors").rename(spoilable / "pytorch_model.bin")
        assert "a pickle, which is never loaded" in refused("generate", "a circle", model=spoilable)


class TestPictures:
    @pytest.mark.parametrize("command", ["edit", "ask"])
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: None, "no such picture"),
            (lambda path: path.write_bytes(b"hello"), "not a picture"),
            (lambda path: path.write_bytes(b""), "not a picture"),
            (lambda path: path.mkdir(), "there is no picture in it"),
            (lambda path: Image.new("RGB", (1, 1)).save(path), "1x1 pixels: too small"),
            (lambda path: one_bit_png(path, 20000, 20000), "too large; scale it down to 141 megapixels"),
        ],
        ids=["missing", "text", "empty", "folder", "1x1", "20000x20000"],
    )
    def test_unusable(
        self, refused: Callable[..., str], tmp_path: Path, make: Callable[[Path], object], message: str, command: str
    ) -> None:
        path = tmp_path / "a.png"
        make(path)
        terms = [path, "make it red"] if command == "edit" else ["what?", "--image", path]
        assert message in refused(command, *terms)

    def test_truncated(self, refused: Callable[..., str], tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:-200])
        assert "damaged or truncated" in refused("edit", path, "make it red")

    @pytest.mark.parametrize("mode", ["P", "I;16", "CMYK", "RGBA", "LA", "1", "rotated"])
    def test_unusual_kinds_work(self, cli: Cli, place: Path, reference_checkpoint: Path, mode: str) -> None:
        """Their pixels are compared in test_images; here they go through a whole command."""
        path = place / ("in.tiff" if mode == "CMYK" else "in.png")
        exif = Image.Exif()
        if mode == "rotated":
            exif[0x0112] = 6
        if mode == "I;16":
            image = Image.fromarray(noise(40, 60, 1).astype(np.uint16) * 257)
        else:
            image = Image.fromarray(noise(40, 60)).convert("RGB" if mode == "rotated" else mode)
        image.save(path, exif=exif)
        ran = cli("ask", "what?", "--image", path, "--model", reference_checkpoint, "--max-new-tokens", 2)
        assert ran.code == 0, ran.err

    def test_extreme_shape_works(self, cli: Cli, place: Path, reference_checkpoint: Path) -> None:
        Image.new("RGB", (2000, 3)).save(place / "in.png")
        ran = cli("ask", "what?", "--image", "in.png", "--model", reference_checkpoint, "--max-new-tokens", 2)
        assert ran.code == 0, ran.err


class TestSettings:
    @pytest.mark.parametrize("prompt", ["", "  ", "\n"])
    def test_empty_prompt(self, refused: Callable[..., str], tmp_path: Path, prompt: str) -> None:
        """Refused before the model is opened: the folder need not even exist."""
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        for command in (["generate", prompt], ["ask", prompt], ["edit", tmp_path / "a.png", prompt]):
            assert refused(*command, model=tmp_path / "nowhere") == "the prompt is empty; say what you want"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--height", 1040], "height 1040 is over the model's 1024 pixels"),
            (["--width", 5000], "width 5000 is over the model's 1024 pixels"),
            (["--num-timesteps", 1], "num_timesteps must be a whole number from 2"),
            (["--cfg-interval", 0.9, 0.1], "cfg_interval is reversed: give (0.1, 0.9)"),
            (["--cfg-renorm-type", "fancy"], "unknown cfg_renorm_type 'fancy'; choose one of"),
            (["--step-cache", "fancy"], "unknown step_cache 'fancy'; choose one of"),
            (["--cfg-text-scale", "nan"], "cfg_text_scale must be a number"),
            (["--seed", -1], "seed must be a whole number from 0"),
        ],
    )
    def test_impossible(self, refused: Callable[..., str], options: list[object], message: str) -> None:
        assert message in refused("generate", "a circle", *options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--device", "toaster"], "unknown device 'toaster'"),
            (["--dtype", "int3"], "unknown dtype 'int3'"),
            (["--attention", "fancy"], "fancy"),
        ],
    )
    def test_impossible_ways_to_load(self, refused: Callable[..., str], options: list[object], message: str) -> None:
        assert message in refused("generate", "a circle", *options)

    def test_temperature_zero_with_sampling(self, refused: Callable[..., str]) -> None:
        assert "temperature 0 with sampling" in refused("ask", "what?", "--do-sample", "--temperature", 0)

    def test_impossible_settings_need_no_loading(self, refused: Callable[..., str], spoilable: Path) -> None:
        """The tensors are read after the settings are checked: what is wrong with them does not come up."""
        change_tensors(spoilable, **{Q: None})
        assert "num_timesteps" in refused("generate", "a circle", "--num-timesteps", 1, model=spoilable)

    def test_sizes_are_rounded_and_it_is_said(self, cli: Cli, place: Path, reference_checkpoint: Path) -> None:
        options = ("--height", 40, "--width", 33, "--num-timesteps", 2, "--seed", 0)
        ran = cli("generate", "a circle", *options, "--model", reference_checkpoint)
        assert ran.code == 0
        assert "note: height 40 is not a multiple of 16; using 48" in ran.err
        assert "note: width 33 is not a multiple of 16; using 32" in ran.err
        assert Image.open(place / "out.png").size == (32, 48)

    def test_local_is_channel(self, cli: Cli, place: Path, reference_checkpoint: Path) -> None:
        options = ("--height", 32, "--width", 32, "--num-timesteps", 2, "--cfg-renorm-type", "local", "--json")
        ran = cli("generate", "a circle", *options, "--model", reference_checkpoint)
        assert json.loads(ran.out)["cfg_renorm_type"] == "channel"

    def test_unknown_options_and_commands(self, cli: Cli, place: Path) -> None:
        for arguments in (["generate"], ["generate", "x", "--no-such-option"], ["no-such-command"]):
            ran = cli(*arguments)
            assert ran.code == 2
            assert "Traceback" not in ran.err
            assert ran.err.splitlines()[-1].startswith("Error: ")


class TestOutputs:
    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("missing/a.png", "no such folder"),
            ("file/a.png", "no such folder"),
            (".", "is a folder; name a file"),
            ("a.bmp", "pictures are saved as PNG, JPEG or WebP; call it a.png, a.jpg or a.webp"),
            ("/dev/null", "not an ordinary file"),
            ("/proc/a.png", "cannot write /proc/a.png"),
            ("x" * 300, "File name too long"),
        ],
    )
    def test_impossible_places(self, refused: Callable[..., str], place: Path, out: str, message: str) -> None:
        (place / "file").write_text("in the way")
        assert message in refused("generate", "a circle", "--out", out)

    @pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
    def test_folder_without_permission(self, refused: Callable[..., str], place: Path) -> None:
        (place / "locked").mkdir(mode=0o500)
        assert "cannot write locked" in refused("generate", "a circle", "--out", "locked/a.png")

    def test_full_disk(self, cli: Cli, place: Path, reference_checkpoint: Path) -> None:
        (place / "out.png").write_bytes(b"precious")
        options = ("--height", 128, "--width", 128, "--num-timesteps", 2)
        with file_size_limit(1000):
            ran = cli("generate", "a circle", *options, "--model", reference_checkpoint)
        assert "cannot write out.png" in ran.error
        assert listing(place) == {place / "out.png"}
        assert (place / "out.png").read_bytes() == b"precious"

    @pytest.mark.parametrize(
        "command", [["generate", "a circle"], ["demo"], ["bench", "predictions", "--out", "record.json"]]
    )
    def test_full_disk_is_known_beforehand(
        self, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, command: list[str]
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
        error = refused(*command, model=None)
        assert "1 MB are free on its disk, and 8 MB are needed; free some space" in error

    @pytest.mark.parametrize("out", ["missing/record.json", ".", "/dev/null", "/proc/record.json"])
    def test_a_benchmark_that_could_not_write_its_record_measures_nothing(
        self, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, out: str
    ) -> None:
        from lowmem_bagel.benchmarks.suites import predictions

        monkeypatch.setattr(predictions, "predictions", None)
        error = refused("bench", "predictions", "--out", out, model=None)
        assert re.search("no such folder|is a folder|not an ordinary file|cannot write", error)

    @pytest.mark.parametrize(
        "command",
        [
            "generate circle -o ~no-such-user/a.png", "demo -o ~no-such-user/a", "inspect ~no-such-user/a",
            "plan ~no-such-user/a", "verify ~no-such-user/a", "convert ~no-such-user/a b --to int8",
            "ask what? --image ~no-such-user/a.png", "ask what? --model ~no-such-user/a",
        ],
    )  # fmt: skip
    def test_a_home_that_nobody_knows(self, refused: Callable[..., str], place: Path, command: str) -> None:
        if command.startswith("demo"):
            (place / "~no-such-user").touch()
        assert "~no-such-user" in refused(*command.split(), model=None)

    def test_demo_into_a_file(self, refused: Callable[..., str], place: Path) -> None:
        (place / "file").write_text("in the way")
        assert "file" in refused("demo", "--out", "file", model=None)
        assert "file" in refused("demo", "--out", "file/folder", model=None)


DRAW_AND_TELL = """
import sys
import lowmem_bagel.generation.executor
from lowmem_bagel.cli import main

report = lowmem_bagel.generation.executor.report

def told(callback, event):
    print("step", flush=True)
    report(callback, event)

lowmem_bagel.generation.executor.report = told
main()
"""


def test_ctrl_c_in_mid_drawing(place: Path, reference_checkpoint: Path) -> None:
    options = ["--height", 64, "--width", 64, "--num-timesteps", 10_000, "--model", reference_checkpoint]
    process = Forked(INTERRUPTIBLE + DRAW_AND_TELL, ["generate", "a circle", *options], folder=place)
    assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGINT)
    ran = process.finished()
    assert ran.returncode == 130
    said = [line for line in ran.stderr.splitlines() if not line.startswith("note: about ")]
    assert said == ["lowmem-bagel: interrupted"]
    assert listing(place) == set()
