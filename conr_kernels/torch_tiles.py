"""Tiles of pairs in PyTorch operations: which there are, their masks and weights, sums over them.

Masks are 0 and 1 in the features' dtype and are multiplied in: several times faster on a CPU than
boolean ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import pair_distance
from .sweep import Sweep
from .variants import Settings

#: Rows of a tile, and the most pairs in one.
BLOCK_I = 256
TILE_PAIRS = 2**18


@dataclass(frozen=True)
class Rows:
    """Unit features [N, D], labels, predictions [N, L] and gradient coefficients in one order."""

    q: Tensor
    y: Tensor
    p: Tensor
    coef: Tensor | None

    def __getitem__(self, rows: slice) -> Rows:
        coef = None if self.coef is None else self.coef[rows]
        return Rows(self.q[rows], self.y[rows], self.p[rows], coef)


def take_rows(
    x: Tensor,
    inverse_norm: Tensor,
    y: Tensor,
    p: Tensor,
    coef: Tensor | None,
    order: Tensor | None,
    buffer: Tensor | None = None,
) -> Rows:
    """The rows in the given order, their unit features written to the buffer if there is one.

    Memory fresh from the system costs more than the arithmetic on it.
    """
    if order is None:
        return Rows(x * inverse_norm, y, p, coef)
    if x.dtype == inverse_norm.dtype:
        q = x.new_empty(x.shape) if buffer is None else buffer
        q = torch.index_select(x, 0, order, out=q)
    else:
        q = x[order].to(inverse_norm.dtype)
    coef = None if coef is None else coef[order]
    return Rows(q.mul_(inverse_norm[order]), y[order], p[order], coef)


@dataclass(frozen=True)
class Tile:
    """Sorted anchors ``i`` against sorted keys ``j``.

    Attributes:
        edges: columns that may hold pairs outside the window; all others are inside.
        has_diagonal: the anchors' own pairs are the diagonal.
        mirrored: keys and columns of the part that stands for the transposed tile too, or None.
    """

    i: slice
    j: slice
    edges: tuple[slice, ...]
    has_diagonal: bool
    mirrored: tuple[slice, slice] | None


def make_tiles(sweep: Sweep) -> Iterator[Tile]:
    """The tiles of a sweep's bands; of the upper triangle only where the anchors are the keys."""
    N, K = sweep.n_anchors, sweep.n_keys
    blocks = range(0, N, BLOCK_I)
    if sweep.serves == "both":
        bounds = [[0, K, 0, 0]] * len(blocks)
    else:
        first = torch.arange(0, N, BLOCK_I)
        last = (first + BLOCK_I - 1).clamp(max=N - 1)
        of_blocks = (sweep.lo[first], sweep.hi[last], sweep.lo[last], sweep.hi[first])
        bounds = torch.stack(of_blocks, dim=1).tolist()
    for i0, (j0, j1, full0, full1) in zip(blocks, bounds, strict=True):
        i1, mirror = min(i0 + BLOCK_I, N), K
        if sweep.is_symmetric:
            # j in [i0, hi of i0) is in every band only if the last anchor is in i0's band too.
            j0, full0, mirror = i0, i0 if full1 >= i1 else full1, i1
        if not sweep.is_exact:
            full1 = full0
        width = TILE_PAIRS // (i1 - i0)
        for c0 in range(j0, j1, width):
            c1 = min(c0 + width, j1)
            yield Tile(
                slice(i0, i1),
                slice(c0, c1),
                _outside(c1 - c0, full0 - c0, full1 - c0),
                sweep.is_symmetric and c0 == i0,
                (slice(max(mirror, c0), c1), slice(max(mirror, c0) - c0, None))
                if mirror < c1
                else None,
            )


def _outside(n_columns: int, full0: int, full1: int) -> tuple[slice, ...]:
    full0, full1 = max(full0, 0), min(full1, n_columns)
    if full0 >= full1:
        return (slice(0, n_columns),)
    sides = ((0, full0), (full1, n_columns))
    return tuple(slice(start, stop) for start, stop in sides if start < stop)


