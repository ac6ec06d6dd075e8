"""What is compared: two eager implementations, the package's backends, and the bare product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conr_kernels import available_backends, conr_loss

from .batches import Batch

WINDOW, TEMPERATURE, PUSH_SCALE = 1.0, 0.2, 0.01
BASELINE = "eager"


@dataclass(frozen=True)
class Provider:
    """One implementation of the row losses ``ℓ_i`` [N] of the variant ``"paper"``.

    Attributes:
        name: the key in tables and rows.
        losses: from a batch and a reduction, ``"none"`` or ``"mean"``, to ``ℓ_i`` [N] or its mean.
        pair_bytes: about how many bytes it needs per pair of rows, to skip what does not fit.
        largest: largest N that the main suite measures.
    """

    name: str
    losses: Callable[[Batch, str], Tensor]
    pair_bytes: int = 0
    largest: int = 65_536

    def loss(self, batch: Batch) -> Tensor:
        return self.losses(batch, "mean")

    def row_losses(self, batch: Batch) -> Tensor:
        return self.losses(batch, "none")

    def step(self, batch: Batch) -> Tensor:
        """Forward and backward; the gradient of the features."""
        (gradient,) = torch.autograd.grad(self.loss(batch), batch.x)
        return gradient


def eager_losses(batch: Batch, reduction: str, has_row_loop: bool = False) -> Tensor:
    """The formula as a careful engineer writes it: one ``exp``, masks formed without gradient.

    Products of 16-bit features are 16-bit products; everything after them is float32.

    ``has_row_loop``: the self pairs are taken out in a Python loop over rows.
    """
    q = F.normalize(batch.x.to(batch.w.dtype), dim=1).to(batch.x.dtype)
    exp_s = ((q @ q.T).to(batch.w.dtype) / TEMPERATURE).exp()
    with torch.no_grad():
        d = (batch.y[:, None] - batch.y[None, :]).abs()
        delta = (batch.p[:, None] - batch.p[None, :]).abs()
        is_similar = d <= WINDOW
        is_negative = ~is_similar & (delta <= WINDOW)
        if has_row_loop:
            for i in range(len(is_similar)):
                is_similar[i, i] = False
        else:
            is_similar.fill_diagonal_(False)
        n, m = is_similar.sum(dim=1), is_negative.sum(dim=1)
        pushing = PUSH_SCALE * batch.w[:, None] * d * is_negative
    positive_sum = (exp_s * is_similar).sum(dim=1)
    negative_sum = (exp_s * pushing).sum(dim=1)
    is_anchor = (n > 0) & (m > 0)
    E = torch.where(is_anchor, positive_sum, 1.0)
    rows = torch.where(is_anchor, torch.log(n.clamp(min=1) * (E + negative_sum) / E), 0.0)
    return rows if reduction == "none" else rows.mean()


def package_losses(backend: str) -> Callable[[Batch, str], Tensor]:
    options = dict(window=WINDOW, temperature=TEMPERATURE, push_scale=PUSH_SCALE, backend=backend)
    return lambda batch, reduction: conr_loss(
        batch.x, batch.y, batch.p, batch.w, reduction=reduction, **options
    )


def product(batch: Batch) -> Callable[[], Tensor]:
    """``q @ q.T``, the one matrix product that every N×N formulation starts with."""
    q = F.normalize(batch.x.detach(), dim=1)
    return lambda: q @ q.T


def providers(device: str) -> list[Provider]:
    """The baseline, its row-loop twin, then each fused backend that runs on the device."""
    is_gpu = device != "cpu"
    fused = [
        name
        for name, reason in available_backends(device).items()
        if reason is None and name != "reference" and not (name == "triton" and not is_gpu)
    ]
    return [
        Provider(BASELINE, eager_losses, 30, 16_384),
        Provider("eager, row loop", functools.partial(eager_losses, has_row_loop=True), 30, 4_096),
        *(Provider(f"conr_kernels ({t})", package_losses(t)) for t in fused),
    ]
