"""Conversion with adapters: what is made of the sum, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowmem_bagel.converters.engine.convert import Progress, Report, convert
from support.adapters import weights_of, write_adapter
from support.command import Ran
from support.conversion_helpers import CONVERTERS, SMALL_SHARDS, copy_checkpoint
from torch import Tensor

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.verify import verify
from lowmem_bagel.errors import ConversionError


@pytest.fixture(scope="module")
def adapters(reference_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    one = write_adapter(folder / "one", reference_checkpoint, weights_of(reference_checkpoint), size=0.2)
    names = weights_of(reference_checkpoint, "und", ("q", "up"))
    return [str(one), str(write_adapter(folder / "two", reference_checkpoint, names, seed=1)) + ":-0.5"]


@pytest.fixture(scope="module")
def summed(reference_checkpoint: Path, adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that holds the sums, in float32."""
    folder = ModelFolder.open(reference_checkpoint, lora=adapters)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: folder.tensor(name).clone() for name in tensors}

    return copy_checkpoint(tmp_path_factory.mktemp("summed") / "model", edit)


@pytest.mark.parametrize("form", ["bf16", "dfloat11", "int8 rotated", "gguf-q8_0"])
def test_it_is_the_conversion_of_the_sums(
    form: str, reference_checkpoint: Path, summed: Path, adapters: list[str], tmp_path: Path
) -> None:
    """Kept, encoded in groups, made of others' rows, and in another file: what is summed knows no format."""
    made = convert(reference_checkpoint, tmp_path / "made", CONVERTERS[form](), lora=adapters)
    wanted = convert(summed, tmp_path / "wanted", CONVERTERS[form]())
    assert made.tensors == wanted.tensors
    assert made.options == {**wanted.options, "lora": "one, two:-0.5"}
    variant, other = ModelFolder.open(tmp_path / "made"), ModelFolder.open(tmp_path / "wanted")
    for name in other.stored:
        assert torch.equal(variant.tensor(name), other.tensor(name)), name


def test_it_is_verified_against_the_sums(reference_checkpoint: Path, adapters: list[str], tmp_path: Path) -> None:
    convert(reference_checkpoint, tmp_path / "variant", CONVERTERS["dfloat11"](), lora=adapters)
    assert verify(tmp_path / "variant", ModelFolder.open(reference_checkpoint, lora=adapters)).passed
    assert not verify(tmp_path / "variant", reference_checkpoint).passed


def test_unfinished_work_is_that_of_the_same_adapters(
    reference_checkpoint: Path, adapters: list[str], tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    def run(lora: list[str], report: Report | None = None) -> None:
        out, converter = tmp_path / "variant", CONVERTERS["int8"]()
        convert(reference_checkpoint, out, converter, lora=lora, report=report, shard_bytes=SMALL_SHARDS)

    with pytest.raises(KeyboardInterrupt):
        run(adapters, stop)
    for other in ([], adapters[:1], [adapters[0] + ":0.5", adapters[1]]):
        with pytest.raises(ConversionError):
            run(other)
    run(adapters)


def test_on_the_command_line(
    cli: Callable[..., Ran], reference_checkpoint: Path, adapters: list[str], tmp_path: Path
) -> None:
    flags = ("--lora", adapters[0], "--lora", adapters[1])
    out = tmp_path / "variant"
    made = cli("convert", reference_checkpoint, out, "--to", "bf16", "--json", *flags)
    assert json.loads(made.out)["options"]["lora"] == "one, two:-0.5"
    assert cli("verify", out, "--source", reference_checkpoint, *flags).code == 0
    assert "one, two:-0.5" in cli("inspect", out).out
    refused = cli("convert", reference_checkpoint, tmp_path / "other", "--to", "bf16", "--lora", tmp_path)
    assert "adapter_config.json is missing" in refused.error
    assert not (tmp_path / "other.partial").exists()
