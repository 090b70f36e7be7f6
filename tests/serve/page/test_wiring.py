"""What goes between the page and its server: no more than is needed, since a browser takes long over each of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.serving import LONG, PROMPT, running_service, service_of, until

from lowmem_bagel.serve.page import build_page
from lowmem_bagel.serve.page.widgets import START, Translated
from lowmem_bagel.serve.page.wiring import REST_SECONDS, TICK_SECONDS, Seen
from lowmem_bagel.serve.service import Service

gr = pytest.importorskip("gradio")


def look_at(service: Service) -> Callable[..., dict[str, Any]]:
    """What a page that has seen this is sent when it looks at the model, by what it is for."""
    [looks] = [event for event in build_page(service).fns.values() if event.targets[0][1] == "tick"]

    def look(seen: Seen, language: str = START) -> dict[str, Any]:
        updates = looks.fn(language, seen)
        return {component.elem_id or type(component).__name__: update for component, update in updates.items()}

    return look


def test_no_component_is_told_how_far_an_event_is() -> None:
    events = [event for event in build_page(service_of()).fns.values() if event.fn and event.targets[0][1] != "unload"]
    assert len(events) > 50
    assert all((event.show_progress, event.show_progress_on) == ("hidden", []) for event in events)


def test_a_page_is_sent_what_changed_since_it_looked_and_looks_more_often_while_something_runs() -> None:
    with running_service() as service:
        look = look_at(service)
        first = look(Seen())
        shown = {"model-line", "memory", "plan", "draw-ratio", "edit-ratio", "mixed-ratio"}
        assert first.keys() == {*shown, "State", "Timer"}
        assert first["Timer"]["value"] == REST_SECONDS
        seen = first["State"]._replace(memory="")  # which others of this process change meanwhile
        assert look(seen).keys() == {"State", "memory"}
        assert look(seen, "zh").keys() == {"State", "memory", "model-line"}

        service.submit([PROMPT], "image", LONG, "")
        until(lambda: service.worker.running)
        assert look(seen)["Timer"]["value"] == TICK_SECONDS


def test_it_looks_often_until_the_model_is_there_or_never_will_be() -> None:
    service = service_of()
    look = look_at(service)
    assert look(Seen())["State"].tick == TICK_SECONDS
    service.failure = OSError()
    assert look(Seen())["State"].tick == REST_SECONDS


def test_a_page_that_was_just_loaded_is_sent_what_it_has_not() -> None:
    texts = Translated()
    with gr.Blocks():
        texts.add_keys(gr.Button, {"value": "cancel"})
        texts.add(gr.HTML, lambda language: {"value": language, "visible": True})
    assert [set(update) for update in texts.first_updates(START)] == [{"__type__"}, {"__type__"}]
    assert [set(update) for update in texts.first_updates("zh")] == [{"__type__", "value"}, {"__type__", "value"}]
    assert [set(update) for update in texts.updates(START)][1] == {"__type__", "value", "visible"}
