"""Conversions of the golden checkpoint: what is encoded and what is not, errors, verification, finding converters."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowmem_bagel.converters.engine.convert import Progress, convert
from lowmem_bagel.converters.engine.shards import Shard, plan_shards, plan_units
from lowmem_bagel.converters.int8 import Int8Converter
from safetensors.torch import load_file, save_file
from support.conversion_helpers import (
    CONVERTERS,
    SMALL_SHARDS,
    TABLE,
    UND,
    Q,
    Variants,
    contents,
    copy_checkpoint,
    equal_bits,
    failure,
    golden_tensor,
    is_linear,
    manifest_of,
    put,
    restored,
)
from support.paths import CHECKPOINT, ROOT
from torch import Tensor

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import MANIFEST_NAME
from lowmem_bagel.checkpoint.tensors import TensorSpec
from lowmem_bagel.checkpoint.variant_summary import encoded_bits_per_weight, summarise
from lowmem_bagel.errors import CheckpointError, ConversionError, LowmemBagelError
from lowmem_bagel.ops.errors import relative_l2

ERROR_LIMIT = {"int8": 0.012, "int8 rotated": 0.012, "fp16": 1e-6, "nf4": 0.11, "gguf-q8_0": 0.008}

needs_entry_points = pytest.mark.skipif(
    not entry_points(group="lowmem_bagel.converters"),
    reason="the installation is older than the entry points in pyproject.toml: pip install -e . again",
)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Variants(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def understanding(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one expert, without a VAE: a third of the bytes and of the tensors."""
    return Variants(tmp_path_factory.mktemp("understanding"), **UND)


# What a variant holds ----------------------------------------------------------------------------------------------


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
