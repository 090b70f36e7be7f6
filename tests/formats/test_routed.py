"""A model with routed experts in every format: converted, checked, drawn with, streamed, adapted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from lowmem_bagel.converters.engine.convert import convert
from lowmem_bagel.converters.engine.shards import plan_units
from safetensors.torch import save_file
from support.command import Ran
from support.conversion_helpers import CONVERTERS, restored
from support.layouts import Parts, golden, routed
from support.numeric import relative_l2
from support.paths import CHECKPOINT
from support.streaming import drawn, fake_cuda, pipeline
from torch import Tensor

from lowmem_bagel.checkpoint.config import BAGEL_MOE_7B
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.checkpoint.verify import verify
from lowmem_bagel.errors import CheckpointError
from lowmem_bagel.formats import base
from lowmem_bagel.formats.base import Site
from lowmem_bagel.formats.gguf import codec as blocks
from lowmem_bagel.formats.gguf.packed import PackedBlocks
from lowmem_bagel.formats.gguf.products import DecodedBlocks, MixedBlocks
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.formats.nf4.spec import side_by_side
from lowmem_bagel.formats.registry import formats
from lowmem_bagel.ops.linear import Dense, Weights
from lowmem_bagel.ops.routed import Groups
from lowmem_bagel.planner.plan import Residency, Unit

__all__ = ["fake_cuda"]

UNITS: tuple[Unit, ...] = tuple((layer, "gen") for layer in range(3))
EXPERT = "language_model.model.layers.1.mlp_moe_gen.experts.3."
SAID = "8 of intermediate size 32 in 2 layers of gen, 4 active"
BOUND = {"int8": 0.3, "int8 rotated": 0.3}
"""Relative L2 of the latent in float32 against that of the file's own numbers, for arithmetic that quantises
activations too; of all others 1e-4."""


def small() -> Parts:
    """8 experts of 32: shorter rows than a block of NF4."""
    return routed(golden(), count=8, active=4, layers=(1, 2), gates=0.02)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small().write(tmp_path_factory.mktemp("routed") / "source")


@pytest.fixture(scope="module")
def variant(source: Path) -> Callable[[str], Path]:
    """It in a format, converted once."""

    @cache
    def made(name: str) -> Path:
        convert(source, source.parent / name, CONVERTERS[name]())
        return source.parent / name

    return made


def numbers(name: str, variant: Path, folder: Path) -> Path:
    """A checkpoint that has a variant's numbers in float32."""
    opened, parts = ModelFolder.open(variant), small()
    assert opened.manifest is not None
    records = opened.manifest.tensors
    parts.tensors = {name_: restored(opened, CONVERTERS[name](), records[name_]).float() for name_ in parts.tensors}
    return parts.write(folder)


each_format = pytest.mark.parametrize("name", CONVERTERS, scope="module")
"""Tests of one format follow each other, so that one process converts it."""


@each_format
def test_it_is_converted_checked_and_shown(
    name: str, variant: Callable[[str], Path], source: Path, cli: Callable[..., Ran]
) -> None:
    folder = ModelFolder.open(variant(name))
    assert folder.config.decoder.routed == ModelFolder.open(source).config.decoder.routed
    assert verify(variant(name), source).passed
    assert folder.manifest is not None
    encodings = {short: folder.manifest.tensors[f"{EXPERT}{short}_proj.weight"].encoding for short in ("up", "down")}
    assert set(encodings.values()) == {folder.format}
    router = folder.manifest.tensors["language_model.model.layers.1.mlp_moe_gen.gate.weight"]
    assert router.encoding == ("fp16" if name == "fp16" else "bf16")
    assert SAID in " ".join(cli("inspect", variant(name)).out.split())


@pytest.mark.usefixtures("fake_cuda")
@each_format
def test_it_draws_and_streamed_to_the_same_bits(name: str, variant: Callable[[str], Path], tmp_path: Path) -> None:
    backend = "auto" if name == "dfloat11" else "native"
    wanted = drawn(pipeline(numbers(name, variant(name), tmp_path), Residency(), "float32"))
    found = drawn(pipeline(variant(name), Residency(), "float32", linears=backend))
    assert relative_l2(found, wanted) <= BOUND.get(name, 1e-4)
    resident = drawn(pipeline(variant(name), Residency(), linears=backend))
    pipe = pipeline(variant(name), Residency(UNITS[:2], 2, "disk"), linears=backend)
    assert torch.equal(drawn(pipe), resident)
    pipe.close()


@pytest.mark.usefixtures("fake_cuda")
def test_the_source_streams_too(source: Path) -> None:
    resident = drawn(pipeline(source, Residency()))
    for residency in (Residency(UNITS, 3, "pageable"), Residency(UNITS[1::2], 2, "disk")):
        assert torch.equal(drawn(pipeline(source, residency)), resident)


def test_a_variant_that_only_answers_has_none(source: Path, tmp_path: Path) -> None:
    """Though its configuration says that there are."""
    convert(source, tmp_path / "und", CONVERTERS["int8"](), experts=("und",))
    assert ModelFolder.open(tmp_path / "und").config.decoder.routed is None
    assert verify(tmp_path / "und", source).passed


