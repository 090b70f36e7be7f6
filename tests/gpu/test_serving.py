"""The server on a real GPU: its thread draws the pipeline's bits, shows them as they form; metrics tell its memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.serving import PROMPT, client_for, until

from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.serve.app import create_app
from lowmem_bagel.serve.options import ServeOptions
from lowmem_bagel.serve.service import Service
from lowmem_bagel.settings import LoadOptions

pytestmark = pytest.mark.gpu

DRAWING = {"seed": 3, "num_timesteps": 50}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service(FOLDER, LoadOptions(device="cuda"), ServeOptions(page=False))
    made.start()
    until(lambda: made.loaded or made.failure)
    assert made.failure is None
    yield made
    made.close(finish=False)


def test_pictures_are_the_pipelines_with_previews_and_without(service: Service) -> None:
    assert service.loaded is not None
    wanted = service.loaded.pipeline.generate(PROMPT, **DRAWING).latent
    for previews in (False, True):
        job = service.submit([PROMPT], "image", DRAWING, "a", previews)
        shown = False
        progress = job.wait(-1)
        while not progress.over:
            progress = job.wait(progress.version, 60)
            shown |= progress.preview is not None
        assert progress.result is not None and progress.result.latent is not None
        assert torch.equal(progress.result.latent, wanted)
        assert shown == previews


def test_metrics_tell_of_the_cards_memory(service: Service) -> None:
    text = client_for(create_app(service)).get("/metrics").text
    found = dict(line.split() for line in text.splitlines() if line.startswith("lowmem_bagel_device"))
    allocated, reserved, total = (
        float(found[f"lowmem_bagel_device_{name}_bytes"]) for name in ("allocated", "reserved", "total")
    )
    assert 0 < allocated <= reserved < total
