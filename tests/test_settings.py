"""Every setting: its default, its limits, and what is said when it is changed or refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
from collections.abc import Iterator
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import CHECKPOINT

from lowmem_bagel.checkpoint.config import BAGEL_7B
from lowmem_bagel.checkpoint.config_files import config_of
from lowmem_bagel.errors import SettingError
from lowmem_bagel.sampling.step_caches.registry import step_caches
from lowmem_bagel.sampling.step_caches.speeds import flag
from lowmem_bagel.settings import (
    LoadOptions,
    Option,
    PictureSettings,
    TextSettings,
    check_prompt,
    options_of,
    picture_options,
    picture_settings,
    text_settings,
)

CONFIG = config_of(CHECKPOINT)


def chosen(has_picture: bool = False, max_side: int = 1024, **given: Any) -> tuple[PictureSettings, list[str]]:
    notes: list[str] = []
    return picture_settings(CONFIG, max_side, has_picture, given, notes.append), notes


def test_published_defaults_of_drawing() -> None:
    settings, notes = chosen()
    assert not notes
    assert (settings.height, settings.width, settings.num_timesteps, settings.timestep_shift) == (1024, 1024, 50, 3.0)
    assert (settings.cfg_text_scale, settings.cfg_img_scale, settings.cfg_interval) == (4.0, 1.0, (0.4, 1.0))
    assert (settings.cfg_renorm_type, settings.cfg_renorm_min, settings.step_cache) == ("global", 0.0, "none")
    assert settings.think is False


def test_published_defaults_of_editing() -> None:
    settings, _ = chosen(has_picture=True)
    assert (settings.height, settings.width) == (None, None)
    assert (settings.cfg_text_scale, settings.cfg_img_scale, settings.cfg_interval) == (4.0, 2.0, (0.0, 1.0))
    assert settings.cfg_renorm_type == "text_channel"


def test_a_small_model_draws_at_its_own_size() -> None:
    settings, _ = chosen(max_side=256)
    assert (settings.height, settings.width) == (256, 256)


@pytest.mark.parametrize(
    ("asked", "used"), [(64, 64), (65, 64), (71, 64), (72, 80), (1, 16), (1017, 1024), (1023, 1024)]
)
def test_sides_are_rounded_and_it_is_said(asked: int, used: int) -> None:
    settings, notes = chosen(height=asked, width=512)
    assert settings.height == used
    assert notes == ([] if asked == used else [f"height {asked} is not a multiple of 16; using {used}"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 1025}, "height 1025 is over the model's 1024 pixels; ask for 1024 or less"),
        ({"width": 4096}, "width 4096 is over the model's 1024 pixels"),
        ({"height": 0}, "height must be a whole number from 1"),
        ({"height": -16}, "height must be a whole number"),
        ({"height": 64.0}, "height must be a whole number"),
        ({"num_timesteps": 1}, "num_timesteps must be a whole number from 2 to 10000, not 1"),
        ({"num_timesteps": True}, "num_timesteps must be a whole number"),
        ({"timestep_shift": 0.0}, "timestep_shift must be a number from 0.001"),
        ({"timestep_shift": float("nan")}, "timestep_shift must be a number"),
        ({"cfg_text_scale": -1}, "cfg_text_scale must be a number from 0"),
        ({"cfg_text_scale": float("inf")}, "cfg_text_scale must be a number"),
        ({"cfg_img_scale": "2"}, "cfg_img_scale must be a number"),
        ({"cfg_interval": (0.9, 0.1)}, r"cfg_interval is reversed: give \(0.1, 0.9\)"),
        ({"cfg_interval": (0.1,)}, "cfg_interval must be two numbers"),
        ({"cfg_interval": 0.4}, "cfg_interval must be two numbers"),
        ({"cfg_interval": (0.0, 1.5)}, "cfg_interval must be a number from 0 to 1"),
        (
            {"cfg_renorm_type": "locale"},
            "unknown cfg_renorm_type 'locale'; choose one of global, channel, text_channel",
        ),
        ({"cfg_renorm_min": 1.1}, "cfg_renorm_min must be a number from 0 to 1"),
        ({"max_think_tokens": 0}, "max_think_tokens must be a whole number from 1"),
        ({"step_cache": "teacache"}, "unknown step_cache 'teacache'; choose one of none, taylorseer"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**64}, "seed must be a whole number from 0"),
        ({"sead": 1}, "unknown setting 'sead'; known are cfg_img_scale"),
    ],
)
def test_impossible_picture_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        chosen(**given)


class Odd:
    """Fails however it is asked."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __float__(self) -> float:
        raise RuntimeError("no")

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __iter__(self) -> Iterator[int]:
        raise RuntimeError("no")


