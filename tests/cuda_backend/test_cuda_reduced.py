"""The CUDA backend's reduced losses, and what a step costs the host."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from conr_kernels import conr_loss, notices, ops
from conr_kernels.cuda_backend import backend as cuda_backend
from conr_kernels.variants import PRESETS, Settings
from tests.helpers.cuda_batches import make_batch, rms
from tests.helpers.memory import fresh_tensors_full_of

#: Of a loss and of a gradient, relative to its root mean square.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-5), torch.float16: (1e-6, 1e-3),
    torch.bfloat16: (1e-6, 6e-3),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_reduced_losses_and_their_gradients(shim, path, dtype, reduction):
    """For an upstream gradient that is not 1."""
    of_loss, of_gradient = TOLERANCES[dtype]
    for N, L, variant in ((1, 1, "paper"), (33, 1, "paper"), (97, 2, "released-age")):
        batch = make_batch(N, 24, L, dtype=dtype)
        options = dict(upstream=3.0 * 2**10, variant=variant)
        loss, gradient = batch.reduced(reduction, **options)
        expected, exact = batch.reduced(reduction, "reference", torch.float64, **options)
        assert (loss - expected).abs() <= of_loss * expected.abs()
        assert rms(gradient - exact) <= of_gradient * rms(exact)


def test_a_reduced_loss_is_that_of_the_row_losses(shim, path):
    batch = make_batch(300, 24)
    rows, _ = batch.run("cuda")
    for reduction, expected in (("sum", rows.sum()), ("mean", rows.mean())):
        loss, gradient = batch.reduced(reduction)
        assert (loss - expected).abs() <= 2e-7 * expected.abs()
        with torch.no_grad():
            x, y, p, w = batch.x, batch.y, batch.p, batch.w
            assert torch.equal(
                conr_loss(x, y, p, w, reduction=reduction, backend="cuda"), loss.float()
            )


@pytest.mark.parametrize("variant", ["paper", "contrastive"])
@pytest.mark.parametrize(("N", "K", "L"), [(1, 1, 1), (33, 33, 1), (130, 170, 2), (0, 5, 1)])
def test_every_number_that_the_forward_operator_returns_is_written(shim, path, variant, N, K, L):
    """Two calls return the same bits, whatever their memory held before, in the announced form."""
    batch = make_batch(K, 24, L)
    rows = batch.x, batch.y, batch.p
    settings = Settings(1.0, 0.02, 0.01, PRESETS[variant])
    keys = (None,) * 3 if N == K else rows
    operands = (*(t[:N] for t in rows), None, *keys, None, 0, *settings.scalars, "cuda")
    found = []
    for byte in (0x3F, 0x5A):
        with fresh_tensors_full_of(byte):
            found.append(torch.ops.conr_kernels.forward(*operands))
            announced = ops._forward_fake(*operands)
    for first, second, expected in zip(*found, announced, strict=True):
        assert first.shape == expected.shape and first.dtype == expected.dtype
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bits_of_a_reduced_loss_in_any_order_of_threads(shim, path, dtype):
    results = []
    for order in (0, 1, 5):
        shim.configure(order)
        results.append(make_batch(130, 40, L=2, dtype=dtype).reduced("mean"))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("where", ["x", "y", "p", "w", "upstream"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_input_of_a_reduced_loss_shows(shim, path, where, value):
    batch = make_batch(66, 16)
    batch.y[9], batch.p[9] = 1e4, -1e4  # in no pair
    if where == "upstream":
        _, gradient = batch.reduced("mean", upstream=value)
        assert not gradient.isfinite().any()
        return
    getattr(batch, where)[7] = value
    loss, gradient = batch.reduced("mean")
    assert not loss.isfinite() and not gradient.isfinite().any()


def test_labels_may_change_between_a_reduced_loss_and_its_gradient(shim, path):
    batch = make_batch(97, 16, L=2)
    expected = batch.reduced("mean")[1]
    x = batch.x.clone().requires_grad_()
    loss = conr_loss(x, batch.y, batch.p, batch.w, backend="cuda")
    batch.y.zero_(), batch.p.zero_(), batch.w.zero_()
    loss.backward()
    assert torch.equal(x.grad.double(), expected)


def test_absent_rows_and_further_keys_are_reduced_too(shim, path):
    """Through the row losses."""
    batch = make_batch(97, 16)
    options = dict(variant="released-depth", mask=torch.arange(97) % 5 > 0)
    keys = make_batch(33, 16, seed=1)
    for further in (None, (keys.x, keys.y, keys.p)):
        loss, gradient = batch.reduced("mean", keys=further, **options)
        of_double = None if further is None else (keys.x.double(), keys.y, keys.p)
        expected, exact = batch.reduced(
            "mean", "reference", torch.float64, keys=of_double, **options
        )
        assert (loss - expected).abs() <= 1e-6 * expected.abs()
        assert rms(gradient - exact) <= 1e-5 * rms(exact)


#: By the path: operators of PyTorch that run a kernel, and kernels launched.
COUNTS = {("dense", 1): ([], 7), ("banded", 1): (["sort"], 10), ("banded", 3): (["sort"], 11)}
#: Operators of the extension, and calls of functions, Python's and C's.
OPERATORS, CALLS = ["forward", "backward"], 182


@pytest.mark.parametrize(("path", "L"), COUNTS, indirect=["path"])
def test_what_a_step_costs_the_host_is_fixed(shim, monkeypatch, path, L):
    """Forward and backward of the mean; beside what is listed, the upstream gradient of
    ``backward()``.
    """
    pytest.importorskip("triton", reason="triton is not installed: benchmarks.host needs it")
    from benchmarks.host.step import count_calls, operators

    monkeypatch.setattr(cuda_backend, "_operators", lambda: torch.ops.conr_kernels_cuda)
    monkeypatch.setattr(notices, "_told", {"anchors"})  # what is read on the CPU alone
    batch = make_batch(130, 40, L, dtype=torch.bfloat16)
    x = batch.x.requires_grad_()

    def step() -> None:
        conr_loss(x, batch.y, batch.p, batch.w, backend="cuda").backward()
        x.grad = None

    for _ in range(3):
        step()
    of_torch, n_launches = COUNTS[path, L]
    assert operators(step)[0] == [*of_torch, "ones_like"]
    before = shim.n_launches()
    step()
    assert shim.n_launches() - before == n_launches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    own = Counter(event.name.partition("conr_kernels_cuda::")[2] for event in profile.events())
    assert {name: n for name, n in own.items() if name} == dict.fromkeys(OPERATORS, 1)
    assert count_calls(step) <= CALLS


def test_what_is_known_of_settings_is_bounded(shim, monkeypatch):
    monkeypatch.setattr(cuda_backend, "_known", {})
    kept = [Settings(1.0, 0.2 + n / 1000, 0.01, PRESETS["paper"]) for n in range(200)]
    for settings in kept:
        assert cuda_backend._scalars(settings, False)[1] == settings.temperature
        assert len(cuda_backend._known) <= cuda_backend.KNOWN
    assert (
        cuda_backend._scalars(kept[0], True)[3] == cuda_backend._scalars(kept[0], False)[3] + 2048
    )