def test_what_is_stacked_is_rotated_all_or_none() -> None:
    units = plan_units(spec for spec in tensor_table(BAGEL_MOE_7B).values() if spec.layer == 1 and spec.expert == "gen")
    stacked = [[spec.linear for spec in unit.specs] for unit in units if unit.specs[0].routed is not None]
    assert stacked == [["gate", "up"] * 16, ["down"] * 16]


# --- products of groups ---


def groups_of(sizes: list[int], rows: Tensor | None = None) -> Groups:
    return Groups(torch.tensor([0, *sizes]).cumsum(0).int(), rows)


@pytest.mark.parametrize("format", [name for name, spec in formats().items() if spec.parts])
def test_parts_of_every_format_are_stacked_by_rows(format: str) -> None:
    """As memory is laid out for all experts together, so it is for each."""
    for part in formats()[format].parts:
        one, all_of_them = part.shape((3584, 1184)), part.shape((16 * 3584, 1184))
        assert (16 * one[0], *one[1:]) == all_of_them


def test_rows_too_short_for_blocks_stand_side_by_side() -> None:
    weight = torch.randn(64, 96)
    packed, absmax = nf4.quantize(weight.view(side_by_side((64, 96))))
    assert absmax.shape == (32, 3) == SHAPES["absmax"]((64, 96))
    restored = nf4.dequantize(packed.view(64, 48), absmax, torch.float32)
    assert torch.equal(restored.view(32, 192), nf4.dequantize(packed, absmax, torch.float32))
    assert side_by_side((3584, 1184)) == (1792, 2368)
    assert side_by_side((10, 128)) == (10, 128)


SHAPES = {part.path: part.shape for part in formats()["nf4"].parts}


@pytest.mark.parametrize("scattered", [True, False])
def test_a_group_meets_its_own_part_of_the_weight(scattered: bool) -> None:
    x, weight = torch.randn(9, 8), torch.randn(4 * 6, 8)
    rows = torch.randint(0, 9, (9,), dtype=torch.int32) if scattered else None
    found = Dense().grouped(x, Weights(weight), groups_of([2, 0, 6, 1], rows))
    inputs = x if rows is None else x[rows.long()]
    expected = [inputs[i] @ weight.view(4, 6, 8)[e].T for i, e in enumerate([0, 0, 2, 2, 2, 2, 2, 2, 3])]
    assert relative_l2(found, torch.stack(expected)) < 1e-6


def test_groups_meet_parts_of_mixed_types() -> None:
    """As other programs' mixes may have experts: a part's rows may begin in one type and end in another."""
    width, types = 256, [("Q8_0", 7), ("Q4_K", 9), ("Q8_0", 8)]
    rows = torch.randn(24, width)
    encoded, row = [], 0
    for kind, height in types:
        encoded.append(blocks.encode(rows[row : row + height].bfloat16(), kind)[0].flatten())
        row += height
    product = MixedBlocks(types, {kind: DecodedBlocks(PackedBlocks(kind)) for kind in ("Q8_0", "Q4_K")})
    weights, x = Weights(torch.cat(encoded)), torch.randn(10, width)
    found = product.grouped(x, weights, groups_of([3, 0, 2, 5]))
    whole = product.multiply(x, weights).view(10, 4, 6)
    expected = torch.stack([whole[i, e] for i, e in enumerate([0, 0, 0, 2, 2, 3, 3, 3, 3, 3])])
    assert relative_l2(found, expected) < 1e-6


def test_without_their_kernels_experts_take_turns(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reason; and a model without them tries no kernel."""
    monkeypatch.setattr(base, "why_not", lambda kernel, *_: "its trial was wrong" if kernel == "broken" else None)
    for folder, reasons in ((source, {"routed experts": "one after the other: its trial was wrong"}), (CHECKPOINT, {})):
        site = Site(ModelFolder.open(folder), torch.device("cpu"), torch.bfloat16, "auto", {})
        assert not site.runs_groups("grouped_matmul", "broken")
        assert site.reasons == reasons
        assert site.runs_groups("grouped_matmul") == bool(reasons)


# --- adapters ---


def adapter(folder: Path, name: str, shape: tuple[int, int]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    factors = {"A": torch.randn(2, shape[1]) / math.sqrt(shape[1]), "B": torch.randn(shape[0], 2)}
    save_file({f"base_model.model.{name}.lora_{f}.weight": v for f, v in factors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def test_adapters_of_experts_are_merged_into_floats_alone(
    source: Path, variant: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = adapter(tmp_path / "lora", f"{EXPERT}up_proj", (32, 128))
    plain, changed = ModelFolder.open(source), ModelFolder.open(source, lora=[str(lora)])
    assert not torch.equal(changed.tensor(f"{EXPERT}up_proj.weight"), plain.tensor(f"{EXPERT}up_proj.weight").float())
    assert ModelFolder.open(variant("bf16"), lora=[str(lora)]).adapters
    for name in ("int8", "nf4", "dfloat11"):
        with pytest.raises(CheckpointError, match=r"changes .*experts\.3\.up_proj\.weight, one of many routed experts"):
            ModelFolder.open(variant(name), lora=[str(lora)])
    convert(source, tmp_path / "merged", CONVERTERS["int8"](), lora=[str(lora)])
    assert verify(tmp_path / "merged", changed).passed
