"""Modules that take seconds to import, for files of tests: every process collects all files, and runs some."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """The classes of a module, imported when one is asked for: pytest asks every name of a file for other things."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if not name[0].isupper():
            raise AttributeError(name)
        return getattr(import_module(self._name), name)
