"""Previews take their share of a request's time, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from support.serving import PROMPT, running_service

from lowmem_bagel.generation.conversing import Said
from lowmem_bagel.generation.executor import Begun, Repeated, Token
from lowmem_bagel.sampling.denoise import Step
from lowmem_bagel.sampling.text import Decoded
from lowmem_bagel.serve import watch
from lowmem_bagel.serve.jobs import Job
from lowmem_bagel.serve.service import Service
from lowmem_bagel.serve.watch import PREVIEW_SHARE, Watch


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as made:
        yield made


@pytest.mark.parametrize(("step_seconds", "preview_seconds"), [(1.0, 0.002), (1.0, 0.1), (0.01, 0.05)])
def test_previews_keep_to_their_share(
    step_seconds: float, preview_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0, shown=0)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock.now)

    def show(_: torch.Tensor) -> Image.Image:
        clock.now += preview_seconds
        clock.shown += 1
        return Image.new("RGB", (2, 2))

    job = Job(None, "a", 1.0, previews=True)  # type: ignore[arg-type]
    job.started = clock.now
    watching = Watch(job, None, 1e9)  # type: ignore[arg-type]
    latent = torch.zeros(1, 1)
    for index in range(1000):
        clock.now += step_seconds
        assert watching(Step(index, 1000, 0.5, latent, latent, show))
    spent, drawn = clock.shown * preview_seconds, clock.now - 100
    assert job.progress.preview is not None
    assert spent <= PREVIEW_SHARE * drawn + preview_seconds
    assert spent > PREVIEW_SHARE * drawn / 2 or clock.shown == 1000


def test_an_answer_that_begins_again_shows_no_token_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after running out of memory."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock.now)
    tokenizer = SimpleNamespace(decode_generated=lambda ids: "-".join(map(str, ids)))
    job = Job(None, "a", 1.0)  # type: ignore[arg-type]
    job.started = clock.now
    watching = Watch(job, SimpleNamespace(model=SimpleNamespace(tokenizer=tokenizer)), 1e9)  # type: ignore[arg-type]
    seen = []
    for index in (1, 2, 3, 1, 2, 3, 4):
        clock.now += 1
        watching(Token(10 + index, index, 9))
        seen.append(job.progress.text)
    assert seen == ["11", "11-12", "11-12-13", "11", "11-12", "11-12-13", "11-12-13-14"]


def test_pieces_of_an_answer_come_one_after_the_other_and_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(decode_generated=lambda ids: "-".join(map(str, ids)))
    job = Job(None, "a", 1.0)  # type: ignore[arg-type]
    job.started = watch.time.monotonic()
    watching = Watch(job, SimpleNamespace(model=SimpleNamespace(tokenizer=tokenizer)), 1e9)  # type: ignore[arg-type]
    said = Said("a", Decoded([1, 2], None))
    for event, pieces, text in (
        (Begun(), (), ""), (Token(11, 2, 9), (), "11"), (said, (said,), ""), (Begun(), (), ""),
        (Token(12, 2, 9), (), "12"), (said, (said,), ""), (Repeated(), (said,), ""), (Token(13, 2, 9), (said,), "13"),
    ):  # fmt: skip
        watching._text_at = 0.0
        assert watching(event)
        assert (tuple(job.progress.pieces), job.progress.text) == (pieces, text)
    job.stop(RuntimeError("stop"))
    assert not watching(Repeated())


@pytest.mark.parametrize("wanted", [True, False])
def test_a_picture_is_shown_as_it_forms_where_that_is_wanted(service: Service, wanted: bool) -> None:
    settings: dict[str, Any] = {"seed": 1, "num_timesteps": 20}
    job = service.submit([PROMPT], "image", settings, "a", previews=wanted)
    shown: list[Image.Image] = []
    progress = job.wait(-1)
    while not progress.over:
        progress = job.wait(progress.version, 60)
        shown += [progress.preview] if progress.preview is not None else []
    assert progress.preview is None
    assert bool(shown) == wanted
    assert progress.result is not None and progress.result.image is not None
    assert all(picture.width == progress.result.image.width // 8 for picture in shown)
