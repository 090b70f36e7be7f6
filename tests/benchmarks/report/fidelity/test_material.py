"""The user's own prompts and pictures as material, and what is refused of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lowmem_bagel.benchmarks.report.fidelity.material import QUESTION, built_in, read_material
from PIL import Image
from support.command import Ran
from support.pictures import noise


def saved(path: Path) -> None:
    Image.fromarray(noise(32, 40, seed=2)).save(path)


def test_a_folder_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n\n  two foxes \n", encoding="utf-8-sig")
    saved(tmp_path / "fox.png")
    (tmp_path / "fox.txt").write_text("make it blue\n")
    saved(tmp_path / "hare.JPEG")
    (tmp_path / "notes.md").write_text("not read")
    found = read_material(tmp_path)
    assert [(request.text, request.picture is not None) for request in found.drawings] == [
        ("a fox", False), ("make it blue", True), ("two foxes", False),
    ]  # fmt: skip
    assert sorted(found.texts) == ["a fox", "make it blue", "two foxes"]
    assert [request.text for request in found.questions] == [QUESTION] * 2
    bounded = found.bounded(2, 1)
    assert (len(bounded.drawings), len(bounded.texts), len(bounded.questions)) == (2, 1, 1)
    assert {"name": tmp_path.name, "pictures": 2, "texts": 1, "questions": 1}.items() <= bounded.about.items()


def test_what_is_built_in_is_the_same_every_time() -> None:
    first, again, other = built_in(1, 3), built_in(1, 3), built_in(2, 3)
    assert first.texts == again.texts != other.texts
    assert [request.picture is None for request in first.drawings] == [True, False] * 3
    assert len(first.questions) == 3 and all(request.picture for request in first.questions)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda place: None, "has no prompts and no pictures"),
        (lambda place: (place / "a.txt").write_bytes(b"\xff\xfe\x00\xd8"), "as UTF-8 text"),
        (lambda place: (place / "a.png").write_bytes(b"no picture"), "a.png"),
        (lambda place: (place / "a.txt").write_text("x\n" * (1 << 20)), "fewer prompts"),
    ],
)
def test_mistakes_are_one_line(
    cli: Callable[..., Ran], tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    place = tmp_path / "own"
    place.mkdir()
    make(place)
    out = tmp_path / "f.json"
    assert says in cli("bench", "fidelity", "--material", place, "--out", out).error
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--material", "nowhere"), "no such folder: nowhere"),
        (("--variants", "int7"), "unknown variant 'int7'; choose from bf16, dfloat11"),
        (("--step-caches", "guess"), "unknown step_cache 'guess'"),
        (("--arithmetic", "fp8"), "unknown dtype 'fp8'"),
        (("--adapters", "."), "no LoRA adapter and holds none"),
        (("--shape", "huge"), "unknown shape 'huge'"),
        (("--shape", "tiny", "--layers", "9"), "from 1 to 2 of tiny"),
        (("--layers", "1"), "--layers is for --shape"),
        (("--shape", "tiny", "--adapters", "."), "random weights have no adapters"),
        ((".", "--shape", "tiny"), "not both"),
        (("--shape", "tiny", "--variants", "."), "unknown variant '.'"),
        (("--pictures", "-1"), "--pictures"),
        (("--size", "8"), "--size"),
        (("--num-timesteps", "1"), "--num-timesteps"),
        (("--out", "nowhere/f.json"), "no such folder"),
    ],
)
def test_impossible_options_are_one_line(
    cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in cli("bench", "fidelity", "--device", "cpu", *words).error
    assert not (tmp_path / "fidelity.json").exists()
