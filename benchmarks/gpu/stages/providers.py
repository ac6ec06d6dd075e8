"""What the GPU benchmark compares, its batches, and the check before anything is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...batches import Batch, make_batch
from ...measure import SAMPLED_ROWS, exact
from ...providers import Provider, eager_losses, package_losses
from .. import device
from ..rows import Stage

#: Kinds of predictions by their names in the rows.
REGIMES = {"7 years off": "agedb", "converged": "converged", "collapsed": "constant"}
OFF, COLLAPSED = "7 years off", "collapsed"
BF16, F32 = torch.bfloat16, torch.float32
PRODUCT = "q @ q.T"
#: Largest errors by dtype and provider: of the losses; of the gradient of the sampled rows, and of
#: the others, relative to the largest entry of each. Comparators round their scores to 16 bits.
LIMITS = {BF16: (3e-3, 2e-2), F32: (5e-6, 5e-5)}
COMPARATOR_LIMITS = {BF16: (2e-2, 5e-2), F32: (1e-2, 1e-2)}


class Size(NamedTuple):
    """N, D, dtype and predictions of a case, as its rows name them."""

    N: int
    D: int = 128
    dtype: torch.dtype = BF16
    regime: str = OFF

    def row(self) -> dict[str, object]:
        dtype = str(self.dtype).removeprefix("torch.")
        return dict(N=self.N, D=self.D, dtype=dtype, regime=self.regime)

    def __str__(self) -> str:
        row = self.row()
        return f"N={self.N} D={self.D} {row['dtype']} {self.regime}"

    def batch(self) -> Batch:
        return _batch(self)


@functools.lru_cache(maxsize=1)
def _batch(size: Size) -> Batch:
    """The host takes seconds to draw the largest."""
    n, d = device.small(size.N), device.narrow(size.D)
    return make_batch(n, d, REGIMES[size.regime], device.DEVICE, size.dtype)


def dense_losses(batch: Batch, reduction: str) -> Tensor:
    from .dense import dense_losses  # Triton may be missing where CUDA C++ is not

    return dense_losses(batch, reduction)


def compiled_eager_losses(batch: Batch, reduction: str) -> Tensor:
    return _compiled_eager()(batch.x, batch.y, batch.p, batch.w, reduction)


@functools.cache
def _compiled_eager() -> Callable[..., Tensor]:
    def losses(x: Tensor, y: Tensor, p: Tensor, w: Tensor, reduction: str) -> Tensor:
        return eager_losses(Batch(x, y, p, w), reduction)

    return losses if device.REHEARSAL else torch.compile(losses, dynamic=False)


#: In a rehearsal the torch backend stands in for those that need a GPU.
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("triton", package_losses(device.TRITON)),
        Provider("cuda", package_losses("torch" if device.REHEARSAL else "cuda")),
        Provider("eager", eager_losses, 40),
        Provider("compiled eager", compiled_eager_losses, 40),
        Provider("dense fused", dense_losses),
    )
}


def fits(size: Size, name: str) -> bool:
    """Whether its N×N matrices find room."""
    return PROVIDERS[name].pair_bytes * size.N**2 < 0.9 * device.bytes_free()


@functools.lru_cache(maxsize=1)
def _truth(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Upstream gradient [S], losses [S] and gradient [N, D] of the first S rows, in float64.

    All rows are keys of the anchors: their losses depend on, and lead a gradient to, every row.
    """
    batch = size.batch()
    g = torch.linspace(0.5, 1.5, min(SAMPLED_ROWS, len(batch.y)), device=device.DEVICE)
    return g, *exact(batch, g)


def is_correct(stage: Stage, size: Size, name: str, batch: Batch) -> bool:
    """Compares with float64, and says so: nothing is timed of a wrong result."""
    g, exact_losses, exact_gradient = _truth(size)
    S = len(g)
    losses = PROVIDERS[name].row_losses(batch)
    (gradient,) = torch.autograd.grad((losses[:S] * g.to(losses.dtype)).sum(), batch.x)
    parts = [part for part in (slice(S), slice(S, None)) if len(gradient[part])]
    errors = {
        "loss error": _error(losses[:S], exact_losses),
        "gradient error": max(_error(gradient[part], exact_gradient[part]) for part in parts),
    }
    limits = (LIMITS if name in ("triton", "cuda") else COMPARATOR_LIMITS)[size.dtype]
    is_right = all(error <= most for error, most in zip(errors.values(), limits, strict=True))
    row = dict(provider=name, mode="forward+backward", **size.row())
    for metric, error in errors.items():
        stage.add(metric, error, **row)
    if not is_right:
        stage.add("wrong", 1, **row, note=f"{errors}, limits {limits}: not timed")
    return is_right


def _error(got: Tensor, exact: Tensor) -> float:
    largest = exact.abs().max().clamp(min=1e-30)
    return ((got.detach().double() - exact).abs().max() / largest).nan_to_num(torch.inf).item()
