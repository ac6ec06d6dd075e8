"""A backend on a structured case, and the reference on the same rounded numbers."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from conr_kernels import reference
from conr_kernels.core.inputs import Inputs
from conr_kernels.core.rows import scale_statistics

from .cases import Case


def fused(backend: ModuleType, case: Case, dtype: torch.dtype, g: Tensor) -> tuple[Tensor, Tensor]:
    """Row losses and gradient of a backend, with features and weights in the given dtype."""
    x, y, p, w = case.x.to(dtype), case.y, case.p, case.weights(dtype)
    inputs = Inputs(x, y, p, w, None, 0, case.settings)
    loss, stats, layout = backend.forward(inputs)
    coef = scale_statistics(stats, g.to(stats.dtype))
    return loss, backend.backward(inputs, coef, None, layout)


def oracle(case: Case, dtype: torch.dtype, g: Tensor) -> tuple[Tensor, Tensor]:
    """The reference computed in ``dtype`` on features and weights as they round to float32."""
    x = case.x.float().to(dtype).requires_grad_()
    w = None if case.w is None else case.w.float().to(dtype)
    loss = reference.row_losses(x, case.y, case.p, w, None, 0, case.settings)
    (gradient,) = torch.autograd.grad(loss, x, g.to(dtype))
    return loss.detach(), gradient


def assert_as_good_as_eager(backend: ModuleType, case: Case) -> None:
    """Loss and gradient in float32: error ≤ 3× careful eager's + 1e-6 of the largest term."""
    g = torch.rand(len(case.x), generator=torch.Generator().manual_seed(9)).double() + 0.5
    exact, eager = (oracle(case, dtype, g) for dtype in (torch.float64, torch.float32))
    tau, e, variant = case.settings.temperature, case.settings.push_scale, case.settings.variant
    # Of a row's sums the largest exponent is 1/τ + e·d. Gradients of a row are sums of terms of
    # size up to |g|/(τ‖x‖), and exp(s) has the relative error of the rounded exponent.
    largest = 1 / tau + e * float(case.y.max() - case.y.min())
    norms = case.x.norm(dim=1)
    steepest = 1 / (tau * norms.masked_fill(norms == 0, 1.0).min().item())
    if variant.weighted_rows and case.w is not None:
        steepest *= case.w.max().item()
    units = 1e-6 * largest, max(1e-6, 2**-24 / tau) * steepest
    ours = fused(backend, case, torch.float32, g)
    for name, a, b, truth, unit in zip(
        ("loss", "gradient"), ours, eager, exact, units, strict=True
    ):
        assert a.isfinite().all(), f"{name} of {case}"
        error, of_eager = ((t.double() - truth).abs().max().item() for t in (a, b))
        assert error <= 3 * of_eager + unit, f"{name} of {case}: {error:.1e}, eager {of_eager:.1e}"
