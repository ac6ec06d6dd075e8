"""``backend="cuda"`` on a GPU: values, same bits, no synchronisation, CUDA graphs.

With ``CONR_REHEARSE=1`` the torch backend stands in on the CPU, so that the tests are tried.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import device
from conr_kernels import conr_loss
from conr_kernels.cuda_backend import backend as cuda_backend
from conr_kernels.variants import PRESETS

BACKEND = "torch" if device.REHEARSAL else "cuda"
WHY_NOT = device.reason_against()
if WHY_NOT is None and not device.REHEARSAL:
    WHY_NOT = cuda_backend.unavailable(torch.device("cuda"), torch.float32)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"not run: {WHY_NOT}")

#: By dtype, with all of a batch's rows: one, a sweep over all pairs, two sweeps, D in chunks.
REGIMES = [(1, 3), (300, 33), (2000, 128), (1500, 300)]
LONG = 3000
REPEATS = 250
if device.REHEARSAL:
    REGIMES, LONG, REPEATS = [(1, 3), (65, 17)], 700, 2
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def batch(N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(N + D)
    y = torch.randint(0, 120, (N,), generator=g) / 4
    p = y + torch.randn(N, generator=g)
    x, w = torch.randn(N, D, generator=g), torch.rand(N, generator=g) + 0.1
    if N > 1:
        x[::29] = 0
    return tuple(t.to(device.DEVICE) for t in (x.to(dtype), y, p, w))


def run(x: Tensor, *others: Tensor, scale: float = 1.0, **options) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of it times the scale."""
    x = x.detach().clone().requires_grad_()
    loss = conr_loss(x, *others, **options)
    (loss * scale).sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_loss_and_gradient(variant, dtype, reduction):
    for N, D in REGIMES:
        x, *others = batch(N, D, dtype)
        # As a GradScaler does: the gradient, a mean's above all, is among float16's subnormal
        # numbers, whose rounding alone is 0.1 % of it.
        scale = {"mean": 2.0**16, "none": 2.0**8}[reduction] if dtype == torch.float16 else 1.0
        options = dict(variant=variant, reduction=reduction, scale=scale)
        loss, gradient = run(x, *others, **options, backend=BACKEND)
        expected = run(x.double(), *others, **options, backend="reference")
        assert not gradient[(x == 0).all(1)].any()
        assert (loss - expected[0]).norm() <= 1e-5 * expected[0].norm()
        error = (gradient.double() - expected[1]).norm()
        assert error <= TOLERANCES[dtype] * expected[1].norm(), (N, D)


@pytest.mark.parametrize("N", [300, LONG])
def test_same_bits(N):
    x, *others = batch(N, 128, torch.bfloat16)
    first = run(x, *others, backend=BACKEND)
    for _ in range(REPEATS):
        assert all(map(torch.equal, first, run(x, *others, backend=BACKEND)))


@pytest.mark.parametrize("N", [300, LONG])
def test_no_synchronisation(N):
    x, *others = batch(N, 128, torch.bfloat16)
    first = run(x, *others, backend=BACKEND)
    with device.no_synchronisation():
        again = run(x, *others, backend=BACKEND)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("N", [300, LONG])
def test_a_cuda_graph_replays_it(N):
    x, *others = batch(N, 64, torch.float32)
    x.requires_grad_()
    expected = run(x, *others, backend=BACKEND)

    def step() -> tuple[Tensor, Tensor]:
        loss = conr_loss(x, *others, backend=BACKEND)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    replay, captured = device.graph(step)
    replay()
    assert all(map(torch.equal, captured(), expected))
