"""Recipes over frames: what they ask for, their texts and a person's own, and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.command import Ran
from support.pictures import noise

from lowmem_bagel import BagelPipeline, Clip
from lowmem_bagel.errors import SettingError
from lowmem_bagel.pictures.saving import read_metadata
from lowmem_bagel.recipes import Storyboard, future, navigate, read_texts, views
from lowmem_bagel.recipes.texts import FIELDS, FORMATTER, merged, own_texts

PICTURES = [Image.fromarray(noise(32, 32, seed=number)) for number in range(5)]
SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_timesteps": 2, "seed": 0}


def test_a_future_is_a_clip_and_frames_after_it() -> None:
    board = future(Clip(PICTURES, 3), 4)
    assert [type(term).__name__ for term in board.terms] == ["Picture"] * 3 + ["str"]
    assert board.terms[-1] == "Draw the next frames."
    assert (board.turns, board.settings) == ((), {"frames": 4, "frame_mode": "together"})
    assert future(Clip(PICTURES), 2, "the ball {falls}").terms[-1] == "the ball {falls}"
    assert future(Clip(PICTURES), 2, mode="turn").terms[-1] == "Draw the next frame."


def test_views_are_told_together_or_one_by_one() -> None:
    board = views(PICTURES[0], ["from the left", "from above", "from behind"])
    assert board.terms[1] == "Show the same from the left, from above and from behind."
    assert (board.turns, board.settings["frames"]) == ((), 3)
    turned = views(PICTURES[0], ["from the left", "from above"], "turn")
    assert (turned.terms[1], turned.turns) == ("Show the same from the left.", ("Show the same from above.",))
    assert views(PICTURES[0], ["from above"]).terms[1] == "Show the same from above."


def test_a_walk_is_a_frame_a_move() -> None:
    board = navigate(PICTURES[0], ["forward", "turn left"])
    assert board.terms[1] == "The camera moves: forward. Show what it sees."
    assert board.turns == ("The camera moves: turn left. Show what it sees.",)
    assert board.settings == {"frames": 2, "frame_mode": "turn"}


@pytest.mark.parametrize("board", [
    future(Clip(PICTURES, 2), 2), views(PICTURES[0], ["left", "right"], "turn"), navigate(PICTURES[0], ["on", "back"]),
], ids=["future", "views", "navigate"])  # fmt: skip
def test_a_pipeline_draws_them(small_pictures: BagelPipeline, board: Storyboard) -> None:
    result = board.draw(small_pictures, **SMALL)
    assert len(result.images) == 2 and result.settings["frames"] == 2
    again = small_pictures.run(board.terms, turns=board.turns, **board.settings, **SMALL)
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in result.images]


@pytest.mark.parametrize("said", [[], "left", [" "], ["left", 3]])
def test_directions_and_moves_must_say_something(said: Any) -> None:
    for recipe in (views, navigate):
        with pytest.raises(SettingError):
            recipe(PICTURES[0], said)


def test_the_texts_have_the_braces_that_are_filled_in() -> None:
    assert merged({}) == own_texts()
    for recipe, texts in own_texts().items():
        for text in texts.values():
            names = {name for _, name, _, _ in FORMATTER.parse(text) if name is not None}
            assert names <= {name for name, owner in FIELDS.items() if owner == recipe}


def test_a_person_s_texts_stand_in_place_of_some(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"navigate": {"move": "<move>{move}</move> {{}}"}}))
    texts = read_texts(path)
    assert navigate(PICTURES[0], ["on"], texts).terms[1] == "<move>on</move> {}"
    assert views(PICTURES[0], ["left"], texts=texts).terms[1] == "Show the same left."


@pytest.mark.parametrize(("said", "wrong"), [
    ([], "an object of recipes"), ({"fly": {}}, "'fly' is none of the recipes"), ({"views": []}, "not an object"),
    ({"views": {"up": ""}}, "views has texts for together, turn, and, not 'up'"), ({"views": {"and": 3}}, "not 'and'"),
    ({"views": {"turn": "{move}"}}, "braces may hold views or view alone"), ({"views": {"turn": "{"}}, "braces may"),
    ({"views": {"turn": "{view.x}"}}, "braces may"), ({"views": {"turn": "{view!r}"}}, "braces may"),
    ({"views": {"turn": "{}"}}, "braces may"), ({"views": {"turn": "{view:>9999999999}"}}, "braces may"),
])  # fmt: skip
def test_texts_that_mean_nothing_are_refused(tmp_path: Path, said: Any, wrong: str) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(said))
    with pytest.raises(SettingError, match=wrong):
        read_texts(path)


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        read_texts(tmp_path / "nowhere.json")
    (tmp_path / "texts.json").write_text("{")
    with pytest.raises(SettingError, match="not a readable JSON file"):
        read_texts(tmp_path / "texts.json")


@pytest.mark.parametrize(("command", "arguments", "count"), [
    ("future", ["--frames", "2", "--clip-count", "2"], 2), ("views", ["left", "right", "--frame-mode", "turn"], 2),
    ("navigate", ["on", "back", "left"], 3),
])  # fmt: skip
def test_commands(cli: Callable[..., Ran], tmp_path: Path, command: str, arguments: list[str], count: int) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for number, picture in enumerate(PICTURES):
        picture.resize((64, 64)).save(given / f"{number}.png")
    small = ("--width", 64, "--height", 64, "--num-timesteps", 2, "--seed", 1, "-o", tmp_path / "out.png", "--json")
    ran = cli(command, given if command == "future" else given / "0.png", *arguments, *small)
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    names = [f"out-0{number}.png" for number in range(1, count + 1)] + ["out-sheet.png", "out.webp", "out.mp4"]
    assert [Path(path).name for path in told["paths"]] == names
    assert (told["recipe"], told["frames"]) == (command, count)
    assert read_metadata(tmp_path / "out-02.png")["recipe"] == command


@pytest.mark.parametrize(("command", "arguments", "wrong"), [
    ("future", ["nowhere.mp4"], "no such picture"), ("views", ["nowhere.png", "left"], "no such picture"),
    ("navigate", ["nowhere.png", "on", "--texts", "nowhere.json"], "nowhere.json: cannot be read"),
])  # fmt: skip
def test_mistakes_end_in_one_line(cli: Callable[..., Ran], command: str, arguments: list[str], wrong: str) -> None:
    ran = cli(command, *arguments)
    assert ran.code == 2 and wrong in ran.error
