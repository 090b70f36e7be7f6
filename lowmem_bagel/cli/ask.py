"""`lowmem-bagel ask`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import (
    Asked,
    AttentionOption,
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxRamOption,
    MaxVramOption,
    ModelOption,
    OffloadOption,
    SeedOption,
    load_pipeline,
    messages,
    notes_shown,
    print_json,
    step_bar,
    text_tokens,
)

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder


def ask_command(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture to ask about.")] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer; default 512.")] = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens, not the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; default 0.3.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of sampling; default 1.")] = None,
    think: Annotated[bool, typer.Option("--think", help="Reason first.")] = False,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    attention: AttentionOption = "auto",
    offload: OffloadOption = "native",
    max_vram: MaxVramOption = None,
    max_ram: MaxRamOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question, about a picture where one is given."""
    from ..settings import check_prompt, text_settings

    console = messages()
    settings = {
        "max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature, "top_p": top_p,
        "think": think, "seed": seed,
    }  # fmt: skip
    check_prompt(question)
    checked = text_settings(settings)
    from ..generation.images import open_image

    picture = None if image is None else open_image(image)

    def check(folder: ModelFolder) -> Asked:
        from ..planner.estimate import answer_load

        size = None if picture is None else picture.size
        load = answer_load(folder.config, checked, size, text_tokens(question))
        return Asked(load, f"at most {checked.max_new_tokens} of them")

    with notes_shown(console):
        pipe = load_pipeline(
            model, ("ask",), console, check,
            device=device, dtype=dtype, backend=backend, attention=attention, offload=offload,
            max_vram=max_vram, max_ram=max_ram,
        )  # fmt: skip
        with step_bar(console) as callback:
            result = pipe.ask(question, picture, callback=callback, **settings)
    if as_json:
        print_json({"answer": result.text, **result.settings, "stats": result.stats.to_json()})
    else:
        print(result.text)
