"""Folders of random quantised weights at a true shape, in memory alone: for measuring speed and memory.

The numbers are random in the format's own terms (int8 values, NF4 codes); DFloat11 codes one layer's random weights
and uses them for every layer, since the decoder's speed depends on their distribution only.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import Manifest
from lowmem_bagel.checkpoint.safetensors_file import DTYPE_BYTES, SafetensorsFile, TensorEntry
from lowmem_bagel.checkpoint.tensors import EXPERTS, TensorSpec, tensor_table
from lowmem_bagel.demo_checkpoint import FOLDER as TOKENIZER_FOLDER

from .synthetic import SHAPES, WEIGHT_STD, make_tensor, shape_of, synthetic_folder

if TYPE_CHECKING:
    import torch

Make = Callable[[], "torch.Tensor"]


class MadeFile:
    """Stands for a safetensors file: entries by name, tensors made when they are read."""

    def __init__(self) -> None:
        self.path = Path("synthetic.safetensors")
        self.entries: dict[str, TensorEntry] = {}
        self._make: dict[str, Make] = {}
        self._end = 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...], make: Make) -> None:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        self.entries[name] = TensorEntry(name, dtype, shape, self._end, nbytes)
        self._make[name] = make
        self._end += nbytes

    def tensor(self, name: str) -> torch.Tensor:
        return self._make[name]()


def variant_folder(format: str, shape: str, device: str) -> ModelFolder:
    """A folder of the format: "source", "int8", "nf4" or "dfloat11"."""
    if format == "source":
        return synthetic_folder(shape, device)
    if format == "dfloat11":
        return _dfloat11(shape, device)
    return _quantised(format, shape, device)


def _plain(file: MadeFile, spec: TensorSpec, device: str) -> None:
    dtype = "F32" if spec.part == "vae" else "BF16"
    file.add(spec.name, dtype, shape_of(spec), lambda: make_tensor(spec, device))


def _quantised(format: str, shape: str, device: str) -> ModelFolder:
    import torch

    config, file, records = SHAPES[shape], MadeFile(), {}
    for name, spec in tensor_table(config).items():
        stored: tuple[str, ...] = (name,)
        if spec.linear is None:
            _plain(file, spec, device)
        else:
            rows, columns = shape_of(spec)
            if format == "int8":
                stored = (name, f"{name}_scale")
                file.add(name, "I8", (rows, columns), _integers(-127, 128, (rows, columns), torch.int8, device))
                file.add(stored[1], "F32", (rows,), _constant(3 * WEIGHT_STD / 127, (rows,), device))
            else:
                stored = (name, f"{name}_absmax")
                file.add(name, "U8", (rows, columns // 2), _integers(0, 256, (rows, columns // 2), torch.uint8, device))
                file.add(
                    stored[1], "F32", (rows, columns // 64), _constant(2.5 * WEIGHT_STD, (rows, columns // 64), device)
                )
        encoding = "bf16" if spec.linear is None else format
        records[name] = SimpleNamespace(name=name, encoding=encoding, stored=stored, options={}, shape=shape_of(spec))
    manifest = SimpleNamespace(format=format, experts=EXPERTS, tensors=records, options={})
    return ModelFolder(TOKENIZER_FOLDER, config, format, cast(Manifest, manifest), [cast(SafetensorsFile, file)])


def _integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Make:
    import torch

    return lambda: torch.randint(low, high, shape, dtype=dtype, device=device)


def _constant(value: float, shape: tuple[int, ...], device: str) -> Make:
    import torch

    return lambda: torch.full(shape, value, dtype=torch.float32, device=device)


def _dfloat11(shape: str, device: str) -> ModelFolder:
    from lowmem_bagel.formats.dfloat11.codec import encode
    from lowmem_bagel.formats.dfloat11.groups import COMPONENTS, own_config, stored_name

    config, file = SHAPES[shape], MadeFile()
    encoded: dict[tuple[int, ...], Mapping[str, Any]] = {}
    for spec in tensor_table(config).values():
        if spec.linear is None:
            _plain(file, spec, device)
            continue
        size = shape_of(spec)
        if size not in encoded:
            encoded[size] = encode([make_tensor(spec, device).cpu()]).tensors
        for component, tensor in encoded[size].items():
            name = stored_name(spec.name.removesuffix(".weight"), component)
            file.add(name, COMPONENTS[component], tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
    folder = Path(tempfile.mkdtemp(prefix="lowmem-bagel-"))
    for path in TOKENIZER_FOLDER.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "merges")):
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": own_config()}))
    return ModelFolder(folder, config, "dfloat11", None, [cast(SafetensorsFile, file)])
