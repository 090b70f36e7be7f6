"""INT8 linears on a processor: integers or dequantised weights, whichever this processor does faster.

Which one wins depends on the processor's instructions (VNNI, AMX), on its memory, on the dtype, on the threads and on
the number of tokens: integers read the fewest bytes for one token, while bfloat16 on AMX overtakes them with a
picture's thousands. So both ways are timed once, when a model is loaded, and the answers hold as long as it is: the
same request gives the same result however busy the machine is later.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.int8 import PADDED_TOKENS
from ...ops.linear import After, Before, Product, Rows, Weights, count_tokens

TOKENS = (1, 64, 1024)
"""Where the ways are compared: a token of text, a prompt, a picture of 512x512. An answer holds up to the next."""
SIDE = 2048
"""Rows and columns of the trial's weight: large enough to be ruled by arithmetic and memory, not by calls."""
PAYS = 1.1
"""Integers must be faster by this factor, because dequantised weights do not round the activations."""
TURNS = 4
CLEAR = 2.0
"""A difference by this factor or more is not measured more than twice."""
SECONDS = 0.5
"""A comparison that is expected to go beyond this, all of them together, is not made: the one before it holds."""

Clock = Callable[[], float]


class Timing(NamedTuple):
    """Seconds of one product of `tokens` x SIDE by SIDE x SIDE."""

    tokens: int
    integer: float
    dequantized: float

    @property
    def integers_win(self) -> bool:
        return self.integer * PAYS <= self.dequantized


class ByTokens(Product):
    """Leaves each product to the way that was found best for its number of tokens.

    `ways[i]` serves numbers of tokens from `starts[i]` on; starts ascend from 1 or less.
    """

    def __init__(self, starts: Sequence[int], ways: Sequence[Product]) -> None:
        assert len(starts) == len(ways) and starts[0] <= 1 and list(starts) == sorted(starts)
        self.starts, self.ways = tuple(starts), tuple(ways)
        self.graph_blocker = next((way.graph_blocker for way in ways if way.graph_blocker), None)

    def way(self, tokens: int) -> Product:
        """The way that serves this number of tokens."""
        return self.ways[max(0, bisect_right(self.starts, tokens) - 1)]

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        return self.way(count_tokens(x)).product(x, weights, before, after)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return self.way(tokens).fuses(tokens, before, after)


def choose_by_trial(
    integer: Product, dequantized: Product, dtype: torch.dtype, clock: Clock = time.perf_counter
) -> tuple[Product, str]:
    """The faster of two ways on this processor with PyTorch's present number of threads, and why in words.

    Args:
        integer: multiplies in integers; taken where it is faster by `PAYS`.
        dequantized: the way that is taken otherwise.
        dtype: of the activations.
    """
    timings = compare(integer, dequantized, dtype, clock)
    return choose(integer, dequantized, timings), describe(timings, dtype)


def compare(
    integer: Product, dequantized: Product, dtype: torch.dtype, clock: Clock = time.perf_counter
) -> list[Timing]:
    """Both ways timed at `TOKENS`, as far as `SECONDS` allows; the best of a few turns each, taken alternately."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (SIDE, SIDE), generator=generator, dtype=torch.int8)
    weights = Weights(weight, torch.full((SIDE,), 2.0**-10))
    timings: list[Timing] = []
    begun = clock()
    for tokens in TOKENS:
        if timings:
            last = timings[-1]
            # Few tokens cost integers no less than their padding, and dequantised weights no less than dequantising.
            growth = tokens / max(last.tokens, PADDED_TOKENS)
            if clock() - begun + 2 * growth * (last.integer + last.dequantized) > SECONDS:
                break
        x = torch.randn(tokens, SIDE, generator=generator).to(dtype)
        seconds = [float("inf"), float("inf")]
        for turn in range(TURNS):
            for index, way in enumerate((integer, dequantized)):
                start = clock()
                way.product(x, weights)
                seconds[index] = min(seconds[index], clock() - start)
            # Never after the first turn, which pays for threads and for code that is made at first use.
            if turn and (max(seconds) > CLEAR * min(seconds) or clock() - begun > SECONDS):
                break
        timings.append(Timing(tokens, *seconds))
    return timings


def choose(integer: Product, dequantized: Product, timings: Sequence[Timing]) -> Product:
    """The winner of each timing from its number of tokens on, the first one's below it too."""
    ways = [integer if timing.integers_win else dequantized for timing in timings]
    if all(way is ways[0] for way in ways):
        return ways[0]
    changes = [i for i in range(len(ways)) if i == 0 or ways[i] is not ways[i - 1]]
    return ByTokens([0 if i == 0 else timings[i].tokens for i in changes], [ways[i] for i in changes])


def describe(timings: Sequence[Timing], dtype: torch.dtype) -> str:
    """What was measured, and what it led to, in words."""
    measured = "; ".join(
        f"{timing.tokens} tokens {timing.integer * 1e3:.3g} ms in integers, {timing.dequantized * 1e3:.3g} dequantised"
        f" -> {'integers' if timing.integers_win else 'dequantised'}"
        for timing in timings
    ).replace("1 tokens ", "1 token ", 1)
    threads = torch.get_num_threads()
    name = str(dtype).removeprefix("torch.")
    return f"measured for {SIDE}x{SIDE} in {name} on {threads} thread{'s' * (threads > 1)}: {measured}"
