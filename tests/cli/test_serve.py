"""`lowmem-bagel serve`: what it tells the service; what it serves is in tests/serve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.command import Ran

from lowmem_bagel.errors import SettingError
from lowmem_bagel.settings import LoadOptions


@pytest.mark.parametrize(("flags", "kept"), [((), "auto"), (("--context-store", "off"), "off")])
def test_a_server_keeps_contexts_unless_told_otherwise(
    cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], kept: str
) -> None:
    loading: list[LoadOptions] = []

    def service(path: object, options: LoadOptions, *_: object, **__: object) -> None:
        loading.append(options)
        raise SettingError("not now")

    monkeypatch.setattr("lowmem_bagel.serve.service.Service", service)
    assert "not now" in cli("serve", *flags).error
    assert [options.context_store for options in loading] == [kept]
