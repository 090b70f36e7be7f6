"""Units read from their shards give the buffers that loading fills."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from support.layouts import demo, in_fp8
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import CheckpointError
from lowmem_bagel.model.flat_buffer import Layout
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.runtime.loader import _Loading
from lowmem_bagel.runtime.streaming.disk import DiskReader, Segment, segments_of
from lowmem_bagel.settings import LoadOptions
from lowmem_bagel.timeline import Timeline


def units(folder: Path, dtype: str) -> tuple[_Loading, dict]:
    opened = ModelFolder.open(folder)
    loading = _Loading(opened, plan_for(opened, LoadOptions(device="cpu", dtype=dtype)), None, Timeline())
    bagel = BagelPipeline.from_pretrained(folder, device="cpu", dtype=dtype).model.bagel
    return loading, {
        (n, expert): module for n, layer in enumerate(bagel.decoder.layers) for expert, module in layer.items()
    }


@pytest.fixture(scope="module")
def folder_of(variant_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a format, made once."""

    @cache
    def made(format: str) -> Path:
        if format == "wrapped":
            return demo().renamed(lambda name: f"module.{name}").write(tmp_path_factory.mktemp("folders") / format)
        return CHECKPOINT if format == "source" else variant_of(format)

    return made


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(f, d) for f in ("source", "int8", "nf4", "fp16") for d in ("bfloat16", "float16")]
    + [("int8", "float32"), ("wrapped", "bfloat16")],
)
def test_buffers_from_disk_are_those_that_loading_fills(
    folder_of: Callable[[str], Path], format: str, dtype: str
) -> None:
    """Also in a dtype of the same size as the stored one, and with norms and biases in a wider one."""
    loading, modules = units(folder_of(format), dtype)
    segments, sizes, wanted = {}, {}, {}
    for unit, module in modules.items():
        layout, sources = Layout.of(module), loading._layer_sources(*unit)
        wanted[unit] = torch.zeros(layout.nbytes, dtype=torch.uint8)
        layout.fill(wanted[unit], sources, loading._read)
        found = segments_of(layout, sources, loading.folder.located, loading._read)
        assert found is not None
        segments[unit], sizes[unit] = found, layout.nbytes
    reader = DiskReader(segments, sizes)
    for unit in modules:
        for piece in (1 << 20, 4098):
            buffer = torch.zeros(reader.nbytes(unit), dtype=torch.uint8)
            for offset in range(0, buffer.numel(), piece):
                reader(unit, offset, buffer[offset : offset + piece])
            assert torch.equal(buffer, wanted[unit])
    reader.close()


def test_weights_that_need_converting_are_not_read_from_disk() -> None:
    opened = ModelFolder.open(CHECKPOINT)
    loading = _Loading(opened, plan_for(opened, LoadOptions(device="cpu", dtype="float32")), None, Timeline())
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32")
    module = pipe.model.bagel.decoder.layers[0]["und"]
    assert segments_of(Layout.of(module), loading._layer_sources(0, "und"), opened.located, loading._read) is None


def test_weights_that_are_made_of_what_is_stored_are_not_read_from_disk(tmp_path: Path) -> None:
    loading, modules = units(in_fp8(demo(), "weight_scale").write(tmp_path), "bfloat16")
    layout, sources = Layout.of(modules[0, "und"]), loading._layer_sources(0, "und")
    assert segments_of(layout, sources, loading.folder.located, loading._read) is None


def test_a_shard_that_shrank_or_vanished_is_named(tmp_path: Path) -> None:
    shard = Path(shutil.copy(CHECKPOINT / "ema.safetensors", tmp_path / "shard.safetensors"))
    size = shard.stat().st_size
    reader = DiskReader({(0, "und"): [Segment(shard, size - 10, 0, 20)]}, {(0, "und"): 20})
    with pytest.raises(CheckpointError, match=r"shard\.safetensors: ends before"):
        reader((0, "und"), 0, torch.zeros(20, dtype=torch.uint8))
    reader.close()
    gone = DiskReader({(0, "und"): [Segment(tmp_path / "gone", 0, 0, 20)]}, {(0, "und"): 20})
    with pytest.raises(CheckpointError, match="gone"):
        gone((0, "und"), 0, torch.zeros(20, dtype=torch.uint8))
