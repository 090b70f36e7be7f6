"""Adapters beside encoded weights: what a linear gives, what a picture is, and what the plan counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from support.adapters import weights_of, write_adapter
from support.command import Ran
from support.numeric import relative_l2

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import EXPERTS, FUSED, tensor_table
from lowmem_bagel.errors import SettingError
from lowmem_bagel.formats.base import Site
from lowmem_bagel.formats.linears import stored_linears
from lowmem_bagel.model.decoder import ExpertLayer
from lowmem_bagel.model.flat_buffer import Layout
from lowmem_bagel.model.names import linear_module
from lowmem_bagel.ops.linear import Linear
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.runtime.streaming.disk import Kept, segments_of

ENCODED = ("dfloat11", "int8", "int8 rotated", "nf4")


@pytest.fixture(scope="module", params=ENCODED)
def variant(request: pytest.FixtureRequest, variant_of: Callable[[str], Path]) -> Path:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return variant_of(request.param)


@pytest.fixture(scope="module")
def adapters(reference_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two: one of all of gen, one of a few weights of und, so that linears stack adapted and other weights."""
    folder = tmp_path_factory.mktemp("adapters")
    one = write_adapter(folder / "one", reference_checkpoint, weights_of(reference_checkpoint), size=0.2)
    names = [*weights_of(reference_checkpoint, "und", ("k", "down")), weights_of(reference_checkpoint)[0]]
    two = write_adapter(folder / "two", reference_checkpoint, names, seed=1, rank=3, size=0.2, ranks={"k_proj": 2},
                        rank_pattern={"k_proj": 2})  # fmt: skip
    return [str(one), f"{two}:0.5"]


@pytest.fixture(scope="module")
def pipe(variant: Path, adapters: list[str]) -> BagelPipeline:
    """A variant with them beside it."""
    return loaded(ModelFolder.open(variant).adapted(adapters))


def loaded(folder: ModelFolder, **options: object) -> BagelPipeline:
    return BagelPipeline.from_folder(folder, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


def levels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).float()


def linears(pipe: BagelPipeline, expert: str, name: str) -> list[Linear]:
    layers = cast("list[dict[str, ExpertLayer]]", pipe.model.bagel.decoder.layers)
    return [getattr(layer[expert], name) for layer in layers]


def test_every_linear_gives_its_product_and_what_the_adapters_add(pipe: BagelPipeline) -> None:
    folder = pipe.model.folder
    assert pipe.model.plan.reasons["linears"].endswith(f"adapters beside {len(folder.beside)} weights")
    for expert in EXPERTS:
        for name, shorts in FUSED.items():
            for layer, linear in enumerate(linears(pipe, expert, name)):
                x = torch.randn(5, linear.in_features)
                wanted = linear.product.product(x, linear.weights()).double()
                modules = [linear_module(layer, expert, short) for short in shorts]
                wanted += torch.cat([added(folder, module, x) for module in modules], 1)
                assert relative_l2(linear(x), wanted) < 1e-6, (expert, name)


def added(folder: ModelFolder, module: str, x: torch.Tensor) -> torch.Tensor:
    """What the adapters add to a weight's product, float64."""
    rows = tensor_table(folder.config)[f"{module}.weight"].shape[0]
    total = torch.zeros(len(x), rows or 0, dtype=torch.float64)
    for change in folder.beside.get(module, ()):
        total += change.scale * (x.double() @ change.a.tensor().double().T @ change.b.tensor().double().T)
    return total


def test_a_lossless_variant_draws_as_the_source_with_them_merged(
    reference_checkpoint: Path, adapters: list[str], variant_of: Callable[[str], Path]
) -> None:
    settings = {"height": 64, "width": 64, "num_timesteps": 3, "seed": 3}
    pictures = []
    for path in (reference_checkpoint, variant_of("dfloat11")):
        pipe = loaded(ModelFolder.open(path).adapted(adapters))
        pictures.append(levels(pipe.generate("a thing", **settings).image))
    base = loaded(ModelFolder.open(reference_checkpoint)).generate("a thing", **settings).image
    changed = levels(base)
    assert (pictures[0] - pictures[1]).abs().max() <= 1
    assert (pictures[0] - changed).abs().mean() > 2


