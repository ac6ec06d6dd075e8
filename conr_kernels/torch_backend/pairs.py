"""Pairs of a tile in PyTorch operations: their masks and weights, and sums over them.

Masks are 0 and 1 in the features' dtype and are multiplied in: several times faster on a CPU than
boolean ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import pair_distance
from ..variants import Settings
from .tiles import Rows, Tile

LN_2 = math.log(2)


class Totals(dict[str, Tensor]):
    """Sums over the pairs of each anchor, in the sweep's order, added up tile by tile."""

    def __init__(self, n_anchors: int) -> None:
        self.n_anchors = n_anchors

    def add(
        self, name: str, tile: Tile, t_ij: Tensor, dtype: torch.dtype, is_log: bool = False
    ) -> None:
        """Adds ``Σ_j t_ij``, or ``log Σ_j exp(t_ij)`` to a sum kept as its logarithm."""
        reduce = torch.logsumexp if is_log else torch.sum
        total = self.get(name)
        if total is None:
            start = -torch.inf if is_log else 0.0
            total = self[name] = t_ij.new_full((self.n_anchors,), start, dtype=dtype)
        self._combine(total[tile.anchors], reduce(t_ij, dim=-1).view(-1), is_log)
        if tile.mirror < tile.width:
            of_keys = reduce(t_ij[..., tile.mirror :], dim=-2).view(tile.count, -1)
            for keys, part in zip(tile.mirrored, of_keys.unbind(), strict=True):
                self._combine(total[keys], part, is_log)

    @staticmethod
    def _combine(total: Tensor, part: Tensor, is_log: bool) -> None:
        if is_log:
            torch.logaddexp(total, part, out=total)
        else:
            total.add_(part)


def similarities(
    q_i: Tensor, q_j: Tensor, settings: Settings, as_powers_of_two: bool = False
) -> Tensor:
    """``s_ij`` of unit features [N, D] and [K, D], or [count, N, D] and [count, K, D].

    ``as_powers_of_two``: ``s_ij / ln 2``; a CPU takes half as long for ``exp2`` as for ``exp``.
    """
    product = torch.addmm if q_i.dim() == 2 else torch.baddbmm
    nothing = q_i.new_empty((1,) * q_i.dim())
    scale = (1 / LN_2 if as_powers_of_two else 1.0) / settings.temperature
    return product(nothing, q_i, q_j.mT, beta=0, alpha=scale)


def window_mask(d_ij: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    """``[d_ij ≤ h]``; overwrites ``d_ij``."""
    return d_ij.le_(settings.window).to(dtype)


def negative_weight(
    d_ij: Tensor, rows_i: Rows, rows_j: Rows, edges: tuple[slice, ...] | None, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """``[j ∈ M_i]``, times ``d_ij`` where ``φ(d) = d``; and ``e·d_ij`` where that is ``log φ``.

    Predictions are compared on the columns ``edges``, None for all. Overwrites ``d_ij``.
    """
    dtype = rows_i.q.dtype
    is_exponential = settings.variant.pushing == "exponential"
    log_phi = d_ij.to(dtype) * settings.push_scale if is_exponential else None
    h = settings.window
    weight = torch.threshold_(d_ij, h, 0.0) if settings.scales_by_distance else d_ij.gt_(h)
    weight = weight.to(dtype)
    if settings.variant.negatives == "all":
        return weight, log_phi
    if edges is None:
        delta_ij = pair_distance(rows_i.p, rows_j.p, settings.distance)
        return weight.mul_(window_mask(delta_ij, settings, dtype)), log_phi
    for columns in edges:
        delta_ij = pair_distance(rows_i.p, rows_j.p[..., columns, :], settings.distance)
        weight[..., columns].mul_(window_mask(delta_ij, settings, dtype))
    return weight, log_phi


def push(t_ij: Tensor, log_phi: Tensor | None, is_log: bool) -> Tensor:
    if log_phi is None:
        return t_ij
    return t_ij.add_(log_phi) if is_log else t_ij.mul_(log_phi.exp_())


def weigh(t_ij: Tensor, weight: Tensor, is_log: bool) -> Tensor:
    """``weight · t_ij``, or ``log weight + t_ij``; in place."""
    return t_ij.add_(weight.log()) if is_log else t_ij.mul_(weight)


def times_coefficients(t_ij: Tensor, coef_i: Tensor, coef_j: Tensor) -> Tensor:
    """``t_ij (c_i + c_j)``, or ``exp(t_ij) (c_i + c_j)`` with c as sign and logarithm [..., N,
    2].
    """
    if coef_i.shape[-1] == 1:
        return (coef_i + coef_j.mT).mul_(t_ij)
    of_i = (t_ij + coef_i[..., 1:]).exp_().mul_(coef_i[..., :1])
    of_j = (t_ij + coef_j[..., 1:].mT).exp_().mul_(coef_j[..., :1].mT)
    return of_i.add_(of_j)


def drop_self(t_ij: Tensor, tile: Tile, fill: float) -> Tensor:
    """Sets the pair of each anchor with itself to ``fill``; in place."""
    if tile.has_diagonal:
        t_ij.diagonal(dim1=-2, dim2=-1).fill_(fill)
    return t_ij