def odd_values() -> tuple[Any, ...]:
    return (
        Odd(), object(), [], {}, (), (1, 2, 3), "", "x", b"1", True, np.bool_(True), torch.tensor(True), float("nan"),
        float("inf"), -float("inf"), 10**400, -1, np.array([1, 2]), np.float32("nan"), torch.tensor([1.0, 2.0]), 1j,
        itertools.count(), np.array("x"), np.datetime64("2020-01-01"), torch.tensor(1, device="meta"), lambda: 1, type,
        "\ud800", "9" * 10**5,
    )  # fmt: skip


@pytest.mark.parametrize("index", range(len(odd_values())))
def test_odd_values_are_refused_in_one_short_line(index: int) -> None:
    """Or taken, where they mean something; nothing else comes out of any option."""
    messages = {}
    for known in (*picture_options(), *options_of(TextSettings), *options_of(LoadOptions)):
        try:
            known.checked(odd_values()[index])
        except SettingError as error:
            messages[known.name] = str(error)
    assert len(messages) > 5
    assert not [name for name, said in messages.items() if name not in said or len(said) > 400 or "\n" in said]


NUMBERS = (np.int64, np.uint8, np.float32, np.float64, torch.tensor, np.array, Fraction, Decimal, int, float)


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.__name__)
def test_numbers_of_other_libraries(kind: Any) -> None:
    """By value, and as Python's own from then on."""
    given = kind(3)
    settings, _ = chosen(timestep_shift=given, cfg_text_scale=given)
    assert (settings.timestep_shift, settings.cfg_text_scale) == (3.0, 3.0)
    assert type(settings.timestep_shift) is float
    json.dumps(settings.to_json())
    if hasattr(given, "__index__") and kind is not float:
        with contextlib.suppress(TypeError):
            operator.index(given)
            whole, _ = chosen(num_timesteps=given, seed=given)
            assert (whole.num_timesteps, whole.seed) == (3, 3)
            assert type(whole.seed) is int


def test_pairs_and_sides_of_other_libraries() -> None:
    for pair in (np.array([0.25, 0.75]), torch.tensor([0.25, 0.75]), [0.25, 0.75], iter((0.25, 0.75))):
        assert chosen(cfg_interval=pair)[0].cfg_interval == (0.25, 0.75)
    options = LoadOptions(
        size=np.array([64, 32]), tune=np.bool_(False), max_vram=np.float32(2**30), tasks=iter(["ask"])
    )
    assert (options.size, options.tune, options.max_vram, options.tasks) == ((64, 32), False, 2.0**30, ("ask",))
    assert type(options.size[0]) is int and type(options.tune) is bool


@pytest.mark.parametrize("think", ["false", "True", 2, None, [], np.array([True, False])])
def test_what_is_neither_true_nor_false(think: Any) -> None:
    option = next(option for option in picture_options() if option.name == "think")
    with pytest.raises(SettingError, match="think must be True or False"):
        option.checked(think)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, np.uint64(2**64 - 1)])
def test_every_seed_of_64_bits(seed: Any) -> None:
    settings, _ = chosen(seed=seed)
    assert settings.seed == int(seed)
    assert torch.Generator().manual_seed(settings.seed).initial_seed() == int(seed)


@pytest.mark.parametrize("prompt", [None, 3, b"a circle", ["a circle"], object()])
def test_a_prompt_that_is_none(prompt: Any) -> None:
    with pytest.raises(SettingError, match="the prompt must be a text, not "):
        check_prompt(prompt)


def test_local_is_the_old_name_of_channel() -> None:
    assert chosen(cfg_renorm_type="local")[0].cfg_renorm_type == "channel"


def test_none_means_the_default() -> None:
    assert chosen(num_timesteps=None, cfg_interval=None, step_cache=None)[0].num_timesteps == 50


def test_seed_zero_is_zero_and_no_seed_is_random() -> None:
    assert chosen(seed=0)[0].seed == 0
    assert text_settings({"seed": 0}).seed == 0
    assert len({chosen()[0].seed for _ in range(8)}) > 1


def test_defaults_of_answers() -> None:
    settings = text_settings({})
    assert (settings.max_new_tokens, settings.do_sample, settings.top_p, settings.think) == (512, False, 1.0, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_sample": True, "temperature": 0}, "temperature 0 with sampling"),
        ({"do_sample": True, "temperature": 0.0}, "temperature 0 with sampling"),
        ({"temperature": -1}, "temperature must be a number from 0"),
        ({"top_p": 0}, "top_p must be a number"),
        ({"top_p": 1.01}, "top_p must be a number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1"),
        ({"num_timesteps": 5}, "unknown setting 'num_timesteps'"),
    ],
)
def test_impossible_answer_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        text_settings(given)