def test_the_plan_counts_what_lies_beside(variant: Path, pipe: BagelPipeline) -> None:
    facts = ModelFacts.of_folder(pipe.model.folder)
    layers = cast("list[dict[str, ExpertLayer]]", pipe.model.bagel.decoder.layers)
    plain = ModelFacts.of_folder(ModelFolder.open(variant))
    for (layer, expert), stored in facts.units.items():
        factors = [p for name, p in layers[layer][expert].named_parameters() if "low_rank" in name]
        assert stored.beside.values == sum(factor.numel() for factor in factors) > 0
        a, b = (
            sum(f.shape[axis] for name, f in layers[layer][expert].named_parameters() if name.endswith(end))
            for end, axis in (("low_rank_a", 1), ("low_rank_b", 0))
        )
        assert stored.beside.passed == a + b
        assert stored.nbytes(2) - plain.units[layer, expert].nbytes(2) == 2 * stored.beside.values
    assert not any(plain.units[0, "gen"].beside)


def test_units_are_still_read_from_the_disk(pipe: BagelPipeline) -> None:
    """The factors alone are kept in memory."""
    folder = pipe.model.folder
    site = Site(folder, torch.device("cpu"), torch.float32, "auto", {})
    linears = stored_linears(site)
    modules = [linear_module(0, "gen", short) for short in FUSED["gate_up"]]
    config = folder.config.decoder
    with torch.device("meta"):
        linear = linears.build(modules, config.hidden_size, 2 * config.intermediate_size, bias=False)
    layout, sources = Layout.of(linear), linears.sources(modules)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)

    def read(name: str) -> torch.Tensor:
        made = linears.read(name)
        return folder.tensor(name) if made is None else made

    layout.fill(buffer, sources, read)
    found = segments_of(layout, sources, folder.stored.get, read)
    if found is None:
        assert folder.format == "dfloat11", "decoded at load here"
        return
    kept = [part for part in found if isinstance(part, Kept)]
    factors = [field for field in layout.fields if "low_rank" in field.path]
    assert [part.start for part in kept] == [field.offset for field in factors]
    for part in kept:
        assert torch.equal(part.data, buffer[part.start : part.start + part.data.numel()])


def test_on_the_command_line(
    cli: Callable[..., Ran], variant: Path, reference_checkpoint: Path, adapters: list[str], tmp_path: Path
) -> None:
    """A variant with adapters is planned and drawn with them; the record of the picture says so.

    By one way of INT8: "auto" takes what is faster at the moment.
    """
    one, two = adapters
    flags = ["--lora", one, "--lora", two]
    plan = json.loads(cli("plan", variant, "--device", "cpu", "--json", *flags).out)
    line = plan["plan"]["reasons"]["adapters"]
    assert line.startswith("one, two:0.5: ") and line.endswith(" encoded weights")
    out = tmp_path / "a.png"
    drawn = cli(
        "generate", "a thing", "--model", variant, "--out", out, "--height", 32, "--width", 32, "--num-timesteps", 2,
        "--seed", 3, "--device", "cpu", "--dtype", "float32", "--backend", "native", *flags,
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    assert line in cli("inspect", out).out
    picture = BagelPipeline.from_pretrained(
        variant, device="cpu", dtype="float32", backend="native", lora=adapters
    ).generate("a thing", height=32, width=32, num_timesteps=2, seed=3)
    assert torch.equal(levels(Image.open(out)), levels(picture.image))


def test_adapters_are_said_when_a_folder_is_opened(reference_checkpoint: Path, adapters: list[str]) -> None:
    with pytest.raises(SettingError, match="give weights, base and lora"):
        BagelPipeline.from_folder(ModelFolder.open(reference_checkpoint), lora=adapters)
    with pytest.raises(SettingError, match="lora must be texts or paths, not 3"):
        BagelPipeline.from_pretrained(reference_checkpoint, lora=3)  # type: ignore[arg-type]
