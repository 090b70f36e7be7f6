"""Conversions of the golden checkpoint: what is encoded and what is not, errors, refusals, verification."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowmem_bagel.converters.engine.convert import Progress, convert
from lowmem_bagel.converters.engine.disk import PAGE_BYTES
from lowmem_bagel.converters.engine.shards import Shard, plan_shards, plan_units
from lowmem_bagel.converters.int8 import Int8Converter
from safetensors.torch import load_file, save_file
from support.conversion_helpers import (
    CONVERTERS,
    SMALL_SHARDS,
    contents,
    copy_checkpoint,
    equal_bits,
    golden_tensor,
    restored,
)
from support.paths import CHECKPOINT, ROOT
from torch import Tensor

from lowmem_bagel.checkpoint.config_files import config_of
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from lowmem_bagel.checkpoint.tensors import TensorSpec, tensor_table
from lowmem_bagel.checkpoint.variant_summary import encoded_bits_per_weight, summarise
from lowmem_bagel.errors import CheckpointError, ConversionError, LowmemBagelError
from lowmem_bagel.ops.errors import relative_l2

TABLE = tensor_table(config_of(CHECKPOINT))
LAYER = "language_model.model.layers.1."
Q = LAYER + "self_attn.q_proj.weight"
NORM = LAYER + "input_layernorm.weight"
UND: dict[str, Any] = {"experts": ("und",)}
ERROR_LIMIT = {"int8": 0.012, "int8 rotated": 0.012, "fp16": 1e-6, "nf4": 0.11, "gguf-q8_0": 0.008}

needs_entry_points = pytest.mark.skipif(
    not entry_points(group="lowmem_bagel.converters"),
    reason="the installation is older than the entry points in pyproject.toml: pip install -e . again",
)


class Variants(dict[str, Path]):
    """The golden checkpoint in every format, converted when it is asked for; read only."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root, self.settings = root, settings

    def __missing__(self, name: str) -> Path:
        self[name] = self.root / name
        convert(CHECKPOINT, self[name], CONVERTERS[name](), shard_bytes=SMALL_SHARDS, **self.settings)
        return self[name]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Variants(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def understanding(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one expert, without a VAE: a third of the bytes and of the tensors."""
    return Variants(tmp_path_factory.mktemp("understanding"), **UND)


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def failure(source: Path, out: Path, name: str = "int8", **settings: Any) -> str:
    """The one line that a refused conversion says."""
    with pytest.raises((ConversionError, CheckpointError)) as caught:
        convert(source, out, CONVERTERS[name](), **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a variant holds ----------------------------------------------------------------------------------------------


def is_linear(spec: TensorSpec) -> bool:
    return bool(re.search(r"language_model.*(_proj)(_moe_gen)?\.weight$", spec.name))


def is_embedding(spec: TensorSpec) -> bool:
    return spec.name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


EXPECTED = {
    "bf16": lambda s: "bf16" if s.part != "vae" else None,
    "dfloat11": lambda s: "dfloat11" if is_linear(s) or is_embedding(s) else None,
    "int8": lambda s: "int8" if is_linear(s) else None,
    "int8 rotated": lambda s: "int8" if is_linear(s) or is_embedding(s) else None,
    "fp16": lambda s: "fp16" if s.part != "vae" else None,
    "nf4": lambda s: "nf4" if is_linear(s) else None,
    "gguf-q8_0": lambda s: "gguf-q8_0" if is_linear(s) else None,
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_exactly_these_tensors_are_encoded(variants: dict[str, Path], name: str) -> None:
    manifest = manifest_of(variants[name])
    assert sum(map(is_linear, TABLE.values())) == 7 * 2 * 3
    want = {n: EXPECTED[name](s) or ("fp32" if s.part == "vae" else "bf16") for n, s in TABLE.items()}
    assert {n: r.encoding for n, r in manifest.tensors.items()} == want


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_tensor_restores_within_its_recorded_error(variants: dict[str, Path], name: str) -> None:
    folder, converter = ModelFolder.open(variants[name]), CONVERTERS[name]()
    manifest = folder.manifest
    assert manifest is not None
    assert {s for r in manifest.tensors.values() for s in r.stored} == set(folder.stored)
    for record in manifest.tensors.values():
        source, value = golden_tensor(record.name), restored(folder, converter, record)
        assert value.shape == source.shape
        if name == "dfloat11" or record.encoding in ("bf16", "fp32"):
            assert equal_bits(value, source), record.name
            assert not record.errors
            continue
        error = relative_l2(value, source)
        assert error == pytest.approx(record.errors["weight_rel_l2"], rel=1e-3, abs=1e-12), record.name
        assert error <= ERROR_LIMIT[name], record.name


@pytest.mark.parametrize("name", [name for name in CONVERTERS if not name.startswith("gguf-")])
def test_folder_is_complete_and_readable_by_others(variants: dict[str, Path], name: str) -> None:
    folder = variants[name]
    manifest = manifest_of(folder)
    for stored in (*manifest.shards.values(), *manifest.files.values()):
        assert (folder / stored.name).stat().st_size == stored.bytes
    assert len(manifest.shards) > 10
    assert {p.name for p in folder.iterdir()} == {MANIFEST_NAME, *manifest.shards, *manifest.files}
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            assert (folder / path.name).read_bytes() == path.read_bytes()
    ours = ModelFolder.open(folder)
    theirs: dict[str, Tensor] = {}
    for shard in manifest.shards:
        theirs |= load_file(folder / shard)
    assert theirs.keys() == ours.stored.keys()
    assert all(equal_bits(tensor, ours.tensor(n).clone()) for n, tensor in theirs.items() if tensor.numel())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {n: s.file.path.name for n, s in ours.stored.items() if s.file.path.name != "ae.safetensors"}
    for stored in ours.stored.values():
        assert stored.entry.start % {"BF16": 2, "F16": 2, "F32": 4, "I64": 8}.get(stored.entry.dtype, 1) == 0


def test_dfloat11_config_for_the_package(tmp_path: Path, variants: dict[str, Path]) -> None:
    config = json.loads((variants["dfloat11"] / "config.json").read_text())["dfloat11_config"]
    assert (config["version"], config["threads_per_block"], config["bytes_per_thread"]) == ("0.5.0", [512], 8)
    encoded = [r for r in manifest_of(variants["dfloat11"]).tensors.values() if r.encoding == "dfloat11"]
    for record in encoded:
        module = record.name.removesuffix(".weight")
        assert sum(bool(re.fullmatch(p, module)) for p in config["pattern_dict"]) == 1
        assert f"{module}.encoded_exponent" in record.stored
    source = copy_checkpoint(tmp_path / "source")
    (source / "config.json").write_text('{"model_type": "bagel"}')
    convert(source, tmp_path / "out", CONVERTERS["dfloat11"]())
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values == {"model_type": "bagel", "dfloat11_config": config}


def test_int8_stores_the_codec_s_numbers(variants: dict[str, Path]) -> None:
    weight = golden_tensor(Q).float()
    scale = weight.abs().amax(1) / 127
    folder = ModelFolder.open(variants["int8"])
    assert torch.equal(folder.tensor(Q + "_scale"), scale)
    assert torch.equal(folder.tensor(Q), (weight / scale[:, None]).round().to(torch.int8))


def test_rotation_is_all_or_none_and_only_where_it_helps(variants: dict[str, Path], tmp_path: Path) -> None:
    records = manifest_of(variants["int8 rotated"]).tensors
    rotated = {n for n, r in records.items() if "rotation_group" in r.options}
    assert rotated, "the probe has outlier channels, so some rotation must help"
    for base in ("self_attn.{}_proj.weight", "self_attn.{}_proj_moe_gen.weight"):
        for layer in range(3):
            names = [f"language_model.model.layers.{layer}.{base.format(x)}" for x in "qkv"]
            assert len({n in rotated for n in names}) == 1
    for record in records.values():
        if TABLE[record.name].linear is None:
            assert "rotation_group" not in record.options
        elif record.name in rotated:
            assert record.errors["output_rel_l2"] < record.errors["output_rel_l2_without_rotation"]
    # Activations of one constant make a rotation concentrate everything in one channel: it must be dropped.
    save_file({Q: torch.ones(32, 128)}, tmp_path / "x.safetensors")
    converter = Int8Converter({"rotate": True, "activations": str(tmp_path / "x.safetensors")})
    record = convert(CHECKPOINT, tmp_path / "out", converter, **UND).tensors[Q]
    assert "output_rel_l2" in record.errors
    assert record.errors["output_rel_l2"] <= record.errors["output_rel_l2_without_rotation"]
    assert record.errors["output_rel_l2"] != records[Q].errors["output_rel_l2"]


def test_understanding_only(tmp_path: Path) -> None:
    manifest = convert(CHECKPOINT, tmp_path / "und", CONVERTERS["int8"](), experts=("und",))
    gone = {n for n, s in TABLE.items() if s.expert == "gen" or s.part in ("latent", "vae")}
    assert manifest.experts == ("und",)
    assert set(manifest.tensors) == set(TABLE) - gone
    assert not any("moe_gen" in n for n in ModelFolder.open(tmp_path / "und").stored)
    assert not (tmp_path / "und" / "ae.safetensors").exists()
    assert "experts" in failure(CHECKPOINT, tmp_path / "x", experts=("gen",))


def test_source_in_shards_gives_the_same_data(tmp_path: Path, variants: dict[str, Path]) -> None:
    source = copy_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(source / "ema.safetensors")
    (source / "ema.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:50], names[50:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, source / file)
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(source, tmp_path / "out", CONVERTERS["int8"](), shard_bytes=SMALL_SHARDS)
    assert contents(tmp_path / "out") == contents(variants["int8"])


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_data_may_begin_anywhere_in_the_source(tmp_path: Path, understanding: dict[str, Path], shift: int) -> None:
    """A header of odd length is allowed, so values may lie where no processor would put them. Of one expert: the
    other's tensors lie no otherwise."""
    source = copy_checkpoint(tmp_path / "checkpoint")
    data = (source / "ema.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * shift
    (source / "ema.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    convert(source, tmp_path / "out", CONVERTERS["int8"](), shard_bytes=SMALL_SHARDS, **UND)
    assert contents(tmp_path / "out") == contents(understanding["int8"])


def test_summary_adds_up(variants: dict[str, Path]) -> None:
    manifest = manifest_of(variants["dfloat11"])
    rows = summarise(manifest, TABLE)
    assert sum(r.bytes for r in rows) == sum(r.bytes for r in manifest.tensors.values())
    assert sum(r.weights for r in rows) == sum(golden_tensor(n).numel() for n in TABLE)
    assert {(r.part, r.expert, r.encoding) for r in rows if r.part == "decoder"} == {
        ("decoder", e, f) for e in ("und", "gen") for f in ("bf16", "dfloat11")
    }
    assert 8 < encoded_bits_per_weight(manifest) < 12
    assert encoded_bits_per_weight(manifest_of(variants["int8"])) == pytest.approx(8.2, abs=0.15)
    worst, name = next(r.worst["weight_rel_l2"] for r in summarise(manifest_of(variants["nf4"]), TABLE) if r.worst)
    assert manifest_of(variants["nf4"]).tensors[name].errors["weight_rel_l2"] == worst


def test_progress_reaches_the_end_and_never_goes_back(tmp_path: Path) -> None:
    seen: list[Progress] = []
    convert(CHECKPOINT, tmp_path / "out", CONVERTERS["int8"](), shard_bytes=SMALL_SHARDS, report=seen.append)
    done = [p.done for p in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total == sum(golden_tensor(n).nbytes for n in TABLE)


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=60), limit=st.integers(1, 150))
def test_shard_plan(sizes: list[int], limit: int) -> None:
    units = plan_units(list(TABLE.values())[: len(sizes)])
    size_of = {spec.name: size for unit, size in zip(units, sizes, strict=False) for spec in unit.specs[:1]}

    def nbytes(spec: TensorSpec) -> int:
        return size_of.get(spec.name, 0)

    shards = plan_shards(units, nbytes, limit)
    assert [u for shard in shards for u in shard.units] == units
    assert len({s.name for s in shards}) == len(shards)

    def filled(shard: Shard) -> int:
        return sum(nbytes(spec) for u in shard.units for spec in u.specs)

    assert all(filled(s) <= limit or len(s.units) == 1 for s in shards)
    for shard, following in itertools.pairwise(shards):
        assert filled(shard) + sum(map(nbytes, following.units[0].specs)) > limit


# Refusals ----------------------------------------------------------------------------------------------------------


def put(name: str, value: float) -> Any:
    return lambda tensors: tensors[name].view(-1).__setitem__(5, value)


@pytest.fixture(scope="module")
def not_finite(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """Checkpoints with such a value in a tensor; read only."""

    @cache
    def made(tensor: str, value: float) -> Path:
        return copy_checkpoint(tmp_path_factory.mktemp("not_finite") / "source", put(tensor, value))

    return made


@pytest.mark.parametrize(
    ("tensor", "value"), [(Q, math.nan), (Q, math.inf), (NORM, math.inf)]
)  # one path for all norms
@pytest.mark.parametrize("name", CONVERTERS)
def test_not_finite(
    not_finite: Callable[[str, float], Path], tmp_path: Path, name: str, tensor: str, value: float
) -> None:
    source = not_finite(tensor, value)
    if name in ("bf16", "dfloat11"):
        convert(source, tmp_path / "out", CONVERTERS[name](), experts=("und",))
        folder = ModelFolder.open(tmp_path / "out")
        back = restored(folder, CONVERTERS[name](), manifest_of(tmp_path / "out").tensors[tensor])
        assert equal_bits(back, ModelFolder.open(source).tensor(tensor).clone())
    else:
        assert tensor in failure(source, tmp_path / "out", name)
        assert not (tmp_path / "out").exists()


def test_fp16_overflow_names_the_tensor(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "source", put(NORM, 70000.0))
    message = failure(source, tmp_path / "out", "fp16")
    assert NORM in message
    assert "65504" in message


def test_fp16_reports_what_became_small(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "source", put(Q, 1e-9))
    errors = convert(source, tmp_path / "out", CONVERTERS["fp16"](), experts=("und",)).tensors[Q].errors
    assert errors["largest_relative_loss"] == 1
    assert errors["values_vanished"] >= 1


def test_weights_that_dfloat11_cannot_make_smaller(tmp_path: Path) -> None:
    """Evenly spread exponents take more than the estimate, and more than bf16; nothing but space is lost."""
    from lowmem_bagel.checkpoint.verify import verify

    def spread(tensors: dict[str, Tensor]) -> None:
        patterns = torch.randint(-(2**15), 2**15, tensors[Q].shape, generator=torch.Generator().manual_seed(0))
        tensors[Q] = patterns.to(torch.int16).view(torch.bfloat16)

    source = copy_checkpoint(tmp_path / "source", spread)
    converter = CONVERTERS["dfloat11"]()
    records = convert(source, tmp_path / "out", converter, **UND).tensors
    record = records[Q]
    assert record.bytes > 2 * record.weights
    assert record.bytes > converter.bytes_estimate(record.shape)
    assert verify(tmp_path / "out", source).exact == len(records)


def noisy(dtype: torch.dtype, *kept: str) -> Callable[[dict[str, Tensor]], None]:
    """Makes tensors of another dtype, with values that bf16 cannot hold; those named are kept."""

    def edit(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name not in kept:
                noise = torch.randn(tensor.shape, generator=generator) * 2.0**-9
                tensors[name] = (tensor.float() * (1 + noise)).to(dtype)

    return edit


def rounded(source: Path) -> Callable[[dict[str, Tensor]], None]:
    """Makes what loading makes of a source in bf16."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in load_file(source / "ema.safetensors").items():
            tensors[name] = tensor.bfloat16()

    return edit


SOURCES = {
    "float32": noisy(torch.float32),
    "float16": noisy(torch.float16),
    "mixed": noisy(torch.float32, Q, NORM, "language_model.lm_head.weight"),
}


@pytest.fixture(scope="module")
def wide_sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A checkpoint in such dtypes, and the same rounded to bf16; read only."""

    @cache
    def made(dtypes: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("wide")
        source = copy_checkpoint(folder / "source", SOURCES[dtypes])
        return source, copy_checkpoint(folder / "narrow", rounded(source))

    return made


@pytest.mark.parametrize(
    ("name", "dtypes", "experts"),
    [("bf16", "float32", ("und",)), ("bf16", "float16", ("und",)), ("dfloat11", "mixed", ("und", "gen"))],
    ids=["bf16-float32", "bf16-float16", "dfloat11-mixed"],
)
def test_a_source_in_any_dtype_is_rounded_as_loading_does(
    wide_sources: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str, dtypes: str, experts: tuple[str, ...]
) -> None:
    """The same files as of the source that was rounded before; the records say what that cost. One has a VAE."""
    from lowmem_bagel.checkpoint.verify import verify

    source, narrow = wide_sources(dtypes)
    made = convert(source, tmp_path / "made", CONVERTERS[name](), experts=experts)
    wanted = convert(narrow, tmp_path / "wanted", CONVERTERS[name](), experts=experts)
    assert made.shards == wanted.shards
    before = ModelFolder.open(source)
    for tensor, record in made.tensors.items():
        errors, wide = dict(record.errors), before.tensor(tensor)
        assert record.dtype == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[wide.dtype]
        if wide.dtype != torch.bfloat16 and TABLE[tensor].part != "vae":
            loss = relative_l2(wide.bfloat16().float(), wide.float())
            assert errors.pop("rounding_rel_l2") == pytest.approx(loss, rel=1e-4)
        assert errors == wanted.tensors[tensor].errors
    found = verify(tmp_path / "made", source)
    assert not found.problems
    assert found.exact < verify(tmp_path / "wanted", narrow).exact


@pytest.mark.parametrize("name", ["int8", "int8 rotated", "nf4", "gguf-q8_0"])
@pytest.mark.parametrize("dtypes", ["float32", "float16"])
def test_what_an_encoding_loses_is_lost_of_the_source_s_own_values(
    wide_sources: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str, dtypes: str
) -> None:
    """Encoded tensors are made of the values as they stand, which were not rounded to bf16 before; all others are. Of
    one expert: what is encoded of the other has the same shapes."""
    source, narrow = wide_sources(dtypes)
    converter = CONVERTERS[name]()
    made = convert(source, tmp_path / "made", converter, experts=("und",))
    of_rounded = convert(narrow, tmp_path / "rounded", CONVERTERS[name](), experts=("und",))
    before, after, after_rounding = map(ModelFolder.open, (source, tmp_path / "made", tmp_path / "rounded"))
    nearer = {}
    for tensor, record in made.tensors.items():
        wide = before.tensor(tensor)
        if record.encoding == "bf16":
            assert torch.equal(after.tensor(tensor), wide.bfloat16())
            continue
        assert "rounding_rel_l2" not in record.errors
        found, other = (
            relative_l2(restored(folder, converter, of.tensors[tensor]), wide.float())
            for of, folder in ((made, after), (of_rounded, after_rounding))
        )
        assert found == pytest.approx(record.errors["weight_rel_l2"], rel=1e-3)
        nearer[tensor] = found < other
    assert sum(nearer.values()) > 0.8 * len(nearer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp16_takes_the_source_s_own_values(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rounding to bf16 first would lose bits that fp16 has."""
    source = copy_checkpoint(tmp_path / "source", noisy(dtype))
    record = convert(source, tmp_path / "out", CONVERTERS["fp16"](), experts=("und",)).tensors[Q]
    wide = ModelFolder.open(source).tensor(Q)
    assert torch.equal(ModelFolder.open(tmp_path / "out").tensor(Q), wide.half())
    assert (record.dtype, record.errors["weight_rel_l2"] == 0) == (
        {4: "F32", 2: "F16"}[wide.itemsize],
        wide.itemsize == 2,
    )


def test_a_float32_source_that_begins_anywhere(tmp_path: Path) -> None:
    """Of one expert: the other's tensors lie no otherwise."""
    source = copy_checkpoint(tmp_path / "source", noisy(torch.float32))
    wanted = convert(source, tmp_path / "wanted", CONVERTERS["bf16"](), experts=("und",))
    for shift in (1, 2, 4):
        data = (source / "ema.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length] + b" " * shift
        (source / "ema.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        made = convert(source, tmp_path / str(shift), CONVERTERS["bf16"](), experts=("und",))
        assert (made.shards, made.source_sha256) == (wanted.shards, wanted.source_sha256)


def test_tensors_larger_than_what_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = copy_checkpoint(tmp_path / "source", SOURCES["mixed"])
    wanted = convert(source, tmp_path / "wanted", CONVERTERS["int8"](), experts=("und",))
    monkeypatch.setattr("lowmem_bagel.converters.engine.reading.READ_BYTES", 2 * PAGE_BYTES)
    made = convert(source, tmp_path / "made", CONVERTERS["int8"](), experts=("und",))
    assert (made.shards, made.source_sha256) == (wanted.shards, wanted.source_sha256)
    for name, record in made.tensors.items():
        assert record.errors == pytest.approx(wanted.tensors[name].errors, rel=1e-5)


def test_fp8_is_read_as_it_is_loaded(tmp_path: Path) -> None:
    """Of one expert: the other's linears have the same shapes."""
    from lowmem_bagel.checkpoint.verify import verify

    def fp8(tensors: dict[str, Tensor]) -> None:
        for name in [name for name, spec in TABLE.items() if is_linear(spec)]:
            scale = tensors[name].float().abs().amax() / 448
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + "weight_scale"] = scale

    source = copy_checkpoint(tmp_path / "source", fp8)
    loaded = ModelFolder.open(source)
    for name in ("bf16", "int8", "dfloat11"):
        convert(source, tmp_path / name, CONVERTERS[name](), experts=("und",))
        assert not verify(tmp_path / name, source).problems
    assert equal_bits(ModelFolder.open(tmp_path / "bf16").tensor(Q).clone(), loaded.tensor(Q))


def test_a_base_completes_and_weights_are_chosen(tmp_path: Path, variants: dict[str, Path]) -> None:
    """A fine-tune that holds only what was trained, beside a set of weights that would be read first."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    tensors = load_file(CHECKPOINT / "ema.safetensors")
    trained = {name: tensor for name, tensor in tensors.items() if "layers" in name}
    save_file(trained, folder / "model.safetensors")
    save_file({Q: torch.zeros_like(tensors[Q])}, folder / "ema.safetensors")
    settings = {"weights": "model.safetensors", "base": CHECKPOINT}
    made = convert(folder, tmp_path / "out", CONVERTERS["int8"](), shard_bytes=SMALL_SHARDS, **settings)
    assert made.shards == manifest_of(variants["int8"]).shards
    assert made.source_sha256 == manifest_of(variants["int8"]).source_sha256
    for path in CHECKPOINT.glob("*.json"):
        assert (tmp_path / "out" / path.name).exists()
    assert "--base" in failure(folder, tmp_path / "other", weights="model.safetensors")
    base = shutil.copytree(CHECKPOINT, tmp_path / "inner" / "base")
    assert "source lies there" in failure(folder, tmp_path / "inner", base=base, weights="model.safetensors")


def test_a_vae_in_fp16_is_kept(tmp_path: Path) -> None:
    from lowmem_bagel.checkpoint.verify import verify

    source = copy_checkpoint(tmp_path / "source")
    vae = {name: tensor.half() for name, tensor in load_file(source / "ae.safetensors").items()}
    save_file(vae, source / "ae.safetensors")
    for name in ("dfloat11", "fp16", "int8", "gguf-q8_0"):  # a lossless one, its own dtype, any other, another file
        records = convert(source, tmp_path / name, CONVERTERS[name]()).tensors
        assert {r.encoding for n, r in records.items() if TABLE[n].part == "vae"} == {"fp16"}
        result = verify(tmp_path / name, source)
        assert result.problems == ()
        assert result.exact >= len(vae)


def test_incomplete_or_misshapen_source(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "missing", lambda tensors: tensors.pop(NORM))
    assert NORM in failure(source, tmp_path / "out")
    source = copy_checkpoint(tmp_path / "shape", lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()}))
    assert NORM in failure(source, tmp_path / "out")
    assert "no such folder" in failure(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_variant_is_no_source(variants: dict[str, Path], tmp_path: Path) -> None:
    assert "int8 folder already" in failure(variants["int8"], tmp_path / "out")


def test_out_exists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(CHECKPOINT, out, CONVERTERS["int8"](), **UND)
    old = contents(out)
    assert "--overwrite" in failure(CHECKPOINT, out, "fp16")
    assert contents(out) == old
    assert convert(CHECKPOINT, out, CONVERTERS["fp16"](), overwrite=True, **UND).format == "fp16"
    assert manifest_of(out).format == "fp16"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    assert "not a variant" in failure(CHECKPOINT, precious, overwrite=True)
    assert (precious / "letter.txt").read_text() == "dear"


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "out", CONVERTERS["int8"](), **UND)
    old = contents(tmp_path / "out")
    broken = copy_checkpoint(tmp_path / "broken", put(Q, float("nan")))
    assert Q in failure(broken, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == old


def test_places_that_would_destroy_the_source(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "models" / "source")
    for out in (source, tmp_path / "models"):
        assert "source lies there" in failure(source, out, overwrite=True)
    assert (source / "ema.safetensors").exists()


def test_somebody_s_partial_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    assert "not made by a conversion" in failure(CHECKPOINT, tmp_path / "out", restart=True)
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=70 << 20))
    message = failure(CHECKPOINT, tmp_path / "out")
    assert "0.1 GB free" in message
    assert not list(tmp_path.iterdir())


def test_a_start_that_failed_leaves_nothing(tmp_path: Path) -> None:
    """Whatever was wrong with it, the next one, of another format or to the same place, is not in its way."""
    broken = copy_checkpoint(tmp_path / "broken", put("language_model.model.embed_tokens.weight", float("nan")))
    assert "NaN" in failure(broken, tmp_path / "results" / "out", "int8")
    assert not list((tmp_path / "results").iterdir())
    assert convert(CHECKPOINT, tmp_path / "results" / "out", CONVERTERS["bf16"](), **UND).format == "bf16"


def test_a_start_that_was_killed_is_not_in_the_way(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / "variant").mkdir(parents=True)
    (partial / "variant" / "model-00001-of-00009.safetensors.tmp").write_bytes(b"half a shard")
    (partial / "journal.jsonl").write_text('{"identity": {"format": ["nf4", 1]}}\n')
    assert convert(CHECKPOINT, tmp_path / "out", CONVERTERS["int8"](), **UND).format == "int8"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"{tmp_path}: cannot be written to" in failure(CHECKPOINT, tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_a_converter_that_lacks_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lowmem_bagel.converters.engine.registry import convert_folder

    monkeypatch.setitem(sys.modules, "lowmem_bagel.converters.nf4", None)
    with pytest.raises(ConversionError, match="nf4 needs what is not installed"):
        convert_folder(CHECKPOINT, tmp_path / "out", "nf4")
    assert not list(tmp_path.iterdir())


def test_unusable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in failure(CHECKPOINT, tmp_path / "file" / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write everywhere, so the refusal is played
        make = Path.mkdir

        def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.name == "out.partial":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            make(path, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
    message = failure(CHECKPOINT, tmp_path / "locked" / "out")
    assert "Permission denied" in message
    assert "out.partial" in message


# Verification ------------------------------------------------------------------------------------------------------


@needs_entry_points
@pytest.mark.parametrize("name", CONVERTERS)
def test_verify_passes(variants: dict[str, Path], name: str) -> None:
    from lowmem_bagel.checkpoint.verify import verify

    result = verify(variants[name], CHECKPOINT)
    assert result.problems == ()
    assert result.compared == len(TABLE)
    kept = [n for n, s in TABLE.items() if EXPECTED[name](s) is None]
    assert result.exact >= (len(TABLE) if name == "dfloat11" else len(kept))
    assert result.largest_error <= ERROR_LIMIT.get(name, 0)


@pytest.fixture
def own(tmp_path: Path, understanding: dict[str, Path]) -> Path:
    """A copy of an int8 variant to damage."""
    shutil.copytree(understanding["int8"], tmp_path / "own")
    return tmp_path / "own"


def test_verify_sees_one_flipped_bit_in_any_file(variant_of: Callable[[str], Path], tmp_path: Path) -> None:
    from lowmem_bagel.checkpoint.verify import verify

    own = Path(shutil.copytree(variant_of("int8"), tmp_path / "own"))
    for path in sorted(own.iterdir()):
        if path.name in (MANIFEST_NAME, "llm_config.json", "vit_config.json", "ae_config.json"):
            continue
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        result = verify(own)
        assert any(path.name in problem for problem in result.problems), path.name
        path.write_bytes(data)
    assert verify(own).passed


@needs_entry_points
def test_verify_sees_another_source_and_a_wrong_record(own: Path, tmp_path: Path) -> None:
    from lowmem_bagel.checkpoint.verify import verify

    other = copy_checkpoint(tmp_path / "other", put(Q, 0.25))
    assert [p for p in verify(own, other).problems if Q in p]
    manifest = manifest_of(own)
    good = manifest.tensors[Q]
    errors = {"weight_rel_l2": good.errors["weight_rel_l2"] / 2}
    tensors = {**manifest.tensors, Q: type(good)(**{**vars(good), "errors": errors})}
    (own / MANIFEST_NAME).write_bytes(type(manifest)(**{**vars(manifest), "tensors": tensors}).to_json())
    problems = verify(own, CHECKPOINT).problems
    assert len(problems) == 1
    assert "recorded" in problems[0]


def test_verify_needs_a_manifest() -> None:
    from lowmem_bagel.checkpoint.verify import verify

    with pytest.raises(CheckpointError, match=r"no variant\.json"):
        verify(CHECKPOINT)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzz_of_shard_headers(own: Path, data: st.DataObject) -> None:
    """Whatever a shard's header says: the project's own error or a problem found, nothing else."""
    from lowmem_bagel.checkpoint.verify import verify

    path = sorted(own.glob("model-*.safetensors"))[0]
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    bad = bytearray(good)
    kind = data.draw(st.sampled_from(["flip", "truncate", "length", "digits"]))
    if kind == "flip":
        bad[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "truncate":
        del bad[data.draw(st.integers(0, len(bad) - 1)) :]
    elif kind == "length":
        bad[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    else:
        digits = [m.start() for m in re.finditer(rb"\d", good[:header])]
        bad[data.draw(st.sampled_from(digits))] = data.draw(st.sampled_from(b"0123456789"))
    try:
        path.write_bytes(bad)
        problems: tuple[str, ...] = verify(own).problems
    except LowmemBagelError as error:
        problems = (str(error),)
    finally:
        path.write_bytes(good)
    assert problems or bytes(bad) == good


# Finding converters ------------------------------------------------------------------------------------------------


def test_every_converter_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project.get("entry-points", {}).get("lowmem_bagel.converters", {})
    types = {f"gguf-{type}" for type in ("q8_0", "q6_k", "q5_k", "q4_k")}
    assert declared.keys() == {"bf16", "dfloat11", "int8", "fp16", "nf4", "gguf", *types}
    for name, place in declared.items():
        module, _, made_by = place.partition(":")
        converter = getattr(import_module(module), made_by)({})
        assert converter.name == name or (name == "gguf" and converter.name in types)


@needs_entry_points
def test_registry() -> None:
    from lowmem_bagel.converters.engine.registry import available_formats, make_converter

    assert set(available_formats()) >= {"dfloat11", "fp16", "int8", "nf4"}
    for name in ("dfloat11", "fp16", "int8", "nf4"):
        assert make_converter(name).name == name
    assert make_converter("int8", {"rotate": True}).options["rotate"] is True
    with pytest.raises(ConversionError, match="choose one of"):
        make_converter("gptq")
    for name in ("dfloat11", "fp16", "nf4"):
        with pytest.raises(ConversionError, match="--rotate is not an option"):
            make_converter(name, {"rotate": True})
    with pytest.raises(ConversionError, match="--block-size is not an option"):
        make_converter("int8", {"block_size": 64})
