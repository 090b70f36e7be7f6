"""Which weights a folder is read from, and what is said where there are none or others in their place."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import layouts
from support.command import Ran
from support.layouts import demo

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.weights import choose
from lowmem_bagel.errors import CheckpointError, SettingError

ORDER = ("ema.safetensors", "ema_bf16.safetensors", "model.safetensors", "model_bf16.safetensors")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 29214589\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>ema.safetensors at main</title></head></html>"


def tiny(path: Path, *names: str) -> Path:
    save_file({name: torch.zeros(1) for name in names or ("connector.fc1.weight",)}, path)
    return path


def index(path: Path, *files: str) -> None:
    path.write_text(json.dumps({"weight_map": {f"connector.{number}": file for number, file in enumerate(files)}}))


class TestChoice:
    def test_the_order_of_names(self, tmp_path: Path) -> None:
        tiny(tmp_path / "tuned.safetensors")
        assert choose(tmp_path).chosen.name == "tuned.safetensors"
        tiny(tmp_path / "model-00001-of-00001.safetensors")
        index(tmp_path / "model.safetensors.index.json", "model-00001-of-00001.safetensors")
        assert choose(tmp_path).chosen.name == "model.safetensors.index.json"
        for name in reversed(ORDER):
            tiny(tmp_path / name)
            chosen = choose(tmp_path)
            assert chosen.chosen.name == name
            assert "tuned.safetensors" in [other.name for other in chosen.others]

    @pytest.mark.parametrize(
        ("given", "files"),
        [
            ("model.safetensors", ["model.safetensors"]),
            ("tuned.safetensors.index.json", ["a-1-of-2.safetensors", "a-2-of-2.safetensors"]),
            ("a-2-of-2.safetensors", ["a-1-of-2.safetensors", "a-2-of-2.safetensors"]),
            ("stage_2/ema.safetensors", ["ema.safetensors"]),
        ],
    )
    def test_by_name(self, tmp_path: Path, given: str, files: list[str]) -> None:
        (tmp_path / "stage_2").mkdir()
        for name in ("ema.safetensors", "model.safetensors", "stage_2/ema.safetensors"):
            tiny(tmp_path / name)
        for number in (1, 2):
            tiny(tmp_path / f"a-{number}-of-2.safetensors", f"connector.{number}")
        index(tmp_path / "tuned.safetensors.index.json", "a-1-of-2.safetensors", "a-2-of-2.safetensors")
        chosen = choose(tmp_path, given).chosen
        assert [path.name for path in chosen.files] == files
        assert chosen.files[0].parent.name == ("stage_2" if "/" in given else tmp_path.name)

    def test_a_name_that_is_not_there_lists_what_is(self, tmp_path: Path) -> None:
        tiny(tmp_path / "ema.safetensors")
        tiny(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"no weights b\.safe.*; it has ema\.safetensors, model\.safetensors"):
            choose(tmp_path, "b.safetensors")

    def test_several_without_a_usual_name_are_listed(self, tmp_path: Path) -> None:
        for name in ("first", "second"):
            tiny(tmp_path / f"{name}.safetensors")
        wanted = r"tensor connector\.fc1\.weight is in first.*second.*it has first.*, second.*--weights FILE"
        with pytest.raises(CheckpointError, match=wanted):
            choose(tmp_path)

    def test_an_index_of_absent_files_is_not_believed(self, tmp_path: Path) -> None:
        index(tmp_path / "model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors")
        with pytest.raises(CheckpointError, match=r"model-1-of-2\.safetensors is missing and 1 more of 2 files"):
            choose(tmp_path)
        tiny(tmp_path / "tuned.safetensors")
        chosen = choose(tmp_path)
        assert chosen.chosen.name == "tuned.safetensors"
        assert "model.safetensors.index.json names" in chosen.notes[0]

    @pytest.mark.parametrize("indexed", [True, False])
    def test_a_missing_shard_is_named(self, tmp_path: Path, indexed: bool) -> None:
        for number in (1, 3):
            tiny(tmp_path / f"model-0000{number}-of-00003.safetensors", f"connector.{number}")
        if indexed:
            index(
                tmp_path / "model.safetensors.index.json", *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
            )
        with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
            choose(tmp_path)

    def test_the_file_itself_may_be_the_model(self, tmp_path: Path, cli: Callable[..., Ran]) -> None:
        layouts.in_shards(demo().write(tmp_path), "tuned")
        demo().write(tmp_path)
        for name, said in (("ema.safetensors", "ema.safetensors"), ("tuned-00002-of-00003.safetensors", "(3 shards)")):
            assert said in ModelFolder.open(tmp_path / name).reading.lines["weights"]
        shown = cli("inspect", tmp_path / "tuned.safetensors.index.json").out
        assert "weights: tuned.safetensors.index.json (3 shards); not ema.safetensors" in shown
        with pytest.raises(CheckpointError, match="name one of them"):
            ModelFolder.open(tmp_path / "ema.safetensors", weights="ema.safetensors")


class TestNoWeights:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (LFS, "a Git LFS pointer, not the file; run `git lfs pull`"),
            (PAGE, "a web page, not the file; fetch the file itself"),
            (b"\n\n<!-- cached -->\n<HTML>", "a web page"),
            (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
            (b"Entry not found", "a server's refusal"),
            (b'{"error": "Invalid credentials"}', "a text that begins"),
            (b"Forbidden: quota exceeded for today\n", "a text that begins"),
            (b"Rar!\x1a\x07\x01\0 and so on", "a compressed file"),
            (b"GGUF\x03\0\0\0", "a GGUF file under another name"),
            (pickle.dumps({"a": 1}), "a pickle; a pickle is never loaded"),
            (b"\x1f\x8b\x08\0\0\0\0\0\0", "a compressed file; unpack it"),
            (bytes(5000), "zero bytes: a download that broke off"),
            (b"", "an empty file"),
        ],
    )
    @pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors", "tuned.safetensors"])
    def test_first_bytes_tell(self, spoilable: Path, name: str, content: bytes, said: str) -> None:
        if name == "tuned.safetensors":
            (spoilable / "ema.safetensors").unlink()
        (spoilable / name).write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            ModelFolder.open(spoilable)
        assert name in str(error.value)
        assert said in str(error.value)
        assert "download it again" not in str(error.value)

    def test_a_file_of_torch_save(self, spoilable: Path) -> None:
        with zipfile.ZipFile(spoilable / "ema.safetensors", "w") as archive:
            archive.writestr("archive/data.pkl", b"")
        with pytest.raises(CheckpointError, match=r"a zip archive or a file of torch.save; a pickle is never loaded"):
            ModelFolder.open(spoilable)

    @pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json", "tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize(("content", "said"), [(LFS, "Git LFS pointer"), (PAGE, "web page"), (b"", "empty file")])
    def test_small_files_too(self, spoilable: Path, name: str, content: bytes, said: str) -> None:
        (spoilable / name).write_bytes(content)
        if name == "tokenizer_config.json":
            (spoilable / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=rf"{name}.*{said}"):
            BagelPipeline.from_pretrained(spoilable, device="cpu", tasks=("ask",))

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
    def test_texts_of_powershell(self, spoilable: Path, encoding: str) -> None:
        for name in ("llm_config.json", "vit_config.json"):
            path = spoilable / name
            path.write_text(path.read_text(), encoding=encoding)
        ModelFolder.open(spoilable)

    def test_a_byte_order_mark_is_skipped(self, spoilable: Path) -> None:
        for name in ("llm_config.json", "vit_config.json", "tokenizer.json"):
            path = spoilable / name
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        BagelPipeline.from_pretrained(spoilable, device="cpu", tasks=("ask",)).close()

    @pytest.mark.parametrize(
        ("file", "said"),
        [
            ("bagel-Q4_K_M.gguf", "a GGUF file"),
            ("__0_0.distcp", "parts of a distributed checkpoint"),
            ("pytorch_model.bin", "a pickle, which is never loaded"),
            ("adapter_model.safetensors", "an adapter and no weights of its own"),
            ("ema.safetensors.incomplete", r"ema\.safetensors\.incomplete, what a download left that was broken off"),
            ("readme.txt", r"ema\.safetensors is missing"),
        ],
    )
    def test_other_files_alone(self, spoilable: Path, file: str, said: str) -> None:
        (spoilable / "ema.safetensors").unlink()
        (spoilable / file).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=said):
            ModelFolder.open(spoilable)


def test_a_link_to_nothing(spoilable: Path) -> None:
    (spoilable / "ema.safetensors").unlink()
    (spoilable / "ema.safetensors").symlink_to(spoilable / "blobs" / "0")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is a link to a file that is not there"):
        ModelFolder.open(spoilable)


class TestWherePeoplePoint:
    def test_the_hubs_cache(self, tmp_path: Path) -> None:
        root = tmp_path / "hub" / "models--someone--bagel"
        for revision in ("aaa", "bbb"):
            tiny_folder(root / "snapshots" / revision)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("aaa")
        with pytest.raises(CheckpointError, match=r"the hub's cache of it: give .*snapshots.aaa$"):
            ModelFolder.open(root)
        with pytest.raises(CheckpointError, match=r"give a folder inside it: .*snapshots.aaa"):
            ModelFolder.open(tmp_path / "hub")

    @pytest.mark.parametrize("inside", ["checkpoints/0002000", "stage_2", "BAGEL-7B-MoT"])
    def test_a_parent(self, tmp_path: Path, inside: str) -> None:
        tiny_folder(tmp_path / inside)
        (tmp_path / "train.log").write_text("")
        with pytest.raises(CheckpointError) as error:
            ModelFolder.open(tmp_path)
        assert str(error.value).endswith(f"give a folder inside it: {tmp_path / inside}")

    def test_a_parent_with_the_configuration(self, tmp_path: Path) -> None:
        parts = demo()
        tiny_folder(tmp_path / "stage_1")
        (tmp_path / "llm_config.json").write_text(json.dumps(parts.configs["llm_config.json"]))
        with pytest.raises(CheckpointError, match=r"stage_1 with --base "):
            ModelFolder.open(tmp_path)

    def test_a_child(self, spoilable: Path) -> None:
        (spoilable / "assets").mkdir()
        with pytest.raises(CheckpointError, match=rf"; give {spoilable}$"):
            ModelFolder.open(spoilable / "assets")


def tiny_folder(path: Path) -> None:
    path.mkdir(parents=True)
    tiny(path / "ema.safetensors")


def test_a_variant_and_an_opened_folder_take_neither(spoilable: Path) -> None:
    with pytest.raises(SettingError, match="open already"):
        BagelPipeline.from_folder(ModelFolder.open(spoilable), base=spoilable)
    with pytest.raises(SettingError, match="weights must be the path"):
        BagelPipeline.from_pretrained(spoilable, weights=3)  # type: ignore[arg-type]
