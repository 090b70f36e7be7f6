"""`lowmem-bagel generate` and `lowmem-bagel edit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings import picture_options
from ..timeline import Timeline
from .console import (
    Asked,
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
    _show(_draw(None, prompt, model, settings, loading, timeline), out, as_json, timeline)


@takes(settings=lambda: picture_options(editing=True), loading=load_flags)
def edit_command(
    image: Annotated[Path, typer.Argument(help="Picture to change.")],
    prompt: Annotated[str, typer.Argument(help="How to change it.")],
    settings: Values,
    loading: Values,
    model: ModelOption = None,
    out: OutOption = Path("out.png"),
    as_json: JsonOption = False,
) -> None:
    """Change a picture as the prompt says."""
    out = check_output(out, prompt)
    timeline = Timeline()
    _show(_draw(image, prompt, model, settings, loading, timeline), out, as_json, timeline)


def _draw(
    image: Path | None, prompt: str, model: Path | None, settings: Values, loading: Values, timeline: Timeline
) -> Result:
    from ..pictures.opening import open_picture
    from ..settings import check_prompt, picture_settings

    prompt = typed(prompt)
    check_prompt(prompt)
    task: Task = "generate" if image is None else "edit"
    picture = None if image is None else open_picture(image)
    size = None if picture is None else picture.image.size

    def check(folder: ModelFolder) -> Asked:
        from ..checkpoint.check_tensors import check_request
        from ..planner.estimate import checked_tasks, drawing_workload
        from ..planner.facts import ModelFacts

        # The pipeline warns of what is changed; this is only for what is refused.
        checked = picture_settings(folder.config, folder.max_side, task == "edit", settings, warn=lambda message: None)
        facts = ModelFacts.of_folder(folder)
        checked_tasks(facts, (task,))
        check_request(facts.lacking, task, size is not None, checked.think)
        workload = drawing_workload(folder.config, checked, size, text_tokens(prompt))
        rows, columns = (side * folder.config.token_pixels for side in workload.grid)
        return Asked(workload, f"for {columns}x{rows} and {checked.num_timesteps} timesteps")

    terms: list[Any] = [prompt] if picture is None else [picture, prompt]
    with notes_shown():
        pipe = load_pipeline(model, loading, check, timeline)
        with step_bar() as show:

            def callback(event: Any) -> None:
                if hasattr(event, "x_t"):
                    timeline.reach("first step")
                show(event)

            return pipe.run(terms, callback=callback, **settings)


def _show(result: Result, out: Path, as_json: bool, timeline: Timeline) -> None:
    with timeline.phase("saving"):
        path = result.save(out)
    timeline.reach("picture")
    if as_json:
        told = {"stats": result.stats.to_json(), "startup": timeline.to_json()}
        print_json({"path": str(path), "text": result.text, **result.settings, **told})
        return
    if result.text:
        say(result.text)
    note(f"{path}: seed {result.seed}, {result.stats.seconds:.1f} s")
