"""What a source may be and what is made of it, and the places of a result: kept, rounded, or refused in a line."""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem_bagel.converters.engine.convert import convert
from lowmem_bagel.converters.engine.disk import PAGE_BYTES
from safetensors.torch import load_file, save_file
from support.conversion_helpers import (
    CONVERTERS,
    NORM,
    SMALL_SHARDS,
    TABLE,
    UND,
    Q,
    Variants,
    contents,
    copy_checkpoint,
    equal_bits,
    failure,
    is_linear,
    manifest_of,
    put,
    restored,
)
from support.paths import CHECKPOINT
from torch import Tensor

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import ConversionError
from lowmem_bagel.ops.errors import relative_l2


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Variants(tmp_path_factory.mktemp("variants"))


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
