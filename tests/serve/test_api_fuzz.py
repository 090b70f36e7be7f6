"""Whatever fits the OpenAPI document, and whatever does not: never a fault of ours.

By hand, for longer: FUZZ_INPUTS=2000 python -m pytest tests/serve/test_api_fuzz.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from support.api import instant, listening
from support.serving import running_service

CASES = int(os.environ.get("FUZZ_INPUTS", "15"))
"""Of each operation."""
CHANGING = ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/sdapi/v1/txt2img",
            "/sdapi/v1/img2img", "/sdapi/v1/options")  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    with running_service(page=False) as service, listening(service) as url:
        instant(service)
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("path", CHANGING)
def test_no_request_is_answered_with_a_fault(schema: Any, path: str, wrong: bool) -> None:
    mode = schemathesis.GenerationMode.NEGATIVE if wrong else schemathesis.GenerationMode.POSITIVE
    operation = schema[path]["POST"]

    @hypothesis.settings(
        max_examples=CASES, deadline=None, database=None, derandomize="FUZZ_INPUTS" not in os.environ,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    holds()
