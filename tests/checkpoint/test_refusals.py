"""What is not BAGEL, is quantised by others or computes otherwise is refused in a line that says what it is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import layouts
from support.checkpoints import change_json
from support.command import Ran
from support.layouts import Parts, demo
from torch import Tensor

from lowmem_bagel.checkpoint import folder
from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.checkpoint.config_files import config_of
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import CheckpointError, ConfigError, UserError

UP = "language_model.model.layers.1.mlp_moe_gen.up_proj."


def beside(*names: str, dtype: torch.dtype = torch.uint8) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.tensors |= {name: torch.ones(2).to(dtype) for name in names}

    return change


def two_copies(parts: Parts) -> None:
    parts.tensors |= {f"ema.{name}": value for name, value in parts.tensors.items() if "layers.0" in name}


def another_model(parts: Parts) -> None:
    parts.tensors = {f"model.layers.{n}.self_attn.qkv.weight": torch.ones(2) for n in range(3)}


REFUSED: dict[str, tuple[Callable[[Parts], None], str]] = {
    "LLM.int8()": (beside(f"{UP}SCB"), r"INT8 by bitsandbytes.*lowmem-bagel convert FOLDER OUT --to int8"),
    "NF4": (beside(f"{UP}weight.absmax", f"{UP}weight.quant_state.bitsandbytes__nf4"), "4 bits by bitsandbytes"),
    "quanto": (beside(f"{UP}weight._data", f"{UP}weight._scale"), "by optimum-quanto"),
    "AutoRound": (beside(f"{UP}qweight", f"{UP}qzeros"), "by GPTQ, AutoRound or AWQ.*quantization_config auto-round"),
    "compressed-tensors": (beside(f"{UP}weight_packed"), "by compressed-tensors"),
    "int8 with scales": (beside(f"{UP}weight_scale", dtype=torch.float32), "quantised: by another program"),
    "Omni-View": (
        beside("ray_head.0.weight", "depth_head.weight"),
        r"modules that BAGEL has not \(depth_head \(1\), ray_head \(1\)\)",
    ),
    "a LoRA inside": (beside("language_model.model.layers.0.self_attn.q_proj.lora_A.weight"), "an adapter that is not"),
    "an optimizer's state": (beside("state.exp_avg.0"), "the state of an optimizer"),
    "flattened parameters": (beside("_fsdp_wrapped_module._flat_param"), "full_state_dict"),
    "two copies": (two_copies, r"modules that BAGEL has not \(ema "),
    "float64": (lambda parts: parts.to(torch.float64) and None, r"is F64, not one of BF16, .*: save it in one of them"),
    "int8 alone": (
        lambda parts: parts.to(torch.int8, lambda name, value: name == f"{UP}weight") and None,
        r"up_proj.weight is I8, .*: quantised by another program; .*--to int8",
    ),
    "another model": (another_model, r"is not BAGEL: its tensors are called model.layers.0.self_attn.qkv.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_said_what_the_files_are(name: str, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    change, said = REFUSED[name]
    parts = demo()
    change(parts)
    if name == "AutoRound":
        parts.configs["config.json"]["quantization_config"] = {"quant_method": "auto-round", "bits": 4}
    folder = parts.write(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        ModelFolder.open(folder)
    for command in ("inspect", "plan"):
        ran = cli(command, folder)
        assert ran.code == 2
        assert "\n" not in ran.err.strip()


def test_a_quantization_that_the_tensors_do_not_have_is_said(tmp_path: Path) -> None:
    parts = demo()
    parts.configs["config.json"]["quantization_config"] = {"quant_method": "bitsandbytes"}
    ignored = ModelFolder.open(parts.write(tmp_path)).reading.lines["ignored"]
    assert ignored == "quantization_config bitsandbytes, which the tensors need not"


def test_an_autoencoder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ae\.safetensors holds an autoencoder alone"):
        ModelFolder.open(demo().write(tmp_path) / "ae.safetensors")


def test_names_come_before_the_configuration(tmp_path: Path) -> None:
    save_file({"encoder.block.0.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not BAGEL: .* called encoder\.block\.0\.weight"):
        ModelFolder.open(tmp_path)


def test_another_models_configuration(tmp_path: Path) -> None:
    parts = demo()
    another_model(parts)
    parts.configs = {"config.json": {"model_type": "blip3o_qwen", "architectures": ["BLIP3oQwenForCausalLM"]}}
    with pytest.raises(CheckpointError, match=r"is not BAGEL: .* says blip3o_qwen BLIP3oQwenForCausalLM"):
        ModelFolder.open(parts.write(tmp_path))


class TestArithmetic:
    """A setting that changes what is computed is honoured or refused by name, in every spelling."""

    @pytest.mark.parametrize(
        "said",
        [
            {"rope_theta": 5e5},
            {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            {"rope_theta": 500000, "rope_scaling": {"type": "default", "rope_theta": 5e5}},
            {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}},
            {"rope_theta": None, "rotary_emb_base": 5e5},
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 1.0}},
            {"rope_theta": 5e5, "rope_scaling": None, "layer_types": ["full_attention"] * 3},
        ],
    )
    def test_rope_theta(self, spoilable: Path, said: dict[str, object]) -> None:
        assert llm(spoilable, said).decoder.rope_theta == 5e5

    @pytest.mark.parametrize("name", ["rms_norm_eps", "rms_norm_epsilon", "norm_eps", "layernorm_epsilon"])
    def test_eps(self, spoilable: Path, name: str) -> None:
        assert llm(spoilable, {"rms_norm_eps": None, name: 1e-5}).decoder.rms_norm_eps == 1e-5

    def test_a_default_where_nothing_is_said(self, spoilable: Path) -> None:
        decoder = llm(spoilable, {"rms_norm_eps": None, "rope_theta": None}).decoder
        assert (decoder.rms_norm_eps, decoder.rope_theta) == (1e-6, 1e6)

    @pytest.mark.parametrize(
        ("said", "named"),
        [
            ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type is 'yarn'"),
            ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'"),
            ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type is 'llama3'"),
            ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
            ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1e.06 and rope_parameters.rope_theta is 10000"),
            ({"rope_theta": 0}, "rope_theta must be above 0"),
            ({"rms_norm_eps": 1e-5, "norm_eps": 1e-6}, "rms_norm_eps is 1e-05 and norm_eps is 1e-06"),
            ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be between 0 and 1"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
            ({"qk_norm": False}, "qk_norm is False"),
            ({"attention_bias": False}, "attention_bias is False"),
            ({"mlp_bias": True}, "mlp_bias is True"),
            ({"use_sliding_window": True}, "use_sliding_window is True"),
            ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
            ({"layer_module": "Qwen2MoEDecoderLayer"}, "layer_module is 'Qwen2MoEDecoderLayer'"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
            ({"head_dim": 64}, "head_dim is 64"),
            ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ],
    )
    def test_what_it_is_not(self, spoilable: Path, said: dict[str, object], named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            llm(spoilable, said)

    @pytest.mark.parametrize(
        ("said", "named"),
        [
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
            ({"rope": True}, "rope is True"),
            ({"num_channels": 4}, "num_channels is 4"),
            ({"layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-6}, "layer_norm_eps is 1e-05 and layer_norm_epsilon"),
        ],
    )
    def test_the_vision_tower(self, spoilable: Path, said: dict[str, object], named: str) -> None:
        change_json(spoilable / "vit_config.json", **said)
        with pytest.raises(ConfigError, match=named):
            config_of(spoilable)

    @pytest.mark.parametrize("said", [{"connector_act": "relu"}, {"interpolate_pos": True}, {"latent_patch_size": 0}])
    def test_around_them(self, spoilable: Path, said: dict[str, object]) -> None:
        (spoilable / "config.json").write_text(json.dumps({"model_type": "bagel", **said}))
        with pytest.raises(ConfigError, match=next(iter(said))):
            config_of(spoilable)

    def test_a_files_name_in_its_place(self, spoilable: Path) -> None:
        names = {"llm_config": "llm_config.json", "vit_config": "vit_config.json"}
        (spoilable / "config.json").write_text(json.dumps(names))
        assert config_of(spoilable).decoder.hidden_size == 128

    def test_two_files_that_disagree(self, spoilable: Path) -> None:
        (spoilable / "config.json").write_text(json.dumps({"llm_config": {"rms_norm_eps": 1e-5}}))
        with pytest.raises(ConfigError, match=r"rms_norm_eps is 1e-06, and .*llm_config\.rms_norm_eps is 1e-05"):
            config_of(spoilable)

    def test_the_autoencoder(self, spoilable: Path) -> None:
        change_json(spoilable / "ae_config.json", scaling_factor=0.5)
        with pytest.raises(ConfigError, match=r"scale_factor is 0\.3611 and scaling_factor is 0\.5"):
            config_of(spoilable)

    @pytest.mark.parametrize("at_top", [True, False])
    def test_tied(self, tmp_path: Path, at_top: bool) -> None:
        parts = demo()
        head = parts.tensors.pop("language_model.lm_head.weight")
        folder = parts.write(tmp_path)
        assert "lm_head: 1 tensor" in ModelFolder.open(folder).reading.lines["lacking"]
        if at_top:
            values = {k: v for k, v in parts.configs["llm_config.json"].items() if k != "tie_word_embeddings"}
            (folder / "llm_config.json").write_text(json.dumps(values))
        change_json(folder / ("config.json" if at_top else "llm_config.json"), tie_word_embeddings=True)
        tied = ModelFolder.open(folder)
        assert torch.equal(tied.tensor("language_model.lm_head.weight"), parts.tensors[layouts.EMBEDDING])
        assert tied.entry("language_model.lm_head.weight").name == "language_model.lm_head.weight"
        parts.tensors["language_model.lm_head.weight"] = head
        parts.write(folder)
        change_json(folder / "llm_config.json", tie_word_embeddings=True)
        own = ModelFolder.open(folder)
        assert torch.equal(own.tensor("language_model.lm_head.weight"), head)
        assert "the file's own" in own.reading.lines["lm_head"]


def llm(folder: Path, said: dict[str, object]) -> BagelConfig:
    """The configuration with other settings of the decoder; None takes one away."""
    path = folder / "llm_config.json"
    values = json.loads(path.read_text()) | said
    kept = {k: v for k, v in values.items() if v is not None or k == "rope_scaling"}
    path.write_text(json.dumps(kept))
    return config_of(folder)


class TestScales:
    @pytest.mark.parametrize(
        "scale",
        [torch.ones(3), torch.ones(0), torch.ones(2, 512), torch.ones(511), torch.ones(1, 512), torch.ones(512, 512)],
    )
    def test_wrong_shapes(self, tmp_path: Path, scale: Tensor) -> None:
        parts = layouts.in_fp8(demo())
        parts.tensors[f"{UP}weight_scale"] = scale
        with pytest.raises(CheckpointError, match=r"weight_scale is F32 .* none for the FP8 weight \[512, 256\]"):
            ModelFolder.open(parts.write(tmp_path))

    def test_wrong_dtypes_and_two_at_once(self, tmp_path: Path) -> None:
        parts = layouts.in_fp8(demo())
        parts.tensors[f"{UP}weight_scale"] = torch.ones(1, dtype=torch.int8)
        with pytest.raises(CheckpointError, match="weight_scale is I8"):
            ModelFolder.open(parts.write(tmp_path))
        parts.tensors[f"{UP}weight_scale"] = parts.tensors[f"{UP}scale_weight"] = torch.ones(1)
        with pytest.raises(CheckpointError, match="has two scales"):
            ModelFolder.open(parts.write(tmp_path))

    def test_blocks(self, tmp_path: Path) -> None:
        parts = layouts.in_fp8(demo())
        scale = torch.rand(4, 2)
        parts.tensors[f"{UP}weight_scale_inv"] = scale
        read = ModelFolder.open(parts.write(tmp_path)).tensor(f"{UP}weight")
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(read, (parts.tensors[f"{UP}weight"].float() * spread).bfloat16())

    def test_marks_of_comfyui(self, tmp_path: Path) -> None:
        parts = layouts.in_fp8(demo(), "weight_scale")
        text = json.dumps({"format": "float8_e4m3fn"}).encode()
        parts.tensors[f"{UP}comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        parts.tensors[f"{UP}input_scale"] = torch.ones(())
        ignored = ModelFolder.open(parts.write(tmp_path)).reading.lines["ignored"]
        assert "1 marks of FP8 weights" in ignored
        assert "1 scales of FP8 activations" in ignored


def mutated(text: str, random: random.Random) -> str:
    """A JSON text with a few of its pieces cut, doubled or exchanged."""
    for _ in range(random.randint(1, 3)):
        a, b = sorted(random.choices(range(len(text)), k=2))
        b = min(b, a + 40)
        odd = random.choice(
            ["", "{", "]", "null", "-1", "1e400", '"', "[[[[", "true", "99999999999999999999", text[a:b] * 2]
        )
        text = text[:a] + odd + text[b:]
    return text


@pytest.mark.parametrize("seed", range(4))
def test_hostile_metadata_and_scales(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file says of itself, the answer is the model or our error. The base, which stays, is opened once."""
    chance = random.Random(seed)
    monkeypatch.setattr("lowmem_bagel.checkpoint.folder._base", cache(folder._base))
    base = demo().write(tmp_path / "base")
    parts = layouts.comfy(layouts.in_fp8(demo(), "weight_scale", "row", mark=True)).without(
        "language_model.model.layers.2"
    )
    parts.vae.clear()
    parts.tensors = {n: v for n, v in parts.tensors.items() if ".layers.0." in n or n.startswith("connector")}
    text = (parts.metadata or {})["comfyui_bagel"]
    names = [name for name in parts.tensors if name.endswith("weight_scale")]
    opened, refused = 0, []
    for _ in range(40):
        parts.metadata = {"comfyui_bagel": mutated(text, chance)} if chance.random() < 0.8 else {"comfyui_bagel": text}
        shape = [chance.randint(0, 600) for _ in range(chance.randint(0, 3))] if chance.random() < 0.5 else [512]
        shape = shape if torch.Size(shape).numel() < 1 << 16 else [1]
        changed: dict[str, Any] = parts.tensors | {chance.choice(names): torch.ones(shape)}
        file = tmp_path / "hostile.safetensors"
        save_file(layouts.whole(changed), file, parts.metadata)
        try:
            hostile = ModelFolder.open(file, base=base)
            for stored in hostile.stored.values():
                if not stored.as_it_is:
                    stored.tensor()
            hostile.companions()
            opened += 1
        except UserError as error:
            refused.append(str(error))
    assert opened
    assert refused
    assert not [line for line in refused if "\n" in line]
