"""Which event does what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import LowmemBagelError
from ...pictures.saving import read_metadata
from ..service import MAX_PROMPT, Output, Service
from . import markup
from .controls import checked_prompt
from .desk import Desk, Shared
from .history import History
from .imported import gradio as gr
from .ratios import sizes
from .tabs import SLOTS
from .talk import TAB, TalkDesk
from .texts import Language, language_of, say
from .widgets import LIVE, Panel, Told, Translated, picture_path

RAW: dict[str, Any] = {"preprocess": False}
"""Of events that take pictures in: Gradio would open them, beyond our bounds; every value is checked by us."""
TICK_SECONDS, REST_SECONDS = 1.5, 5.0
"""Between two looks at the model: while it loads or works, and while nothing of it changes by itself."""
CHOSEN_LANGUAGE = """() => {
  const wanted = localStorage.getItem("lowmem-bagel-language") || navigator.language || "en";
  const language = wanted.toLowerCase().startsWith("zh") ? "zh" : "en";
  document.documentElement.lang = language;
  return [language];
}"""
KEEP_LANGUAGE = """(language) => {
  localStorage.setItem("lowmem-bagel-language", language);
  document.documentElement.lang = language;
  return [language];
}"""
SHOW_RESULT = """(...values) => {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const place = document.getElementById("TAB-status");
  if (place) place.scrollIntoView({block: "nearest", behavior: calm ? "auto" : "smooth"});
  return values;
}"""
FETCH_SAVED = '() => document.querySelector("#TAB-saved a")?.click()'.replace("TAB", TAB)


class Seen(NamedTuple):
    """What a page was last told of the model, and seconds until it looks again."""

    line: str = ""
    memory: str = ""
    name: str = ""
    tick: float = TICK_SECONDS


@dataclass
class Page:
    """Everything that events read and change.

    Attributes:
        ratio_told, memory_told: what components of ratios and of memory are told, by language.
        tabs: gr.Tabs.
        line, memory, plan, chosen: gr.HTML.
        index: a gr.State, of the entry that was chosen in the history; -1 for none.
        seen: a gr.State, what the page was last told of the model.
    """

    service: Service
    texts: Translated
    shared: Shared
    desks: dict[str, Desk]
    talk: TalkDesk
    ratio_told: Told
    memory_told: Told
    tabs: Any
    line: Any
    memory: Any
    plan: Any
    chosen: Any
    restore: Any
    index: Any
    seen: Any
    timer: Any

    @property
    def ratios(self) -> list[Any]:
        panels = (panel for desk in self.desks.values() for panel in desk.panels.values())
        return [panel.ratio for panel in panels if panel.ratio is not None]


def wire(blocks: gr.Blocks, page: Page) -> None:
    for desk in page.desks.values():
        _wire_desk(page, desk)
    _wire_talk(page.talk)
    _wire_language(blocks, page)
    _wire_model(page)
    _wire_history(page)
    for desk in page.desks.values():
        for button, tab in zip(desk.after, ("edit", "ask"), strict=False):
            _wire_onward(page, desk, button, page.desks[tab])
    blocks.unload(_left(page))


def _wire_desk(page: Page, desk: Desk) -> None:
    prompts = [slot.text.submit for slot in desk.slots if slot.text is not None]
    gr.on(
        [desk.go.click, *prompts], desk.run, desk.inputs, desk.results, js=SHOW_RESULT.replace("TAB", desk.tab),
        trigger_mode="once", **RAW, **LIVE,
    )  # fmt: skip
    desk.cancel.click(desk.stop, None, None, **LIVE)
    for output, panel in desk.panels.items():
        _wire_panel(page, desk, output, panel)
    if desk.output is not None:
        _wire_parts(desk)


def _wire_talk(desk: TalkDesk) -> None:
    gr.on(
        [desk.go.click, desk.prompt.submit], desk.run, desk.inputs, desk.results, js=SHOW_RESULT.replace("TAB", TAB),
        trigger_mode="once", **RAW, **LIVE,
    )  # fmt: skip
    desk.cancel.click(desk.stop, None, None, **LIVE)
    desk.undo.click(desk.take_back, [desk.language], desk.results, trigger_mode="once", **LIVE)
    desk.anew.click(desk.begin_anew, [desk.language], desk.results, trigger_mode="once", **LIVE)
    desk.save.click(desk.keep, [desk.language], desk.results, trigger_mode="once", **LIVE).then(
        None, None, None, js=FETCH_SAVED
    )
    desk.open.upload(desk.open_file, [desk.open, desk.language], desk.results, **RAW, **LIVE)
    _wire_seed(desk.panel, desk.last_seed)


def _wire_seed(panel: Panel, last_seed: Any) -> None:
    panel.reset.click(lambda: panel.updates({}), None, panel.changed, **LIVE)
    seed = panel.by_name["seed"]
    panel.random.click(lambda: "", None, [seed], **LIVE)
    panel.last.click(lambda last: last, [last_seed], [seed], **LIVE)


def _wire_panel(page: Page, desk: Desk, output: Output, panel: Panel) -> None:
    _wire_seed(panel, desk.last_seed)
    if panel.ratio is not None:
        sides = [panel.by_name["width"], panel.by_name["height"]]
        panel.ratio.input(lambda name: _sides(page.service, name), [panel.ratio], sides, **LIVE)
        panel.dropped.upload(
            lambda path, language: _from_picture(desk, output, path, language_of(language)),
            [panel.dropped, page.shared.language],
            desk.restorable,
            **RAW,
            **LIVE,
        )


def _sides(service: Service, name: str) -> tuple[int | None, int | None]:
    """Width and height of a ratio; none for the automatic one."""
    if not name or service.loaded is None:
        return None, None
    return sizes(service.loaded.folder)[name]


def _from_picture(desk: Desk, output: Output, path: Any, language: Language) -> dict[Any, Any]:
    """Prompt and settings that a picture of ours carries."""
    file = picture_path(path)
    assert file is not None
    try:
        kept = read_metadata(file)
        updates = desk.restored((checked_prompt(kept.get("prompt"), MAX_PROMPT),), kept, output)
    except LowmemBagelError as error:
        return {desk.status: markup.problem(error, language)}
    return updates | {desk.status: markup.note(say("restored_from", language, name=file.name))}


def _wire_parts(desk: Desk) -> None:
    """Of a mixed request: parts come and go, and settings follow what is made."""
    changes: tuple[Callable[[tuple[str, ...]], tuple[str, ...]], ...] = (
        lambda kinds: (*kinds, "text")[:SLOTS],
        lambda kinds: (*kinds, "picture")[:SLOTS],
        lambda kinds: kinds[:-1],
    )
    of_slots = [part for slot in desk.slots for part in (slot.text, slot.picture)]

    def changed(change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Callable[[Any], dict[Any, Any]]:
        return lambda kinds: desk.laid_out(change(tuple(kinds))) | {desk.kinds: change(tuple(kinds))}

    for button, change in zip(desk.parts, changes, strict=True):
        button.click(changed(change), [desk.kinds], [desk.kinds, *of_slots], **LIVE)
    desk.output.change(
        lambda chosen: [gr.update(visible=chosen == output) for output in desk.groups],
        [desk.output],
        list(desk.groups.values()),
        **LIVE,
    )


def _wire_onward(page: Page, desk: Desk, button: Any, other: Desk) -> None:
    """The picture that was drawn becomes another tab's input."""
    place = next(slot.picture for slot in other.slots if slot.picture is not None)

    def sent(drawn: Any) -> tuple[Any, Any]:
        path = picture_path(drawn)
        return (None if path is None else str(path)), gr.update(selected=other.tab)

    button.click(sent, [desk.picture], [place, page.tabs], **RAW, **LIVE)


