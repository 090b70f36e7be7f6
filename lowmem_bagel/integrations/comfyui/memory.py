"""A model among those that ComfyUI manages: it asks for memory back, in part or whole, and gives it again.

ComfyUI's management (`comfy.model_management`) keeps a list of what is loaded, and talks to what it calls its patcher:
`ManagedModel` is one. Where others need memory, some of our units begin to stream, or, where that is not enough, the
pipeline is closed; what others have loaded, ComfyUI alone decides about. Before a request the model is put on the list
again, and whatever it lacks is taken back: units from RAM, or the whole of it from disk.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.folder import ModelFolder
from ...errors import DoesNotFitError, first_line
from ...hardware.profile import CONTEXT_BYTES
from ...pipeline import BagelPipeline
from ...planner.devices import device_names
from ...planner.estimate import alone, plan_from, plan_inputs, within
from ...planner.load_options import options_from
from ...runtime.loader import load_model
from ...runtime.memory_promise import PROMISES, Promise
from .progress import byte_progress


class BagelWeights:
    """Holds a pipeline while it is loaded. ComfyUI's log names the class, and ComfyUI is told when the object goes."""

    def __init__(self) -> None:
        self.pipeline: BagelPipeline | None = None
        self.promise: Promise | None = None

    def close(self) -> None:
        """Give everything back; a second time does nothing."""
        pipeline, self.pipeline = self.pipeline, None
        promise, self.promise = self.promise, None
        if pipeline is not None:
            pipeline.close()
        if promise is not None:
            PROMISES.end(promise)


