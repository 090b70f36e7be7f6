"""Passes of a picture through the layers, replayed by CUDA graphs.

A step of a small picture takes what the host takes to launch it, some 650 kernels in INT8 (launches_h200.json); and one
thread that launches for several cards keeps each of them waiting for the others' launches. From step to step of a
drawing nothing changes but the hidden states that enter: keys of contexts stay where they are, and the picture's own
are written to the same rows. So a pass of the same branches is captured when it first goes, and replayed from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.decoder import Part, Pass
from ..ops.device import GraphMemory, captured


class PassGraphs:
    """Of one drawing on one device, whose weights and contexts stay where they are meanwhile.

    Args:
        most_tokens: of a pass, those of all its branches together; greater ones are launched.
        refused: told why a pass could not be captured. All are launched from then on, to the same bits.
    """

    def __init__(self, most_tokens: int, refused: Callable[[RuntimeError], None]) -> None:
        self.most_tokens, self._refused = most_tokens, refused
        self._memory = GraphMemory()
        self._graphs: dict[tuple[int, ...], _PassGraph] = {}

    def launch(self, run: Pass, branches: Sequence[int]) -> None:
        """Take the pass of these branches through the layers that are left."""
        tokens = sum(part.hidden.shape[0] * part.hidden.shape[1] for part in run.parts)
        if tokens <= self.most_tokens:
            try:
                run.arrive(self._hidden(run, tuple(branches)))
                return
            except RuntimeError as error:  # for lack of memory too: the picture goes on without
                self._graphs.clear()
                self.most_tokens = 0
                self._refused(error)
        run.launch(len(run.decoder.layers))

    def _hidden(self, run: Pass, branches: tuple[int, ...]) -> list[Tensor]:
        """Each part's hidden states after the last layer."""
        graph = self._graphs.get(branches)
        if graph is not None:
            return graph.replayed(run.parts)
        self._graphs[branches] = graph = _PassGraph(run, self._memory)
        return graph.first()


class _PassGraph:
    """The layers of a pass from where it is to the last, on hidden states of its own."""

    def __init__(self, run: Pass, memory: GraphMemory) -> None:
        self._decoder, self._attend, self._layer = run.decoder, run.attend, run.layer
        self._given = [Part(part.expert, part.hidden.clone(), part.rope) for part in run.parts]
        self._made: list[Tensor] = []
        self._first: list[Tensor] = []
        device = self._given[0].hidden.device
        self._graph = captured(device, self._go, self._warm_up, memory)

    def first(self) -> list[Tensor]:
        """The hidden states that going once before the capture gave; asked for once."""
        found = [hidden.clone() for hidden in self._first]
        for hidden in self._first:
            if hidden.is_cuda:  # made on the capture's stream, whose next user must not take its memory too soon
                hidden.record_stream(torch.cuda.current_stream(hidden.device))
        self._first = []
        return found

    def replayed(self, parts: Sequence[Part]) -> list[Tensor]:
        """What becomes of the hidden states of these parts."""
        for fixed, part in zip(self._given, parts, strict=True):
            fixed.hidden.copy_(part.hidden)
        self._graph.replay()
        return [made.clone() for made in self._made]

    def _warm_up(self) -> None:
        self._first = self._through()

    def _go(self) -> None:
        self._made = self._through()

    def _through(self) -> list[Tensor]:
        run = Pass(self._decoder, self._given, self._attend, self._layer)
        return run.advance(len(self._decoder.layers))
