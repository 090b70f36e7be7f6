"""What is read off a folder before anything is planned."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from lowmem_bagel import extensions
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.planner.facts import ModelFacts


@pytest.mark.parametrize("form", ["nf4", "gguf-q8_0"])
def test_formats_are_looked_up_by_folder_and_not_by_tensor(
    variant_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Every installed distribution is gone through for each kind of thing once: once a tensor, or some times a request,
    that took longer than all else of a small load."""
    folder, looks = ModelFolder.open(variant_of(form)), []

    def counted(**about: Any) -> Any:
        looks.append(about)
        return entry_points(**about)

    monkeypatch.setattr(extensions, "entry_points", counted)
    extensions._registered.cache_clear()
    for _ in range(2):
        assert ModelFacts.of_folder(folder).format == form
    groups = [about["group"] for about in looks]
    assert "lowmem_bagel.formats" in groups and len(groups) == len(set(groups))
