"""What rounding may cost: the bounds that a row loss and a gradient promise, and the distances on
which they depend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conr_kernels.variants import Settings


def unit(dtype: torch.dtype) -> float:
    """Half a last place of 1: 2⁻²⁴ in float32, 2⁻⁵³ in float64."""
    return torch.finfo(dtype).eps / 2


def label_distance(y: Tensor, distance: str) -> Tensor:
    """``d_ij`` [N, N] of the labels [N, L], component by component, in the labels' dtype."""
    gaps = [(y[:, None, c] - y[None, :, c]).abs() for c in range(y.shape[1])]
    if len(gaps) == 1:
        return gaps[0]
    if distance == "mae":
        return sum(gaps[1:], gaps[0]) / len(gaps)
    squares = [gap * gap for gap in gaps]
    return (sum(squares[1:], squares[0]) / len(gaps)).sqrt()


def row_bound(u: float, rows: Tensor, y: Tensor, w: Tensor, settings: Settings) -> Tensor:
    """What a row loss is good to [N]: ``8u (1/τ + |ℓ_i| + e·max d)``; of a weighted row the
    exponents count ``w_i`` times.
    """
    exponent = _largest_exponent(y, settings)
    rate = w.double() if settings.variant.weighted_rows else 1.0
    return 8 * u * (rate * exponent + rows.double().abs())


def largest_rate(g: Tensor, w: Tensor, settings: Settings) -> float:
    """The largest term in the sums ``‖x_i‖ ∂L/∂x_i``, up to a small factor: ``max |g_i|/τ``."""
    return _rates(g, w, settings).max().item() if len(g) else 0.0


def gradient_bound(u: float, y: Tensor, g: Tensor, w: Tensor, settings: Settings) -> float:
    """What the rounding of exponents costs ``‖x_i‖ ∂L/∂x_i``: ``8u (1/τ + e·max d + 1)`` of the
    rows' rates.
    """
    return 8 * u * (_largest_exponent(y, settings) + 1) * _rates(g, w, settings).sum().item()


def _rates(g: Tensor, w: Tensor, settings: Settings) -> Tensor:
    """How fast a row loss changes with its unit feature at most, times the upstream gradient."""
    scale = g * w if settings.variant.weighted_rows else g
    return scale.double().abs() / settings.temperature


def _largest_exponent(y: Tensor, settings: Settings) -> float:
    d_ij = label_distance(y, settings.distance)
    largest_d = d_ij.max().item() if d_ij.numel() else 0.0
    return 1 / settings.temperature + abs(settings.push_scale) * largest_d
