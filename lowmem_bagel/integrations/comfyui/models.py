"""Where models lie in ComfyUI: folders, and files that are a whole model, below models/bagel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...demo_checkpoint import FOLDER as DEMO_FOLDER

KIND = "bagel"
"""ComfyUI's word for the folder; extra_model_paths.yaml may name more of them."""
ADAPTERS = "loras"
DEMO = "demo (small, colored shapes)"
SUFFIXES = (".safetensors", ".gguf")
MARKS = ("variant.json", "llm_config.json", "config.json")
"""A folder with one of them is a model's."""


def register() -> None:
    """Make models/bagel known to ComfyUI."""
    import folder_paths

    folder_paths.add_model_folder_path(KIND, str(Path(folder_paths.models_dir) / KIND))


def roots(kind: str = KIND) -> list[Path]:
    """The folders that hold models, the first one for those that are made."""
    import folder_paths

    if kind == KIND:
        register()  # again, without effect, where nobody loaded the extension
    return [Path(root) for root in folder_paths.get_folder_paths(kind)]


def model_names() -> list[str]:
    """What can be chosen: the models of all roots, then the one that comes with the package."""
    return [*sorted({path.name for root in roots() for path in _models(root)}), DEMO]


def _models(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        return
    for path in root.iterdir():
        if path.suffix != ".partial" and (_is_model_folder(path) if path.is_dir() else path.suffix in SUFFIXES):
            yield path


def _is_model_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in MARKS) or any(
        next(path.glob(f"*{suffix}"), None) is not None for suffix in SUFFIXES
    )


def model_path(name: str, path: str = "") -> Path:
    """The folder or file of a model: the path, where one is said, or else what the name stands for.

    One that is not there is left to whoever opens it to refuse.
    """
    if path.strip():
        return Path(found(path.strip(), KIND))
    return DEMO_FOLDER if name == DEMO else Path(found(name, KIND))


def found(name: str, kind: str) -> str:
    """A name below one of the roots as a path; a path as it is. What may follow a colon (an adapter's weight) stays."""
    bare, colon, weight = name.rpartition(":")
    for part, rest in ((name, ""), (bare, colon + weight)):
        for root in roots(kind) if part and not Path(part).expanduser().exists() else ():
            if (root / part).exists():
                return f"{root / part}{rest}"
    return name if Path(name).exists() or kind != KIND else str(Path(name).expanduser())
