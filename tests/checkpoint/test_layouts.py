"""Every layout in which BAGEL's weights are published or saved: opened, shown, and drawn with to the same bits; or
refused in the line that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import layouts
from support.layouts import Parts, demo
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.formats.summary import summarise

SETTINGS = {"height": 32, "width": 32, "num_timesteps": 2, "seed": 3, "cfg_text_scale": 1.0}


PICTURE = Image.frombytes("RGB", (32, 24), bytes(n * n % 251 for n in range(32 * 24 * 3)))
"""Without any symmetry."""


def results(folder: ModelFolder) -> tuple[torch.Tensor, list[int]]:
    """A picture's latent and an answer's tokens, which every weight of the model takes part in."""
    pipe = BagelPipeline.from_folder(folder, device="cpu", dtype="float32")
    drawn = pipe.edit(PICTURE, "make it blue", **SETTINGS)
    answered = pipe.ask("what is it?", max_new_tokens=4)
    pipe.close()
    assert drawn.latent is not None
    return drawn.latent, answered.token_ids


@pytest.fixture(scope="module")
def weights() -> int:
    return summarise(FOLDER).total.weights


@pytest.fixture(scope="module")
def published() -> ModelFolder:
    return ModelFolder.open(FOLDER)


@pytest.fixture(scope="module")
def wanted(published: ModelFolder) -> tuple[torch.Tensor, list[int]]:
    return results(published)


def outer(name: str) -> str:
    return f"module._orig_mod.{name}"


def inner(name: str) -> str:
    """Wrapped layer by layer, with and without checkpointing."""
    wrapped = name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.")
    return "_fsdp_wrapped_module." + wrapped.replace("vit_model.", "vit_model._fsdp_wrapped_module.")


def beside(out: Path) -> None:
    """What is not the model's."""
    (out / "optimizer.00000-of-00008.pt").write_bytes(b"\x80\x02not opened")
    (out / "junk.safetensors").write_bytes(b"<!doctype html>")
    (out / "._ema.safetensors").write_bytes(b"a resource fork")
    layouts.save_file({"a.lora_A.weight": torch.ones(2, 2)}, out / "adapter_model.safetensors")
    layouts.save_file({"encoder.block.0.weight": torch.ones(2)}, out / "text_encoder.safetensors")


