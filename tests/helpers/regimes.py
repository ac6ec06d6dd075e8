"""The ways in which the torch backend computes a batch, forced at small sizes, and batches for
them.
"""

import pytest
import torch
from torch import Tensor

from conr_kernels import conr_loss
from conr_kernels.torch_backend import small, sweeps, tiles
from conr_kernels.variants import PRESETS as VARIANTS

PRESETS = tuple(VARIANTS)
#: One kept tile; two banded sweeps; one sweep over all pairs; and the eager equations.
REGIMES = ("kept", "banded", "dense", "reference")


def force(monkeypatch: pytest.MonkeyPatch, regime: str) -> str:
    """Makes the torch backend take the regime, in tiles of few pairs; the backend to call."""
    if regime == "reference":
        return "reference"
    monkeypatch.setattr(small, "KEPT_ROWS", 10**6 if regime == "kept" else 0)
    monkeypatch.setattr(sweeps, "DENSE_SHARE", 9.0 if regime == "banded" else -1.0)
    monkeypatch.setattr(tiles, "BLOCK_I", 8)
    monkeypatch.setattr(tiles, "TILE_PAIRS", 256)
    return "torch"


def make_batch(N: int, D: int = 7, dtype=torch.float32, seed: int = 0, L: int = 1) -> dict:
    """Features, labels with ties, predictions and weights; the last row has no pairs at all."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 10, (N, L), generator=g).float()
    p = y + 2 * torch.randn(N, L, generator=g)
    y[-1:], p[-1:] = 100.0, -100.0
    w = torch.rand(N, generator=g) + 0.5
    if L == 1:
        y, p = y[:, 0], p[:, 0]
    return dict(features=x, targets=y, predictions=p, weights=w)


def value_and_gradient(
    features: Tensor, *rest, g: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of a leaf that shares the features' memory and strides."""
    x = features.detach().requires_grad_()
    loss = conr_loss(x, *rest, **options)
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss) if g is None else g)
    return loss.detach(), gradient


def same_bits(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
