"""What is on each tab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...settings import TextSettings, answer_options, options_of, picture_options
from ..service import Output, Service
from .desk import Desk, Shared, Slot
from .examples import Examples
from .imported import gradio as gr
from .markup import conversation
from .ratios import sizes
from .talk import TAB, TalkDesk
from .texts import Language, say
from .widgets import LIVE, Panel, Translated, panel, small_button

SLOTS = 8
"""Parts of a mixed request."""
FIRST_KINDS = ("picture", "text")


@dataclass
class Tabs:
    """Makes the tabs' content; each function is called where it is to appear."""

    service: Service
    texts: Translated
    shared: Shared
    examples: Examples

    def draw(self) -> Desk:
        def slots() -> list[Slot]:
            return [Slot(text=self._prompt("draw", "prompt", self.examples.draw))]

        return self._desk("draw", slots, {"image": self._picture_panel("draw", editing=False)})

    def edit(self) -> Desk:
        def slots() -> list[Slot]:
            picture = self._picture("edit", "input_picture")
            return [Slot(picture=picture), Slot(text=self._prompt("edit", "change", self.examples.edit))]

        return self._desk("edit", slots, {"image": self._picture_panel("edit", editing=True)})

    def ask(self) -> Desk:
        def slots() -> list[Slot]:
            picture = self._picture("ask", "asked_picture")
            return [Slot(picture=picture), Slot(text=self._prompt("ask", "question", self.examples.ask))]

        return self._desk("ask", slots, {"text": self._text_panel("ask")})

    def mixed(self) -> Desk:
        panels: dict[Output, Callable[[], Panel]] = {
            "image": self._picture_panel("mixed", editing=True),
            "text": self._text_panel("mixed-text"),
        }
        return self._desk("mixed", lambda: [self._slot(number) for number in range(SLOTS)], panels)

    def chat(self) -> TalkDesk:
        """What is said next and its settings on the left, the conversation on the right."""
        made = TalkDesk(self.service, self.shared.clients, self.shared.language)
        with gr.Row(equal_height=False, elem_classes="lb-desk"):
            with gr.Column(scale=5, min_width=320):
                made.prompt = self._prompt(TAB, "message", self.examples.chat)
                made.picture = self._picture(TAB, "asked_picture", 160)
                made.last_seed = gr.State("")
                made.go, made.cancel = self._buttons(TAB)
                with gr.Row(elem_classes="lb-buttons"):
                    made.undo, made.anew, made.save = (
                        small_button(self.texts, key, TAB) for key in ("undo_chat", "new_chat", "save_chat")
                    )
                    made.open = self.texts.add_keys(
                        gr.UploadButton, {"label": "open_chat"}, file_types=[".zip"], size="sm", min_width=90,
                        elem_id=f"{TAB}-open",
                    )  # fmt: skip
                with gr.Column(elem_classes="lb-settings"):
                    made.panel = panel(self.texts, answer_options(editing=True), TAB)
            with gr.Column(scale=6, min_width=320, elem_id=f"{TAB}-result", elem_classes="lb-conversation"):
                made.log = self.texts.add(
                    gr.HTML, lambda language: {"value": conversation((), language)}, autoscroll=True,
                    elem_id=f"{TAB}-log",
                )  # fmt: skip
                made.status = gr.HTML(elem_id=f"{TAB}-status")
                made.saved = gr.HTML(elem_id=f"{TAB}-saved")
        return made

    def ratio_told(self, language: Language) -> dict[str, Any]:
        """What a ratio's component is told; what the model can draw is known once it is loaded."""
        known = {} if self.service.loaded is None else sizes(self.service.loaded.folder)
        choices = [(f"{name} ({size.width}×{size.height})", name) for name, size in known.items()]
        return {
            "label": say("ratio", language),
            "info": say("ratio_help", language),
            "choices": [(say("ratio_auto", language), ""), *choices],
        }

    def _desk(self, tab: str, slots: Callable[[], list[Slot]], panels: dict[Output, Callable[[], Panel]]) -> Desk:
        """What is wanted and its settings on the left, what comes of it on the right."""
        mixed = len(panels) > 1
        with gr.Row(equal_height=False, elem_classes="lb-desk"):
            with gr.Column(scale=5, min_width=320):
                made = Desk(tab, self.shared, slots())
                made.last_seed = gr.State("")
                if mixed:
                    self._choices(made)
                made.go, made.cancel = self._buttons(tab)
                for output, build in panels.items():
                    with gr.Column(visible=not made.panels, elem_classes="lb-settings") as group:
                        made.panels[output] = build()
                    made.groups[output] = group
            with gr.Column(scale=6, min_width=320, elem_id=f"{tab}-result"):
                self._result(made)
        return made

    def _buttons(self, tab: str) -> tuple[Any, Any]:
        """What begins, and what ends."""
        with gr.Row(elem_classes="lb-buttons"):
            go = self.texts.add_keys(
                gr.Button, {"value": f"go_{tab}"}, variant="primary", scale=3, min_width=120, elem_id=f"{tab}-go"
            )
            cancel = self.texts.add_keys(
                gr.Button, {"value": "cancel"}, interactive=False, scale=1, min_width=90, elem_id=f"{tab}-cancel"
            )
        return go, cancel

    def _result(self, made: Desk) -> None:
        made.status = gr.HTML(elem_id=f"{made.tab}-status")
        made.thoughts = self._written(made.tab, "plan_text", "thoughts")
        if "text" in made.panels:
            made.answer = self._written(made.tab, "answer", "answer")
        if "image" not in made.panels:
            return
        made.picture = self.texts.add_keys(
            gr.Image, {"label": "result"}, interactive=False, format="png", buttons=["download", "fullscreen"],
            elem_id=f"{made.tab}-drawn", elem_classes="lb-drawn",
        )  # fmt: skip
        with gr.Row(elem_classes="lb-buttons"):
            made.after = [small_button(self.texts, key, made.tab, visible=False) for key in ("edit_this", "ask_this")]

    def _prompt(self, tab: str, key: str, examples: Sequence[str]) -> Any:
        prompt = self.texts.add_keys(
            gr.Textbox, {"label": key, "placeholder": f"{key}_hint"}, lines=3, max_lines=12, elem_id=f"{tab}-prompt"
        )
        offered = self.texts.add_keys(
            gr.Dataset, {"label": "examples"}, components=[prompt], samples=[[text] for text in examples],
            elem_id=f"{tab}-examples",
        )  # fmt: skip
        offered.click(lambda sample: sample[0], [offered], [prompt], **LIVE)
        return prompt

    def _picture(self, tab: str, key: str, height: int = 260) -> Any:
        return self.texts.add_keys(
            gr.Image, {"label": key, "placeholder": "drop_here"}, type="filepath", height=height,
            sources=["upload", "clipboard"], buttons=["fullscreen"], elem_id=f"{tab}-picture",
        )  # fmt: skip

    def _slot(self, number: int) -> Slot:
        kind = FIRST_KINDS[number] if number < len(FIRST_KINDS) else ""

        def told(key: str, hint: str) -> Callable[[Language], dict[str, Any]]:
            return lambda language: {"label": say(key, language, number=number + 1), "placeholder": say(hint, language)}

        text = self.texts.add(
            gr.Textbox,
            told("part_text", "part_hint"),
            lines=2,
            visible=kind == "text",
            elem_id=f"mixed-text-{number + 1}",
        )
        picture = self.texts.add(
            gr.Image, told("part_picture", "drop_here"), visible=kind == "picture", height=200, buttons=["fullscreen"],
            sources=["upload", "clipboard"], elem_id=f"mixed-picture-{number + 1}",
        )  # fmt: skip
        return Slot(text, picture)

    def _choices(self, made: Desk) -> None:
        """Of a mixed request: more parts or fewer, and what is made of them."""
        made.kinds = gr.State(FIRST_KINDS)
        with gr.Row(elem_classes="lb-buttons"):
            made.parts = [small_button(self.texts, key, "mixed") for key in ("add_text", "add_picture", "remove_part")]

        def told(language: Language) -> dict[str, Any]:
            choices = [(say(f"output_{output}", language), output) for output in ("image", "text")]
            return {"label": say("output", language), "choices": choices}

        made.output = self.texts.add(gr.Radio, told, value="image", elem_id="mixed-output")

    def _picture_panel(self, tab: str, editing: bool) -> Callable[[], Panel]:
        return lambda: panel(self.texts, picture_options(editing), tab, self.ratio_told)

    def _text_panel(self, prefix: str) -> Callable[[], Panel]:
        return lambda: panel(self.texts, options_of(TextSettings), prefix)

    def _written(self, tab: str, key: str, name: str) -> Any:
        """Grows with its text, since what cannot be typed into is not scrolled by keys. Gradio's button for copying
        would take its label."""
        return self.texts.add_keys(
            gr.Textbox, {"label": key}, lines=2, max_lines=1000, interactive=False, visible=False, buttons=[],
            elem_id=f"{tab}-{name}",
        )  # fmt: skip