class ManagedModel:
    """A folder and how it is loaded, and the pipeline while ComfyUI leaves it the memory.

    Attributes:
        load_device, offload_device, model, parent: as ComfyUI's management reads them.
    """

    parent = None

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        """Opens the folder and plans; what is loaded comes with the first use.

        Args:
            options: as keywords of `BagelPipeline.from_pretrained`.

        Raises:
            CheckpointError, ConfigError, SettingError, DoesNotFitError: as of `BagelPipeline.from_pretrained`.
        """
        self.path, self.options = path, {**options, **_device(options)}
        asked = options_from(self.options)
        folder = self._opened()
        self.config = folder.config
        self.load_device, self.offload_device = torch.device(_first(device_names(asked)[0])), torch.device("cpu")
        context = CONTEXT_BYTES if self.load_device.type == "cuda" else 0
        self._context = context  # which ComfyUI's process has in any case
        peak, self._working = alone(folder, asked)
        """Bytes of the device that a request takes beside the weights."""
        self._whole = max(0, peak - context - self._working)
        """Bytes that its weights would take, had it the whole device."""
        self.model = BagelWeights()
        weakref.finalize(self, self.model.close).atexit = False

    def in_use(self) -> BagelPipeline:
        """The pipeline, loaded, with the memory that a request takes beside it.

        Raises:
            DoesNotFitError: with all that ComfyUI could free there is too little.
        """
        from comfy import model_management

        model_management.load_models_gpu([self], memory_required=self._working)
        return self.model.pipeline or self._loaded()

    def _opened(self) -> ModelFolder:
        asked = options_from(self.options)
        return ModelFolder.open(self.path, weights=asked.weights, base=asked.base, lora=asked.lora)

    def _loaded(self, budget: float = math.inf) -> BagelPipeline:
        """Load it. budget: bytes of the device for weights, beside what a request takes."""
        from comfy import model_management

        model_management.soft_empty_cache()  # what torch keeps for ComfyUI's next model is free, and does not look it
        # A promise would hold the whole process to our limit; ComfyUI's other models have none to keep.
        self.model.promise = PROMISES.begin(self.load_device, None)
        try:
            pipeline = self._planned(budget)
        except BaseException:
            self.model.close()
            raise
        self.model.pipeline = pipeline
        prediction = pipeline.model.plan.prediction
        peak = 0 if prediction is None else prediction.peak_bytes - self._context
        self._working = max(0, peak - pipeline.model.weight_bytes)
        return pipeline

    def _planned(self, budget: float) -> BagelPipeline:
        """By the fastest plan within the budget, or else, where none is so small, as much of it given back afterwards
        as streams."""
        from comfy import model_management

        options = options_from({**self.options, "progress": byte_progress()})
        folder = self._opened()
        if "limits" in folder.reading.lines:
            warnings.warn(folder.reading.lines["limits"], UserWarning, stacklevel=2)
        inputs = plan_inputs(folder, options)

        def by_plan(allowed: float) -> BagelPipeline:
            bounded = within(inputs, allowed)
            return BagelPipeline(load_model(folder, plan_from(bounded, options), options.progress), bounded)

        room = model_management.get_free_memory(self.load_device) - _reserved()
        try:
            return by_plan(min(room, budget + self._working))
        except DoesNotFitError:
            if budget + self._working >= room:
                raise
        pipeline = by_plan(room)
        pipeline.lower_residency(int(max(0, pipeline.model.weight_bytes - budget)))
        return pipeline

    # What ComfyUI's management calls.

    def loaded_size(self) -> int:
        """Bytes of the device that its weights hold now."""
        pipeline = self.model.pipeline
        return 0 if pipeline is None else pipeline.model.weight_bytes

    def model_size(self) -> int:
        """Bytes of the device that its weights would hold, had it the whole of it."""
        pipeline = self.model.pipeline
        if pipeline is None:
            return self._whole
        loaded = pipeline.model.weight_bytes
        return max(loaded, min(loaded + pipeline.model.residency.streamed_bytes, self._whole))

    def current_loaded_device(self) -> torch.device:
        return self.offload_device if self.model.pipeline is None else self.load_device

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """Take so much more memory for weights, at most: ComfyUI's budget (`--lowvram`, `--novram`, `--reserve-vram`).
        What is loaded anew is planned for it; what is there already keeps more of its units."""
        from comfy import model_management

        before, pipeline = self.loaded_size(), self.model.pipeline
        if pipeline is None:
            self._loaded(extra_memory)
        elif pipeline.model.residency.streamed:
            room = model_management.get_free_memory(self.load_device) - self._working - _reserved()
            try:
                pipeline.raise_residency(int(max(0, min(extra_memory, room))))
            except torch.OutOfMemoryError as error:
                pipeline.model.note("residency", f"units stream on, another took the memory: {first_line(error)}")
        return self.loaded_size() - before

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        """Give so much memory back, at least; what was given, which may be less: then all of it is asked for."""
        pipeline = self.model.pipeline
        return 0 if pipeline is None else pipeline.lower_residency(int(memory_to_free))

    def detach(self, unpatch_all: bool = True) -> BagelWeights:
        """Give all memory back. With False it is only taken from ComfyUI's list, to be put there anew."""
        if unpatch_all:
            self.model.close()
        return self.model

    def is_clone(self, other: Any) -> bool:
        return getattr(other, "model", None) is self.model

    def is_dynamic(self) -> bool:
        """Whether ComfyUI's own loader moves its weights."""
        return False

    def model_dtype(self) -> None:
        """None: no patch is ever moved to it."""

    def model_patches_to(self, device: Any) -> None:
        """It has no patches."""

    def model_patches_models(self) -> list[Any]:
        return []

    def lowvram_patch_counter(self) -> int:
        return 0

    def pinned_memory_size(self) -> int:
        """Of memory that ComfyUI has page-locked."""
        return 0

    def loaded_ram_size(self) -> int:
        return 0

    def partially_unload_ram(self, ram_to_unload: float, *_: Any, **__: Any) -> int:
        """What waits in RAM is needed for the next step."""
        return 0

    def model_mmap_residency(self, free: bool = False) -> tuple[int, int]:
        return 0, 0


def _reserved() -> float:
    """Bytes of a card that ComfyUI keeps for other programs (`--reserve-vram`)."""
    from comfy import model_management

    return float(model_management.extra_reserved_memory())


def _device(options: Mapping[str, Any]) -> dict[str, str]:
    """ComfyUI's device, where none is named; a kind that we do not know is left to the planner."""
    from comfy import model_management

    device = model_management.get_torch_device()
    named = options.get("device", "auto") != "auto" or options.get("devices")
    return {} if named or device.type not in ("cpu", "cuda") else {"device": str(device)}


def _first(name: str) -> str:
    """A device's name as torch has it."""
    return {"auto": "cpu", "cuda": "cuda:0"}.get(name, name)
