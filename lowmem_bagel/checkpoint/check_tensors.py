"""Whether a folder holds exactly the tensors that its configuration demands."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import CheckpointError
from .folder import ModelFolder
from .tensors import EXPERTS, TensorSpec, tensor_table

FLOATS = ("BF16", "F16", "F32")


def check_tensors(folder: ModelFolder, layout: Mapping[str, tuple[str, ...]]) -> None:
    """Compare a folder's tensors with its configuration.

    A source checkpoint holds each tensor of the table under its name; in a variant the manifest says which stored
    tensors make it up, in a folder of another kind without one `layout` does: tensor -> stored names. A variant without
    the gen expert lacks what only pictures need.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected or misshapen.
    """
    table = tensor_table(folder.config)
    experts = folder.manifest.experts if folder.manifest is not None else EXPERTS
    wanted = {name: spec for name, spec in table.items() if "gen" in experts or not only_for_pictures(spec)}
    belonging: set[str] = set()
    for name, spec in wanted.items():
        for stored in _stored_names(folder, layout, name):
            if stored not in folder.stored:
                raise CheckpointError(f"{folder.path}: tensor {stored} is missing; download or convert it again")
            belonging.add(stored)
        if name in folder.stored and _is_plain(folder, name):
            _check_plain(folder, spec)
    for stored in folder.stored:
        if stored not in belonging:
            raise CheckpointError(
                f"{folder.path}: unexpected tensor {stored}; the files do not belong to this configuration"
            )


def only_for_pictures(spec: TensorSpec) -> bool:
    """Tensors that a checkpoint that only answers does without."""
    return spec.expert == "gen" or spec.part in ("latent", "vae")


def _stored_names(folder: ModelFolder, layout: Mapping[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    if folder.manifest is not None:
        record = folder.manifest.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{folder.path}: variant.json lacks the tensor {name}; convert the folder again")
        return record.stored
    return layout.get(name, (name,))


def _is_plain(folder: ModelFolder, name: str) -> bool:
    return folder.manifest is None or folder.manifest.tensors[name].encoding in ("bf16", "fp16", "fp32")


def _check_plain(folder: ModelFolder, spec: TensorSpec) -> None:
    entry = folder.entry(spec.name)
    wanted = tuple(found if size is None else size for size, found in zip(spec.shape, entry.shape, strict=False))
    if len(spec.shape) != len(entry.shape) or wanted != entry.shape:
        shape = " x ".join("any" if size is None else str(size) for size in spec.shape)
        raise CheckpointError(
            f"{folder.path}: tensor {spec.name} is {' x '.join(map(str, entry.shape))}, and the configuration "
            f"demands {shape}; the checkpoint does not belong to its configuration"
        )
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{folder.path}: tensor {spec.name} is {entry.dtype}, not one of {', '.join(FLOATS)}; download it again"
        )
