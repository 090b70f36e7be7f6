"""ComfyUI's node API, with the demo checkpoint to draw with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.comfy import Comfy, comfy_loaded


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy_loaded(tmp_path_factory.mktemp("comfyui") / "models") as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def nothing_shown_yet(request: pytest.FixtureRequest) -> None:
    if "comfy" in request.fixturenames:
        request.getfixturevalue("comfy").shown.calls.clear()
