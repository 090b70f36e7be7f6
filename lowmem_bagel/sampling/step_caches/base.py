"""What a step cache is: a way to predict what some evaluations of the decoder give instead of computing them.

A cache is one file that ends in its declaration, a `StepCache`, and one line in `registry`; another distribution adds
one under the entry-point group `lowmem_bagel.step_caches`. The planner reads the declaration, the sampler has it make
one object for each branch of guidance. Importing this, or any cache, needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


Predicted = Literal["hidden states", "velocities"]


class BranchCache(Protocol):
    """Of one branch of one picture. Told of every evaluation of its branch, in order: `predict` or `after_first_layer`
    answers it, or `store` is called.

    Hidden states are [tokens, hidden_size], of the latent tokens, before the final norm; where its declaration says so,
    `predict` and `store` are about velocities instead, float32 [tokens, latent_values].
    """

    def predict(self) -> Tensor | None:
        """The branch's hidden states for this evaluation, or None when they must be computed."""
        ...

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        """The same once the first layer is computed; `entering` and `leaving` are the hidden states around it. Going on
        overwrites `leaving`."""
        ...

    def store(self, hidden: Tensor) -> None:
        """The hidden states computed for this evaluation."""
        ...


@dataclass(frozen=True)
class Setting:
    """A number that a request may give to a cache, from `low` to `high`. `name` is its keyword, and its flag."""

    name: str
    default: float
    low: float
    high: float
    help: str


def every(evaluations: int) -> int:
    """Of so many evaluations all are computed."""
    return evaluations


@dataclass(frozen=True)
class StepCache:
    """What a step cache declares. `computed` and `stored` are asked about the evaluations of one branch.

    Attributes:
        name: as `step_cache` takes it.
        help: what it does, for whoever chooses one.
        branch: makes the object of one branch; called with the cache's own settings by name.
        predicts: whether objects are told of hidden states and answer with them, or of velocities.
        stored: how many of them the object holds at most in so many evaluations.
        computed: how many of so many evaluations go through all layers; at most, if that depends on the picture.
        depends_on_picture: which evaluations are computed is known only when they are.
        settings: of a request, beside `step_cache` itself.
        holds_result: what an evaluation gave is among what is stored, not held beside it until the branches meet.
        pending: hidden states beside those stored that it holds while the layers behind the first compute.
    """

    name: str
    help: str
    branch: Callable[..., BranchCache]
    stored: Callable[[int], int]
    computed: Callable[[int], int] = every
    depends_on_picture: bool = False
    settings: tuple[Setting, ...] = ()
    holds_result: bool = False
    pending: int = 0
    predicts: Predicted = "hidden states"
