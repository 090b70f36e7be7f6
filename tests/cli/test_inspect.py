"""`inspect` and `verify` of variants through the command line: every byte in its row, every error with its tensor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lowmem_bagel.converters.engine.convert import convert
from safetensors.torch import load_file, save_file
from support.command import Ran
from support.conversion_helpers import CONVERTERS, copy_checkpoint
from support.dfloat11_groups import GEN, LINEARS, PUBLISHED
from support.paths import CHECKPOINT

from lowmem_bagel.checkpoint.config_files import config_of
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import read_manifest
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.checkpoint.variant_summary import PartSummary
from lowmem_bagel.formats.dfloat11 import codec as dfloat11
from lowmem_bagel.formats.dfloat11.groups import own_config, stored_name

Cli = Callable[..., Ran]
TABLE = tensor_table(config_of(CHECKPOINT))
WITHOUT_LOSS = ("dfloat11", "bf16")
Q = "language_model.model.layers.1.self_attn.q_proj.weight"


def data_bytes(folder: Path) -> int:
    return sum(stored.entry.nbytes for stored in ModelFolder.open(folder).stored.values())


WEIGHTS = sum(math.prod(stored.entry.shape) for stored in ModelFolder.open(CHECKPOINT).stored.values())


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_byte_and_weight_is_in_one_row(cli: Cli, variant_of: Callable[[str], Path], name: str) -> None:
    record = json.loads(cli("inspect", variant_of(name), "--json").out)
    assert record["format"] == name.removesuffix(" rotated")
    assert record["experts"] == ["und", "gen"]
    assert record["total"] == {"tensors": len(TABLE), "weights": WEIGHTS, "bytes": data_bytes(variant_of(name))}
    for field, total in record["total"].items():
        assert total == sum(part[field] for part in record["parts"])
    assert {part["part"] for part in record["parts"]} == {spec.part for spec in TABLE.values()}
    encoded = [part for part in record["parts"] if part["encoding"] == record["format"]]
    bits = 8 * sum(part["bytes"] for part in encoded) / sum(part["weights"] for part in encoded)
    assert record["variant"]["encoded_bits_per_weight"] == pytest.approx(bits)
    for part in encoded:
        assert bool(part["worst"]) == (name not in WITHOUT_LOSS)


@pytest.mark.parametrize("name", CONVERTERS)
def test_the_table_and_the_worst_errors(cli: Cli, variant_of: Callable[[str], Path], name: str) -> None:
    ran = cli("inspect", variant_of(name))
    assert ran.code == 0
    assert "other" not in ran.out
    assert f"{data_bytes(variant_of(name)):,}" in ran.out
    manifest = read_manifest(variant_of(name))
    assert manifest is not None
    und = [r for r in manifest.tensors.values() if r.errors and TABLE[r.name].expert == "und"]
    if name in WITHOUT_LOSS:
        assert "worst" not in ran.out
        return
    worst = max(und, key=lambda record: record.errors["weight_rel_l2"])
    encoding = name.removesuffix(" rotated")
    line = f"decoder und {encoding}: worst weight_rel_l2 {worst.errors['weight_rel_l2']:.3g} in {worst.name}"
    assert line in ran.out.splitlines()


def test_every_tensor_with_its_errors(cli: Cli, variant_of: Callable[[str], Path]) -> None:
    lines = cli("inspect", variant_of("int8 rotated"), "--tensors").out.splitlines()
    assert [line.split()[0] for line in lines] == list(TABLE)
    record = json.loads(cli("inspect", variant_of("int8 rotated"), "--tensors", "--json").out)["tensors"]
    row = next(row for row in record if row["name"] == Q)
    line = next(line for line in lines if line.startswith(Q))
    assert f"output_rel_l2 {row['errors']['output_rel_l2']:.3g}" in line
    assert f"rotation_group {row['options']['rotation_group']}" in line
    assert row["bits_per_weight"] == pytest.approx(8 + 32 / 128)
    assert "records no errors" in cli("inspect", CHECKPOINT, "--tensors").error


def test_a_variant_that_only_answers(cli: Cli, tmp_path: Path) -> None:
    convert(CHECKPOINT, tmp_path / "und", CONVERTERS["nf4"](), experts=("und",))
    record = json.loads(cli("inspect", tmp_path / "und", "--json").out)
    assert record["experts"] == ["und"]
    assert {part["expert"] for part in record["parts"]} == {"", "und"}
    assert "experts und\n" in cli("inspect", tmp_path / "und").out


def test_a_source(cli: Cli) -> None:
    record = json.loads(cli("inspect", CHECKPOINT, "--json").out)
    assert record["total"] == {"tensors": len(TABLE), "weights": WEIGHTS, "bytes": data_bytes(CHECKPOINT)}
    assert {part["encoding"] for part in record["parts"]} == {"bf16", "fp32"}


def test_a_published_dfloat11_folder(cli: Cli, tmp_path: Path) -> None:
    """Its manifest is in config.json alone; groups of both experts count as shared."""
    folder = copy_checkpoint(tmp_path / "published")
    tensors = load_file(folder / "ema.safetensors")
    module = "language_model.model.layers.0"
    encoded = dfloat11.encode([tensors.pop(f"{module}.{linear}.weight") for linear in LINEARS + GEN])
    tensors |= {stored_name(module, component): tensor for component, tensor in encoded.tensors.items()}
    save_file(tensors, folder / "ema.safetensors")
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": own_config() | {"pattern_dict": PUBLISHED}}))
    record = json.loads(cli("inspect", folder, "--json").out)
    assert record["total"] == {"tensors": len(TABLE), "weights": WEIGHTS, "bytes": data_bytes(folder)}
    (row,) = [part for part in record["parts"] if part["encoding"] == "dfloat11"]
    assert (row["part"], row["expert"], row["tensors"]) == ("decoder", "", 14)
    assert (row["weights"], row["bytes"]) == (encoded.num_weights, encoded.nbytes)
    assert "other" not in {part["part"] for part in record["parts"]}


@pytest.mark.parametrize("name", CONVERTERS)
def test_verify_against_the_source(cli: Cli, variant_of: Callable[[str], Path], name: str) -> None:
    ran = cli("verify", variant_of(name), "--source", CHECKPOINT)
    assert (ran.code, ran.err) == (0, "")
    written, exact = ran.out.splitlines()
    assert f"{len(TABLE)} tensors are as they were written" in written
    record = json.loads(cli("verify", variant_of(name), "--source", CHECKPOINT, "--json").out)
    assert record["passed"] is True
    assert record["compared"] == len(TABLE)
    assert exact.startswith(f"{record['exact']} of {len(TABLE)} tensors have the source's bits")
    assert (record["exact"] == len(TABLE)) == (name in WITHOUT_LOSS)


def test_verify_names_what_is_damaged(cli: Cli, variant_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variant_of("int8"), tmp_path / "own"))
    entry = ModelFolder.open(folder).entry(Q)
    shard = ModelFolder.open(folder).stored[Q].file.path
    data = bytearray(shard.read_bytes())
    data[entry.start + 7] ^= 0x10
    shard.write_bytes(data)
    ran = cli("verify", folder)
    assert ran.code == 2
    assert f"tensor {Q}: its data is damaged" in ran.out
    assert f"{shard.name}: its data is damaged" in ran.out
    assert "2 problems; convert or download it again" in ran.err
    record = json.loads(cli("verify", folder, "--json").out)
    assert (record["passed"], len(record["problems"])) == (False, 2)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read" in cli("verify", folder).out


def test_verify_of_what_has_no_checksums(cli: Cli, tmp_path: Path) -> None:
    assert "no variant.json" in cli("verify", CHECKPOINT).error
    assert "no such folder" in cli("verify", tmp_path / "nowhere").error


def test_convert_says_what_it_made_and_refuses_in_one_line(cli: Cli, tmp_path: Path) -> None:
    ran = cli("convert", CHECKPOINT, tmp_path / "out", "--to", "int8", "--embeddings", "--shard-size", "1MB", "--json")
    assert (ran.code, ran.err) == (0, "")
    record = json.loads(ran.out)
    assert record["options"] == {"embeddings": True, "rotate": False}
    assert record["shards"] > 3
    assert "exists" in cli("convert", CHECKPOINT, tmp_path / "out", "--to", "int8").error
    assert "no converter for 'gptq'" in cli("convert", CHECKPOINT, tmp_path / "x", "--to", "gptq").error
    assert "--shard-size" in cli("convert", CHECKPOINT, tmp_path / "x", "--to", "int8", "--shard-size", "many").error
    assert not (tmp_path / "x").exists()
    ran = cli("convert", CHECKPOINT, tmp_path / "out", "--to", "fp16", "--overwrite")
    assert ran.out.splitlines()[1] == f"Next: lowmem-bagel inspect {tmp_path / 'out'}"


def test_parts_without_a_weight() -> None:
    """Tensors may be empty; nothing is divided by their number of weights."""
    assert PartSummary("vit", "", "bf16", 1, 0, 0, {}).bits_per_weight == 0
