"""A line of the jobs file as a job: what it asks for, checked whole before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from ..errors import ImageError, SettingError
from ..files import expanded
from ..pictures.callers import is_data_url
from ..settings import Task, TextSettings, check_prompt, options_of, picture_options, picture_settings, text_settings
from ..values import path_text, shown
from .lines import Line, check_name

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder
    from ..planner.facts import ModelFacts

FIELDS = ("id", "task", "prompt", "image", "images", "output")
"""Of a line, beside the settings."""
MAX_PICTURES = 16
"""That one job may be given."""


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        line: its number in the jobs file.
        pictures: paths of files, or data: URLs.
        output: what the picture's file will be called; empty for an answer.
        settings: as they were given, and a seed.
        size: height and width of what is drawn; None where an input picture decides, and of an answer.
        step_cache: what it is drawn with.
        frames: how many pictures it draws, in which way.
    """

    id: str
    line: int
    digest: str
    task: Task
    prompt: str
    pictures: tuple[str, ...]
    output: str
    settings: Mapping[str, Any]
    size: tuple[int, int] | None = None
    step_cache: str = "none"
    frames: int = 1
    frame_mode: str = "together"


@dataclass
class Checker:
    """Makes jobs of lines, for a model.

    Attributes:
        beside: the folder that pictures' paths start from.
        out: where results are written.
        owners: whose a file in there is, by the file's name.
        read: real paths of the pictures that any job reads.
    """

    folder: ModelFolder
    facts: ModelFacts
    beside: Path
    out: Path
    owners: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def look_at(self, lines: Sequence[Line]) -> None:
        """Note which pictures are read, which no job may write over."""
        for line in lines:
            with suppress(SettingError, ImageError):  # said when the line's turn has come
                self.read.update(os.path.realpath(path) for path in self._pictures(line.said) if not is_data_url(path))

    def job(self, line: Line) -> Job:
        """The job of a line.

        Raises:
            UserError: what is wrong with it, or which picture is missing.
        """
        from ..checkpoint.check_tensors import check_request
        from ..planner.estimate import checked_tasks

        if line.why:
            raise SettingError(line.why)
        prompt, pictures = line.said.get("prompt"), self._pictures(line.said)
        given = {name: line.said[name] for name in line.said if name not in FIELDS and line.said[name] is not None}
        task = _task(line.said.get("task"), bool(pictures), given, line.said.get("output") is not None, self._names)
        check_prompt(prompt)
        settings = {"seed": seed_of(line)} | given
        size, drawn = None, dict[str, Any]()
        if task == "ask":
            think = text_settings(settings).think
        else:
            drawing = picture_settings(self.folder.config, self.folder.max_side, task == "edit", settings, _unsaid)
            think = drawing.think
            drawn = {name: getattr(drawing, name) for name in ("step_cache", "frames", "frame_mode")}
            size = (drawing.height, drawing.width) if drawing.height and drawing.width else None
        checked_tasks(self.facts, (task,))
        check_request(self.facts.lacking, task, bool(pictures), think)
        output = self._output(line, task, str(prompt))
        missing = [path for path in pictures if not is_data_url(path) and not os.path.exists(path)]
        if missing:
            raise ImageError(f"no such picture: {missing[0]}")
        if output:
            self.owners[output.casefold()] = line.id
        return Job(line.id, line.number, line.digest, task, str(prompt), pictures, output, settings, size, **drawn)

    @cached_property
    def _names(self) -> tuple[set[str], set[str]]:
        text = {known.name for known in options_of(TextSettings)}
        picture = {known.name for known in picture_options()}
        return text - picture, picture - text

    def _pictures(self, said: Mapping[str, Any]) -> tuple[str, ...]:
        given = [said[name] for name in ("image", "images") if said.get(name) is not None]
        if len(given) > 1:
            raise SettingError("give image or images, not both")
        named = given[0] if given else []
        paths = [named] if isinstance(named, str) else named
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise SettingError(f"image must be a picture's path, and images a list of them, not {shown(named)}")
        if len(paths) > MAX_PICTURES:
            raise SettingError(f"{len(paths)} pictures; give {MAX_PICTURES} or fewer")
        return tuple(path if is_data_url(path) else self._path(path) for path in paths)

    def _path(self, said: str) -> str:
        if "\0" in said or path_text(said) is None:
            raise ImageError(f"no file can be called {shown(said)}")
        return str(self.beside / expanded(said))

    def _output(self, line: Line, task: Task, prompt: str) -> str:
        """What the job's file is called."""
        from ..pictures.saving import check_room, check_suffix

        said = line.said.get("output")
        if task == "ask":
            if said is not None:
                raise SettingError("an answer is written among the results; leave output out")
            return ""
        if said is not None and not isinstance(said, str):
            raise SettingError(f"output must be a file's name, not {shown(said)}")
        output = f"{line.id}.png" if said is None else check_name(said, "output")
        output = output if Path(output).suffix else f"{output}.png"
        check_suffix(output)
        check_room(output, prompt)
        owner = self.owners.get(output.casefold())
        if owner not in (None, line.id):
            raise SettingError(f"{output} is what the job {shown(owner)} writes; give another output")
        place = self.out / output
        if os.path.isdir(place) or (owner is None and os.path.exists(place) and os.path.realpath(place) in self.read):
            raise SettingError(f"{place} is a folder, or a picture that jobs read; give another output")
        return output


def seed_of(line: Line) -> int:
    """Of a job whose line says none: always the same one, and for every job another."""
    return int.from_bytes(sha256(f"{line.id}\n{line.digest}".encode()).digest()[:4]) >> 1


def _task(
    said: object, pictured: bool, given: Mapping[str, Any], has_output: bool, names: tuple[set[str], set[str]]
) -> Task:
    """What is said, or else what the line can only mean. `names`: of settings of answers alone, and of pictures alone.

    Raises:
        SettingError: it may mean two things, or what is said needs a picture, or takes none.
    """
    if said is not None and said not in get_args(Task):
        raise SettingError(f"unknown task {shown(said)}; choose one of {', '.join(get_args(Task))}")
    of_text, of_pictures = names
    drawing, answering = has_output or bool(of_pictures & set(given)), bool(of_text & set(given))
    if said is None and (drawing == answering and (pictured or drawing)):
        other = "edit" if pictured else "generate"
        raise SettingError(f'which task is meant is not clear; say "task": "{other}" or "task": "ask"')
    task = said or ("ask" if answering else "edit" if pictured else "generate")
    if task == "generate" and pictured:
        raise SettingError('generate takes no picture; say "task": "edit"')
    if task == "edit" and not pictured:
        raise SettingError("edit needs an image")
    return cast("Task", task)


def _unsaid(changed: str) -> None:
    """Of settings that are changed the job itself tells, when it is done."""
