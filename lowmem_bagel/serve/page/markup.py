"""What the page shows as HTML: progress, the model, an entry of the history. Everything foreign is escaped."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from ...errors import BusyError, Cancelled, LowmemBagelError
from ...settings import PictureSettings
from ..service import Service
from .history import Entry
from .texts import Language, duration, option_label, say
from .thoughts import parts_of

if TYPE_CHECKING:
    from PIL import Image

    from ...planner.plan import Plan
    from .actions import View

PREVIEW_QUALITY = 80
FILES = "/gradio_api/file="
"""Where Gradio serves files that it keeps."""


class Part(NamedTuple):
    """A text of a conversation, or a picture: a file that the browser can fetch."""

    text: str = ""
    picture: Path | None = None


@dataclass
class Shown:
    """A turn of a conversation: what was given and what was answered; `text` is still being written."""

    given: list[Part] = field(default_factory=list)
    answer: list[Part] = field(default_factory=list)
    text: str = ""


def status(view: View, language: Language) -> str:
    """A request's state: a line, a bar while it runs, and the picture as it forms."""
    progress = view.progress
    if view.error is not None:
        return problem(view.error, language)
    if progress.state == "done":
        return _line(_done(view, language), "done")
    line, share = _running(view, language)
    return _line(line) + _bar(line, share) + _preview(progress.preview, language)


def sending(language: Language) -> str:
    """Before anything is known."""
    return _line(say("sending", language)) + _bar(say("sending", language), None)


def problem(error: BaseException, language: Language) -> str:
    """Why there is no result, in one line; never a traceback."""
    if isinstance(error, Cancelled):
        return _line(say("cancelled", language), "done")
    if isinstance(error, BusyError):
        text = say("busy", language, reason=error, time=duration(error.retry_after, language))
    elif isinstance(error, LowmemBagelError):
        text = say("refused", language, reason=error)
    else:
        text = say("fault", language)
    return f'<p class="lb-line lb-error" role="alert">{escape(text)}</p>'


def conversation(turns: Sequence[Shown], language: Language) -> str:
    """Turns in their order, the last perhaps on its way; texts and pictures where they stand in each."""
    if not turns:
        return _line(say("chat_empty", language), "done")
    label = escape(say("conversation", language))
    return f'<div class="lb-talk" role="log" aria-label="{label}">{"".join(_turn(t, language) for t in turns)}</div>'


def file_link(path: Path, text: str) -> str:
    """To be fetched."""
    return f'<p class="lb-line"><a href="{_address(path)}" download="{escape(path.name)}">{escape(text)}</a></p>'


def note(text: str) -> str:
    return _line(text, "done")


def nothing_chosen(language: Language) -> str:
    """Below the history, before an entry of it was chosen."""
    return _line(f"{say('history_empty', language)} {say('history_choose', language)}", "done")


def model_line(service: Service, language: Language) -> str:
    """Whether the model is there: how much is loaded, or its name and how many requests wait."""
    if service.failure is not None:
        text = say("load_failed", language, reason=_said(service.failure, language))
        return f'<p class="lb-line lb-error" role="alert">{escape(text)}</p>'
    if service.loaded is None:
        done, total = service.bytes_loaded
        if not total:
            return _line(say("loading_begins", language)) + _bar(say("loading_begins", language), None)
        text = say("loading", language, done=_gigabytes(done), total=_gigabytes(total))
        return _line(text) + _bar(text, done / total)
    devices = ", ".join(service.loaded.plan.devices)
    parts = [say("ready", language, name=service.name), service.loaded.folder.format, devices]
    waiting = len(service.queue.order())
    if waiting:
        parts.append(say("queue_waits", language, count=waiting))
    return _line(" · ".join(parts), "ready")


def plan_table(service: Service, language: Language) -> str:
    """What was loaded, where it lives and why."""
    if service.loaded is None:
        return model_line(service, language)
    folder, plan = service.loaded.folder, service.loaded.plan
    rows = [
        (say("model_name", language), service.name),
        (say("format", language), folder.format),
        (say("device", language), ", ".join(plan.devices)),
        (say("dtype", language), plan.dtype),
        (say("tasks", language), ", ".join(plan.tasks)),
        (say("places", language), _places(plan, folder.config.decoder.num_layers, language)),
    ]
    if plan.prediction is not None:
        rows.append((say("peak", language), _gigabytes(plan.prediction.peak_bytes)))
        if plan.prediction.seconds is not None:
            rows.append((say("predicted", language), duration(plan.prediction.seconds, language)))
    reasons = _table((name, text) for name, text in plan.reasons.items())
    return _table(rows) + f"<h3>{escape(say('reasons', language))}</h3>" + reasons


def memory_bar(used: int, total: int, language: Language) -> str:
    """The device's memory now."""
    text = say("memory_used", language, used=_gigabytes(used), total=_gigabytes(total))
    return _line(f"{say('memory', language)}: {text}") + _bar(say("memory", language), used / max(total, 1))


def entry_table(entry: Entry, language: Language) -> str:
    """A result of the history: what was asked for, what was answered, every setting."""
    rows = [(option_label(name, language), _shown(value, language)) for name, value in entry.settings.items()]
    answer = f'<p class="lb-answer">{escape(entry.answer)}</p>' if entry.answer else ""
    heading = f"{say(entry.tab, language)}: {entry.prompt}"  # type: ignore[arg-type, unused-ignore]
    return f"<h3>{escape(heading)}</h3>{answer}" + _table(rows, (say("setting", language), say("value", language)))


