"""Pictures and settings of callers go through a whole request; what had to be assumed is said and kept."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import Ran
from support.pictures import noise, pixels
from support.tiff_files import tiff

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import SettingError, UserError
from lowmem_bagel.generation.inputs import open_terms
from lowmem_bagel.pictures.opening import Picture
from lowmem_bagel.pictures.saving import read_metadata

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_timesteps": 3, "seed": 3}
VALUES = noise(32, 32)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(VALUES).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def edited(small_pictures: BagelPipeline) -> np.ndarray:
    result = small_pictures.edit(Image.fromarray(VALUES), "make it red", **SMALL)
    assert result.image is not None
    return pixels(result.image)


@pytest.mark.parametrize(
    "source", [VALUES, VALUES / 255, torch.from_numpy(VALUES).permute(2, 0, 1), png(), io.BytesIO(png())],
    ids=["array", "floats", "tensor", "bytes", "file"],
)  # fmt: skip
def test_every_way_to_give_a_picture(small_pictures: BagelPipeline, edited: np.ndarray, source: Any) -> None:
    result = small_pictures.edit(source, "make it red", **SMALL)
    assert result.image is not None
    assert (pixels(result.image) == edited).all()
    assert "notes" not in result.settings


def test_a_data_url_is_a_picture_among_terms_too(small_pictures: BagelPipeline, edited: np.ndarray) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for result in (
        small_pictures.edit(url, "make it red", **SMALL),
        small_pictures.run(iter([url, "make it red"]), **SMALL),
    ):
        assert result.image is not None
        assert (pixels(result.image) == edited).all()
        assert result.settings["prompt"] == "make it red"


def test_settings_of_other_libraries(small_pictures: BagelPipeline, edited: np.ndarray) -> None:
    given = {name: np.int64(value) for name, value in SMALL.items()} | {"timestep_shift": torch.tensor(3.0)}
    result = small_pictures.edit(Image.fromarray(VALUES), "make it red", **given)
    assert result.image is not None
    assert (pixels(result.image) == edited).all()


def test_the_largest_seed_is_kept_by_a_saved_picture(small_pictures: BagelPipeline, tmp_path: Path) -> None:
    result = small_pictures.generate("a circle", **SMALL | {"seed": np.uint64(2**64 - 1)})
    for name in ("a.png", "a.jpg", "a.webp"):
        assert read_metadata(result.save(tmp_path / name)) == json.loads(json.dumps(dict(result.settings)))
        assert result.settings["seed"] == result.seed == 2**64 - 1


def test_what_was_assumed_is_warned_of_and_kept(small_pictures: BagelPipeline, tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff((VALUES / 510).astype(np.float32), 2))
    with pytest.warns(UserWarning, match=r"deep\.tif: samples of 32 bits .* white 1"):
        result = small_pictures.edit(path, "make it red", **SMALL)
    (note,) = result.settings["notes"]
    assert note.startswith("deep.tif: samples of 32 bits") and note.endswith("black was taken to be 0 and white 1")
    assert read_metadata(result.save(tmp_path / "a.png"))["notes"] == [note]


def test_the_command_line_shows_notes_once(cli: Callable[..., Ran], reference_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff((VALUES / 510).astype(np.float32), 2))
    ran = cli("ask", "what?", "--image", path, "--model", reference_checkpoint, "--max-new-tokens", 2)
    assert ran.code == 0
    assert ran.err.count("note: deep.tif: samples of 32 bits") == 1


def test_the_command_line_saves_by_suffix(cli: Callable[..., Ran], reference_checkpoint: Path, tmp_path: Path) -> None:
    small = ("--height", 32, "--width", 32, "--num-timesteps", 2, "--seed", 2**64 - 1, "--model", reference_checkpoint)
    for name in ("a.jpg", "a.webp"):
        assert cli("generate", "a red circle", "--out", tmp_path / name, *small).code == 0
        shown = cli("inspect", tmp_path / name)
        assert shown.code == 0
        assert "prompt: a red circle" in shown.out and f"seed: {2**64 - 1}" in shown.out


ODD_TERMS: tuple[Any, ...] = (
    None,
    3,
    "a prompt alone",
    b"bytes",
    [],
    [None],
    [3],
    ["a", None],
    [[]],
    [""],
    {"a": 1},
    VALUES,
    object(),
)


@pytest.mark.parametrize("terms", ODD_TERMS, ids=range(len(ODD_TERMS)))
def test_odd_terms(terms: Any) -> None:
    with pytest.raises(UserError):
        open_terms(terms)


class NoPath:
    """Says that it is one, and fails in every other way too."""

    def __fspath__(self) -> int:
        return 3

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_odd_calls(small_pictures: BagelPipeline) -> None:
    picture = Image.fromarray(VALUES)
    calls: tuple[Callable[[], object], ...] = (
        lambda: small_pictures.generate(None),  # type: ignore[arg-type]
        lambda: small_pictures.generate(b"a circle"),  # type: ignore[arg-type]
        lambda: small_pictures.edit(picture, None),  # type: ignore[arg-type]
        lambda: small_pictures.edit(None, "make it red"),
        lambda: small_pictures.ask(picture),  # type: ignore[arg-type]
        lambda: small_pictures.ask("what?", 3),
        lambda: small_pictures.run(["a circle"], output=np.array(["image", "text"])),  # type: ignore[arg-type]
        lambda: small_pictures.generate("a circle", callback=3),  # type: ignore[arg-type]
        lambda: small_pictures.generate("a circle", seed="1"),
        lambda: small_pictures.generate("a circle", think=np.zeros(3)),
        lambda: small_pictures.ask("what?", think=torch.zeros(2, 2)),
        lambda: small_pictures.ask("what?", NoPath()),
        lambda: small_pictures.run(NoPath()),  # type: ignore[arg-type]
        lambda: small_pictures.run(["a circle"], output=NoPath()),  # type: ignore[arg-type]
        lambda: BagelPipeline.from_pretrained("nowhere", weights=NoPath()),  # type: ignore[arg-type]
        lambda: BagelPipeline.from_pretrained(None),  # type: ignore[arg-type]
        lambda: BagelPipeline.from_pretrained("nowhere", progress=3),  # type: ignore[arg-type]
    )
    for index, call in enumerate(calls):
        with pytest.raises(UserError) as refused:
            call()
        assert "\n" not in str(refused.value), index


def test_terms_are_opened_once(small_pictures: BagelPipeline) -> None:
    """A file object is read to its end: it could not be read again."""

    class Once:
        def read(self, size: int = -1) -> bytes:
            assert not hasattr(self, "done")
            self.done = True
            return png()

    (opened,) = open_terms([Once()])
    assert isinstance(opened, Picture)
    assert open_terms([opened]) == [opened]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small_pictures.ask("what?", Once(), max_new_tokens=2).text is not None


def test_a_setting_unknown_to_a_request_is_named(small_pictures: BagelPipeline) -> None:
    with pytest.raises(SettingError, match="unknown setting 'sead'"):
        small_pictures.generate("a circle", sead=1)