def _wire_language(blocks: gr.Blocks, page: Page) -> None:
    texts, language = page.texts, page.shared.language
    blocks.load(
        lambda chosen: [chosen, *texts.first_updates(chosen)], [language], [language, *texts.components],
        js=CHOSEN_LANGUAGE, **LIVE,
    )  # fmt: skip
    language.input(texts.updates, [language], texts.components, js=KEEP_LANGUAGE, **LIVE)


def _wire_model(page: Page) -> None:
    """The model as it loads, its memory, and what it can draw once that is known."""
    service, ratios = page.service, page.ratios

    def look(language: Language, seen: Seen) -> dict[Any, Any]:
        line, memory = markup.model_line(service, language), page.memory_told(language)["value"]
        name = "" if service.loaded is None else service.name
        now = Seen(line, memory, name, REST_SECONDS if _rests(service) else TICK_SECONDS)
        updates: dict[Any, Any] = {page.seen: now}
        if line != seen.line:
            updates[page.line] = line
        if memory != seen.memory:
            updates[page.memory] = memory
        if name != seen.name:
            updates[page.plan] = markup.plan_table(service, language)
            updates |= {ratio: gr.update(**page.ratio_told(language)) for ratio in ratios}
        if now.tick != seen.tick:
            updates[page.timer] = gr.update(value=now.tick)
        return updates

    outputs = [page.line, page.memory, page.plan, page.seen, page.timer, *ratios]
    page.timer.tick(look, [page.shared.language, page.seen], outputs, **LIVE)


def _rests(service: Service) -> bool:
    """Whether nothing of the model changes by itself."""
    if service.loaded is None:
        return service.failure is not None
    return service.worker.running is None and not service.queue.order()


def _wire_history(page: Page) -> None:
    shared = page.shared

    def chosen(history: History, language: Language, event: gr.SelectData) -> dict[Any, Any]:
        number = event.index
        if not isinstance(number, int) or not 0 <= number < len(history):
            return {page.index: -1}
        table = markup.entry_table(history[number], language)
        return {page.index: number, page.chosen: table, page.restore: gr.update(interactive=True)}

    def restored(history: History, number: int, language: Language) -> dict[Any, Any]:
        if not 0 <= number < len(history):
            return {page.index: -1}
        entry = history[number]
        desk = page.desks[entry.tab]
        updates = desk.restored(entry.texts, entry.settings, entry.output, entry.pictures)
        whole = all(Path(path).is_file() for path in entry.pictures)
        said = markup.note(say("restored" if whole else "restored_in_part", language))
        return updates | {desk.status: said, page.tabs: gr.update(selected=entry.tab)}

    shared.gallery.select(chosen, [shared.history, shared.language], [page.index, page.chosen, page.restore], **LIVE)
    everything = [component for desk in page.desks.values() for component in desk.restorable]
    page.restore.click(
        restored, [shared.history, page.index, shared.language], [*everything, page.tabs, page.index], **LIVE
    )


def _left(page: Page) -> Callable[[gr.Request], None]:
    def left(request: gr.Request) -> None:
        page.shared.clients.leave(str(request.session_hash))
        page.talk.leave(str(request.session_hash))

    return left
