"""``backend="cuda"`` on a GPU: values, same bits, no synchronisation, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conr_kernels import conr_loss, cuda_backend
from conr_kernels.variants import PRESETS

WHY_NOT = (
    cuda_backend.unavailable(torch.device("cuda"), torch.float32)
    if torch.cuda.is_available()
    else "no CUDA GPU"
)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

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
    return x.to("cuda", dtype), y.cuda(), p.cuda(), w.cuda()


def run(x: Tensor, *others: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    loss = conr_loss(x, *others, **options)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_loss_and_gradient(variant, dtype):
    for N, D in ((1, 3), (300, 33), (2000, 128), (1500, 300)):
        x, *others = batch(N, D, dtype)
        loss, gradient = run(x, *others, variant=variant, backend="cuda")
        expected = run(x.double(), *others, variant=variant, backend="reference")
        assert (loss - expected[0]).abs() <= 1e-5 * expected[0].abs()
        error = (gradient.double() - expected[1]).norm()
        assert error <= TOLERANCES[dtype] * expected[1].norm(), (N, D)


@pytest.mark.parametrize("N", [300, 3000])
def test_same_bits_and_no_synchronisation(N):
    x, *others = batch(N, 128, torch.bfloat16)
    first = run(x, *others, backend="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(x, *others, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("N", [300, 3000])
def test_a_cuda_graph_replays_it(N):
    x, *others = batch(N, 64, torch.float32)
    x.requires_grad_()
    expected = run(x, *others, backend="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(conr_loss(x, *others, backend="cuda"), x)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        loss = conr_loss(x, *others, backend="cuda")
        (gradient,) = torch.autograd.grad(loss, x)
    graph.replay()
    assert torch.equal(loss.detach(), expected[0]) and torch.equal(gradient, expected[1])
