"""Muon for the matrices of the layers, AdamW for everything else; both free of host synchronisation, so that a whole
training step can be captured in a CUDA graph.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, then the update is replaced by the
nearest half-orthogonal matrix, found by a Newton-Schulz iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Matrix:
    """A parameter as a matrix (a convolution's is [out, in * height * width]), and the rows of the matrices that are
    stacked in it: each is orthogonalised by itself."""

    parameter: Tensor
    rows: tuple[int, ...]


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """[N, r, c] with r <= c -> about the nearest matrices with equal singular values; on a GPU in bfloat16, which is
    exact enough, and which processors that only emulate it take many times as long for."""
    a, b, c = _NEWTON_SCHULZ
    x: Tensor = stack.bfloat16() if stack.is_cuda else stack.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


class Muon:
    """lr is scaled by 0.2 * sqrt(max(rows, columns)), which gives updates of about AdamW's size."""

    def __init__(self, matrices: Sequence[Matrix], lr: Tensor, momentum: float = 0.95, decay: float = 0.01) -> None:
        self.matrices, self.lr, self.momentum, self.decay = list(matrices), lr, momentum, decay
        self.parameters = [m.parameter for m in matrices]
        self.buffers = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        grads = [_grad(p) for p in self.parameters]
        torch._foreach_mul_(self.buffers, self.momentum)
        torch._foreach_add_(self.buffers, grads)
        looking_ahead = torch._foreach_add(grads, self.buffers, alpha=self.momentum)
        groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for matrix, update in zip(self.matrices, looking_ahead, strict=True):
            whole = matrix.parameter.flatten(1)
            for part, into in zip(update.flatten(1).split(matrix.rows), whole.split(matrix.rows), strict=True):
                if part.shape[0] > part.shape[1]:
                    part, into = part.mT, into.mT
                groups.setdefault(tuple(part.shape), []).append((part, into))
        torch._foreach_mul_(self.parameters, 1 - self.lr * self.decay)
        for shape, pairs in groups.items():
            updates = orthogonalise(torch.stack([part for part, _ in pairs])).float()
            updates = updates * (-0.2 * max(shape) ** 0.5 * self.lr)
            torch._foreach_add_([into for _, into in pairs], list(updates.unbind()))


class AdamW:
    """Adam with decoupled weight decay and a step count kept on the device."""

    def __init__(
        self, parameters: Sequence[Tensor], lr: Tensor, betas: tuple[float, float] = (0.9, 0.99), decay: float = 0.0
    ) -> None:
        self.parameters, self.lr, self.betas, self.decay = list(parameters), lr, betas, decay
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.count = torch.zeros((), device=lr.device)

    @torch.no_grad()
    def step(self) -> None:
        grads = [_grad(p) for p in self.parameters]
        b1, b2 = self.betas
        self.count += 1
        torch._foreach_lerp_(self.first, grads, 1 - b1)
        torch._foreach_mul_(self.second, b2)
        torch._foreach_addcmul_(self.second, grads, grads, 1 - b2)
        scale = torch._foreach_div(self.second, 1 - b2**self.count)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        updates = torch._foreach_div(self.first, scale)
        torch._foreach_mul_(updates, -self.lr / (1 - b1**self.count))
        if self.decay:
            torch._foreach_mul_(self.parameters, 1 - self.lr * self.decay)
        torch._foreach_add_(self.parameters, updates)


@torch.no_grad()
def average_into(averaged: list[Tensor], current: Sequence[Tensor], share: Tensor) -> None:
    """averaged += share * (current - averaged); share is a tensor on the device, so that a graph can be replayed."""
    steps = torch._foreach_sub(list(current), averaged)
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(averaged, steps)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a parameter that no loss depends on"
    return parameter.grad


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to 1%."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
