"""GGUF files made by the package `gguf`: read back to the bit, refused in one line where they are something else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from lowmem_bagel.converters.engine.convert import convert
from support.command import Ran
from support.conversion_helpers import CONVERTERS
from support.gguf_files import HELD, linears, write_gguf
from support.layouts import demo

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.gguf_file import KINDS, GgufFile
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import CheckpointError

Q = "language_model.model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "demo.gguf", linears("Q8_0"))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


BAGEL = key("general.architecture", 8, text("bagel"))


def tensor(name: str = "a", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def header(*, keys: tuple[bytes, ...] = (BAGEL,), tensors: tuple[bytes, ...] = (), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join((*keys, *tensors))


def test_every_tensor_has_the_packages_bytes(made: Path) -> None:
    ours, theirs = GgufFile(made), gguf.GGUFReader(made)
    assert ours.entries.keys() == {one.name for one in theirs.tensors}
    for one in theirs.tensors:
        entry = ours.entries[one.name]
        assert entry.dtype == one.tensor_type.name
        assert entry.shape == tuple(reversed(one.shape.tolist()))
        assert (entry.start, entry.nbytes) == (one.data_offset, one.n_bytes)
        assert bytes(ours.raw(one.name)) == one.data.tobytes()
        assert ours.tensor(one.name).contiguous().view(torch.uint8).numpy().tobytes() == one.data.tobytes()
    assert ours.metadata[f"{HELD}llm_config.json"] == str(theirs.fields[f"{HELD}llm_config.json"].contents())
    assert "tokenizer.ggml.tokens" not in ours.metadata  # a list is stepped over


def test_a_file_is_complete_in_itself(made: Path, cli: Callable[..., Ran]) -> None:
    folder, source = ModelFolder.open(made), ModelFolder.open(FOLDER)
    assert folder.format == "gguf-q8_0"
    assert folder.stored.keys() == source.stored.keys()
    assert (folder.config, folder.reading.lines) == (
        source.config, {"weights": "demo.gguf", "dtypes": "84 of 255 tensors Q8_0"}
    )  # fmt: skip
    assert torch.equal(folder.tensor(EMBEDDING), source.tensor(EMBEDDING))
    assert folder.located(Q).encoded and folder.tensor(Q).shape == (256 * 256 // 32 * 34,)
    assert ModelFolder.open(made.parent).format == ModelFolder.open(made.parent, weights=made.name).format
    held = {name: data for name, data in folder.companions().items() if isinstance(data, bytes)}
    assert held["vocab.json"] == (FOLDER / "vocab.json").read_bytes()
    shown = cli("inspect", made).out
    assert "gguf-q8_0" in shown and "8.50" in shown
    assert json.loads(cli("plan", made, "--json").out)["format"] == "gguf-q8_0"


def test_a_file_of_floats_is_a_checkpoint_like_any(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "demo.gguf", lambda name: None)
    folder, source = ModelFolder.open(path), ModelFolder.open(FOLDER)
    assert folder.format == "source"
    assert all(torch.equal(folder.tensor(name), source.tensor(name)) for name in source.stored)
    manifest = convert(path, tmp_path / "nf4", CONVERTERS["nf4"]())
    assert manifest.source_sha256 == convert(FOLDER, tmp_path / "other", CONVERTERS["nf4"]()).source_sha256
    assert (tmp_path / "nf4" / "vocab.json").read_bytes() == (FOLDER / "vocab.json").read_bytes()


def test_quantised_tensors_that_are_no_linears_become_bf16(tmp_path: Path) -> None:
    linear = linears("Q4_K")
    path = write_gguf(tmp_path / "a.gguf", lambda name: "Q6_K" if name == EMBEDDING else linear(name))
    folder = ModelFolder.open(path)
    found = folder.tensor(EMBEDDING)
    assert found.dtype == torch.bfloat16
    source = ModelFolder.open(FOLDER).tensor(EMBEDDING).float()
    assert float((found.float() - source).norm() / source.norm()) < 0.03


def test_what_it_lacks_a_base_lends(tmp_path: Path) -> None:
    parts = demo().without("vit_model.", "connector.")
    parts.vae = {}
    path = write_gguf(tmp_path / "a.gguf", linears("Q8_0"), parts, held=False)
    with pytest.raises(CheckpointError, match=r"llm_config.json is missing"):
        ModelFolder.open(path)
    lent = ModelFolder.open(path, base=FOLDER)
    assert "the VAE in ae.safetensors: 176 tensors" in lent.reading.lines["completed"]
    assert lent.tokenizer.folder == FOLDER.resolve()


def test_a_folder_with_checkpoint_files_prefers_them(made: Path, tmp_path: Path) -> None:
    demo().write(tmp_path)
    (tmp_path / "demo.gguf").write_bytes(made.read_bytes())
    assert ModelFolder.open(tmp_path).format == "source"
    assert "not demo.gguf" in ModelFolder.open(tmp_path).reading.lines["weights"]
    assert ModelFolder.open(tmp_path, weights="demo.gguf").format == "gguf-q8_0"


def test_two_files_are_to_be_chosen_from(made: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(made.read_bytes())
    with pytest.raises(CheckpointError, match=r"it has a\.gguf, b\.gguf: choose one with --weights FILE"):
        ModelFolder.open(tmp_path)
    assert ModelFolder.open(tmp_path, weights="b.gguf").reading.lines["weights"] == "b.gguf"


def test_it_draws_like_its_source(made: Path) -> None:
    pictures = []
    for model in (FOLDER, made):
        pipe = BagelPipeline.from_pretrained(model, device="cpu", tasks=("generate",))
        drawn = pipe.generate("a red circle", seed=3, num_timesteps=12)
        pictures.append(np.asarray(drawn.image, dtype=float))
        assert drawn.settings["format"] == pipe.model.folder.format
        pipe.close()
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 1


REFUSED: dict[str, tuple[bytes, str]] = {
    "another model": (
        header(keys=(key("general.architecture", 8, text("llama")), key("llama.block_count", 4, bytes(4)))),
        "is a llama GGUF, not a BAGEL one; give one that `lowmem-bagel convert FOLDER OUT --to gguf` makes",
    ),
    "another model in types that are not read": (
        header(keys=(key("general.architecture", 8, text("flux")),), tensors=(tensor(kind=2),)), "is a flux GGUF",
    ),
    "nothing said": (header(keys=()), r"does not say of what \(general.architecture is missing\)"),
    "an architecture that is a number": (header(keys=(key("general.architecture", 4, bytes(4)),)), "does not say"),
    "version 1": (header(version=1), "is of GGUF version 1, and 2 and 3 are read"),
    "big-endian": (header(version=3 << 24), "is of GGUF version 50331648"),
    "empty": (b"", "not a GGUF file but an empty file"),
    "a web page": (b"<!doctype html><html>", "not a GGUF file but a web page"),
    "the magic alone": (b"GGUF", r"ends inside its header \(truncated\); download it again"),
    "cut in a key": (header()[:-3], r"ends inside its header \(truncated\)"),
    "more keys than can be": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63), "counts 9223372036854775808 keys"),
    "more tensors than can be": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "counts 1099511627776 tensors"),
    "a text beyond the end": (
        header(keys=(struct.pack("<Q", 1 << 62),)), r"ends inside its header \(truncated\)",
    ),
    "a list beyond the end": (
        header(keys=(BAGEL, key("a", 9, struct.pack("<IQ", 10, 1 << 61)))), r"ends inside its header \(truncated\)",
    ),
    "a list of too many texts": (
        header(keys=(BAGEL, key("a", 9, struct.pack("<IQ", 8, 1 << 40)))), "a list in its header has 1099511627776",
    ),
    "lists in lists": (
        header(keys=(BAGEL, key("a", 9, struct.pack("<IQ", 9, 1)))), "a list in its header is of lists",
    ),
    "a value of no type": (header(keys=(BAGEL, key("a", 77, b""))), "is of the unknown type 77"),
    "no UTF-8": (header(keys=(struct.pack("<Q", 1) + b"\xff" + bytes(12),)), "is not UTF-8"),
    "a key twice": (header(keys=(BAGEL, BAGEL)), "the key general.architecture appears twice"),
    "an alignment of three": (
        header(keys=(BAGEL, key("general.alignment", 4, struct.pack("<I", 3)))), "its alignment is 3",
    ),
    "a part of several": (
        header(keys=(BAGEL, key("split.count", 2, struct.pack("<H", 4)))), "is one of 4 parts; put them together",
    ),
    "an unnamed tensor": (header(tensors=(tensor(""),)) + bytes(400), "tensor '' is no name"),
    "a tensor twice": (header(tensors=(tensor(), tensor())) + bytes(400), "tensor 'a' appears twice"),
    "no sizes": (header(tensors=(tensor(sizes=()),)) + bytes(400), "has 0 sizes, not 1 to 4"),
    "five sizes": (header(tensors=(tensor(sizes=(1,) * 5),)) + bytes(400), "has 5 sizes"),
    "impossible sizes": (header(tensors=(tensor(sizes=(1 << 40, 1 << 40)),)) + bytes(400), "has impossible sizes"),
    "a type that is not read": (
        header(tensors=(tensor(kind=2),)) + bytes(400),
        "tensor a is Q4_0, and F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K are read; make the file anew in one of these",
    ),
    "a type that nobody knows": (header(tensors=(tensor(kind=99),)) + bytes(400), "tensor a is of type 99"),
    "half a block": (header(tensors=(tensor(sizes=(128,), kind=12),)) + bytes(400), "are no whole blocks of Q4_K"),
    "a place between": (header(tensors=(tensor(offset=8),)) + bytes(400), "its place 8 is no multiple of 32"),
    "beyond the end": (
        header(tensors=(tensor(offset=1 << 62),)) + bytes(400), r"before its data \(truncated\); download it again",
    ),
    "overlapping": (
        header(tensors=(tensor("a"), tensor("b", offset=96))) + bytes(400), "tensor b overlaps another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    content, said = REFUSED[what]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as refusal:
        ModelFolder.open(path)
    assert "\n" not in str(refusal.value)


def test_types_are_named_once() -> None:
    assert len(set(KINDS.values())) == len(KINDS)


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    parts = demo()
    parts.tensors[Q] = parts.tensors[Q][:128]
    path = write_gguf(tmp_path / "a.gguf", linears("Q8_0"), parts)
    with pytest.raises(CheckpointError, match=r"q_proj.weight is \[128, 256\], and the configuration demands"):
        ModelFolder.open(path)


def test_a_damaged_configuration_inside(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", linears("Q8_0"), held=False, keys={f"{HELD}llm_config.json": "{"})
    with pytest.raises(CheckpointError, match=r"bagel.file.llm_config.json of the weights: not readable JSON"):
        ModelFolder.open(path)
