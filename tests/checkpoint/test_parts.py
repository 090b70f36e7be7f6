"""A folder that holds only what was trained: it does what it can, and says what it lacks where that is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import layouts
from support.command import Ran
from support.layouts import demo

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import SUFFIX
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import CheckpointError, SettingError, UserError
from lowmem_bagel.settings import Task

DRAWN = {"height": 32, "width": 32, "num_timesteps": 2, "seed": 3}
PICTURE = Image.new("RGB", (32, 32), "red")


def without_vae(folder: Path) -> Path:
    parts = demo()
    parts.vae.clear()
    return parts.write(folder)


def without_drawing(folder: Path) -> Path:
    parts = demo().without(*layouts.LATENT)
    parts.vae.clear()
    return parts.write(folder)


def without_vit(folder: Path) -> Path:
    return demo().without(*layouts.VIT).write(folder)


def without_head(folder: Path) -> Path:
    return demo().without("language_model.lm_head").write(folder)


def without_gen(folder: Path) -> Path:
    parts = demo()
    parts.tensors = {name: value for name, value in parts.tensors.items() if SUFFIX["gen"] not in name}
    return parts.write(folder)


CAN: dict[Callable[[Path], Path], tuple[tuple[Task, ...], str]] = {
    without_vae: (("ask",), r"the VAE in ae\.safetensors is missing"),
    without_drawing: (("ask",), r"the latent projections and time embedder .* is missing"),
    without_vit: (("generate", "ask"), r"the vision tower and its connector .* is missing"),
    without_head: (("generate", "edit"), "lm_head is missing"),
    without_gen: (("ask",), "the generating expert is missing"),
}
"""How a folder is made, what it can do without pictures as input, and what it says of the rest."""


def load(folder: Path, **options: object) -> BagelPipeline:
    return BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


def do(pipe: BagelPipeline, task: Task) -> torch.Tensor | list[int] | None:
    if task == "ask":
        return pipe.ask("what is it?", max_new_tokens=3).token_ids
    return pipe.run(["a red circle"] if task == "generate" else [PICTURE, "blue"], output="image", **DRAWN).latent


Wanted = Callable[[Task], torch.Tensor | list[int] | None]


@pytest.fixture(scope="module")
def wanted() -> Wanted:
    """What the whole model does."""
    pipe = load(FOLDER)
    return cache(lambda task: do(pipe, task))


@pytest.mark.parametrize("make", CAN)
def test_it_does_what_it_can(make: Callable[[Path], Path], tmp_path: Path, wanted: Wanted) -> None:
    """All tasks are asked for where none is named, so what cannot be done is left out; by name it is refused."""
    folder, (can, line) = make(tmp_path / "model"), CAN[make]
    pipe = load(folder)
    assert pipe.model.plan.tasks == can
    assert line.split(".*")[0].replace("\\", "")[:20] in pipe.model.plan.reasons["tasks"]
    for task in can:
        assert torch.equal(torch.as_tensor(do(pipe, task)), torch.as_tensor(wanted(task))), task
    cannot: list[Task] = [task for task in ("generate", "edit", "ask") if task not in can]
    for task in cannot:
        with pytest.raises(CheckpointError, match=line):
            do(pipe, task)
        with pytest.raises(CheckpointError, match=rf"{line}.*--base FOLDER"):
            load(folder, tasks=(task,))
    pipe.close()
    completed = load(folder, base=FOLDER)
    assert completed.model.plan.tasks == ("generate", "edit", "ask")
    assert torch.equal(torch.as_tensor(do(completed, "edit")), torch.as_tensor(wanted("edit")))
    completed.close()


def test_a_question_about_a_picture_needs_the_tower(tmp_path: Path) -> None:
    pipe = load(without_vit(tmp_path / "model"), tasks=("ask",))
    assert pipe.ask("what is it?", max_new_tokens=3).token_ids
    with pytest.raises(CheckpointError, match="the vision tower and its connector"):
        pipe.ask("what is it?", PICTURE)
    pipe.close()


def test_without_the_tower_its_configuration_is_not_needed(tmp_path: Path) -> None:
    folder = without_vit(tmp_path / "model")
    (folder / "vit_config.json").unlink()
    pipe = load(folder, tasks=("generate",))
    assert pipe.generate("a red circle", **DRAWN).latent is not None
    pipe.close()


def test_a_missing_tokenizer_is_seen_beforehand(tmp_path: Path) -> None:
    parts = demo()
    parts.files.clear()
    assert ModelFolder.open(parts.write(tmp_path)).reading.lines["lacking"] == "the tokenizer"


def test_a_plan_before_drawing_needs_lm_head(tmp_path: Path) -> None:
    pipe = load(without_head(tmp_path / "model"), tasks=("generate",))
    with pytest.raises(CheckpointError, match="lm_head is missing"):
        pipe.generate("a circle", think=True, **DRAWN)
    pipe.close()


def test_part_of_a_part_is_no_part(tmp_path: Path) -> None:
    """Nothing is left out silently where a file is incomplete."""
    folder = demo().without("connector.fc1.").write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"tensor connector.fc1.weight is missing, and 1 more of the vision"):
        load(folder)
    load(folder, tasks=("generate",)).close()


def test_the_command_line_says_so_before_it_loads(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    folder = without_vit(tmp_path / "model")
    PICTURE.save(tmp_path / "a.png")
    shown = cli("inspect", folder).out
    assert "lacking: the vision tower and its connector (vit_model, connector): 74 tensors" in shown
    assert "lacking" in json.loads(cli("inspect", folder, "--json").out)["reading"]
    planned = cli("plan", folder, "--ram", "8GB")
    assert planned.code == 0
    assert "tasks: edit cannot be done" in planned.out
    for command in (
        ("edit", tmp_path / "a.png", "blue", "-o", tmp_path / "b.png"),
        ("ask", "what?", "-i", tmp_path / "a.png"),
    ):
        ran = cli(*command, "--model", folder)
        assert ran.code == 2
        assert "the vision tower and its connector" in ran.err
    ran = cli("ask", "what?", "--model", folder, "--device", "cpu", "--max-new-tokens", 2)
    assert ran.code == 0
    drawn = cli(
        "generate", "a", "-m", folder, "--device", "cpu", "--num-timesteps", 2, "-o", tmp_path / "c.png", "--json",
        "--weights", "ema.safetensors", "--base", FOLDER,
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    reading = json.loads(drawn.out)["reading"]
    assert reading["weights"] == "ema.safetensors"
    assert "74 tensors" in reading["completed"]


@pytest.mark.parametrize("side", [4, 3])
def test_a_small_table_lowers_the_limit(tmp_path: Path, side: int) -> None:
    parts = demo()
    table = parts.tensors["latent_pos_embed.pos_embed"].view(8, 8, -1)[:side, :side]
    parts.tensors["latent_pos_embed.pos_embed"] = table.reshape(side * side, -1)
    with pytest.warns(UserWarning, match=f"covers pictures of {16 * side} pixels a side") as warned:
        pipe = load(parts.write(tmp_path))
    assert len(warned) == 1
    drawn = pipe.generate("a red circle", num_timesteps=2, seed=1)
    assert drawn.image is not None
    assert drawn.image.size == (16 * side, 16 * side)
    edited = pipe.edit(Image.new("RGB", (128, 128)), "blue", num_timesteps=2, seed=1)
    assert edited.image is not None
    assert max(edited.image.size) == 16 * side
    with pytest.raises(SettingError, match=f"height 128 is over the model's {16 * side} pixels"):
        pipe.generate("a", height=128)
    pipe.close()


@pytest.mark.parametrize(
    ("key", "rule"), [("max_latent_size", "vae_resize"), ("vit_max_num_patch_per_side", "vit_resize")]
)
def test_a_computed_table_is_as_large_as_the_configuration_says(tmp_path: Path, key: str, rule: str) -> None:
    """What lies beyond was never trained."""
    parts = demo().without(*layouts.TABLES)
    parts.configs["config.json"][key] = 4
    config = ModelFolder.open(parts.write(tmp_path)).config
    assert getattr(config, rule).max_side == 4 * {"vae_resize": 16, "vit_resize": 14}[rule]


def test_the_base_never_overrides(tmp_path: Path) -> None:
    parts = demo()
    parts.tensors["connector.fc1.bias"] += 1
    parts.configs["llm_config.json"]["rope_theta"] = 5e5
    folder = ModelFolder.open(parts.write(tmp_path / "model"), base=FOLDER)
    assert torch.equal(folder.tensor("connector.fc1.bias"), parts.tensors["connector.fc1.bias"])
    assert folder.config.decoder.rope_theta == 5e5
    assert "nothing was lacking" in folder.reading.lines["completed"]


def test_a_base_of_other_sizes_is_refused(tmp_path: Path, reference_checkpoint: Path) -> None:
    folder = demo().without("connector.").write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"connector\.fc1\.weight is 128 x 64, and the configuration demands"):
        load(folder, base=reference_checkpoint)


def test_a_base_is_a_folder_of_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        ModelFolder.open(FOLDER, base=tmp_path / "nowhere")


def test_companions_make_a_folder_complete(tmp_path: Path) -> None:
    """What a converter writes beside the weights opens by itself."""
    parts = layouts.comfy(demo())
    folder = ModelFolder.open(parts.write(tmp_path / "model", "bagel.safetensors"), base=FOLDER)
    out = tmp_path / "out"
    out.mkdir()
    for name, content in folder.companions().items():
        (out / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    layouts.save_file(layouts.whole(demo().tensors), out / "ema.safetensors")
    again = ModelFolder.open(out)
    assert again.config == folder.config == ModelFolder.open(FOLDER).config
    assert {*layouts.TOKENIZER, "llm_config.json", "vit_config.json", "ae_config.json"} <= {*folder.companions()}
