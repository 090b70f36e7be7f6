"""Whose variants are compared: a checkpoint on disk, or random weights that every variant is encoded from."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from lowmem_bagel.errors import SettingError

from ...conversions import CASES, convert

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_bagel.checkpoint.folder import ModelFolder
    from lowmem_bagel.checkpoint.manifest import Manifest
    from lowmem_bagel.checkpoint.safetensors_file import SafetensorsFile
    from lowmem_bagel.checkpoint.tensors import TensorSpec


class InMemory(Protocol):
    """An encoded tensor: see `converters.engine.in_memory`."""

    @property
    def encoding(self) -> str: ...
    @property
    def stored(self) -> Mapping[str, Tensor]: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


class _Kept(NamedTuple):
    encoding: str
    stored: Mapping[str, Tensor]
    options: Mapping[str, Any]


class Checkpoint:
    """A checkpoint's folder. Its variants are converted into a temporary folder, or are the folders named."""

    random = False
    """Whether its pictures and answers mean nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def source(self, lora: Sequence[str] = ()) -> ModelFolder:
        from lowmem_bagel.checkpoint.folder import ModelFolder

        return ModelFolder.open(self.path, lora=lora)

    @contextmanager
    def variant(self, name: str) -> Iterator[ModelFolder]:
        from lowmem_bagel.checkpoint.folder import ModelFolder

        if name not in CASES:
            yield ModelFolder.open(name)
            return
        with TemporaryDirectory(prefix="lowmem-bagel-") as work:
            convert(self.path, Path(work) / "variant", name)
            yield ModelFolder.open(Path(work) / "variant")


class RandomWeights:
    """Random weights at a true shape in RAM, the same numbers in every variant: each tensor has a seed of its own.

    Variants are encoded from them by the installed converters. layers: of the decoder, None for all.
    """

    random = True

    def __init__(self, shape: str, layers: int | None, device: str, seed: int) -> None:
        from ...shapes import shape_named

        config = shape_named(shape)
        if layers is not None:
            if not 1 <= layers <= config.decoder.num_layers:
                raise SettingError(f"--layers must be from 1 to {config.decoder.num_layers} of {shape}, not {layers}")
            config = replace(config, decoder=replace(config.decoder, num_layers=layers))
        self.config, self.device, self.seed = config, device, seed
        self._place = TemporaryDirectory(prefix="lowmem-bagel-")

    @cached_property
    def tensors(self) -> dict[TensorSpec, Tensor]:
        """On the host."""
        from lowmem_bagel.checkpoint.tensors import tensor_table
        from lowmem_bagel.ops.device import empty_cache

        from ...synthetic import begin_at, make_tensor

        made = {}
        for spec in tensor_table(self.config).values():
            begin_at(self.seed ^ zlib.crc32(spec.name.encode()))
            made[spec] = make_tensor(spec, self.device).cpu()
        empty_cache()  # what torch keeps of it is the models'
        return made

    def source(self) -> ModelFolder:
        kept = {spec: _Kept("", {spec.name: tensor}, {}) for spec, tensor in self.tensors.items()}
        return self._folder("source", kept, {})

    @contextmanager
    def variant(self, name: str) -> Iterator[ModelFolder]:
        (tool,) = entry_points(group="lowmem_bagel.tools", name="encode")
        format, options = CASES[name]
        yield self._folder(format, *tool.load()(format, options, self.tensors))

    def _folder(self, format: str, encoded: Mapping[TensorSpec, InMemory], entries: Mapping[str, Any]) -> ModelFolder:
        from lowmem_bagel.checkpoint.folder import ModelFolder
        from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES

        from ...synthetic import MadeFile

        made = []
        for weight in encoded.values():
            kind = weight.encoding.removeprefix("gguf-").upper()
            for name, tensor in weight.stored.items():
                held, dtype = (tensor.reshape(-1), kind) if kind in BLOCK_TYPES else (tensor, _dtype_name(tensor))
                made.append((name, dtype, tuple(held.shape), partial(_itself, held)))
        file = cast("SafetensorsFile", MadeFile(made))
        # A format that keeps itself in config.json is read by that alone.
        manifest = None if format == "source" or entries else self._manifest(format, encoded)
        return ModelFolder(self._companions(format, entries), self.config, format, manifest, [file])

    def _manifest(self, format: str, encoded: Mapping[TensorSpec, InMemory]) -> Manifest:
        """As much of it as loading reads."""
        from lowmem_bagel.checkpoint.tensors import EXPERTS

        tensors = {
            spec.name: SimpleNamespace(
                name=spec.name, encoding=weight.encoding, stored=tuple(weight.stored), options=weight.options,
                errors={}, shape=tuple(self.tensors[spec].shape),
            )
            for spec, weight in encoded.items()
        }  # fmt: skip
        return cast("Manifest", SimpleNamespace(format=format, experts=EXPERTS, tensors=tensors, options={}))

    def _companions(self, format: str, entries: Mapping[str, Any]) -> Path:
        """The demo checkpoint's tokenizer, beside a `config.json` where the format keeps itself there."""
        from lowmem_bagel.demo_checkpoint import FOLDER

        from ...synthetic import TOKENIZER_FILES

        if not entries:
            return FOLDER
        folder = Path(self._place.name) / format
        folder.mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:
            shutil.copy(FOLDER / name, folder / name)
        (folder / "config.json").write_text(json.dumps(entries), encoding="utf-8")
        return folder


def stored_bytes(folder: ModelFolder) -> int:
    """What a folder's tensors take where they are stored."""
    return sum(stored.entry.nbytes for stored in folder.stored.values())


def check_variants(names: Sequence[str], random: bool) -> None:
    """Refuse what is neither a conversion that is known nor a folder.

    Raises:
        SettingError: with those that are.
    """
    for name in names:
        if name not in CASES and (random or not Path(name).is_dir()):
            more = "" if random else ", or a variant's folder"
            raise SettingError(f"unknown variant {name!r}; choose from {', '.join(CASES)}{more}")


def adapters_in(folder: Path) -> dict[str, str]:
    """Adapters by name: the folder itself, or those that it holds.

    Raises:
        SettingError: there is none.
    """
    found = [path for path in (folder, *sorted(folder.glob("*/"))) if (path / "adapter_config.json").is_file()]
    if not found:
        raise SettingError(f"{folder} is no LoRA adapter and holds none; PEFT saves one with its adapter_config.json")
    return {path.name: str(path) for path in found}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _dtype_name(tensor: Tensor) -> str:
    from lowmem_bagel.checkpoint.safetensors_file import DTYPE_BYTES, torch_dtype

    return next(name for name in DTYPE_BYTES if torch_dtype(name) == tensor.dtype)