def _turn(turn: Shown, language: Language) -> str:
    answer = [*turn.answer, *([Part(turn.text)] if turn.text else [])]
    given = _parts(turn.given, "picture_given", language)
    said = _parts(answer, "picture_answered", language)
    mine = f'<div class="lb-mine"><h4>{escape(say("you", language))}</h4>{given}</div>' if given else ""
    return mine + (f'<div class="lb-theirs"><h4>BAGEL</h4>{said}</div>' if said else "")


def _parts(parts: Sequence[Part], described: str, language: Language) -> str:
    shown = []
    pictures = 0
    for part in parts:
        if part.picture is None:
            shown.append(_written(part.text, language))
            continue
        pictures += 1
        alt = escape(say(described, language, number=pictures))
        address = _address(part.picture)
        shown.append(
            f'<a href="{address}" target="_blank" rel="noopener">'
            f'<img class="lb-told" src="{address}" alt="{alt}" decoding="sync"></a>'
        )
    return "".join(shown)


def _written(text: str, language: Language) -> str:
    """A text, with what was thought before it folded away."""
    reasoning, answer = parts_of(text)
    thought = ""
    if reasoning:
        thought = (
            f"<details><summary>{escape(say('plan_text', language))}</summary><p>{escape(reasoning)}</p></details>"
        )
    return thought + (f"<p>{escape(answer)}</p>" if answer else "")


def _address(path: Path) -> str:
    return f"{FILES}{quote(str(path))}"


def _running(view: View, language: Language) -> tuple[str, float | None]:
    """The line, and the share that is done; None where it is not known."""
    progress, outlook = view.progress, view.outlook
    seconds = progress.seconds_left
    if progress.state == "waiting":
        place, left = (1, 0.0) if outlook is None else (outlook.ahead + 1, outlook.seconds)
        return say("waiting", language, place=place, time=duration(left, language)), None
    if progress.steps and progress.step == progress.steps:
        return say("decoding", language, steps=progress.steps), 1.0
    if progress.steps:
        time_left = duration(seconds or 0.0, language)
        line = say("step", language, step=progress.step, steps=progress.steps, time=time_left)
        return line, progress.step / progress.steps
    if progress.text or progress.pieces:
        return say("writing", language), None
    return say("starting", language, time=duration(seconds or 0.0, language)), None


def _done(view: View, language: Language) -> str:
    job, result, answer = view.job, view.progress.result, view.progress.answer
    assert job is not None
    seconds = time.monotonic() - (job.started or job.created)
    if answer is not None:
        line = say("done", language, time=duration(seconds, language), seed=answer.seed)
        ended = [] if answer.ended == "text" else [say(f"ended_{answer.ended}", language)]
        return " ".join([line, *ended, *job.prepared.notes])
    assert result is not None
    line = say("done", language, time=duration(seconds, language), seed=result.seed)
    if isinstance(job.prepared.settings, PictureSettings):
        size = say("done_size", language, width=result.settings["width"], height=result.settings["height"])
        line = f"{line} {size}"
    return " ".join([line, *job.prepared.notes])


def _line(text: str, kind: str = "busy") -> str:
    return f'<p class="lb-line lb-{kind}" role="status">{escape(text)}</p>'


def _bar(label: str, share: float | None) -> str:
    """A bar for eyes and screen readers; one that only moves where the share is not known."""
    known = "" if share is None else f' aria-valuenow="{share * 100:.0f}"'
    width = "" if share is None else f' style="width:{share * 100:.1f}%"'
    kind = " lb-moving" if share is None else ""
    return (
        f'<div class="lb-bar{kind}" role="progressbar" aria-label="{escape(label)}" aria-valuemin="0" '
        f'aria-valuemax="100"{known}><div{width}></div></div>'
    )


def _preview(image: Image.Image | None, language: Language) -> str:
    if image is None:
        return ""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=PREVIEW_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="lb-preview" alt="{escape(say("preview_of", language))}" src="data:image/jpeg;base64,{data}">'


def _places(plan: Plan, layers: int, language: Language) -> str:
    """How many units wait where."""
    residency, total = plan.residency, layers * len(plan.experts)
    on_device = total - len(residency.streamed)
    said = [say("place_device", language, count=on_device, total=total)]
    said += [say(f"place_{place}", language, count=len(units)) for place, units in residency.waiting().items()]
    if residency.staged:
        said.append(say("place_staged", language, parts=", ".join(residency.staged)))
    return "; ".join(said)


def _table(rows: Iterable[tuple[str, str]], head: tuple[str, str] | None = None) -> str:
    heading = (
        "" if head is None else f'<tr><th scope="col">{escape(head[0])}</th><th scope="col">{escape(head[1])}</th></tr>'
    )
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f'<table class="lb-table">{heading}{body}</table>'


def _said(error: BaseException, language: Language) -> str:
    return str(error) if isinstance(error, LowmemBagelError) else say("fault", language)


def _shown(value: object, language: Language) -> str:
    if isinstance(value, bool):
        return say("yes" if value else "no", language)
    if isinstance(value, (tuple, list)):
        return ", ".join(_shown(part, language) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
