"""Every option becomes widgets, and what they show becomes the option's value again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from lowmem_bagel.errors import SettingError
from lowmem_bagel.serve.page.controls import (
    COMMON,
    checked_prompt,
    fields_of,
    in_order,
    settings_of,
    shown_settings,
    value_of,
)
from lowmem_bagel.serve.page.texts import OPTIONS, TEXTS, option_help, option_label
from lowmem_bagel.settings import Option, TextSettings, answer_options, option, options_of, picture_options

ALL = {
    "drawing": picture_options(),
    "editing": picture_options(editing=True),
    "answering": options_of(TextSettings),
    "talking": answer_options(editing=True),
}


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_defaults_come_back_as_they_are(options: tuple[Option, ...]) -> None:
    shown = [about.value for option in options for about in fields_of(option)]
    settings = settings_of(options, shown)
    assert settings == {option.name: option.default for option in options}
    assert shown_settings(options, settings) == shown


def test_any_new_option_has_a_widget() -> None:
    @dataclass
    class Declared:
        fresh: float = option(7.5, "Something new", low=0.0, high=9.0)
        either: str = option("a", "One of two", choices=("a", "b"))
        sides: tuple[float, float] = option((1.0, 2.0), "Two numbers", low=0.0, high=9.0)
        free: int | None = option(None, "A number or none")

    options = options_of(Declared)
    fields = [about for known in in_order(options) for about in fields_of(known)]
    assert [about.widget for about in fields] == ["number", "choice", "number", "number", "text"]
    assert fields[0].label("zh") == "Fresh"
    assert fields[0].info("en") == "Something new (0 to 9)"
    assert fields[2].label("en") == "Sides: from"
    assert settings_of(in_order(options), [1, "b", 2, 3, " 12 "]) == {
        "fresh": 1, "either": "b", "sides": (2, 3), "free": 12,
    }  # fmt: skip


def test_common_options_come_first_and_none_is_lost() -> None:
    ordered = in_order(picture_options())
    own = [name for name in COMMON if name not in ("max_new_tokens", "max_rounds")]
    assert [known.name for known in ordered[:4]] == own
    assert sorted(known.name for known in ordered) == sorted(known.name for known in picture_options())


@pytest.mark.parametrize(
    ("written", "value"),
    [("", None), (" 5 ", 5), (str(2**64 - 1), 2**64 - 1), ("abc", "abc"), ("1.5", "1.5"), ("9" * 5000, "9" * 5000)],
)
def test_a_seed_keeps_every_digit_and_what_is_none_is_refused_by_its_check(written: str, value: Any) -> None:
    [seed] = [known for known in picture_options() if known.name == "seed"]
    assert value_of(seed, [written]) == value
    if isinstance(value, str):
        with pytest.raises(SettingError, match="seed must be a whole number"):
            seed.checked(value)


def test_settings_of_a_picture_that_was_tampered_with_are_refused() -> None:
    with pytest.raises(SettingError, match="num_timesteps"):
        shown_settings(picture_options(), {"num_timesteps": "many"})
    with pytest.raises(SettingError, match="prompt"):
        checked_prompt(["no", "text"], 100)
    with pytest.raises(SettingError, match="prompt"):
        checked_prompt("long" * 100, 100)


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_every_option_is_explained_in_both_languages(options: tuple[Option, ...]) -> None:
    for known in options:
        assert known.name in OPTIONS, f"{known.name} has no Chinese text in page/texts.py"
        assert any("\u4e00" <= c <= "\u9fff" for c in option_help(known.name, known.help, "zh"))
        assert option_help(known.name, known.help, "en") == known.help
        assert option_label(known.name, "zh")


def test_both_languages_fill_in_the_same_values() -> None:
    import string

    for key, text in TEXTS.items():
        assert text.en and text.zh, key
        names = [{name for _, name, _, _ in string.Formatter().parse(said) if name} for said in text]
        assert names[0] == names[1], key


def test_every_text_is_used() -> None:
    from support.paths import ROOT

    source = "".join(path.read_text("utf-8") for path in (ROOT / "lowmem_bagel/serve/page").glob("*.py"))
    composed = ("go_", "output_", "place_", "draw", "edit", "ask", "mixed", "history", "model", "ended_")
    by_name = [key for key in TEXTS if not key.startswith(composed) and not key.endswith("_hint")]
    assert [key for key in by_name if len(re.findall(f"[\"']{key}[\"']", source)) < 2] == []
