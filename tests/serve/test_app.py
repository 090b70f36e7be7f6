"""The application around its routes: failures in one shape, metrics, health."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import Body, FastAPI
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from support.serving import LONG, PROMPT, QUICK, client_for, running_service, service_of, until

from lowmem_bagel import errors
from lowmem_bagel.serve.app import create_app
from lowmem_bagel.serve.failures import Failure, catch_failures
from lowmem_bagel.serve.routing import PLACES, first_part
from lowmem_bagel.serve.service import Service

RAISED: dict[str, tuple[BaseException, int, str | None]] = {
    "setting": (errors.SettingError("no such size"), 400, None),
    "image": (errors.ImageError("no picture"), 400, None),
    "full": (errors.BusyError("full", 12.1), 429, "13"),
    "closing": (errors.UnavailableError("closing", 0.2), 503, "1"),
    "slow": (errors.TimeLimitError("too slow"), 504, None),
    "cancelled": (errors.Cancelled("cancelled"), 503, None),
    "closed": (errors.PipelineClosedError("closed"), 503, None),
    "memory": (errors.DoesNotFitError("full"), 400, None),
}


class Wanted(BaseModel):
    count: int
    names: list[str] = []


@pytest.fixture(scope="module")
def failing() -> Any:
    app = FastAPI()
    catch_failures(app)

    @app.get("/raise/{name}")
    def raises(name: str) -> None:
        raise RAISED[name][0]

    @app.post("/wanted")
    def wanted(body: Annotated[Wanted, Body()]) -> int:
        return body.count

    return client_for(app)


@pytest.mark.parametrize("name", RAISED)
def test_our_errors_have_their_status(failing: Any, name: str) -> None:
    error, status, retry_after = RAISED[name]
    answer = failing.get(f"/raise/{name}")
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert Failure.model_validate(answer.json()).error.message == str(error)


def test_every_error_of_ours_has_a_status_that_is_no_fault(failing: Any) -> None:
    for known in vars(errors).values():
        if isinstance(known, type) and issubclass(known, errors.UserError):
            made = known("x", 1.0) if issubclass(known, errors.BusyError) else known("x")
            RAISED["one"] = made, 0, None
            assert failing.get("/raise/one").status_code != 500


def test_a_fault_of_ours_is_told_by_a_number_alone(failing: Any, caplog: pytest.LogCaptureFixture) -> None:
    RAISED["fault"] = RuntimeError("secret /root/path"), 500, None
    with caplog.at_level(logging.ERROR):
        answer = failing.get("/raise/fault")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    number = answer.json()["error"]["code"]
    assert f"fault {number}" in caplog.text
    assert "secret /root/path" in caplog.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"count": "many"}', "count"),
        (b'{"count": 1e400}', "count"),
        (b'{"count": NaN}', "count"),
        (b'{"count": 1, "names": [1]}', "names.0"),
        (b"{}", "count"),
        (b"[]", "body"),
        (b"", "body"),
        (b'{"count": 1', None),
        (b"\xff\xfe", None),
        (b'{"count": ' + b"9" * 5000 + b"}", None),
        (b"[" * 100_000, None),
        (b'{"count": "\\ud800\\u001b"}', "count"),
    ],
)
def test_what_is_no_request_is_named(failing: Any, body: bytes, param: str | None) -> None:
    answer = failing.post("/wanted", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = Failure.model_validate(answer.json()).error
    assert error.type == "invalid_request_error"
    assert error.message and error.message.isprintable()
    if param is not None:
        assert error.param == param
        assert param in error.message


def test_what_is_not_there(failing: Any) -> None:
    for answer, status in ((failing.get("/nothing"), 404), (failing.get("/wanted"), 405)):
        assert answer.status_code == status
        assert Failure.model_validate(answer.json()).error.code


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(page=False) as made:
        yield made


def metrics_of(client: Any) -> dict[str, float]:
    text = client.get("/metrics").text
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items(), reverse=True)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_what_was_done(service: Service) -> None:
    client = client_for(create_app(service))
    before = metrics_of(client)
    assert before["lowmem_bagel_ready"] == 1
    assert before["lowmem_bagel_loaded_bytes"] == before["lowmem_bagel_loading_bytes"] > 0
    running = service.submit([PROMPT], "image", LONG, "a")
    service.submit([PROMPT], "image", QUICK, "a")
    asked = service.submit(["What is it?"], "text", {"max_new_tokens": 4}, "a")
    until(lambda: running.progress.step > 2)
    during = metrics_of(client)
    assert (during["lowmem_bagel_queue_length"], during["lowmem_bagel_running"]) == (2, 1)
    service.cancel(running)
    until(lambda: "lowmem_bagel_requests_total ask done" in metrics_of(client))
    client.get("/nothing")
    after = metrics_of(client)
    assert after["lowmem_bagel_requests_total generate cancelled"] == 1
    assert after["lowmem_bagel_requests_total generate done"] == 1
    assert after["lowmem_bagel_requests_total ask done"] == 1
    assert after["lowmem_bagel_running_seconds_count generate"] == 2
    assert after["lowmem_bagel_waiting_seconds_sum ask"] > 0
    assert after["lowmem_bagel_steps_total"] >= 4
    assert after["lowmem_bagel_tokens_total"] == len(asked.progress.result.token_ids)
    assert after["lowmem_bagel_http_responses_total 404"] == 1
    assert after["process_resident_memory_bytes"] > 1e6


def test_two_services_count_apart(service: Service) -> None:
    one, other = client_for(create_app(service)), client_for(create_app(service_of(page=False)))
    one.get("/nothing")
    assert "lowmem_bagel_http_responses_total 404" in metrics_of(one)
    assert "lowmem_bagel_http_responses_total 404" not in metrics_of(other)


def test_health_follows_the_service() -> None:
    made = service_of(page=False)
    client = client_for(create_app(made))
    assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "loading")
    made.bytes_loaded = (30, 100)
    assert client.get("/health").json()["loading"] == {"bytes": 30, "total_bytes": 100}
    made.close()
    assert client.get("/health").json()["status"] == "closing"


def test_every_route_documents_failures_in_the_one_shape(service: Service) -> None:
    described = create_app(service).openapi()
    assert {first_part(path) for path in described["paths"]} <= PLACES
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            assert {"4XX", "5XX"} <= set(about["responses"]), (method, path)
            assert "422" not in about["responses"]
            assert re.fullmatch(r"[A-Z].*[^.]", about["summary"]), "summaries are phrases"
