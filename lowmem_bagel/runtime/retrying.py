"""Requests begun again where a device's memory runs out or a card fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from ..errors import DeviceError, DoesNotFitError
from .elsewhere import CardFailed, card_out_of_memory
from .loaded import LoadedModel

Carried = TypeVar("Carried")

RETRIES = 6
"""Times that a request is begun again."""
DEMOTED_BYTES = 1_000_000_000
"""Of weights that stream from then on, each time."""
IN_PIECES = 300_000_000
"""Bytes between tensors that are worth beginning a request again as it was: what a large activation takes."""


class Retrying:
    """Carries requests out with a model.

    Args:
        warn: told what is otherwise from then on.
        lose: closes the model, of which too little is left.
    """

    def __init__(self, model: LoadedModel, warn: Callable[[str], None], lose: Callable[[], None]) -> None:
        self.model, self._warn, self._lose = model, warn, lose

    @torch.inference_mode()
    def __call__(self, request: Callable[[], Carried]) -> Carried:
        """What the request gives. Where a device's memory runs out, contexts are forgotten, then more units stream, and
        it is begun again; once as it is, where enough was free in pieces, which lie otherwise the next time. So too
        without a card that fails, where others can do its part.

        A request is determined by its seed, so beginning again changes nothing but the time.

        Raises:
            DoesNotFitError: nothing is left to stream.
            DeviceError: a card failed that has some of the layers.
        """
        short, pieced = 0, True
        for _ in range(RETRIES):
            try:
                return request()
            except torch.OutOfMemoryError as error:
                short = card_out_of_memory(error)
                pieced = pieced and self.model.on_card(short).bytes_in_pieces() >= IN_PIECES
                remedy = partial(self._free_memory, short, str(error).split(". ")[0], pieced)
            except CardFailed as failure:
                remedy = partial(self._give_up, failure.card, str(failure))
            # Outside the handlers, whose traceback would keep the failed request's tensors alive.
            if not remedy():
                break
            pieced = False
        raise DoesNotFitError(self.model.on_card(short).out_of_memory())

    def _free_memory(self, card: int, found: str, pieced: bool) -> bool:
        """Whether there is more room on a card for the request to be begun again; `pieced`: there was, in pieces."""
        where = "the device's memory" if card == 0 else f"the memory of {self.model.on_card(card).plan.device}"
        kept = self.model.forget_contexts() if card == 0 else 0
        if kept:
            self._warn(f"{where} ran out ({found}); letting go of {kept / 1e9:.1f} GB of kept contexts")
            return True
        if pieced:
            self._warn(f"{where} ran out ({found}), though enough was free in pieces; beginning again")
            self.model.return_pieces()
            return True
        freed = self.model.lower_residency(DEMOTED_BYTES, card)
        if freed:
            self._warn(f"{where} ran out ({found}); streaming {freed / 1e9:.1f} GB more of the weights")
        return freed > 0

    def _give_up(self, card: int, why: str) -> bool:
        device = self.model.on_card(card).plan.device
        if self.model.plan.divided:
            self._lose()
            raise DeviceError(f"{device}, which has some of the layers, failed: {why}; load the model without it")
        self._warn(f"{device} failed ({why}); going on without it")
        self.model.give_up(card, why)
        return True
