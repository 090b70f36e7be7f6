"""Two pipelines on one card: each keeps its promise of memory, and both draw at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.cards import ARITHMETIC, RESIDENT, STREAMED, Told, every_format, pipeline_on, told
from support.threads import at_once

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import CheckpointError
from lowmem_bagel.hardware.profile import CONTEXT_BYTES
from lowmem_bagel.runtime import loaded, loader, memory_promise
from lowmem_bagel.runtime.memory_promise import MemoryPromises

pytestmark = pytest.mark.gpu

GB = 1_000_000_000
CARD = torch.device("cuda", 0)
SPARE = GB // 5
"""A limit is found to so many bytes: the allocator rounds."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return every_format(tmp_path_factory.mktemp("variants"))


@pytest.fixture
def promises(monkeypatch: pytest.MonkeyPatch) -> MemoryPromises:
    """Of the pipelines of this test alone, by torch's own limit."""
    if torch.cuda.mem_get_info(CARD)[0] < 8 * GB:
        pytest.skip("needs 8 GB of free memory")
    made = MemoryPromises(torch.cuda.set_per_process_memory_fraction, memory_promise._total_bytes)
    for module in (loader, loaded):
        monkeypatch.setattr(module, "PROMISES", made)
    return made


def promising(folder: Path, size: int | None) -> BagelPipeline:
    return pipeline_on("cuda:0", folder, "bfloat16", RESIDENT, max_vram=size)


def fits(nbytes: int) -> bool:
    """Whether torch lets so much be allocated now, all it keeps aside."""
    try:
        return torch.empty(nbytes - torch.cuda.memory_reserved(CARD), dtype=torch.uint8, device=CARD).is_cuda
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def limited_to(promised: int) -> bool:
    """Whether torch is held to a promise, no more and no less."""
    allowed = promised - CONTEXT_BYTES
    return fits(allowed - SPARE) and not fits(allowed + SPARE)


@pytest.mark.usefixtures("promises")
@pytest.mark.parametrize("first_ends_first", [True, False])
def test_promises_are_kept_when_either_ends_first(folders: dict[str, Path], first_ends_first: bool) -> None:
    pipes = {3 * GB: promising(folders["source"], 3 * GB), 2 * GB: promising(folders["int8"], 2 * GB)}
    assert limited_to(5 * GB)
    ending, left = sorted(pipes, reverse=first_ends_first)
    pipes[ending].close()
    assert limited_to(left)
    assert told(pipes[left]).answer
    pipes[left].close()
    assert fits(5 * GB)


@pytest.mark.usefixtures("promises")
def test_a_load_that_fails_leaves_the_others_promise(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> object:
        raise CheckpointError("injected")

    def failing() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(loader, "UnitBuffers", fail)
            with pytest.raises(CheckpointError, match="injected"):
                promising(folders["int8"], 2 * GB)

    failing()
    assert fits(5 * GB), "it had promised, and is not there"
    pipe = promising(folders["source"], 3 * GB)
    failing()
    assert limited_to(3 * GB)
    pipe.close()
    assert fits(5 * GB)


@pytest.mark.usefixtures("promises")
def test_nothing_is_limited_while_one_promises_nothing(folders: dict[str, Path]) -> None:
    promised, free = promising(folders["source"], 3 * GB), promising(folders["int8"], None)
    assert fits(5 * GB)
    free.close()
    assert limited_to(3 * GB)
    promised.close()


@pytest.mark.parametrize("formats", [("source", "dfloat11"), ("int8", "nf4"), ("fp16", "source")])
def test_two_threads_on_one_card_at_once(folders: dict[str, Path], formats: tuple[str, str]) -> None:
    """One empties the cache for its edits and streams while the other captures graphs."""
    held = (RESIDENT, STREAMED)
    pipes = [
        pipeline_on("cuda:0", folders[name], ARITHMETIC[name], residency)
        for name in formats for residency in held
    ]  # fmt: skip
    wanted = [told(pipe) for pipe in pipes]

    def rounds(pipe: BagelPipeline) -> Callable[[], list[Told]]:
        return lambda: [told(pipe) for _ in range(3)]

    assert at_once([rounds(pipe) for pipe in pipes]) == [[want] * 3 for want in wanted]
    for pipe in pipes:
        assert "cannot be captured" not in pipe.model.plan.reasons.get("text decoding by graph", "")
        pipe.close()


def test_two_threads_on_one_pipeline(folders: dict[str, Path]) -> None:
    """DFloat11's linears share the buffer that they decode into."""
    pipe = pipeline_on("cuda:0", folders["dfloat11"], "bfloat16", RESIDENT)
    wanted = told(pipe)
    assert at_once([lambda: told(pipe)] * 3) == [wanted] * 3
