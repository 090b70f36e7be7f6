"""A model whose linears have several GGUF types, as other programs mix them: what it draws, resident and streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.gguf_files import linears, write_gguf
from support.layouts import demo
from support.numeric import relative_l2
from support.streaming import drawn, fake_cuda, pipeline

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.gguf_blocks import decoded
from lowmem_bagel.errors import CheckpointError
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.plan import Residency, Unit

__all__ = ["fake_cuda"]

UNITS: tuple[Unit, ...] = tuple((layer, expert) for layer in range(3) for expert in ("und", "gen"))
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_K but for v and down, which are Q6_K, and so is the embedding."""
    linear = linears("Q4_K")

    def kinds(name: str) -> str | None:
        if name == EMBEDDING:
            return "Q6_K"
        kind = linear(name)
        return "Q6_K" if kind is not None and ("v_proj" in name or "down_proj" in name) else kind

    return write_gguf(tmp_path_factory.mktemp("mixed") / "mixed.gguf", kinds)


def test_it_draws_what_its_numbers_draw(mixed: Path, tmp_path: Path) -> None:
    folder, source = ModelFolder.open(mixed), demo()
    assert folder.reading.lines["dtypes"] == "60 of 255 tensors Q4_K, 24 of 255 tensors Q6_K"
    for name, tensor in source.tensors.items():
        stored = folder.located(name)
        value = stored.tensor()
        if stored.encoded:
            shape = tuple(tensor.shape)
            assert len(shape) == 2
            value = decoded(value, stored.entry.dtype, shape, torch.float32)
        source.tensors[name] = value.float()
    wanted = drawn(pipeline(source.write(tmp_path / "numbers"), Residency(), "float32"))
    pipe = pipeline(mixed, Residency(), "float32")
    assert relative_l2(drawn(pipe), wanted) < 1e-4
    assert pipe.model.plan.reasons["linears"] == "gguf-q4_k (decoded, Q6_K, Q4_K)"
    nbytes = sum(stored.entry.nbytes for stored in folder.stored.values() if stored.encoded)
    assert sum(unit.packed for unit in ModelFacts.of_folder(folder).units.values()) == nbytes


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("place", ["pinned", "pageable", "disk"])
def test_it_streams_to_the_same_bits(mixed: Path, place: str) -> None:
    resident = drawn(pipeline(mixed, Residency()))
    pipe = pipeline(mixed, Residency(UNITS, 3, place))
    assert torch.equal(drawn(pipe), resident)
    pipe.close()


def test_what_is_multiplied_together_is_quantised_together(tmp_path: Path) -> None:
    linear = linears("Q8_0")
    path = write_gguf(tmp_path / "a.gguf", lambda name: None if "k_proj" in name else linear(name))
    with pytest.raises(CheckpointError, match="some are quantised and some are not"):
        BagelPipeline.from_pretrained(path, device="cpu")
