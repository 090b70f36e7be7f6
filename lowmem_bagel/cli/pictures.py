"""`lowmem-bagel generate` and `lowmem-bagel edit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    check_output,
    load_pipeline,
    messages,
    notes_shown,
    print_json,
    step_bar,
    text_tokens,
)

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder
    from ..planner.plan import Task

OutOption = Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")]
StepsOption = Annotated[int | None, typer.Option(help="Timesteps, at least 2; default 50.")]
ShiftOption = Annotated[float | None, typer.Option(help="Timestep shift; default 3.")]
TextScaleOption = Annotated[float | None, typer.Option(help="Guidance by the text; default 4; 1 turns guidance off.")]
ImageScaleOption = Annotated[float | None, typer.Option(help="Guidance by the picture; default 2 for edits, else 1.")]
IntervalOption = Annotated[tuple[float, float] | None, typer.Option(help="Timesteps guided: from, to.")]
RenormOption = Annotated[str | None, typer.Option(help="global, channel or text_channel.")]
RenormMinOption = Annotated[float | None, typer.Option(help="Smallest renormalisation factor.")]
ThinkOption = Annotated[bool, typer.Option("--think", help="Write a plan first.")]
ThinkTokensOption = Annotated[int | None, typer.Option(help="Most tokens of the plan; default 1000.")]
CacheOption = Annotated[
    str | None, typer.Option(help="none, taylorseer or first-block: predict some steps instead of computing.")
]
CacheThresholdOption = Annotated[
    float | None, typer.Option(help="first-block: change below which a step is skipped; default 0.05; 0 skips none.")
]
HeightOption = Annotated[int | None, typer.Option(help="Pixels; a multiple of 16.")]
WidthOption = Annotated[int | None, typer.Option(help="Pixels; a multiple of 16.")]


def generate_command(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: ModelOption = None,
    out: OutOption = Path("out.png"),
    seed: SeedOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_timesteps: StepsOption = None,
    timestep_shift: ShiftOption = None,
    cfg_text_scale: TextScaleOption = None,
    cfg_img_scale: ImageScaleOption = None,
    cfg_interval: IntervalOption = None,
    cfg_renorm_type: RenormOption = None,
    cfg_renorm_min: RenormMinOption = None,
    think: ThinkOption = False,
    max_think_tokens: ThinkTokensOption = None,
    step_cache: CacheOption = None,
    step_cache_threshold: CacheThresholdOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    attention: AttentionOption = "auto",
    offload: OffloadOption = "native",
    max_vram: MaxVramOption = None,
    max_ram: MaxRamOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a picture from a prompt."""
    _draw([prompt], "generate", locals())


def edit_command(
    image: Annotated[Path, typer.Argument(help="Picture to change.")],
    prompt: Annotated[str, typer.Argument(help="How to change it.")],
    model: ModelOption = None,
    out: OutOption = Path("out.png"),
    seed: SeedOption = None,
    num_timesteps: StepsOption = None,
    timestep_shift: ShiftOption = None,
    cfg_text_scale: TextScaleOption = None,
    cfg_img_scale: ImageScaleOption = None,
    cfg_interval: IntervalOption = None,
    cfg_renorm_type: RenormOption = None,
    cfg_renorm_min: RenormMinOption = None,
    think: ThinkOption = False,
    max_think_tokens: ThinkTokensOption = None,
    step_cache: CacheOption = None,
    step_cache_threshold: CacheThresholdOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    attention: AttentionOption = "auto",
    offload: OffloadOption = "native",
    max_vram: MaxVramOption = None,
    max_ram: MaxRamOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a picture as the prompt says."""
    _draw([image, prompt], "edit", locals())


LOADING = ("device", "dtype", "backend", "attention", "offload", "max_vram", "max_ram")
NOT_SETTINGS = {"image", "prompt", "model", "out", "as_json", *LOADING}


def _draw(terms: list[Any], task: Task, given: dict[str, Any]) -> None:
    from ..settings import check_prompt, picture_settings

    console, out = messages(), check_output(given["out"])
    check_prompt(given["prompt"])
    settings = {name: value for name, value in given.items() if name not in NOT_SETTINGS}
    from ..generation.images import open_image

    terms = [open_image(term) if isinstance(term, Path) else term for term in terms]

    picture = next((term.size for term in terms if not isinstance(term, str)), None)

    def check(folder: ModelFolder) -> Asked:
        from ..planner.estimate import checked_tasks, drawing_load
        from ..planner.facts import ModelFacts

        checked_tasks(ModelFacts.of_folder(folder), (task,))
        # The pipeline warns of what is changed; this is only for what is refused.
        checked = picture_settings(folder.config, folder.max_side, task == "edit", settings, warn=lambda message: None)
        load = drawing_load(folder.config, checked, picture, text_tokens(given["prompt"]))
        rows, columns = (side * folder.config.token_pixels for side in load.grid)
        return Asked(load, f"for {columns}x{rows} and {checked.num_timesteps} timesteps")

    with notes_shown(console):
        loading = {name: given[name] for name in LOADING} | {"step_cache": given["step_cache"] or "none"}
        pipe = load_pipeline(given["model"], (task,), console, check, **loading)
        with step_bar(console) as callback:
            result = pipe.run(terms, callback=callback, **settings)
    path = result.save(out)
    if given["as_json"]:
        print_json({"path": str(path), "text": result.text, **result.settings, "stats": result.stats.to_json()})
        return
    if result.text:
        print(result.text)
    console.print(f"{path}: seed {result.seed}, {result.stats.seconds:.1f} s", markup=False)
