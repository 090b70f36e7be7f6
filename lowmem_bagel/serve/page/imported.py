"""Gradio as the page imports it: without the type stubs that it writes beside its components each time, which takes it
long. Whoever defines a component later has Gradio write its stub all the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

WRITER = "gradio.component_meta"
WRITES = "create_or_modify_pyi"
"""Called for every class of component: parses its source and the stub that is there, which is the same already."""


@contextmanager
def _no_stubs() -> Iterator[None]:
    """While it is imported for the first time."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for loader in finder.loaders:
            loader.restore()


class _Finder(MetaPathFinder):
    """Of that one module."""

    def __init__(self) -> None:
        self.loaders: list[_Loader] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != WRITER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            loader = _Loader(spec.loader.name, spec.loader.path)
            spec.loader = loader
            self.loaders.append(loader)
        return spec


class _Loader(SourceFileLoader):
    written: tuple[ModuleType, Any] | None = None
    """The module, and what it writes stubs with."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if hasattr(module, WRITES):
            self.written = module, getattr(module, WRITES)
            setattr(module, WRITES, lambda *_: None)

    def restore(self) -> None:
        if self.written is not None:
            module, writes = self.written
            setattr(module, WRITES, writes)


with _no_stubs():
    import gradio

__all__ = ["gradio"]
