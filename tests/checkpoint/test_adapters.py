"""LoRA adapters: read as PEFT writes them, merged to the last bit, refused by the name of what does not fit."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import PREFIX, spoiled, weights_of, write_adapter
from support.files import NOT_ORDINARY, in_place
from torch import Tensor

from lowmem_bagel.checkpoint.adapters import folder_and_weight, read_adapters
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.errors import CheckpointError

Q = "language_model.model.layers.0.self_attn.q_proj_moe_gen.weight"
CALLED = PREFIX + "model.layers.0.self_attn.q_proj_moe_gen"


@pytest.fixture
def adapter(tmp_path: Path, reference_checkpoint: Path) -> Path:
    return write_adapter(tmp_path / "style", reference_checkpoint, weights_of(reference_checkpoint))


def factors(adapter: Path, name: str) -> tuple[Tensor, Tensor]:
    held = load_file(adapter / "adapter_model.safetensors")
    called = PREFIX + name.removesuffix(".weight").removeprefix("language_model.")
    return held[f"{called}.lora_A.weight"], held[f"{called}.lora_B.weight"]


def plus(weight: Tensor, adapter: Path, name: str, scale: float) -> Tensor:
    a, b = factors(adapter, name)
    return weight.float() + scale * (b.float() @ a.float())


def test_a_weight_becomes_the_sum(reference_checkpoint: Path, adapter: Path) -> None:
    base = ModelFolder.open(reference_checkpoint)
    folder, weights = base.adapted([str(adapter)]), weights_of(reference_checkpoint)
    for name in weights:
        assert torch.equal(folder.tensor(name), plus(base.tensor(name), adapter, name, 2.0))
    others = [name for name in base.stored if name not in weights]
    assert all(folder.located(name) == base.located(name) for name in others)
    assert folder.reading.lines["adapters"] == f"style: added to {len(weights)} weights"
    assert not folder.beside
    assert "adapters" not in base.reading.lines


def test_several_are_added_in_their_order_with_their_weights(
    tmp_path: Path, reference_checkpoint: Path, adapter: Path
) -> None:
    names = [*weights_of(reference_checkpoint, "und", ("q",)), Q]
    second = write_adapter(tmp_path / "other", reference_checkpoint, names, seed=1, rank=2, lora_alpha=3)
    base = ModelFolder.open(reference_checkpoint)
    folder = base.adapted([f"{adapter}:0.5", f"{second}:-1.25"])
    once = plus(base.tensor(Q), adapter, Q, 1.0)
    assert torch.equal(folder.tensor(Q), plus(once, second, Q, -1.25 * 1.5))
    assert torch.equal(folder.tensor(names[0]), plus(base.tensor(names[0]), second, names[0], -1.25 * 1.5))
    assert folder.reading.lines["adapters"].startswith("style:0.5, other:-1.25: added to ")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"alpha_pattern": {"self_attn.q_proj_moe_gen": 2}}, 0.5),
        ({"alpha_pattern": {"q_proj": 2}}, 2.0),
        ({"alpha_pattern": {"^model\\.layers\\.0\\.self_attn\\.q_proj_moe_gen": 12}}, 3.0),
    ],
)
def test_scales(tmp_path: Path, reference_checkpoint: Path, settings: dict[str, object], scale: float) -> None:
    adapter = write_adapter(tmp_path / "a", reference_checkpoint, [Q], **settings)
    base = ModelFolder.open(reference_checkpoint)
    assert torch.equal(base.adapted([str(adapter)]).tensor(Q), plus(base.tensor(Q), adapter, Q, scale))


def test_ranks_may_differ_from_weight_to_weight(tmp_path: Path, reference_checkpoint: Path) -> None:
    adapter = write_adapter(
        tmp_path / "a", reference_checkpoint, weights_of(reference_checkpoint), ranks={"q_proj_moe_gen": 2},
        rank_pattern={"q_proj_moe_gen": 2}, lora_alpha=8,
    )  # fmt: skip
    base = ModelFolder.open(reference_checkpoint)
    folder = base.adapted([str(adapter)])
    assert torch.equal(folder.tensor(Q), plus(base.tensor(Q), adapter, Q, 4.0))
    k = Q.replace("q_proj", "k_proj")
    assert torch.equal(folder.tensor(k), plus(base.tensor(k), adapter, k, 2.0))


@pytest.mark.parametrize(
    "called",
    [
        "base_model.model.language_model.model.layers.0.self_attn.q_proj_moe_gen",
        "base_model.model.model.language_model.model.layers.0.self_attn.q_proj_moe_gen",
        "base_model.model.layers.0.self_attn.q_proj_moe_gen",
        "module.base_model.model.model.layers.0.self_attn.q_proj_moe_gen",
        "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj_moe_gen",
        "language_model.model.layers.0.self_attn.q_proj_moe_gen",
    ],
)
@pytest.mark.parametrize("default", ["", ".default"])
def test_names_as_trainers_write_them(tmp_path: Path, reference_checkpoint: Path, called: str, default: str) -> None:
    adapter = write_adapter(tmp_path / "a", reference_checkpoint, [Q])
    a, b = factors(adapter, Q)
    old = {f"{CALLED}.lora_{factor}.weight": None for factor in "AB"}
    new = {f"{called}.lora_A{default}.weight": a, f"{called}.lora_B{default}.weight": b}
    spoiled(adapter, {**old, **new})
    base = ModelFolder.open(reference_checkpoint)
    a_row = base.adapted([str(adapter)]).tensor(Q)
    assert torch.equal(a_row, base.tensor(Q).float() + 2.0 * (b @ a))


@pytest.mark.parametrize(
    "module", ["lm_head", "vae2llm", "connector.fc1", "vit_model.vision_model.encoder.layers.0.mlp.fc1"]
)
def test_any_matrix_can_be_changed(tmp_path: Path, reference_checkpoint: Path, module: str) -> None:
    name = f"language_model.{module}.weight" if module == "lm_head" else f"{module}.weight"
    adapter = write_adapter(tmp_path / "a", reference_checkpoint, [name])
    base = ModelFolder.open(reference_checkpoint)
    assert torch.equal(base.adapted([str(adapter)]).tensor(name), plus(base.tensor(name), adapter, name, 2.0))


def test_a_weight_is_said_behind_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_and_weight("a/b") == (Path("a/b"), 1.0)
    assert folder_and_weight("a/b:0.25") == (Path("a/b"), 0.25)
    assert folder_and_weight("C:\\loras\\a") == (Path("C:\\loras\\a"), 1.0)
    Path("v:2").mkdir()
    assert folder_and_weight("v:2") == (Path("v:2"), 1.0)
    for text in ("a:nan", "a:inf"):
        with pytest.raises(CheckpointError, match="weight of an adapter must be a number"):
            folder_and_weight(text)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3'"),
        ({"use_dora": True}, "use_dora is on"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is on"),
        ({"init_lora_weights": "pissa_niter_4"}, "convert it to plain LoRA"),
        ({"bias": "all"}, "trains biases"),
        ({"r": 8}, "says rank 8 for"),
        ({"r": "many"}, "r is 'many', not a number above 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"rank_pattern": [1]}, "rank_pattern is not an object"),
        ({"rank_pattern": {"(a+)+$": 1}}, "only names of modules"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is None"),
    ],
)
def test_settings_that_cannot_be_used(
    tmp_path: Path, reference_checkpoint: Path, settings: dict[str, object], said: str
) -> None:
    adapter = write_adapter(tmp_path / "a", reference_checkpoint, [Q], **{"rank": 4, **settings})
    with pytest.raises(CheckpointError, match=said.replace("(", "\\(")):
        ModelFolder.open(reference_checkpoint).adapted([str(adapter)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{CALLED}.lora_B.weight": None}, f"'{CALLED}' has no lora_B"),
        ({f"{CALLED}.lora_A.weight": torch.zeros(4, 3)}, "belongs to another model"),
        ({f"{CALLED}.lora_A.weight": torch.zeros(4)}, "belongs to another model"),
        ({f"{CALLED}.lora_A.weight": torch.zeros(0, 64), f"{CALLED}.lora_B.weight": torch.zeros(64, 0)}, "another"),
        ({f"{CALLED}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}, "is I8, not one of"),
        ({f"{CALLED}.lora_A.other.weight": torch.zeros(4, 64)}, "holds two adapters"),
        ({f"{CALLED}.lora_magnitude_vector": torch.zeros(64)}, "is no factor of a LoRA"),
        ({"base_model.model.classifier.weight": torch.zeros(3)}, "is no factor of a LoRA"),
        ({"base_model.model.model.layers.99.mlp.up_proj.lora_A.weight": torch.zeros(4, 4)}, "does not have"),
        ({"language_model." + CALLED.removeprefix(PREFIX) + ".lora_A.weight": torch.zeros(4, 64)}, "are one weight"),
        ({"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 64)}, "does not have"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, reference_checkpoint: Path, change: dict[str, Tensor | None], said: str
) -> None:
    width = tensor_table(ModelFolder.open(reference_checkpoint).config)[Q].shape[1]
    fitting = {
        name: None if value is None else value.new_zeros([width if n == 64 else n for n in value.shape])
        for name, value in change.items()
    }
    adapter = spoiled(write_adapter(tmp_path / "a", reference_checkpoint, [Q]), fitting)
    with pytest.raises(CheckpointError, match=said) as raised:
        ModelFolder.open(reference_checkpoint).adapted([str(adapter)])
    assert "\n" not in str(raised.value)


def test_folders_that_are_none(tmp_path: Path, reference_checkpoint: Path, adapter: Path) -> None:
    folder = ModelFolder.open(reference_checkpoint)
    for path, said in ((tmp_path / "missing", "adapter_config.json is missing"), (tmp_path, "adapter_config.json")):
        with pytest.raises(CheckpointError, match=said):
            folder.adapted([str(path)])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which is never loaded"):
        folder.adapted([str(adapter)])
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        folder.adapted([str(adapter)])


@pytest.mark.parametrize("kind", NOT_ORDINARY)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_no_files(
    reference_checkpoint: Path, adapter: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapter)  # a socket's name is short
    in_place(kind, adapter / name)
    with pytest.raises(CheckpointError):
        ModelFolder.open(reference_checkpoint).adapted([str(adapter)])


def test_damaged_settings_and_headers_are_our_error(reference_checkpoint: Path, adapter: Path) -> None:
    table = tensor_table(ModelFolder.open(reference_checkpoint).config)
    rng = random.Random(5)
    files = {name: (adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    refused = 0
    for _ in range(200):
        name = rng.choice(list(files))
        data = bytearray(files[name])
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(min(len(data), 4000))
            data[at : at + rng.choice((0, 1, 1, 3))] = rng.choice((b"", b"9", b'"', b"{", b"\xff", b"null", b"1e999"))
        (adapter / name).write_bytes(data)
        try:
            for change in read_adapters([str(adapter)], table)[0].changes.values():
                assert math.isfinite(change.scale)
        except CheckpointError as error:
            refused += "\n" not in str(error) and len(str(error)) < 1500
        (adapter / name).write_bytes(files[name])
    assert refused > 100
