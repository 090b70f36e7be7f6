"""docs/serving.md says what the code and the records say."""

from __future__ import annotations

import pytest
from support.paths import ROOT

from lowmem_bagel.serve import body_limits, connection, service
from lowmem_bagel.serve.options import KEY_VARIABLE, ServeOptions
from lowmem_bagel.settings import options_of

PAGE = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    "said",
    [
        f"{body_limits.limit_of('/v1/images/edits') >> 20} MiB for the API",
        f"{body_limits.IN_FLIGHT >> 20} MiB of all unanswered requests",
        f"{body_limits.BODY_SECONDS:g} s to arrive",
        f"{service.MAX_PROMPT:,} characters of text, {service.MAX_PICTURES} pictures",
        f"| {connection.MAX_CONNECTIONS}; {connection.HEAD_SECONDS} s for a request's head",
        f"{connection.TAKING_SECONDS} s to take what was written",
        f"`{KEY_VARIABLE}`",
    ],
)
def test_limits_are_the_codes(said: str) -> None:
    assert said in PAGE


def test_every_option_of_the_server_that_lets_others_in_is_named() -> None:
    assert {"api_key", "share", "remote_images", "queue", "time_limit"} <= {o.name for o in options_of(ServeOptions)}
    for flag in ("--api-key", "--share", "--remote-images", "--queue", "--time-limit"):
        assert f"`{flag}" in PAGE
