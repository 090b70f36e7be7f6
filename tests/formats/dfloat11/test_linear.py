"""Linears that decode DFloat11 at use, resident and streamed, without a GPU: the pictures of the source, to the bit.

Our kernel is its own source, emulated; the package's is replaced by the CPU codec, reading and writing at the addresses
that the kernel would be given.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowmem_bagel.benchmarks.baselines import dfloat11 as package_dfloat11
from support import cuda_emulation
from support.paths import CHECKPOINT
from support.streaming import UNITS, drawn, pipeline

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import LM_HEAD
from lowmem_bagel.errors import MissingExtraError, SettingError
from lowmem_bagel.formats.base import Site
from lowmem_bagel.formats.dfloat11 import kernels as kernel
from lowmem_bagel.formats.dfloat11 import linear
from lowmem_bagel.formats.dfloat11.codec import decode, from_tensors
from lowmem_bagel.formats.dfloat11.linear import DFloat11Linears
from lowmem_bagel.formats.dfloat11.spec import AT_USE
from lowmem_bagel.formats.linears import stored_linears
from lowmem_bagel.formats.spec import Requires
from lowmem_bagel.planner.plan import Residency
from lowmem_bagel.runtime import reading
from lowmem_bagel.runtime.reading import Readers

PLACES = [Residency(), Residency(UNITS[::2], 2, "pageable"), Residency(UNITS, 3, "disk")]


@pytest.fixture(scope="module")
def folder(variant_of: Callable[[str], Path]) -> Path:
    return variant_of("dfloat11")


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    return drawn(pipeline(CHECKPOINT, Residency()))


@pytest.fixture
def kept_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a card is not asked whether there is one."""
    unmet = Requires.unmet
    monkeypatch.setattr(Requires, "unmet", lambda self, here: None if self is AT_USE else unmet(self, here))


@pytest.mark.skipif(cuda_emulation.compiler() is None, reason="needs g++ to emulate the kernel")
@pytest.mark.usefixtures("fake_cuda", "kept_compressed")
@pytest.mark.parametrize("residency", PLACES, ids=["resident", "half streamed", "from disk"])
def test_our_kernel(folder: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch, residency: Residency) -> None:
    monkeypatch.setattr(kernel, "why_unavailable", lambda device: None)
    module = cuda_emulation.Module(kernel.SOURCE, {"TABLE_BITS": kernel.TABLE_BITS})
    monkeypatch.setattr(kernel, "decoder_module", lambda device, table_bits: module)
    pipe = pipeline(folder, residency, linears="auto")
    assert pipe.model.plan.reasons["linears"] == "dfloat11 (decoded at use)"
    assert torch.equal(drawn(pipe), wanted)


def at(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def decode_at(blocks: int, shared_bytes: int, addresses: Sequence[int], numbers: Sequence[int]) -> None:
    """What the package's kernel does with its arguments."""
    luts, encoded, signs, positions, gaps, out = addresses
    tables, encoded_bytes, weights = numbers
    assert blocks == -(-encoded_bytes // 4096)
    found = at(positions, 4 * (blocks + 1)).view(np.uint32).astype(np.int64)
    assert found[-1] == weights, "the kernel reads the end mark"
    assert shared_bytes == 2052 + 2 * np.diff(found).max()
    tensors = {
        "luts": at(luts, 256 * tables).reshape(tables, 256),
        "encoded_exponent": at(encoded, encoded_bytes),
        "sign_mantissa": at(signs, weights),
        "output_positions": at(positions, 4 * (blocks + 1)),
        "gaps": at(gaps, -(-blocks * 512 * 5 // 8)),
        "split_positions": np.zeros(0, np.int64),
    }
    copies = {name: torch.from_numpy(values.copy()) for name, values in tensors.items()}
    at(out, 2 * weights)[:] = decode(from_tensors(copies, "group")).view(torch.uint8).numpy()


@pytest.mark.usefixtures("fake_cuda", "kept_compressed")
@pytest.mark.parametrize("residency", PLACES, ids=["resident", "half streamed", "from disk"])
def test_the_packages_kernel(
    folder: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch, residency: Residency
) -> None:
    monkeypatch.setattr(package_dfloat11, "launcher", lambda device: (decode_at, "a stand-in"))
    pipe = pipeline(folder, residency, linears="dfloat11")
    assert "package's kernel through a stand-in" in pipe.model.plan.reasons["linears"]
    assert torch.equal(drawn(pipe), wanted)


def chosen(folder: Path, dtype: torch.dtype) -> object:
    return stored_linears(Site(ModelFolder.open(folder), torch.device("cpu"), dtype, "dfloat11", {}))


@pytest.mark.usefixtures("kept_compressed")
def test_the_package_is_asked_for_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="bfloat16 alone"):
        chosen(folder, torch.float16)
    monkeypatch.setattr(package_dfloat11.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "lowmem-bagel\[dfloat11\]"'):
        chosen(folder, torch.bfloat16)
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "dfloat11")
    with pytest.raises(SettingError, match="switched off"):
        chosen(folder, torch.bfloat16)


@pytest.mark.usefixtures("kept_compressed")
def test_the_packages_ptx_is_found_without_importing_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "dfloat11"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no GPU here')")
    (package / "decode.ptx").write_bytes(b".version 8.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_dfloat11.ptx_file() == package / "decode.ptx"
    loaded: list[Path] = []
    monkeypatch.setattr(package_dfloat11, "_by_driver", lambda path, device: loaded.append(path) or decode_at)
    assert isinstance(chosen(folder, torch.bfloat16), DFloat11Linears)
    assert loaded == [package / "decode.ptx"]


@pytest.mark.usefixtures("fake_cuda", "kept_compressed")
def test_what_is_stored_as_it_is_used_is_read_while_a_weight_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding waits until another thread has been given a tensor that is not decoded."""
    monkeypatch.setattr(package_dfloat11, "launcher", lambda device: (decode_at, "a stand-in"))
    monkeypatch.setattr(reading, "CHUNK", 1 << 16)  # a small model has one reader
    given, decode_weights, read = threading.Event(), linear.decode_weights, DFloat11Linears.read
    decoded: list[str] = []

    def slow(*arguments: Any, name: str, **named: Any) -> list[torch.Tensor]:
        assert given.wait(30), "nobody is given anything meanwhile"
        decoded.append(name)
        return decode_weights(*arguments, name=name, **named)

    def told(linears: DFloat11Linears, name: str) -> torch.Tensor | None:
        found = read(linears, name)
        if name.endswith("output_positions"):
            given.set()
        return found

    monkeypatch.setattr(linear, "decode_weights", slow)
    monkeypatch.setattr(DFloat11Linears, "read", told)
    pipeline(folder, Residency(), linears="dfloat11").close()
    assert LM_HEAD.removesuffix(".weight") in decoded


def test_what_compiles_the_loops_is_imported_before_threads_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    begin = Readers.__enter__
    monkeypatch.setattr(linear, "import_loops", lambda: order.append("import"))
    monkeypatch.setattr(Readers, "__enter__", lambda readers: order.append("read") or begin(readers))
    pipeline(folder, Residency()).close()
    assert order == ["import", "read"]