class Totals(dict[str, Tensor]):
    """Sums over the pairs of each anchor, in the sweep's order, added up tile by tile."""

    def __init__(self, n_anchors: int) -> None:
        self.n_anchors = n_anchors

    def add(
        self, name: str, tile: Tile, t_ij: Tensor, dtype: torch.dtype, is_log: bool = False
    ) -> None:
        """Adds ``Σ_j t_ij``, or ``log Σ_j exp(t_ij)`` to a sum kept as its logarithm."""
        reduce = torch.logsumexp if is_log else torch.sum
        combine = torch.logaddexp if is_log else torch.add
        if name not in self:
            start = -torch.inf if is_log else 0.0
            self[name] = t_ij.new_full((self.n_anchors,), start, dtype=dtype)
        total = self[name]
        total[tile.i] = combine(total[tile.i], reduce(t_ij, dim=1))
        if tile.mirrored:
            keys, columns = tile.mirrored
            total[keys] = combine(total[keys], reduce(t_ij[:, columns], dim=0))


def similarities(q_i: Tensor, q_j: Tensor, settings: Settings) -> Tensor:
    s_ij = q_i.new_empty(len(q_i), len(q_j))
    return s_ij.addmm_(q_i, q_j.T, beta=0, alpha=1 / settings.temperature)


def window_mask(d_ij: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    """``[d_ij ≤ h]``; overwrites ``d_ij``."""
    return d_ij.le_(settings.window).to(dtype)


def negative_weight(
    d_ij: Tensor, rows_i: Rows, rows_j: Rows, edges: tuple[slice, ...], settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """``[j ∈ M_i]``, times ``d_ij`` where ``φ(d) = d``; and ``e·d_ij`` where that is ``log φ``.

    Predictions are compared on the columns ``edges``. Overwrites ``d_ij``.
    """
    dtype = rows_i.q.dtype
    is_exponential = settings.variant.pushing == "exponential"
    log_phi = d_ij.to(dtype) * settings.push_scale if is_exponential else None
    h = settings.window
    weight = torch.threshold_(d_ij, h, 0.0) if settings.scales_by_distance else d_ij.gt_(h)
    weight = weight.to(dtype)
    if settings.variant.negatives == "confused":
        for columns in edges:
            delta_ij = pair_distance(rows_i.p, rows_j.p[columns], settings.distance)
            weight[:, columns].mul_(window_mask(delta_ij, settings, dtype))
    return weight, log_phi


def push(t_ij: Tensor, log_phi: Tensor | None, is_log: bool) -> Tensor:
    if log_phi is None:
        return t_ij
    return t_ij.add_(log_phi) if is_log else t_ij.mul_(log_phi.exp_())


def weigh(t_ij: Tensor, weight: Tensor, is_log: bool) -> Tensor:
    """``weight · t_ij``, or ``log weight + t_ij``; in place."""
    return t_ij.add_(weight.log()) if is_log else t_ij.mul_(weight)


def times_coefficients(t_ij: Tensor, coef_i: Tensor, coef_j: Tensor) -> Tensor:
    """``t_ij (c_i + c_j)``, or ``exp(t_ij) (c_i + c_j)`` with c as sign and logarithm [N, 2]."""
    if coef_i.shape[1] == 1:
        return (coef_i + coef_j.T).mul_(t_ij)
    of_i = (t_ij + coef_i[:, 1:]).exp_().mul_(coef_i[:, :1])
    of_j = (t_ij + coef_j[:, 1]).exp_().mul_(coef_j[:, 0])
    return of_i.add_(of_j)


def drop_self(t_ij: Tensor, tile: Tile, fill: float) -> Tensor:
    """Sets the pair of each anchor with itself to ``fill``; in place."""
    return t_ij.fill_diagonal_(fill) if tile.has_diagonal else t_ij
