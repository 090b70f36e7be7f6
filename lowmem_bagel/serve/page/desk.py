"""One tab of the page: where a request is written, its settings, and where its result appears."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradio.utils import get_upload_folder

from ...errors import LowmemBagelError
from ..service import Output
from . import markup
from .actions import Clients, View, Wish
from .history import Entry, History, thumbnail, thumbnails, with_entry
from .imported import gradio as gr
from .texts import Language, language_of, say
from .thoughts import parts_of
from .widgets import Panel, picture_path

if TYPE_CHECKING:
    from PIL import Image

    from ...generation.results import Result

Values = Mapping[Any, Any]
"""What components hold, by component."""


@dataclass
class Shared:
    """What the tabs have in common."""

    clients: Clients
    language: Any
    history: Any
    gallery: Any


@dataclass
class Slot:
    """A place for a part of a request: a text, a picture, or either, one of which is seen."""

    text: Any = None
    picture: Any = None


@dataclass
class Desk:
    """A tab's components, and what happens in it.

    Attributes:
        slots: the request's parts, in their order.
        kinds: a gr.State with the kinds of the slots in use, where the user chooses them; None: each is what it is.
        output: a gr.Radio of what is made, where the user chooses.
        panels, groups: settings by what is made, and the columns that they stand in.
        status, thoughts, answer, picture: where the result appears.
        last_seed: a gr.State.
        parts: buttons that add a text, add a picture, and remove a part.
        after: buttons that edit the picture that was drawn, and that ask about it.
    """

    tab: str
    shared: Shared
    slots: list[Slot]
    panels: dict[Output, Panel] = field(default_factory=dict)
    groups: dict[Output, Any] = field(default_factory=dict)
    go: Any = None
    cancel: Any = None
    status: Any = None
    thoughts: Any = None
    answer: Any = None
    picture: Any = None
    last_seed: Any = None
    kinds: Any = None
    output: Any = None
    parts: list[Any] = field(default_factory=list)
    after: list[Any] = field(default_factory=list)

    @property
    def inputs(self) -> set[Any]:
        """What a request is made from."""
        of_slots = {part for slot in self.slots for part in (slot.text, slot.picture)}
        of_panels = {component for panel in self.panels.values() for component in panel.components}
        chosen = {self.kinds, self.output, self.shared.language, self.shared.history}
        return (of_slots | of_panels | chosen) - {None}

    @property
    def results(self) -> list[Any]:
        """What a request changes."""
        own = [self.go, self.cancel, self.status, self.thoughts, self.answer, self.picture, self.last_seed]
        return [part for part in (*own, *self.after, self.shared.history, self.shared.gallery) if part is not None]

    @property
    def restorable(self) -> list[Any]:
        """What a restored request changes."""
        of_slots = [part for slot in self.slots for part in (slot.text, slot.picture)]
        of_panels = [component for panel in self.panels.values() for component in panel.changed]
        own = [*of_slots, *of_panels, self.kinds, self.output, self.status]
        return [part for part in own if part is not None]

    async def run(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        """A click on the tab's button: its whole course, as updates."""
        language = language_of(values[self.shared.language])
        output = self._output(values)
        yield self._begun(language)
        wish = Wish(self._terms(values), output, self.panels[output].settings(self._shown(values, output)))
        async for view in self.shared.clients.follow(str(request.session_hash), self.tab, wish):
            updates = self._seen(view, output, language)
            if view.progress.state == "done":
                updates |= await self._kept(view, wish, values[self.shared.history], language)
            # The last one says everything: Gradio sends it twice, and a browser that still loads a component for the
            # first time puts an earlier one over it.
            yield updates

    def stop(self, request: gr.Request) -> None:
        """A click on cancel."""
        self.shared.clients.cancel(str(request.session_hash), self.tab)

    def restored(
        self,
        texts: Sequence[str | None],
        settings: Mapping[str, Any],
        output: Output,
        pictures: Sequence[str] | None = None,
    ) -> dict[Any, Any]:
        """The tab as it was when this was asked for; without `pictures`, those that are there stay.

        Raises:
            SettingError: a setting is impossible.
        """
        updates = self.panels[output].updates(settings)
        if self.output is not None:
            updates[self.output] = gr.update(value=output)
        shown = {} if pictures is None else self._pictured(texts, pictures)
        return updates | self._written(texts, shown)

    def _pictured(self, texts: Sequence[str | None], pictures: Sequence[str]) -> dict[Any, Any]:
        """The value of each place for a picture: none where there was none, or where its file is gone."""
        places = [slot.picture for slot in self.slots if slot.picture is not None]
        if self.kinds is not None:
            chosen = [slot.picture for slot, text in zip(self.slots, texts, strict=False) if text is None]
            return dict.fromkeys(places) | dict(zip(chosen, map(_if_there, pictures), strict=False))
        return dict.fromkeys(places) | dict(zip(places, map(_if_there, pictures), strict=False))

    def _written(self, texts: Sequence[str | None], shown: Mapping[Any, str | None]) -> dict[Any, Any]:
        values = {place: gr.update(value=path) for place, path in shown.items()}
        if self.kinds is None:
            written = " ".join(text for text in texts if text)
            return values | {slot.text: gr.update(value=written) for slot in self.slots if slot.text is not None}
        kinds = tuple("picture" if text is None else "text" for text in texts[: len(self.slots)])
        filled = {
            slot.text: gr.update(value=text or "", visible=text is not None)
            for slot, text in zip(self.slots, texts, strict=False)
        }
        laid_out = self.laid_out(kinds)
        pictured = {place: laid_out[place] | value for place, value in values.items()}
        return laid_out | filled | pictured | {self.kinds: kinds}

    def laid_out(self, kinds: Sequence[str]) -> dict[Any, Any]:
        """The slots in use, each as what it is."""
        updates = {}
        for number, slot in enumerate(self.slots):
            kind = kinds[number] if number < len(kinds) else ""
            updates[slot.text] = gr.update(visible=kind == "text")
            updates[slot.picture] = gr.update(visible=kind == "picture")
        return updates

    def _output(self, values: Values) -> Output:
        chosen = None if self.output is None else values[self.output]
        return next((output for output in self.panels if output == chosen), next(iter(self.panels)))

    def _shown(self, values: Values, output: Output) -> list[Any]:
        return [values[component] for component in self.panels[output].components]

    def _terms(self, values: Values) -> list[str | Path]:
        """The parts that are there, in their order."""
        terms: list[str | Path | None] = []
        for number, slot in enumerate(self.slots):
            kind = self._kind(values, number)
            if kind == "text":
                terms.append(str(values[slot.text] or ""))
            elif kind == "picture":
                terms.append(picture_path(values[slot.picture]))
        if self.kinds is not None:  # an empty part is no part; elsewhere an empty prompt is a mistake to be told
            return [term for term in terms if term and (isinstance(term, Path) or term.strip())]
        return [term for term in terms if term is not None]

    def _kind(self, values: Values, number: int) -> str:
        if self.kinds is not None:
            kinds = values[self.kinds]
            return str(kinds[number]) if number < len(kinds) else ""
        return "picture" if self.slots[number].picture is not None else "text"

    def _begun(self, language: Language) -> dict[Any, Any]:
        updates = {
            self.status: markup.sending(language),
            self.cancel: gr.update(interactive=True),
            self.thoughts: gr.update(value="", visible=False),
            self.answer: gr.update(value="", visible=False),
            self.picture: gr.update(value=None, visible=False),
        }
        updates.update({button: gr.update(visible=False) for button in self.after})
        return _there(updates)

    def _seen(self, view: View, output: Output, language: Language) -> dict[Any, Any]:
        """A view, as updates of what it changes. Each says whether there is something to cancel: the page may leave
        out an update that another follows soon, and with it a button."""
        cancel = gr.update(interactive=not view.progress.over)
        updates: dict[Any, Any] = {self.status: markup.status(view, language), self.cancel: cancel}
        text = view.progress.text
        if text:
            parts = parts_of(text)
            thoughts, answer = (parts.reasoning or text, "") if output == "image" else parts
            updates[self.thoughts] = gr.update(value=thoughts, visible=bool(thoughts))
            updates[self.answer] = gr.update(value=answer, visible=bool(answer))
        return _there(updates)

    async def _kept(self, view: View, wish: Wish, history: History, language: Language) -> dict[Any, Any]:
        """The result, in its place and in the history."""
        result, job = view.progress.result, view.job
        assert result is not None and job is not None
        looked_at = [term.image for term in job.prepared.terms if not isinstance(term, str)]
        try:
            made = await asyncio.to_thread(_saved, result, looked_at[-1] if looked_at else None)
        except (LowmemBagelError, OSError) as error:
            return {self.status: markup.problem(error, language)}
        texts = tuple(term if isinstance(term, str) else None for term in wish.terms)
        options = self.panels[wish.output].options
        settings = {option.name: result.settings[option.name] for option in options if option.name in result.settings}
        pictures = tuple(str(term) for term in wish.terms if isinstance(term, Path))
        entry = Entry(self.tab, texts, pictures, wish.output, settings, result.text, made.thumbnail)
        history = with_entry(history, entry)
        updates: dict[Any, Any] = {
            self.last_seed: str(result.seed),
            self.shared.history: history,
            self.shared.gallery: gr.update(value=thumbnails(history), selected_index=None),
        }
        if made.picture is not None:
            alt = say("picture_of", language, prompt=entry.caption)
            updates[self.picture] = gr.update(value=made.picture, visible=True, alt_text=alt)
            updates.update({button: gr.update(visible=True) for button in self.after})
        return _there(updates)


class Saved(NamedTuple):
    """Paths in Gradio's cache, which forgets them after a while."""

    picture: str | None
    thumbnail: str


def _saved(result: Result, looked_at: Image.Image | None) -> Saved:
    """A result where the browser can fetch it: the picture, which carries its settings, and a small one."""
    folder = Path(get_upload_folder()) / f"lowmem-bagel-{secrets.token_hex(16)}"
    folder.mkdir(parents=True, mode=0o700)
    small = folder / "thumbnail.png"
    thumbnail(result.image or looked_at).save(small)
    picture = None if result.image is None else str(result.save(folder / f"bagel-{result.seed}.png"))
    return Saved(picture, str(small))


def _if_there(path: str) -> str | None:
    return path if Path(path).is_file() else None


def _there(updates: dict[Any, Any]) -> dict[Any, Any]:
    """Without those of components that the tab lacks."""
    return {component: update for component, update in updates.items() if component is not None}
