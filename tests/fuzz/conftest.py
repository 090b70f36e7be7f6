"""What is installed does not change meanwhile, so it is looked up once: that would take longer than all inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from lowmem_bagel import extensions


@pytest.fixture(autouse=True, scope="package")
def installed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extensions, "entry_points", cache(extensions.entry_points))
        yield
