"""accelerate in place of our streaming and of our way between cards, by `--offload accelerate` (see `offload_option`).

Its `AlignDevicesHook` moves each tensor of a unit from plain memory to the device when its layer begins, in step with
the arithmetic, and drops it when the layer ends: what `cpu_offload` and `device_map="auto"` do to a module. Of layers
on several cards the hooks carry what enters a layer to its card (`send_to_device`), and one branch of guidance is back
before the next one begins.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from lowmem_bagel.checkpoint.tensors import Expert
from lowmem_bagel.errors import MissingExtraError, SettingError
from lowmem_bagel.model.decoder import Layer, LayerSource, Stretch
from lowmem_bagel.ops.linear import Linear
from lowmem_bagel.planner.plan import Unit

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook


class AccelerateLayers:
    """A source of layers some of whose units accelerate moves; see `model.decoder.LayerSource`.

    Args:
        units: those that move; their modules' tensors are in host memory.
        device: with its number, where there are several.

    Raises:
        MissingExtraError: accelerate is not installed.
        SettingError: a linear needs its tensors side by side, and accelerate moves them one by one.

    Attributes:
        copied_bytes: to the device, of units moved so far.
    """

    def __init__(self, layers: Sequence[Layer], units: Collection[Unit], device: torch.device) -> None:
        try:
            from accelerate.hooks import AlignDevicesHook
        except ImportError as error:
            raise MissingExtraError(
                f'accelerate cannot be imported ({error}); install it with: pip install "lowmem-bagel[benchmarks]"'
            ) from error
        for layer, expert in units:
            linears = (module for module in layers[layer][expert].modules() if isinstance(module, Linear))
            if any(linear.side_by_side for linear in linears):
                raise SettingError(
                    "accelerate moves tensors one by one, and the DFloat11 kernel needs them side by side; "
                    "choose offload native or backend cpu"
                )
        self.layers = layers
        self.copied_bytes = 0
        self._experts: frozenset[Expert] = frozenset()
        self._hooks: dict[Unit, AlignDevicesHook] = {}
        self._nbytes: dict[Unit, int] = {}
        self._there: set[Unit] = set()
        for layer, expert in units:
            hook = AlignDevicesHook(execution_device=device, offload=True, offload_buffers=True, place_submodules=True)
            hook.init_hook(layers[layer][expert])
            self._hooks[layer, expert] = hook
            module = layers[layer][expert]
            self._nbytes[layer, expert] = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))

    def begin(self, experts: Collection[Expert]) -> None:
        self._drop()  # a pass that was broken off leaves its layer behind
        self._experts = frozenset(experts)

    def acquire(self, layer: int) -> Layer:
        experts = self.layers[layer]
        for expert, module in experts.items():
            unit = (layer, expert)
            if unit in self._hooks and expert in self._experts:
                self._there.add(unit)
                self._hooks[unit].pre_forward(module)
                self.copied_bytes += self._nbytes[unit]
        return experts

    def release(self, layer: int) -> None:
        self._drop()

    def close(self) -> None:
        """Let go of the host memory; the modules' tensors must be bound anew."""
        self._drop()
        self._hooks.clear()

    def _drop(self) -> None:
        for layer, expert in self._there:
            self._hooks[layer, expert].post_forward(self.layers[layer][expert], None)
        self._there.clear()


class AccelerateStretch:
    """Layers on another card that accelerate carries hidden states to and back; see `model.decoder.Stretch`."""

    ahead = False

    def __init__(self, stretch: Stretch, first: torch.device) -> None:
        from accelerate.utils import send_to_device

        self.layers, self.device, self.entered = stretch.layers, stretch.device, stretch.entered
        self._stretch, self._first, self._send = stretch, first, send_to_device

    @property
    def source(self) -> LayerSource:
        return self._stretch.source

    def there(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sent(tensor, self.device)

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sent(tensor, self._first)

    def _sent(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent: torch.Tensor = self._send(tensor, device)
        return sent
