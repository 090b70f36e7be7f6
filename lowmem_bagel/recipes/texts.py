"""The texts of the recipes: those of `texts.json`, or a person's own in their place."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import SettingError
from ..files import expanded, parse_json, read_file

Texts: TypeAlias = Mapping[str, Mapping[str, str]]
"""By recipe and by place. What stands in braces is filled in: `FIELDS` has the names."""
FIELDS = {"prompt": "future", "views": "views", "view": "views", "move": "navigate"}
"""What a recipe fills in, and which does."""
MAX_BYTES = 1 << 20
FORMATTER = string.Formatter()


@cache
def own_texts() -> Texts:
    """Those that come with the package."""
    texts: Texts = parse_json(read_file(Path(__file__).with_name("texts.json"), MAX_BYTES))
    return texts


def read_texts(path: Path | None) -> Texts:
    """The package's texts, with those of a JSON file in place of some or all of them.

    Raises:
        SettingError: it cannot be read, or has other recipes, places or braces than there are.
    """
    if path is None:
        return own_texts()
    try:
        said = parse_json(read_file(expanded(path), MAX_BYTES))
    except OSError as error:
        raise SettingError(f"{path}: cannot be read ({error.strerror or error}); give a JSON file of texts") from error
    except ValueError as error:
        raise SettingError(f"{path}: not a readable JSON file: {error}") from error
    return merged(said, str(path))


def merged(said: Any, name: str = "texts") -> Texts:
    """Texts in place of the package's, checked.

    Raises:
        SettingError: as of `read_texts`.
    """
    known = own_texts()
    if not isinstance(said, Mapping):
        raise SettingError(f"{name}: texts are an object of recipes: {', '.join(known)}")
    for recipe, texts in said.items():
        if recipe not in known or not isinstance(texts, Mapping):
            raise SettingError(f"{name}: {recipe!r:.50} is none of the recipes {', '.join(known)}, or not an object")
        for place, text in texts.items():
            if place not in known[recipe] or not isinstance(text, str):
                raise SettingError(f"{name}: {recipe} has texts for {', '.join(known[recipe])}, not {place!r:.50}")
            _check_fields(f"{name}: {recipe}.{place}", recipe, text)
    return {recipe: {**texts, **said.get(recipe, {})} for recipe, texts in known.items()}


def _check_fields(where: str, recipe: str, text: str) -> None:
    known = [name for name, owner in FIELDS.items() if owner == recipe]
    try:
        plain = all(name in (None, *known) and not form and not kind for _, name, form, kind in FORMATTER.parse(text))
    except ValueError:
        plain = False
    if not plain:
        raise SettingError(f"{where}: braces may hold {' or '.join(known)} alone; write {{{{ for a brace")
