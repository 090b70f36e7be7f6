"""`lowmem-bagel generate` and `lowmem-bagel edit`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings import picture_options
from ..timeline import Timeline
from .console import (
    Asked,
    ClipOption,
    JsonOption,
    ModelOption,
    check_output,
    load_flags,
    load_pipeline,
    notes_shown,
    step_bar,
    text_tokens,
    typed,
)
from .options import Values, takes
from .terminal import note, print_json, say

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder
    from ..generation.results import Result
    from ..recipes.storyboards import Storyboard
    from ..settings import Task

OutOption = Annotated[Path, typer.Option("--out", "-o", help="PNG, JPEG or WebP to write.")]


@takes(settings=picture_options, loading=load_flags)
def generate_command(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    settings: Values,
    loading: Values,
    model: ModelOption = None,
    out: OutOption = Path("out.png"),
    as_json: JsonOption = False,
) -> None:
    """Draw a picture from a prompt."""
    out = check_output(out, prompt)
    timeline = Timeline()
    show_result(draw(_board(None, prompt), model, settings, loading, timeline), out, as_json, timeline)


@takes(settings=lambda: picture_options(editing=True), loading=load_flags)
def edit_command(
    image: Annotated[
        Path, typer.Argument(help="Picture to change; or a video, or a folder of pictures, to go on from.")
    ],
    prompt: Annotated[str, typer.Argument(help="How to change it.")],
    settings: Values,
    loading: Values,
    model: ModelOption = None,
    out: OutOption = Path("out.png"),
    clip_count: ClipOption = 8,
    as_json: JsonOption = False,
) -> None:
    """Change a picture as the prompt says."""
    out = check_output(out, prompt)
    timeline = Timeline()
    board = _board(image, prompt, clip_count)
    show_result(draw(board, model, settings, loading, timeline), out, as_json, timeline)


def _board(image: Path | None, prompt: str, clip_count: int = 1) -> Storyboard:
    from ..pictures.clips import pictures_of
    from ..recipes.storyboards import Storyboard
    from ..settings import check_prompt

    prompt = typed(prompt)
    check_prompt(prompt)
    return Storyboard([*([] if image is None else pictures_of(image, clip_count)), prompt])


def draw(board: Storyboard, model: Path | None, settings: Values, loading: Values, timeline: Timeline) -> Result:
    """Load the model and draw. What is impossible is refused before gigabytes are read."""
    from ..settings import picture_settings

    given = {**board.settings, **settings}
    texts = [*(term for term in board.terms if isinstance(term, str)), *board.turns]
    sizes = [term.image.size for term in board.terms if not isinstance(term, str)]
    task: Task = "edit" if sizes else "generate"
    frames = "frames" in board.settings or given.get("frames", 1) > 1  # a recipe's board says how many, even one

    def check(folder: ModelFolder) -> Asked:
        from ..checkpoint.check_tensors import check_request
        from ..planner.estimate import checked_tasks, drawing_workload
        from ..planner.facts import ModelFacts

        # The pipeline warns of what is changed; this is only for what is refused.
        checked = picture_settings(folder.config, folder.max_side, task == "edit", given, warn=lambda message: None)
        facts = ModelFacts.of_folder(folder)
        checked_tasks(facts, (task,))
        check_request(facts.lacking, task, bool(sizes), checked.think)
        workload = drawing_workload(folder.config, checked, sizes, sum(map(text_tokens, texts)))
        rows, columns = (side * folder.config.token_pixels for side in workload.grid)
        several = f"{checked.frames} frames of " if checked.frames > 1 else ""
        return Asked(workload, f"for {several}{columns}x{rows} and {checked.num_timesteps} timesteps")

    with notes_shown():
        pipe = load_pipeline(model, loading, check, timeline, frames)
        with step_bar() as show:

            def callback(event: Any) -> None:
                if hasattr(event, "x_t"):
                    timeline.reach("first step")
                show(event)

            return board.draw(pipe, callback=callback, **settings)


def show_result(
    result: Result, out: Path, as_json: bool, timeline: Timeline, fps: float = 8.0, recipe: str = ""
) -> None:
    """Save what was drawn, and say so; with the name of the recipe, if one made it."""
    if recipe:
        result = replace(result, settings={**result.settings, "recipe": recipe})
    with timeline.phase("saving"):
        path, *others = result.save_frames(out, fps) if result.more else [result.save(out)]
    timeline.reach("picture")
    if as_json:
        told: dict[str, Any] = {"stats": result.stats.to_json(), "startup": timeline.to_json()}
        told |= {"paths": [str(path), *map(str, others)]} if others else {}
        print_json({"path": str(path), "text": result.text, **result.settings, **told})
        return
    if result.text:
        say(result.text)
    beside = f" to {others[-1].name}" if others else ""
    note(f"{path}{beside}: seed {result.seed}, {result.stats.seconds:.1f} s")
