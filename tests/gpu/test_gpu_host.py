"""What takes the host out of a step on a GPU: the launch of compiled kernels and CUDA graphs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import device
from conr_kernels import ConRLoss, conr_loss

WHY_NOT = device.reason_against() or ("a rehearsal has no GPU" if device.REHEARSAL else None)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"not run: {WHY_NOT}")

#: Every pair with s_ij kept and found again, and sweeps; odd sizes and misaligned rows below.
SIZES = [(31, 33), (128, 128), (1000, 512), (3001, 128), (4096, 256), (5000, 65)]


def batch(N: int, D: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(N + D)
    x = torch.randn(N, D, generator=g).to(dtype)
    y = torch.randint(0, 60, (N,), generator=g).float()
    p = y + 8 * torch.randn(N, generator=g)
    return tuple(t.to(device.DEVICE) for t in (x, y, p, torch.rand(N, generator=g) + 0.1))


def loss_and_gradient(x: Tensor, *rows: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = conr_loss(x, *rows, backend="triton", **options)
    (loss * 3).sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize(("N", "D"), SIZES)
def test_a_looked_up_launch_has_the_bits_of_tritons_own(
    N: int, D: int, offset: int, reduction: str
) -> None:
    from conr_kernels.triton_backend import launch

    x, *rows = batch(N, D)
    spread = torch.empty(N * D + offset, dtype=x.dtype, device=x.device)
    x = spread[offset:].view(N, D).copy_(x)
    looked_up = [loss_and_gradient(x, *rows, reduction=reduction) for _ in range(3)]
    with mock.patch.object(launch, "_is_on_gpu", lambda t: False):
        plain = loss_and_gradient(x, *rows, reduction=reduction)
    for loss, gradient in looked_up:
        assert torch.equal(loss, plain[0]) and torch.equal(gradient, plain[1])


@pytest.mark.parametrize("N", [31, 1000, 4000, 6000])
def test_labels_are_converted_as_pytorch_converts_them(N: int) -> None:
    x, y, p, w = batch(N, 64)
    expected = loss_and_gradient(x, y, p.to(torch.bfloat16).float(), w)
    got = loss_and_gradient(x, y.long(), p.to(torch.bfloat16), w)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


class Head(nn.Module):
    """An encoder's head with its losses."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(D, D), nn.Linear(D, 1)
        self.conr = ConRLoss(backend="triton")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.body(x)
        predictions = self.out(features)[:, 0]
        return nn.functional.l1_loss(predictions, y) + self.conr(features, y, predictions)


def gradients_of(step: nn.Module, head: Head, x: Tensor, y: Tensor) -> list[Tensor]:
    head.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    loss = step(x, y)
    loss.backward()
    return [loss.detach().clone(), x.grad.clone(), *(t.grad.clone() for t in head.parameters())]


@pytest.mark.parametrize("N", [128, 1000, 4096, 6000])
def test_a_graphed_head_has_the_bits_of_an_eager_one(N: int) -> None:
    torch.manual_seed(0)
    head = Head(64).to(device.DEVICE)
    x, y, *_ = batch(N, 64, torch.float32)
    graphed = torch.cuda.make_graphed_callables(Head(64).to(device.DEVICE), (
        x.clone().requires_grad_(), y,
    ))  # fmt: skip
    graphed.load_state_dict(head.state_dict())
    for step in range(3):  # new data in the places that were captured
        g = torch.Generator(x.device).manual_seed(step)
        order = torch.randperm(N, device=x.device, generator=g)
        of_step = (x[order] + step, y)
        expected = gradients_of(head, head, *of_step)
        for ours, theirs in zip(gradients_of(graphed, graphed, *of_step), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("N", [128, 4096, 6000])
def test_reduce_overhead_replays_with_new_data(N: int) -> None:
    torch.manual_seed(0)
    head = Head(64).to(device.DEVICE)
    compiled = torch.compile(head, mode="reduce-overhead")
    x, y, *_ = batch(N, 64, torch.float32)
    for step in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        of_step = (x.flip(0) * (step + 1), y)
        got = gradients_of(compiled, head, *of_step)
        for ours, theirs in zip(got, gradients_of(head, head, *of_step), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
