"""Parts that are on the device only while they are used: the vision tower, the autoencoder, lm_head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.flat_buffer import Layout
from ..ops.device import empty_cache


class StagedPart:
    """A module whose tensors wait in host memory and visit the device for a phase.

    The host buffer stays as it is: nothing is copied back.
    """

    def __init__(self, module: nn.Module, layout: Layout, host: Tensor, device: torch.device) -> None:
        self.module, self.layout, self.host, self.device = module, layout, host, device
        self._users = 0
        layout.bind(module, host)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The module's tensors are on the device inside; may be nested."""
        if self._users == 0:  # counted below: where memory runs out here, nobody is a user
            empty_cache()  # torch would keep activations beside it, in pieces that it does not fit in
            visiting = torch.empty(self.layout.nbytes, dtype=torch.uint8, device=self.device)
            visiting.copy_(self.host, non_blocking=True)
            self.layout.bind(self.module, visiting)
            del visiting
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self.layout.bind(self.module, self.host)
                empty_cache()  # in what it leaves a request's keys would come to lie, and hold all of it
