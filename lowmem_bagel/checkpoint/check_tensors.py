"""Whether a folder holds the tensors that its configuration demands, as far as a task uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from .folder import ModelFolder
from .naming import FLOATS
from .reading import WORDS, part_of
from .tensors import TensorSpec, only_for_pictures, tensor_table

DRAWING = ("generate", "edit")
USES: Mapping[str, tuple[str, ...]] = {
    "decoder und": (*DRAWING, "ask"),
    "embedding": (*DRAWING, "ask"),
    "lm_head": ("ask",),
    "decoder gen": DRAWING,
    "latent": DRAWING,
    "vae": DRAWING,
    "vit": ("edit",),
}
"""The tasks that cannot be done without a part. Asking needs the vision tower only where it is about a picture, and
drawing lm_head only where a plan is written first: such a request is refused when it is made."""

Layout = Mapping[str, tuple[str, ...]]
"""Tensor -> the stored names that make it up, where that is not its own."""


@dataclass(frozen=True)
class Lack:
    """What is missing of a part, in one line with the remedy; `whole` where nothing of it is there."""

    line: str
    whole: bool


def check_tensors(folder: ModelFolder, layout: Layout, tasks: Iterable[str] = (*DRAWING, "ask")) -> dict[str, Lack]:
    """Compare a folder's tensors with its configuration, as far as the tasks use them.

    A source checkpoint holds each tensor of the table under its name; in a variant the manifest says which stored
    tensors make it up, in a folder of another kind without one `layout` does. A variant without the gen expert lacks
    what only pictures need.

    Returns:
        the parts that are missing, in whole or in part, which none of the tasks needs.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected or misshapen, or the part that is missing.
    """
    table = tensor_table(folder.config)
    lacks = lacking(folder, layout)
    for task in tasks:
        check_request(lacks, task)
    belonging: set[str] = set()
    for name, spec in table.items():
        belonging.update(_stored_names(folder, layout, spec))
        if name in folder.stored and not folder.stored[name].encoded and _is_plain(folder, name):
            _check_plain(folder, spec)
    for stored in folder.stored:
        if stored not in belonging:
            raise CheckpointError(
                f"{folder.path}: unexpected tensor {stored}; the files do not belong to this configuration"
            )
    return lacks


def check_request(lacks: Mapping[str, Lack], task: str, pictured: bool = False, writes: bool = False) -> None:
    """Refuse a request that needs a part which is not there.

    Args:
        pictured: whether it has an input picture. writes: whether a picture is drawn after a plan in words.

    Raises:
        CheckpointError: the part, and the remedy.
    """
    for part, lack in lacks.items():
        if task in USES[part] or (part == "vit" and pictured) or (part == "lm_head" and writes):
            raise CheckpointError(lack.line)


def lacking(folder: ModelFolder, layout: Layout) -> dict[str, Lack]:
    """What is missing, by part.

    Raises:
        CheckpointError: a variant's manifest lacks a tensor that it should have.
    """
    table = tensor_table(folder.config)
    whole = Counter(part_of(spec) for spec in table.values())
    found = missing(folder, layout)
    if folder.manifest is not None and "gen" not in folder.manifest.experts:
        found = {part: names for part, names in found.items() if not only_for_pictures(table[names[0]])}
    return {
        part: Lack(_line(folder, part, names, whole[part]), len(names) == whole[part]) for part, names in found.items()
    }


def missing(folder: ModelFolder, layout: Layout) -> dict[str, list[str]]:
    """The stored tensors that are not there, by the part of the model that they belong to (see `reading.part_of`).

    Raises:
        CheckpointError: a variant's manifest lacks a tensor that it should have.
    """
    found: dict[str, list[str]] = {}
    for name, spec in tensor_table(folder.config).items():
        absent = [stored for stored in _stored_names(folder, layout, spec) if stored not in folder.stored]
        if absent:
            found.setdefault(part_of(spec), []).append(absent[0] if len(absent) == 1 else name)
    return found


def _line(folder: ModelFolder, part: str, names: list[str], whole: int) -> str:
    """One line for a part that is missing, or incomplete, with the remedy."""
    without = [task for task in (*DRAWING, "ask") if task not in USES[part]]
    remedy = "complete it with --base FOLDER (in Python base=), the checkpoint that it was made from"
    if folder.manifest is not None:
        remedy = "convert the folder again"
    if len(names) < whole:
        more = f", and {len(names) - 1} more of {WORDS[part]}" if len(names) > 1 else ""
        return f"{folder.path}: tensor {names[0]} is missing{more}; {remedy}"
    also = f", or use it for {' and '.join(without)} alone" if without else ""
    use = "edits and questions about pictures" if part == "vit" else " and ".join(USES[part])
    return f"{folder.path}: {WORDS[part]} is missing, for {use}; {remedy}{also}"


def _stored_names(folder: ModelFolder, layout: Layout, spec: TensorSpec) -> tuple[str, ...]:
    if folder.manifest is not None:
        record = folder.manifest.tensors.get(spec.name)
        if record is not None:
            return record.stored
        if "gen" in folder.manifest.experts or not only_for_pictures(spec):
            raise CheckpointError(f"{folder.path}: variant.json lacks the tensor {spec.name}; convert the folder again")
    return layout.get(spec.name, (spec.name,))


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
            f"{folder.path}: tensor {spec.name} is {entry.dtype}, not one of {', '.join(FLOATS)}; "
            "convert the folder again"
        )
