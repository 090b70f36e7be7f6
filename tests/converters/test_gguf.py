"""GGUF made of the demo checkpoint: read back by the package `gguf`, complete in itself, in every type."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from lowmem_bagel.converters.engine.convert import convert
from lowmem_bagel.converters.engine.registry import make_converter
from lowmem_bagel.converters.gguf import by_type
from support.conversion_helpers import SMALL_SHARDS, copy_checkpoint
from support.layouts import demo
from support.numeric import relative_l2
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES
from lowmem_bagel.checkpoint.manifest import Manifest, read_manifest
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.checkpoint.verify import verify
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import ConversionError, MissingExtraError

KINDS = tuple(BLOCK_TYPES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo checkpoint in every type, as folders."""
    root = tmp_path_factory.mktemp("gguf")
    for kind in KINDS:
        convert(FOLDER, root / kind, by_type({"type": kind.lower()}), shard_bytes=4 << 20)
    return {kind: root / kind for kind in KINDS}


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_reads_it(made: dict[str, Path], kind: str) -> None:
    reader, source = gguf.GGUFReader(file_of(made[kind])), ModelFolder.open(FOLDER)
    table, manifest = tensor_table(source.config), manifest_of(made[kind])
    assert file_of(made[kind]).name == f"bagel-{kind}.gguf"
    assert reader.fields["general.architecture"].contents() == "bagel"
    assert reader.fields["general.file_type"].contents() == getattr(
        gguf.LlamaFileType, f"MOSTLY_{kind}" + ("_S" if kind in ("Q4_K", "Q5_K") else "")
    )
    assert json.loads(reader.fields["bagel.file.llm_config.json"].contents()) == json.loads(
        (FOLDER / "llm_config.json").read_text()
    )
    assert {tensor.name for tensor in reader.tensors} == source.stored.keys()
    for tensor in reader.tensors:
        want = source.tensor(tensor.name)
        assert tuple(reversed(tensor.shape.tolist())) == tuple(want.shape)
        assert tensor.data_offset % 4096 == 0
        if table[tensor.name].linear is None:
            assert tensor.data.tobytes() == want.contiguous().view(torch.uint8).numpy().tobytes(), tensor.name
            continue
        assert tensor.tensor_type.name == kind
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        error = manifest.tensors[tensor.name].errors["weight_rel_l2"]
        assert relative_l2(values, want) == pytest.approx(error, rel=1e-3)
        if kind == "Q8_0":
            assert np.array_equal(tensor.data, gguf.quants.quantize(want.float().numpy(), tensor.tensor_type))


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_alone_is_the_model(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    assert verify(made[kind], FOLDER).problems == ()
    assert {path.name for path in made[kind].iterdir()} == {file_of(made[kind]).name, "variant.json"}
    alone = Path(shutil.copy(file_of(made[kind]), tmp_path / "moved.gguf"))
    pictures = []
    in_its_folder = [file_of(made[kind])] if kind == "Q8_0" else []
    for path in (made[kind], *in_its_folder, alone):
        folder = ModelFolder.open(path)
        assert (folder.format, folder.manifest is None) == (f"gguf-{kind.lower()}", path == alone)
        pipe = BagelPipeline.from_pretrained(path, device="cpu")
        drawn = pipe.generate("a red circle", seed=3, num_timesteps=3, height=32, width=32)
        assert drawn.settings["format"] == folder.format
        pictures.append((drawn.latent, pipe.ask("what is it?", max_new_tokens=4).token_ids))
        pipe.close()
    for latent, ids in pictures[1:]:
        assert torch.equal(latent, pictures[0][0])
        assert ids == pictures[0][1]


def test_shards_make_no_difference(made: dict[str, Path], tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "out", by_type({"type": "q4_k"}))
    assert file_of(tmp_path / "out").read_bytes() == file_of(made["Q4_K"]).read_bytes()


def test_one_flipped_bit_is_seen(made: dict[str, Path], tmp_path: Path) -> None:
    own = Path(shutil.copytree(made["Q8_0"], tmp_path / "own"))
    data = bytearray(file_of(own).read_bytes())
    data[len(data) // 2] ^= 1
    file_of(own).write_bytes(data)
    assert any("its data is damaged" in problem for problem in verify(own).problems)


def test_it_may_be_said_either_way(tmp_path: Path) -> None:
    assert by_type({}).name == "gguf-q8_0"
    assert by_type({"type": "Q5_K"}).name == make_converter("gguf-q5_k").name == "gguf-q5_k"
    for wrong in ({"type": "q4_k_m"}, {"rotate": True}):
        with pytest.raises(ConversionError):
            by_type(wrong)
    with pytest.raises(ConversionError, match="--type q8_0 is not gguf-q4_k"):
        make_converter("gguf-q4_k", {"type": "q8_0"})


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """Rows of 128 are no blocks of a K type: they are Q8_0, and are so loaded, shown and verified."""
    convert(CHECKPOINT, tmp_path / "out", by_type({"type": "q6_k"}), shard_bytes=SMALL_SHARDS)
    records = manifest_of(tmp_path / "out").tensors
    kinds = {record.encoding for record in records.values() if record.encoding.startswith("gguf-")}
    assert "gguf-q8_0" in kinds
    assert verify(tmp_path / "out", CHECKPOINT).passed
    pipe = BagelPipeline.from_pretrained(tmp_path / "out", device="cpu")
    assert "Q8_0" in pipe.model.plan.reasons["linears"] or kinds == {"gguf-q8_0"}
    pipe.generate("x", height=32, width=32, num_timesteps=2)
    pipe.close()


def test_a_fine_tune_completed_by_its_base(tmp_path: Path) -> None:
    parts = demo()
    parts.files, parts.vae = {}, {}
    source = parts.write(tmp_path / "source")
    convert(source, tmp_path / "out", by_type({}), base=FOLDER)
    assert ModelFolder.open(file_of(tmp_path / "out")).reading.lines == {
        "weights": "bagel-Q8_0.gguf", "dtypes": "84 of 255 tensors Q8_0"
    }  # fmt: skip


def test_one_that_only_answers(tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "und", by_type({}), experts=("und",))
    shutil.copy(file_of(tmp_path / "und"), tmp_path / "und.gguf")
    for path in (tmp_path / "und", tmp_path / "und.gguf"):
        pipe = BagelPipeline.from_pretrained(path, device="cpu", tasks=("ask",))
        assert pipe.ask("what is it?", max_new_tokens=3).token_ids
        pipe.close()


def test_configurations_of_powershell(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "source")
    path = source / "llm_config.json"
    path.write_text(path.read_text(), encoding="utf-16")
    convert(source, tmp_path / "out", by_type({}))
    assert ModelFolder.open(tmp_path / "out").config == ModelFolder.open(CHECKPOINT).config


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r'pip install "lowmem-bagel\[gguf\]"'):
        convert(CHECKPOINT, tmp_path / "out", by_type({}))
    assert list(tmp_path.iterdir()) == []
