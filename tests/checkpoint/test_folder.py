"""Opening a model folder: every layout that is published, and every way in which it can be incomplete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import Q, change_json, change_tensors
from support.files import NOT_ORDINARY, in_place

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.config_files import config_of
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.checkpoint.tokenizer import BagelTokenizer
from lowmem_bagel.errors import CheckpointError, ConfigError


def shard(folder: Path, index: str | None) -> dict[str, str]:
    """Split ema.safetensors into three shards, with or without an index; returns the index's map."""
    tensors = load_file(folder / "ema.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "ema.safetensors").unlink()
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def load(folder: Path) -> BagelPipeline:
    return BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32")


class TestLayouts:
    @pytest.mark.parametrize("index", ["model.safetensors.index.json", "ema.safetensors.index.json", None])
    def test_shards_load_like_the_single_file(self, spoilable: Path, pipe: BagelPipeline, index: str | None) -> None:
        shard(spoilable, index)
        sharded = load(spoilable)
        settings = {"height": 32, "width": 48, "num_timesteps": 3, "seed": 5}
        assert torch.equal(
            sharded.generate("a circle", **settings).latent, pipe.generate("a circle", **settings).latent
        )

    def test_every_tensor_is_found_once(self, reference_checkpoint: Path) -> None:
        folder = ModelFolder.open(reference_checkpoint)
        assert folder.format == "source"
        assert folder.manifest is None
        assert set(folder.stored) == set(tensor_table(folder.config))

    def test_max_side_comes_from_the_table(self, reference_checkpoint: Path) -> None:
        assert ModelFolder.open(reference_checkpoint).max_side == 1024

    def test_published_constants_without_ae_config(self, spoilable: Path) -> None:
        (spoilable / "ae_config.json").unlink()
        vae = config_of(spoilable).vae
        assert (vae.ch, vae.ch_mult, vae.z_channels) == (128, (1, 2, 4, 4), 16)
        assert (vae.scale_factor, vae.shift_factor) == (0.3611, 0.1159)

    def test_resize_limits_of_a_small_model(self, spoilable: Path) -> None:
        limits = {"max_side": 128, "min_side": 64, "stride": 16}
        vit = {"max_side": 112, "min_side": 56, "stride": 14}
        (spoilable / "resize_config.json").write_text(json.dumps({"vae": limits, "vit": vit}))
        config = config_of(spoilable)
        assert (config.vae_resize.max_side, config.vit_resize.max_side) == (128, 112)


class TestIncomplete:
    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such folder"):
            load(tmp_path / "nowhere")

    @pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json", "ema.safetensors"])
    def test_missing_file(self, spoilable: Path, name: str) -> None:
        (spoilable / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            load(spoilable)

    def test_missing_tokenizer(self, spoilable: Path) -> None:
        for name in ("tokenizer.json", "merges.txt"):
            (spoilable / name).unlink()
        with pytest.raises(CheckpointError, match=r"tokenizer.json and merges.txt are missing"):
            load(spoilable)

    def test_missing_shard(self, spoilable: Path) -> None:
        shard(spoilable, "model.safetensors.index.json")
        (spoilable / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing"):
            load(spoilable)

    def test_missing_tensor(self, spoilable: Path) -> None:
        change_tensors(spoilable, **{Q: None})
        with pytest.raises(CheckpointError, match=f"tensor {Q} is missing"):
            load(spoilable)

    def test_truncated_file_names_a_tensor(self, spoilable: Path) -> None:
        path = spoilable / "ema.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"tensor [a-z_.0-9]+: the file ends before its data"):
            load(spoilable)

    def test_pickles_are_never_opened(self, spoilable: Path) -> None:
        """The pickle would leave a mark if it were loaded."""
        mark = spoilable / "executed"
        attack = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
        (spoilable / "pytorch_model.bin").write_bytes(attack)
        load(spoilable)
        (spoilable / "ema.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"holds pytorch_model.bin, a pickle, which is never loaded"):
            load(spoilable)
        assert not mark.exists()


class TestContradictions:
    def test_unexpected_tensor(self, spoilable: Path) -> None:
        change_tensors(spoilable, stray=torch.zeros(1))
        with pytest.raises(CheckpointError, match="unexpected tensor stray"):
            load(spoilable)

    @pytest.mark.parametrize("shape", [(128, 127), (127, 128), (128 * 128,), (1, 128, 128)])
    def test_misshapen_tensor(self, spoilable: Path, shape: tuple[int, ...]) -> None:
        change_tensors(spoilable, **{Q: torch.zeros(shape, dtype=torch.bfloat16)})
        with pytest.raises(CheckpointError, match=f"tensor {Q} is .* demands 128 x 128"):
            load(spoilable)

    def test_tensor_of_whole_numbers(self, spoilable: Path) -> None:
        change_tensors(spoilable, **{Q: torch.zeros(128, 128, dtype=torch.int8)})
        with pytest.raises(CheckpointError, match=f"tensor {Q} is I8"):
            load(spoilable)

    def test_tensor_in_two_shards(self, spoilable: Path) -> None:
        shard(spoilable, None)
        save_file({Q: torch.zeros(128, 128)}, spoilable / "extra.safetensors")
        with pytest.raises(CheckpointError, match=f"tensor {Q} is in "):
            load(spoilable)

    @pytest.mark.parametrize("name", ["../ema.safetensors", "/etc/passwd", "model.bin", "sub/x.safetensors"])
    def test_index_that_points_elsewhere(self, spoilable: Path, name: str) -> None:
        weight_map = shard(spoilable, "model.safetensors.index.json")
        index = {"weight_map": weight_map | {Q: name}}
        (spoilable / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="not a shard beside it"):
            load(spoilable)

    @pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
    def test_index_without_a_map(self, spoilable: Path, index: object) -> None:
        shard(spoilable, None)
        (spoilable / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="has no weight_map"):
            load(spoilable)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"num_hidden_layers": 4}, r"tensor language_model.model.layers.3.* is missing"),
            ({"num_hidden_layers": 2}, r"unexpected tensor language_model.model.layers.2"),
            ({"vocab_size": 500}, r"embed_tokens.weight is 448 x 128, and the configuration demands 500 x 128"),
        ],
    )
    def test_configuration_of_another_model(self, spoilable: Path, values: dict[str, int], message: str) -> None:
        change_json(spoilable / "llm_config.json", **values)
        with pytest.raises(CheckpointError, match=message):
            load(spoilable)

    @pytest.mark.parametrize(
        ("file", "values", "message"),
        [
            ("llm_config.json", {"hidden_size": None}, "hidden_size must be a whole number"),
            ("llm_config.json", {"hidden_size": "128"}, "hidden_size must be a whole number"),
            ("llm_config.json", {"hidden_size": 0}, "hidden_size must be a whole number"),
            ("llm_config.json", {"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads"),
            ("llm_config.json", {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
            ("llm_config.json", {"num_attention_heads": 128, "num_key_value_heads": 64}, "head size 1 is odd"),
            (
                "llm_config.json",
                {"num_hidden_layers": 2**31},
                "num_hidden_layers must be a whole number from 1 to 1000",
            ),
            ("llm_config.json", {"rope_theta": "x"}, "rope_theta must be a number"),
            ("vit_config.json", {"num_hidden_layers": 1}, "num_hidden_layers must be a whole number from 2"),
            ("vit_config.json", {"image_size": 224}, "image_size 224 is under the 980 pixels"),
            ("ae_config.json", {"ch_mult": [1, "2"]}, "ch_mult must be a list"),
            ("ae_config.json", {"ch_mult": [1] * 99}, "ch_mult must be a list of 1 to 8"),
            ("ae_config.json", {"scale_factor": None}, "scale_factor must be a number"),
        ],
    )
    def test_impossible_values(self, spoilable: Path, file: str, values: dict[str, object], message: str) -> None:
        change_json(spoilable / file, **values)
        with pytest.raises(ConfigError, match=message) as error:
            load(spoilable)
        assert file in str(error.value)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff", "[" * 100_000])
    def test_configuration_that_is_no_object(self, spoilable: Path, text: str) -> None:
        (spoilable / "llm_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"llm_config\.json.*(JSON|object)"):
            load(spoilable)

    @pytest.mark.parametrize(
        "vae",
        [
            None,
            {"max_side": 128},
            {"max_side": 128, "min_side": 256, "stride": 16},
            {"max_side": 128, "min_side": 64, "stride": 8},
            {"max_side": 120, "min_side": 64, "stride": 16},
        ],
    )
    def test_impossible_resize_limits(self, spoilable: Path, vae: object) -> None:
        vit = {"max_side": 112, "min_side": 56, "stride": 14}
        (spoilable / "resize_config.json").write_text(json.dumps({"vae": vae, "vit": vit}))
        with pytest.raises(ConfigError, match=r"resize_config\.json: vae"):
            config_of(spoilable)

    def test_pictures_larger_than_the_position_table(self, spoilable: Path) -> None:
        vae = {"max_side": 2048, "min_side": 512, "stride": 16}
        vit = {"max_side": 112, "min_side": 56, "stride": 14}
        (spoilable / "resize_config.json").write_text(json.dumps({"vae": vae, "vit": vit}))
        folder = ModelFolder.open(spoilable)
        assert (folder.config.vae_resize.max_side, folder.config.vae_resize.min_side) == (1024, 512)
        assert "latent_pos_embed.pos_embed covers pictures of 1024 pixels" in folder.reading.lines["limits"]


class TestWhatIsNoFile:
    """Something else in the place of a file that a folder has: our error at once."""

    @pytest.mark.parametrize("kind", NOT_ORDINARY)
    @pytest.mark.parametrize(
        "name",
        ["llm_config.json", "resize_config.json", "config.json", "variant.json", "ema.safetensors", "ae.safetensors"],
    )
    def test_opening(self, spoilable: Path, name: str, kind: str) -> None:
        in_place(kind, spoilable / name)
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*it is (a folder|not an ordinary file)"):
            ModelFolder.open(spoilable)

    @pytest.mark.parametrize("kind", NOT_ORDINARY)
    @pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
    def test_tokenizer(self, spoilable: Path, name: str, kind: str) -> None:
        (spoilable / "tokenizer.json").unlink()
        in_place(kind, spoilable / name)
        with pytest.raises(CheckpointError, match=r"it is (a folder|not an ordinary file)|damaged"):
            BagelTokenizer(spoilable)

    @pytest.mark.parametrize("name", ["a\0.safetensors", "a\n.safetensors", "\x1b[2J.safetensors", "../a.safetensors"])
    def test_names_in_an_index(self, spoilable: Path, name: str) -> None:
        (spoilable / "ema.safetensors").unlink()
        (spoilable / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(CheckpointError, match="not a shard beside it"):
            ModelFolder.open(spoilable)

    @pytest.mark.parametrize("text", ['{"weight_map": {"x": "\\ud800.safetensors"}}', '{"weight_map": {"x": NaN}}'])
    def test_an_index_that_is_no_json(self, spoilable: Path, text: str) -> None:
        (spoilable / "ema.safetensors").unlink()
        (spoilable / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a readable JSON file"):
            ModelFolder.open(spoilable)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "x" * 300 + ".safetensors"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        ModelFolder.open(name)


def test_a_folder_that_may_not_be_looked_into(spoilable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    (spoilable / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{spoilable}: cannot be read \(Permission denied\)"):
        ModelFolder.open(spoilable)


def test_an_index_of_names_that_are_too_long(spoilable: Path) -> None:
    (spoilable / "ema.safetensors").unlink()
    index = {"weight_map": {"x": "x" * 300 + ".safetensors"}}
    (spoilable / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"cannot be read|missing|absent|not here"):
        ModelFolder.open(spoilable)
