"""Fixtures that many tests share: the reference checkpoint, a copy of it to spoil, and the command line in-process.

A plugin of pytest's, taken by the `conftest.py` of the tests in processes that run some.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.manifest import MANIFEST_NAME
from lowmem_bagel.cli import main
from lowmem_bagel.formats.int8 import cpu_choice
from lowmem_bagel.kernels import nvrtc
from lowmem_bagel.ops.attention import select
from support import cuda_emulation, forked
from support.command import Ran
from support.cuda_emulation import CudaSources
from support.int_mm import exact_int_mm as exact_int_mm
from support.int_mm import saturating_int_mm as saturating_int_mm
from support.numeric import poisoned as poisoned
from support.paths import CHECKPOINT
from support.rewriting import rewrite_share
from support.streaming import fake_cuda as fake_cuda

if TYPE_CHECKING:
    from support.browser import Browser

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Numbers of malloc.h."""


def pytest_configure() -> None:
    """Test models are so small that more threads would only wait for each other, for minutes on a busy machine; and on
    one, an example that takes long is no fault."""
    forked.keep_spares()
    torch.set_num_threads(1)
    keep_freed_memory()
    settings.register_profile("without deadline", deadline=None)
    settings.load_profile("without deadline")


def keep_freed_memory() -> None:
    """glibc gives what a large tensor had back to the kernel, and the next one's pages are cleared and mapped again: a
    quarter of what a convolution of a large picture takes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for which, size in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 1 << 29), (M_TOP_PAD, 1 << 24)):
            mallopt(which, size)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    rewrite_share(session.config)


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: no test that collects garbage, and no benchmark that frees its models,
    goes through it again, which takes half a second each time."""
    keep_what_is_there(len(sys.modules) // 500)
    gc.set_threshold(50_000, 20, 20)
    hand_on_what_pytorch_logs(len(logging.root.manager.loggerDict))


def pytest_runtest_logstart() -> None:
    """Tests import more of PyTorch: its compiler alone has forty loggers, and a million objects come with it."""
    hand_on_what_pytorch_logs(len(logging.root.manager.loggerDict))
    keep_what_is_there(len(sys.modules) // 500)


@cache
def keep_what_is_there(half_thousands: int) -> None:
    """Done again whenever there are so many modules more. What a fixture has by then and gives up later in a cycle
    stays too, which is little: it happens a few times a session."""
    gc.collect()
    gc.freeze()


@cache
def hand_on_what_pytorch_logs(loggers: int) -> None:
    """PyTorch's loggers hand nothing on, so pytest would put its handlers on each of them and take them off again, six
    times a test. Done whenever there are more `loggers`."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.fixture(autouse=True, scope="session")
def tried_once() -> Iterator[None]:
    """What every load does anew, some hundred loads of a session once: the numbers that attention is tried with are
    always the same, and which way of INT8 this processor does faster is timed for half a second."""
    compare, timings = cpu_choice.compare, dict[Any, list[cpu_choice.Timing]]()

    def compared(integer: Any, dequantized: Any, dtype: torch.dtype, clock: Any = time.perf_counter) -> Any:
        if clock is not time.perf_counter:
            return compare(integer, dequantized, dtype, clock)
        key = type(integer), type(dequantized), dtype, torch.get_num_threads()
        if key not in timings:
            timings[key] = compare(integer, dequantized, dtype, clock)
        return timings[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_choice, "compare", compared)
        patch.setattr(select, "_trials", cache(select._trials))
        yield


@pytest.fixture(scope="session")
def reference_checkpoint() -> Path:
    """A small random model in the published layout. Not to be written to."""
    return CHECKPOINT


@pytest.fixture
def spoilable(tmp_path: Path) -> Path:
    """A copy of the reference checkpoint that a test may damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


@pytest.fixture(scope="session")
def variant_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The reference checkpoint in a format, by its name in `CONVERTERS`: converted once for all tests, whichever worker
    runs them, and not to be written to."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    @cache
    def made(name: str) -> Path:
        from lowmem_bagel.converters.engine.convert import convert

        from support.conversion_helpers import CONVERTERS

        out = folder / "variants-of-the-reference" / name.replace(" ", "-")
        out.parent.mkdir(exist_ok=True)
        with FileLock(f"{out}.lock"):
            if not (out / MANIFEST_NAME).exists():
                convert(CHECKPOINT, out, CONVERTERS[name]())
        return out

    return made


@pytest.fixture(scope="session")
def small_variant_of(
    variant_of: Callable[[str], Path], small_pictures: BagelPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The same with the limits of `small_pictures`, which are no part of what is converted."""

    @cache
    def made(name: str) -> Path:
        folder = Path(shutil.copytree(variant_of(name), tmp_path_factory.mktemp("small") / name))
        shutil.copy(small_pictures.model.folder.path / "resize_config.json", folder)
        return folder

    return made


@pytest.fixture(scope="session")
def pipe() -> BagelPipeline:
    """The reference checkpoint in float32 on the CPU."""
    return BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A browser, to be had by one person after the other."""
    from support import browser  # which most runs of a few tests need not

    with browser.chromium() as one:
        yield one


@pytest.fixture(scope="session")
def small_pictures(tmp_path_factory: pytest.TempPathFactory) -> BagelPipeline:
    """The reference checkpoint with limits that keep input pictures small, which makes edits a hundred times faster."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path_factory.mktemp("small") / "model"))
    vae = {"max_side": 128, "min_side": 32, "stride": 16}
    vit = {"max_side": 112, "min_side": 28, "stride": 14}
    (folder / "resize_config.json").write_text(json.dumps({"vae": vae, "vit": vit}))
    return BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(params=["ascending", "descending", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_sources(request: pytest.FixtureRequest) -> Iterator[CudaSources]:
    """Emulated, in either order of a block's threads, or on a card; the device is torch's default in the test."""
    device = torch.device("cuda" if request.param == "cuda" else "cpu")
    load = None
    if device.type == "cuda":
        if reason := nvrtc.why_unavailable(device):
            pytest.skip(reason)
    elif cuda_emulation.compiler() is None:
        pytest.skip("the emulation needs g++")
    else:
        descending = request.param == "descending"

        def load(source: str, defines: dict[str, int]) -> cuda_emulation.Module:
            return cuda_emulation.Module(source, defines, descending)

    with device:
        yield CudaSources(device, load)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`cli("generate", "a circle", "-o", path)`: runs the real command line in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["lowmem-bagel", *map(str, arguments)])
        capsys.readouterr()
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as exit:
            main()
        torch.set_num_threads(threads)  # a command may choose its process's; here it shares ours
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Ran(exit.value.code, captured.out, captured.err)

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `first` are. A name with an address in it is another one in each worker of pytest-xdist, which then
    runs nothing at all."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"{named[0]}: its name holds an address; give its parameters ids of their own")
    if not torch.cuda.is_available():
        leave_out_gpu(config, items)


def leave_out_gpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a file's tests marked `gpu` the first is skipped, with the reason; each of the others, a thousand and a half,
    would be prepared and reported to say the same."""
    of_files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold names of folders too
            of_files.setdefault(item.path, []).append(item)
    left_out: set[pytest.Item] = set()
    for first, *others in of_files.values():
        reason = f"needs a CUDA GPU, as {len(others)} others here do" if others else "needs a CUDA GPU"
        first.add_marker(pytest.mark.skip(reason=reason))
        left_out.update(others)
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]
