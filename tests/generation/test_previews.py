"""Previews of a picture as it forms: they show it, cost nothing where nobody asks, and disturb nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pictures import noise

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import Cancelled
from lowmem_bagel.generation.executor import Token
from lowmem_bagel.model.preview import LatentColors
from lowmem_bagel.sampling.denoise import Step

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_timesteps": 5, "seed": 3}


@pytest.fixture
def pipe(reference_checkpoint: Path) -> BagelPipeline:
    """One of its own, that has shown nothing yet."""
    return BagelPipeline.from_pretrained(reference_checkpoint, device="cpu", dtype="float32")


def test_previews_change_no_bit_and_draw_nothing(pipe: BagelPipeline) -> None:
    plain = pipe.generate("a red circle", **SMALL)
    sizes: list[tuple[int, int]] = []
    numbers: list[tuple[int, int]] = []
    state = torch.get_rng_state()

    def show(step: Step | Token) -> None:
        assert isinstance(step, Step)
        sizes.append(step.preview().image().size)
        numbers.append((step.index, step.total))

    shown = pipe.generate("a red circle", callback=show, **SMALL)
    assert sizes == [(6, 4)] * 4, "an eighth of 48x32"
    assert numbers == [(index, 4) for index in range(4)]
    assert shown.latent is not None and plain.latent is not None and torch.equal(shown.latent, plain.latent)
    assert np.array_equal(np.asarray(shown.image), np.asarray(plain.image))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_last_preview_is_of_the_finished_latent(pipe: BagelPipeline) -> None:
    steps: list[Step] = []
    drawn = pipe.generate("a red circle", callback=steps.append, **SMALL)  # type: ignore[arg-type]
    assert drawn.latent is not None
    assert np.array_equal(np.asarray(steps[-1].preview().image()), np.asarray(steps[-1].show(drawn.latent)))
    assert not np.array_equal(np.asarray(steps[0].preview().image()), np.asarray(steps[-1].preview().image()))


def test_nothing_is_fitted_where_nobody_asks(pipe: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []
    monkeypatch.setattr("lowmem_bagel.runtime.loaded.LatentColors", lambda vae: fitted.append(vae) or LatentColors(vae))
    pipe.generate("a red circle", callback=lambda _: None, **SMALL)
    assert not fitted
    for _ in range(2):
        pipe.generate("a red circle", callback=lambda step: step.preview().image() and None, **SMALL)  # type: ignore[union-attr]
    assert len(fitted) == 1, "once a model"


class Visits:
    """Stands for an autoencoder that waits in RAM, and notes when it visits."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self.seen.append("autoencoder")
        yield


def test_an_autoencoder_that_waits_in_ram_does_not_visit_between_steps(pipe: BagelPipeline) -> None:
    seen: list[str] = []
    pipe.model.staged = {"vae": Visits(seen)}  # type: ignore[dict-item]

    def show(step: Any) -> None:
        step.preview().image()
        seen.append("step")

    for wanted in (["autoencoder"], []):
        seen.clear()
        pipe.generate("a red circle", callback=show, **SMALL)
        assert seen == [*wanted, *["step"] * 4, "autoencoder"], "it decodes at the end"
    seen.clear()
    pipe.ask("what is it?", callback=lambda _: None, max_new_tokens=2)
    assert not seen


def test_a_request_that_a_preview_breaks_off_leaves_all_as_it_was(small_pictures: BagelPipeline) -> None:
    picture = noise(32, 32)
    wanted = small_pictures.edit(picture, "make it red", **SMALL).latent

    def stop(step: Any) -> bool:
        return bool(step.preview().image() is None)

    with pytest.raises(Cancelled):
        small_pictures.edit(picture, "make it red", callback=stop, **SMALL)
    found = small_pictures.edit(picture, "make it red", **SMALL).latent
    assert wanted is not None and found is not None and torch.equal(found, wanted)
