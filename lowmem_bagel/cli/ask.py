"""`lowmem-bagel ask`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..settings import TextSettings, options_of
from .console import (
    Asked,
    ClipOption,
    JsonOption,
    ModelOption,
    load_flags,
    load_pipeline,
    notes_shown,
    step_bar,
    text_tokens,
    typed,
)
from .options import Values, takes
from .terminal import print_json, say

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder


@takes(settings=lambda: options_of(TextSettings), loading=load_flags)
def ask_command(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    settings: Values,
    loading: Values,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", help="Picture to ask about; or a video, or a folder.")
    ] = None,
    model: ModelOption = None,
    clip_count: ClipOption = 8,
    as_json: JsonOption = False,
) -> None:
    """Answer a question, about a picture where one is given."""
    from ..settings import check_prompt, text_settings

    question = typed(question)
    check_prompt(question)
    checked = text_settings(settings)
    from ..pictures.clips import pictures_of

    pictures = [] if image is None else pictures_of(image, clip_count)
    sizes = [picture.image.size for picture in pictures]

    def check(folder: ModelFolder) -> Asked:
        from ..checkpoint.check_tensors import check_request
        from ..planner.estimate import answer_workload
        from ..planner.facts import ModelFacts

        check_request(ModelFacts.of_folder(folder).lacking, "ask", bool(sizes))
        workload = answer_workload(folder.config, checked, sizes, text_tokens(question))
        return Asked(workload, f"at most {checked.max_new_tokens} of them")

    with notes_shown():
        pipe = load_pipeline(model, loading, check)
        with step_bar() as callback:
            result = pipe.run([*pictures, question], output="text", callback=callback, **settings)
    if as_json:
        print_json({"answer": result.text, **result.settings, "stats": result.stats.to_json()})
    else:
        say(result.text)
