"""BAGEL-MoE: gen MLPs that are cut into routed experts are found by their tensors, and refused where these and the
configuration contradict each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Ran
from support.layouts import Parts, demo, routed
from support.numeric import relative_l2

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.config import BAGEL_7B, BAGEL_MOE_7B, Routed
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import CheckpointError, ConfigError

GEN = "language_model.model.layers.2.mlp_moe_gen."
WEIGHTS = "16 of intermediate size 32 in 4 layers of gen"


def latent(folder: Path, **options: Any) -> torch.Tensor:
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32", **options)
    drawn = pipe.generate("a red circle", height=32, width=32, num_timesteps=3, seed=3)
    pipe.close()
    assert drawn.latent is not None
    return drawn.latent


def said(parts: Parts, folder: Path, **options: Any) -> str:
    return ModelFolder.open(parts.write(folder), **options).reading.lines["experts"]


def test_all_experts_together_are_the_mlp_that_was_cut(tmp_path: Path) -> None:
    """A router of zeros gives each the weight 1."""
    whole = latent(FOLDER)
    assert relative_l2(latent(routed(demo(), active=16).write(tmp_path / "all")), whole) < 1e-5
    assert relative_l2(latent(routed(demo(), active=8).write(tmp_path / "half")), whole) > 1e-2


def test_it_is_said_how_many_there_are_and_how_many_are_active(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    folder = routed(demo()).write(tmp_path)
    assert ModelFolder.open(folder).reading.lines["experts"] == f"{WEIGHTS}, 8 active for each token"
    for command in ("inspect", "plan"):
        assert WEIGHTS in " ".join(cli(command, folder).out.split())


@pytest.mark.parametrize(
    ("config", "active"),
    [
        ({}, "8 active for each token, half of them, as no num_experts_per_tok says otherwise"),
        ({"top_k": 50}, "8 active for each token, half of them, as no num_experts_per_tok says otherwise"),
        ({"num_experts": 16, "num_shared_experts": 0, "top_k": 4}, "4 active for each token"),
        ({"num_experts_per_tok": 2, "top_k": 50, "transformed_gen": [1, 2, 3, 4]}, "2 active for each token"),
        (
            {"shared_expert_intermediate_size": 5, "moe_intermediate_size": 57, "moe_topk": 3},
            "3 active for each token",
        ),
    ],
)
def test_what_a_configuration_says_of_active_experts(config: dict[str, Any], active: str, tmp_path: Path) -> None:
    """The published code does not keep it with the weights, and puts other things under the same names."""
    parts = routed(demo())
    for name in ("num_experts", "num_experts_per_tok"):
        del parts.configs["llm_config.json"][name]
    parts.configs["llm_config.json"] |= config
    assert said(parts, tmp_path) == f"{WEIGHTS}, {active}"


def without(*names: str) -> Callable[[Parts], object]:
    return lambda parts: [parts.tensors.pop(GEN + name) for name in names]


def adding(name: str, *shape: int) -> Callable[[Parts], object]:
    return lambda parts: parts.tensors.update({name: torch.ones(shape, dtype=torch.bfloat16)})


def saying(**config: object) -> Callable[[Parts], object]:
    return lambda parts: parts.configs["llm_config.json"].update(config)


REFUSED: dict[str, tuple[Callable[[Parts], object], str]] = {
    "another number": (saying(num_experts=8), "num_experts is 8, and the weights hold 16 a layer"),
    "more active than there are": (saying(num_experts_per_tok=17), "17 experts are to be active, and a layer has 16"),
    "no number": (saying(num_experts_per_tok="half"), "num_experts_per_tok must be a whole number"),
    "other layers": (saying(transformed_gen=[1, 2]), "names 2 layers, and the weights hold experts in 4"),
    "no layers": (saying(transformed_gen="all"), "transformed_gen must be true, false or a list of layers"),
    "for texts": (saying(transformed_und=[1]), r"transformed_und is \[1\].*for pictures alone"),
    "another size": (saying(moe_intermediate_size=64), "gate_proj.weight is 32 x 256, and .* demands 64 x 256"),
    "an expert less": (without("experts.15.down_proj.weight"), r"tensor .*experts\.15\.down_proj.* is missing"),
    "a layer with less": (
        without(*(f"experts.15.{short}_proj.weight" for short in ("gate", "up", "down"))),
        r"tensor .*layers\.2\.mlp_moe_gen\.experts\.15\.gate_proj\.weight is missing, and 2 more",
    ),
    "no router": (without("gate.weight"), r"tensor .*mlp_moe_gen\.gate\.weight is missing"),
    "a router of another width": (adding(f"{GEN}gate.weight", 8, 256), "gate.weight is 8 x 256, .* demands 16 x 256"),
    "a whole MLP too": (adding(f"{GEN}gate_proj.weight", 512, 256), r"unexpected tensor .*layers\.2\..*gate_proj"),
    "no number of an expert": (adding(f"{GEN}experts.x.up_proj.weight", 32, 256), "routed experts of another kind"),
    "far too many": (adding(f"{GEN}experts.99999.up_proj.weight", 32, 256), "at most 512 routed experts"),
    "a shared expert": (adding(f"{GEN}shared_expert.up_proj.weight", 32, 256), "routed experts of another kind"),
    "experts for texts": (
        adding("language_model.model.layers.1.mlp.experts.0.up_proj.weight", 32, 256),
        r"routed experts of another kind.*\(tensor .*layers\.1\.mlp\.experts\.0\.up_proj",
    ),
    "in no layer": (adding("language_model.model.layers.99.mlp_moe_gen.experts.0.up_proj.weight", 1), "another kind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    change, why = REFUSED[name]
    parts = routed(demo())
    change(parts)
    folder = parts.write(tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=why):
        latent(folder)
    ran = cli("generate", "a circle", "--model", folder, "--out", tmp_path / "out.png")
    assert ran.code == 2
    assert re.search(why, ran.err.strip().splitlines()[-1])


def test_a_configuration_of_experts_for_whole_mlps(tmp_path: Path) -> None:
    parts = demo()
    parts.configs["llm_config.json"]["num_experts"] = 16
    with pytest.raises(ConfigError, match="num_experts is 16, and the weights hold whole MLPs"):
        ModelFolder.open(parts.write(tmp_path))


def test_a_gate_of_a_shared_expert_that_is_not_there(tmp_path: Path) -> None:
    """The published code makes one for every layer."""
    parts = routed(demo())
    adding(f"{GEN}gate_shared.weight", 1, 256)(parts)
    folder = ModelFolder.open(parts.write(tmp_path))
    assert folder.reading.lines["ignored"] == "1 gates of a shared expert, which is not there"


def test_completed_from_a_base(tmp_path: Path) -> None:
    """What is not the MLPs' comes from the model that they were cut of; a folder without gen borrows experts."""
    mine = routed(demo()).without("vit_model.", "connector.", "vit_pos_embed.", "language_model.model.layers.0.")
    folder = mine.write(tmp_path / "mine")
    assert ModelFolder.open(folder, base=FOLDER).config.decoder.routed == Routed(16, 8, 32, frozenset((1, 2, 3, 4)))
    whole = routed(demo(), gates=0.1).write(tmp_path / "whole")
    assert torch.equal(latent(folder, base=whole), latent(routed(demo()).write(tmp_path / "same")))
    parts = demo()
    parts.tensors = {name: value for name, value in parts.tensors.items() if "_moe_gen" not in name}
    assert torch.equal(latent(parts.write(tmp_path / "und"), base=whole), latent(whole))


def test_the_published_shape() -> None:
    table = tensor_table(BAGEL_MOE_7B)
    mlp = "language_model.model.layers.{}.mlp_moe_gen."
    assert table[f"{mlp.format(1)}gate.weight"].shape == (16, 3584)
    assert table[f"{mlp.format(26)}experts.15.up_proj.weight"].shape == (1184, 3584)
    assert table[f"{mlp.format(9)}experts.0.down_proj.weight"].shape == (3584, 1184)
    assert table[f"{mlp.format(0)}gate_proj.weight"] == tensor_table(BAGEL_7B)[f"{mlp.format(0)}gate_proj.weight"]
    assert f"{mlp.format(27)}gate.weight" not in table
    dense, sparse = (config.decoder.multiplied("gen") for config in (BAGEL_7B, BAGEL_MOE_7B))
    assert BAGEL_MOE_7B.decoder.multiplied("und") == dense
    assert dense - sparse == 26 * 3584 * (3 * (18944 - 8 * 1184) - 16)
