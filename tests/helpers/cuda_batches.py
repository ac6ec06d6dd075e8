"""Batches for tests of the CUDA kernels, with ties at the window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conr_kernels import conr_loss


@dataclass
class Batch:
    x: Tensor
    y: Tensor
    p: Tensor
    w: Tensor
    upstream: Tensor

    def run(self, backend: str, dtype: torch.dtype | None = None, **settings):
        """Row losses and the gradient of the features, given in ``dtype``."""
        x = self.x.to(dtype or self.x.dtype).clone().requires_grad_()
        rows = conr_loss(x, self.y, self.p, self.w, reduction="none", backend=backend, **settings)
        rows.backward(self.upstream.to(rows.dtype))
        return rows.detach().double(), x.grad.double()

    def reduced(
        self,
        reduction: str,
        backend: str = "cuda",
        dtype: torch.dtype | None = None,
        upstream: float = 1.0,
        **settings,
    ):
        """The reduced loss and the gradient of the features for an upstream gradient."""
        x = self.x.to(dtype or self.x.dtype).clone().requires_grad_()
        loss = conr_loss(
            x, self.y, self.p, self.w, reduction=reduction, backend=backend, **settings
        )
        loss.backward(loss.new_tensor(upstream))
        return loss.detach().double(), x.grad.double()


def make_batch(N, D, L=1, dtype=torch.float32, seed=0, grid=0.25, spread=10.0) -> Batch:
    """Labels on a grid, so that ties and distances of exactly h are frequent."""
    g = torch.Generator().manual_seed(1000 * N + D + seed)
    x = torch.randn(N, D, generator=g).to(dtype)
    y = torch.randint(0, int(spread / grid), (N, L), generator=g) * grid
    p = y + torch.randint(-12, 13, (N, L), generator=g) * grid
    w = torch.rand(N, generator=g) + 0.1
    return Batch(x, y, p, w, torch.randn(N, generator=g))


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def assert_as_good_as_eager(batch: Batch, message: str = "", **settings) -> None:
    """Errors at most 3 times those of eager float32 plus 1e-6 of the largest term.

    A gradient's terms are of the size of 1/‖x_i‖: for D = 1 they cancel as its radial part.
    """
    expected = batch.run("reference", torch.float64, **settings)
    eager = batch.run("reference", torch.float32, **settings)
    actual = batch.run("cuda", **settings)
    terms = expected[0].abs().max(), 1 / batch.x.double().norm(dim=1).min()
    for name, a, b, e, term in zip(
        ("loss", "gradient"), actual, eager, expected, terms, strict=True
    ):
        error, allowed = (a - e).abs().max(), 3 * (b - e).abs().max() + 1e-6 * term
        assert error <= allowed, f"{name} {message} {settings}: {error:.2e} > {allowed:.2e}"