def stale_index(out: Path) -> None:
    index = {"weight_map": dict.fromkeys(demo().tensors, "model-00001-of-00002.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def write_standard(out: Path) -> dict[str, Any]:
    demo().write(out)
    beside(out)
    return {}


def named(weights: str) -> Callable[[Path], dict[str, Any]]:
    def write(out: Path) -> dict[str, Any]:
        demo().write(out, weights)
        stale_index(out)
        return {}

    return write


def sharded(stem: str, index: str | None) -> Callable[[Path], dict[str, Any]]:
    def write(out: Path) -> dict[str, Any]:
        layouts.in_shards(demo().write(out), stem, index=index)
        return {}

    return write


def changed(change: Callable[[Parts], Parts], **to: str) -> Callable[[Path], dict[str, Any]]:
    def write(out: Path) -> dict[str, Any]:
        change(demo()).write(out, **to)
        return {}

    return write


def completed(change: Callable[[Parts], Parts]) -> Callable[[Path], dict[str, Any]]:
    def write(out: Path) -> dict[str, Any]:
        change(demo()).write(out)
        return {"base": FOLDER}

    return write


def no_small_files(parts: Parts) -> Parts:
    parts.configs.clear()
    parts.files.clear()
    return parts


def no_vae(parts: Parts) -> Parts:
    parts.vae.clear()
    return parts


def merged_vae(prefix: str) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        parts.tensors |= {prefix + name: value for name, value in parts.vae.items()}
        return no_vae(parts)

    return change


def diffusers_folder(out: Path) -> dict[str, Any]:
    parts = layouts.diffusers_vae(demo())
    ae = parts.configs.pop("ae_config.json")
    parts.write(out, vae="vae/diffusion_pytorch_model.safetensors")
    config = {
        "in_channels": 3, "out_channels": 3, "block_out_channels": [ae["ch"] * m for m in ae["ch_mult"]],
        "layers_per_block": ae["num_res_blocks"], "latent_channels": 16, "scaling_factor": ae["scale_factor"],
        "shift_factor": ae["shift_factor"], "act_fn": "silu", "norm_num_groups": 32, "use_quant_conv": False,
    }  # fmt: skip
    (out / "vae" / "config.json").write_text(json.dumps(config))
    return {}


def of_two(weights: str) -> Callable[[Path], dict[str, Any]]:
    """The wanted set is not the one that would be taken."""

    def write(out: Path) -> dict[str, Any]:
        parts = demo()
        parts.write(out, "wanted.safetensors")
        parts.to(torch.bfloat16).tensors[layouts.EMBEDDING].zero_()
        parts.write(out, "ema.safetensors")
        return {"weights": weights}

    return write


SAME: dict[str, Callable[[Path], dict[str, Any]]] = {
    "standard": write_standard,
    "ema_bf16": named("ema_bf16.safetensors"),
    "model": named("model.safetensors"),
    "model_bf16": named("model_bf16.safetensors"),
    "one of its own name": named("bagel-finetuned.safetensors"),
    "shards": sharded("model", ""),
    "shards of ema": sharded("ema", ""),
    "shards by an index of another name": sharded("diffusion", "tuned.safetensors.index.json"),
    "loose shards": sharded("tuned", None),
    "named of two": of_two("wanted.safetensors"),
    "wrapped": changed(lambda parts: parts.renamed(outer)),
    "wrapped inside": changed(lambda parts: parts.renamed(inner)),
    "one prefix": changed(lambda parts: parts.renamed(lambda name: f"model.bagel.{name}")),
    "saved by save_pretrained": changed(lambda parts: layouts.nested(parts, vit_layers=4)),
    "nested, counted as published": changed(lambda parts: layouts.nested(parts, vit_layers=5)),
    "convolution": changed(layouts.convolved),
    "whole SigLIP": changed(lambda parts: layouts.whole_siglip(layouts.convolved(parts))),
    "buffers": changed(layouts.with_buffers),
    "no tables": changed(lambda parts: parts.without(*layouts.TABLES)),
    "float32": changed(lambda parts: parts.to(torch.float32)),
    "mixed": changed(lambda parts: parts.to(torch.float32, lambda name, value: name in layouts.TABLES)),
    "vae in a folder": changed(lambda parts: parts, vae="vae/ae.safetensors"),
    "diffusers' vae": diffusers_folder,
    "vae merged": changed(merged_vae("")),
    "vae merged under a prefix": changed(
        lambda parts: merged_vae("vae_model.")(parts).renamed(lambda name: f"module.bagel.{name}")
    ),
    "weights alone": completed(lambda parts: no_vae(no_small_files(parts))),
    "no vision": completed(lambda parts: parts.without(*layouts.VIT)),
    "decoder alone": completed(lambda parts: no_vae(parts.without(*layouts.VIT, *layouts.LATENT))),
    "one layer alone": completed(
        lambda parts: Parts({n: v for n, v in parts.tensors.items() if ".layers.1.mlp" in n}, {}, {}, {})
    ),
    "comfy": completed(lambda parts: no_vae(layouts.comfy(parts))),
}
"""Folders with the demo checkpoint's weights: how to make one, and what is said to open it."""
DRAWN = (
    "standard", "shards", "wrapped inside", "saved by save_pretrained", "whole SigLIP", "no tables", "mixed",
    "diffusers' vae", "vae merged under a prefix", "weights alone", "decoder alone", "comfy",
)  # fmt: skip
"""One of each way of naming, viewing, computing, rounding and completing what is read. Loading knows no more of a
folder than the tensors that it reads and the configuration, which are compared for all."""


@pytest.mark.parametrize("layout", SAME)
def test_the_same_weights_give_the_same_bits(
    layout: str, tmp_path: Path, published: ModelFolder, wanted: tuple[torch.Tensor, list[int]], weights: int
) -> None:
    opened = SAME[layout](tmp_path)
    folder = ModelFolder.open(tmp_path, **opened)
    assert folder.config == published.config
    for name in published.stored:
        assert torch.equal(folder.tensor(name).float(), published.tensor(name).float()), name
    if layout in DRAWN:
        latent, ids = results(folder)
        assert torch.equal(latent, wanted[0])
        assert ids == wanted[1]
    summary = summarise(tmp_path, **opened)
    assert summary.total.weights == weights
    assert summary.experts == ("und", "gen")
    assert summary.reading.lines["weights"]
    assert "lacking" not in summary.reading.lines


@pytest.mark.parametrize("source", [FOLDER, CHECKPOINT], ids=["demo", "golden"])
def test_computed_tables_have_the_published_bits(source: Path, tmp_path: Path) -> None:
    published = ModelFolder.open(source)
    tensors = {n: published.tensor(n) for n, one in published.stored.items() if one.entry.name not in layouts.TABLES}
    files = {path.name: path.read_bytes() for path in source.glob("*.json") if "index" not in path.name}
    computed = ModelFolder.open(Parts(tensors, {}, {}, files).write(tmp_path))
    assert computed.reading.lines["computed"] == ", ".join(layouts.TABLES)
    for name in layouts.TABLES:
        assert torch.equal(computed.tensor(name), published.tensor(name))
        assert computed.entry(name).dtype == published.entry(name).dtype
        assert bytes(computed.raw(name)) == bytes(published.raw(name))


@pytest.mark.parametrize(
    ("scale", "kind"),
    [
        (None, ""),
        ("weight_scale", "tensor"),
        ("weight_scale", "row"),
        ("scale_weight", "tensor"),
        ("weight_scale_inv", "row"),
    ],
)
def test_fp8_is_read_as_what_it_stands_for(tmp_path: Path, scale: str | None, kind: str) -> None:
    parts = layouts.in_fp8(demo(), scale, kind, mark=scale == "scale_weight")
    fp8 = ModelFolder.open(parts.write(tmp_path / "fp8", "ema-FP8.safetensors"))
    plain = ModelFolder.open(layouts.dequantized(parts).write(tmp_path / "plain"))
    for name, stored in plain.stored.items():
        assert (fp8.entry(name).dtype, fp8.entry(name).shape) == (stored.entry.dtype, stored.entry.shape), name
        assert torch.equal(fp8.tensor(name), stored.tensor()), name
        assert bytes(fp8.raw(name)) == bytes(stored.raw()), name
    assert "FP8, read as bf16" in fp8.reading.lines["dtypes"]
    if scale == "weight_scale_inv":  # what is read to the same bits is drawn with alike, however it was stored
        assert torch.equal(results(fp8)[0], results(plain)[0])
