"""The whole page: its head, its tabs, the history and the model."""

from __future__ import annotations

import sys
from typing import Any

from ..memory import device_memory
from ..service import Service
from . import markup
from .actions import Clients
from .desk import Shared
from .examples import examples_for
from .imported import gradio as gr
from .tabs import Tabs
from .talk import TAB
from .texts import LANGUAGES, Language, say
from .widgets import START, Translated, small_button
from .wiring import TICK_SECONDS, Page, Seen, wire

TITLE = "lowmem-bagel"
CACHE_SECONDS = (3600, 24 * 3600)
"""How often files that sessions left behind are looked for, and how old those are that go."""
SESSIONS = 200
"""That are remembered, at nearly half a megabyte each; of more, those that were used least recently are forgotten."""
QUEUE_SECONDS, PROGRESS_SECONDS = 0.02, 60.0
"""Between Gradio's looks for an event, and for progress that one tells it, which ours do not. By itself it takes a
thousand of the first and a hundred of the second every second: 7 % of a core while nobody has the page open."""


def page(service: Service) -> gr.Blocks:
    """The page of a service. Its events wait in no queue but ours."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=CACHE_SECONDS) as blocks:
        wire(blocks, _laid_out(service))
    blocks.queue(default_concurrency_limit=None, max_size=None, api_open=False)
    blocks.state_session_capacity = SESSIONS
    # Gradio sums up all events after each, with pandas, for a page that is closed here.
    blocks._queue.ANAYLTICS_CACHE_FREQUENCY = sys.maxsize
    blocks._queue.sleep_when_free, blocks._queue.progress_update_sleep_when_free = QUEUE_SECONDS, PROGRESS_SECONDS
    return blocks


def _laid_out(service: Service) -> Page:
    texts = Translated()

    def memory_told(language: Language) -> dict[str, str]:
        loaded = service.loaded
        return {"value": "" if loaded is None else markup.memory_bar(*device_memory(loaded), language)}

    with gr.Row(elem_id="head"):
        with gr.Column(scale=5, min_width=260):
            texts.add(gr.HTML, lambda language: {"value": f"<h1>{TITLE}</h1><p>{say('about', language)}</p>"})
            line = texts.add(
                gr.HTML, lambda language: {"value": markup.model_line(service, language)}, elem_id="model-line"
            )
        language = texts.add_keys(
            gr.Radio, {"label": "language"}, choices=[(name, known) for known, name in LANGUAGES.items()], value=START,
            scale=0, min_width=190, elem_id="language",
        )  # fmt: skip
    shared = Shared(Clients(service), language, gr.State((), time_to_live=CACHE_SECONDS[1]), _gallery(texts))
    tabs = Tabs(service, texts, shared, examples_for(service.path))
    with gr.Tabs(elem_id="tabs") as folders:
        desks = []
        for name, build in (("draw", tabs.draw), ("edit", tabs.edit), ("ask", tabs.ask)):
            with _tab(texts, name):
                desks.append(build())
        with _tab(texts, TAB):
            talk = tabs.chat()
        with _tab(texts, "mixed"):
            desks.append(tabs.mixed())
        with _tab(texts, "history"):
            shared.gallery.render()
            chosen = texts.add(gr.HTML, lambda language: {"value": markup.nothing_chosen(language)}, elem_id="chosen")
            restore = small_button(texts, "restore", "history", interactive=False)
        with _tab(texts, "model"):
            memory = texts.add(gr.HTML, memory_told, elem_id="memory")
            plan = texts.add(gr.HTML, lambda language: {"value": markup.plan_table(service, language)}, elem_id="plan")
    return Page(
        service, texts, shared, {desk.tab: desk for desk in desks}, talk, tabs.ratio_told, memory_told, folders, line,
        memory, plan, chosen, restore, gr.State(-1), gr.State(Seen()), gr.Timer(TICK_SECONDS),
    )  # fmt: skip


def _tab(texts: Translated, name: str) -> Any:
    return texts.add_keys(gr.Tab, {"label": name}, id=name, elem_id=f"tab-{name}")


def _gallery(texts: Translated) -> Any:
    return texts.add_keys(
        gr.Gallery, {"label": "history_pictures"}, columns=6, fit_columns=False, height="auto", object_fit="contain",
        buttons=[], allow_preview=False, interactive=False, elem_id="history-pictures", render=False,
    )  # fmt: skip