def test_temperature_zero_without_sampling_is_harmless() -> None:
    assert text_settings({"temperature": 0}).temperature == 0


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", "\u3000"])
def test_empty_prompt(prompt: str) -> None:
    with pytest.raises(SettingError, match="the prompt is empty"):
        check_prompt(prompt)


def test_prompt_that_is_no_text() -> None:
    with pytest.raises(SettingError, match="not valid UTF-8"):
        check_prompt(b"\xff\xfe".decode("utf-8", "surrogateescape"))
    check_prompt("ein Kreis 圆 😀")


NO_OPTIONS = {"progress", "added", "step_cache_settings"}
"""Fields that are filled otherwise."""


@pytest.mark.parametrize("declared", [LoadOptions, PictureSettings, TextSettings])
def test_every_field_is_an_option_with_a_help_text(declared: type) -> None:
    known = {option.name: option for option in options_of(declared)}
    assert set(known) == {field.name for field in fields(declared)} - NO_OPTIONS
    assert not [option.name for option in known.values() if not option.help or option.help.endswith(".")]


@pytest.mark.parametrize(
    "options",
    [
        options_of(LoadOptions),
        options_of(TextSettings),
        picture_options(),
        picture_options(editing=True),
    ],
    ids=["load", "text", "draw", "edit"],
)
def test_every_default_passes_its_own_check(options: tuple[Option, ...]) -> None:
    assert len(options) > 5
    for option in options:
        if option.default is not None:
            assert option.checked(option.default) == option.default, option.name


def test_options_as_data() -> None:
    """What an HTTP schema is made from."""
    described = {option.name: option.to_json() for option in picture_options(editing=True)}
    assert json.loads(json.dumps(described))["cfg_interval"]["default"] == [0.0, 1.0]
    assert described["cfg_img_scale"] == {
        "name": "cfg_img_scale", "type": "number", "help": "Guidance by the picture", "default": 2.0,
        "minimum": 0.0, "maximum": 1e3,
    }  # fmt: skip
    assert described["step_cache"]["choices"] == [*step_caches()]
    assert described["speed"]["choices"] == ["exact", "balanced", "fast"]
    assert described["step_cache_threshold"]["default"] == 0.05
    assert described["seed"]["default"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "int3"}, "unknown dtype 'int3'; choose one of auto, float32, bfloat16, float16"),
        ({"device": 0}, "device must be a text, not 0"),
        ({"tasks": ()}, r"tasks must be some of generate, edit, ask, not \(\)"),
        ({"tasks": "ask"}, "tasks must be some of generate, edit, ask"),
        ({"size": 512}, "size must be height and width in pixels, not 512"),
        ({"size": (0, 512)}, "size must be a whole number from 1 to 65536, not 0"),
        ({"step_cache": "fancy"}, "unknown step_cache 'fancy'; choose one of none"),
    ],
)
def test_impossible_load_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LoadOptions(**given)


@pytest.mark.parametrize(
    ("speed", "timesteps", "cache"),
    [
        ("exact", 50, "none"), ("balanced", 50, "velocity-3"), ("fast", 50, "velocity-early"),
        ("balanced", 25, "none"), ("fast", 25, "velocity-2"), ("fast", 10, "none"), ("fast", 1000, "velocity-early"),
        ("balanced", 40, "velocity-2"), ("fast", 40, "velocity-3"),
    ],
)  # fmt: skip
def test_a_speed_is_a_step_cache(speed: str, timesteps: int, cache: str) -> None:
    def chosen(**given: Any) -> PictureSettings:
        return picture_settings(BAGEL_7B, 1024, False, {"num_timesteps": timesteps, **given}, print)

    assert chosen(speed=speed).step_cache == cache
    assert chosen(speed=speed, step_cache=cache).to_json()["speed"] == speed
    if speed != "exact":
        with pytest.raises(SettingError, match=f"speed {speed} means step_cache {cache} here"):
            chosen(speed=speed, step_cache="taylorseer")
    if timesteps == 50:
        assert LoadOptions(speed=speed).step_cache == cache


def test_a_speed_of_an_edit() -> None:
    assert picture_settings(BAGEL_7B, 1024, True, {"speed": "fast"}, print).step_cache == "velocity-late"
    assert LoadOptions(speed="fast", tasks=("edit",)).step_cache == "velocity-late"


@pytest.mark.parametrize(
    ("cache", "editing", "asked"),
    [("none", False, ""), ("velocity-early", False, "--speed fast"), ("velocity-late", True, "--speed fast"),
     ("velocity-4", False, "--step-cache velocity-4"), ("taylorseer", True, "--step-cache taylorseer")],
)  # fmt: skip
def test_how_a_step_cache_is_asked_for(cache: str, editing: bool, asked: str) -> None:
    assert flag(cache, editing) == asked
