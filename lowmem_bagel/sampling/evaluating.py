"""Velocities of branches of guidance on one device: through the layers, or predicted by their step caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.bagel import Bagel
from ..model.decoder import Part, Pass
from ..model.kv_cache import PictureAttention, SequenceView
from ..ops.attention.base import AttentionBackend
from ..ops.rope import Rope
from .frames import MARKERS, Frames
from .pass_graphs import PassGraphs
from .step_caches.base import BranchCache, Predicted


class Begun(NamedTuple):
    """A pass of branches that is on its way through the layers, and the others' answers."""

    run: Pass
    rest: Sequence[int]
    found: dict[int, Tensor]


class Evaluator:
    """Evaluates the branches of a picture, or of several frames in one sequence, that belong to a device.

    Args:
        views: what the branches see there, by their numbers.
        markers: the two marker tokens that frame a frame's latent tokens, embedded, [2, hidden_size].
        scratch: the cache's range for the keys of all frames, `frames.tokens`.
        make_cache: called once for each branch.
        predicts: what those predict.
        batch: whether branches that are evaluated together run as one batch.
        graphs: what replays passes, where any are to be.

    Attributes:
        evaluations, computed: velocities of a branch so far, and those that went through all layers.
    """

    def __init__(
        self,
        bagel: Bagel,
        backend: AttentionBackend,
        views: Mapping[int, SequenceView],
        markers: Tensor,
        scratch: range,
        frames: Frames,
        make_cache: Callable[[], BranchCache],
        predicts: Predicted,
        batch: bool,
        graphs: PassGraphs | None = None,
    ) -> None:
        self.bagel, self.backend, self.views = bagel, backend, views
        self.markers = markers.repeat(frames.count, 1)
        self.scratch, self.batch, self.frames, self.graphs = scratch, batch, frames, graphs
        self.caches, self.predicts = {branch: make_cache() for branch in views}, predicts
        self._ropes = bagel.rope(torch.tensor([frames.positions(view.position) for view in views.values()]))
        self._row = {branch: row for row, branch in enumerate(views)}
        self.evaluations = self.computed = 0

    def velocities(self, x: Tensor, time: Tensor, wanted: Sequence[int]) -> dict[int, Tensor]:
        """Of each branch at the time (float32 [1]): float32 [tokens, latent_values], as x is."""
        answers = {branch: self.caches[branch].predict() for branch in wanted}
        predicted = {branch: answer for branch, answer in answers.items() if answer is not None}
        missing = [branch for branch in wanted if branch not in predicted]
        self.evaluations += len(wanted)
        groups = [missing] if self.batch and missing else [[branch] for branch in missing]
        if self.predicts == "hidden states":
            predicted |= self._forwards(x, time, groups, lambda found: found)
            return {branch: self._velocity(predicted[branch]) for branch in wanted}
        predicted |= self._forwards(x, time, groups, lambda found: {b: self._velocity(h) for b, h in found.items()})
        for branch in missing:
            self.caches[branch].store(predicted[branch])
        return predicted

    def layers(self, x: Tensor, time: Tensor, branch: int) -> Iterator[Tensor]:
        """Hidden states of a branch's latent tokens after each layer, [tokens, hidden_size] each: good until the next
        one is asked for. Step caches are not told of it."""
        _, run = self._entering(x, time, [branch])
        for layer in range(len(self.bagel.decoder.layers)):
            yield run.advance(layer + 1)[1][0]

    def _velocity(self, hidden: Tensor) -> Tensor:
        return self.bagel.velocity(hidden[None])[0]

    def _forwards(
        self, x: Tensor, time: Tensor, groups: Sequence[Sequence[int]],
        then: Callable[[dict[int, Tensor]], dict[int, Tensor]],
    ) -> dict[int, Tensor]:  # fmt: skip
        """What `then` makes of the hidden states of the latent tokens before the final norm, [tokens, hidden_size] for
        each branch of a group: one group after the other on one device, and all on their way at once where layers are
        on several."""
        made: dict[int, Tensor] = {}
        elsewhere = self.bagel.decoder.elsewhere
        ahead = len(groups) if elsewhere and all(stretch.ahead for stretch in elsewhere) else 1
        for start in range(0, len(groups), max(1, ahead)):
            begun = [self._begin(x, time, group) for group in groups[start : start + ahead]]
            while begun:
                made |= then(self._end(begun.pop(0)))
        return made

    def _begin(self, x: Tensor, time: Tensor, group: Sequence[int]) -> Begun:
        latents, run = self._entering(x, time, group)
        leaving = run.advance(1)[1].unbind(0)
        answers = {b: self.caches[b].after_first_layer(latents, h) for b, h in zip(group, leaving, strict=True)}
        del latents, leaving  # kept through the layers they would only take memory
        found = {branch: answer for branch, answer in answers.items() if answer is not None}
        rest = [branch for branch in group if branch not in found]
        if rest:
            if found:
                run.keep([group.index(branch) for branch in rest], self._attention(rest))
            if self.graphs is None:
                run.launch(len(self.bagel.decoder.layers))
            else:
                self.graphs.launch(run, rest)
        return Begun(run, rest, found)

    def _end(self, begun: Begun) -> dict[int, Tensor]:
        found = begun.found
        if begun.rest:
            for branch, computed in zip(begun.rest, begun.run.hidden()[1].unbind(0), strict=True):
                if self.predicts == "hidden states":
                    self.caches[branch].store(computed)
                found[branch] = computed
        self.computed += len(begun.rest)
        return found

    def _entering(self, x: Tensor, time: Tensor, group: Sequence[int]) -> tuple[Tensor, Pass]:
        """The latent tokens as they enter the layers, [tokens, hidden_size], and the pass of their branches."""
        bagel, size, frames = self.bagel, len(group), self.frames
        latents = bagel.embed_latents(x, time, frames.rows, frames.columns)
        rope = self._rope(group)
        parts = [
            Part("und", self.markers.expand(size, -1, -1), frames.for_tokens(rope, MARKERS)),
            Part("gen", latents.expand(size, -1, -1), frames.for_tokens(rope, frames.each)),
        ]
        return latents, Pass(bagel.decoder, parts, self._attention(group))

    def _rope(self, group: Sequence[int]) -> Rope:
        """Of each branch's frames: cos and sin [len(group), frames, 1, head_dim]."""
        rows = [self._row[branch] for branch in group]
        cos, sin = (torch.cat([table[row : row + 1] for row in rows]) for table in self._ropes)
        return cos, sin

    def _attention(self, group: Sequence[int]) -> PictureAttention:
        return PictureAttention([self.views[branch] for branch in group], self.scratch, self.backend)
