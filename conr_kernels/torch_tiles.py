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

#: Rows of a block, and the most pairs in one tile. Small blocks waste few pairs at the bands' ends;
#: a tile takes as many blocks as fit, in one batched product.
BLOCK_I = 64
TILE_PAIRS = 2**18
#: What the host does for a tile takes as long as so many pairs; the most blocks tried for one tile.
TILE_COST = 2**13
GROUP_BLOCKS = 64


@dataclass(slots=True)
class Rows:
    """Unit features [..., N, D], labels, predictions [..., N, L] if these matter, gradient
    coefficients.
    """

    q: Tensor
    y: Tensor
    p: Tensor | None
    coef: Tensor | None

    def windows(self, start: int, count: int, step: int, width: int) -> Rows:
        """Views [count, width, …] of the rows from ``start + k·step`` on, k < count."""

        def cut(t: Tensor) -> Tensor:
            row, column = t.stride()
            at = t.storage_offset() + start * row
            return t.as_strided((count, width, t.shape[1]), (step * row, row, column), at)

        p = None if self.p is None else cut(self.p)
        coef = None if self.coef is None else cut(self.coef)
        return Rows(cut(self.q), cut(self.y), p, coef)


@dataclass(slots=True)
class Tile:
    """``count`` blocks of ``rows`` sorted anchors, each against its own ``width`` sorted keys.

    Attributes:
        i0, j0: the first anchor and key of the first block.
        step: block k's keys begin at ``j0 + k·step``; its anchors at ``i0 + k·rows``.
        edges: columns that may hold pairs outside the window; all others are inside.
        has_diagonal: the anchors' own pairs are the blocks' diagonals.
        mirror: columns from here on stand for the transposed tile too.
    """

    i0: int
    j0: int
    count: int
    rows: int
    step: int
    width: int
    edges: tuple[slice, ...]
    has_diagonal: bool
    mirror: int

    @property
    def anchors(self) -> slice:
        return slice(self.i0, self.i0 + self.count * self.rows)

    def of(self, rows_i: Rows, rows_j: Rows) -> tuple[Rows, Rows]:
        """The tile's anchors [count, rows, …] and keys [count, width, …]."""
        return (
            rows_i.windows(self.i0, self.count, self.rows, self.rows),
            rows_j.windows(self.j0, self.count, self.step, self.width),
        )

    @property
    def mirrored(self) -> Iterator[tuple[int, slice]]:
        """Blocks, and the keys of their columns from ``mirror`` on."""
        if self.mirror < self.width:
            for k in range(self.count):
                start = self.j0 + k * self.step
                yield k, slice(start + self.mirror, start + self.width)


@dataclass(slots=True)
class Block:
    """Keys ``[start, stop)`` of a block of anchors; ``[full0, full1)`` are in every one's band."""

    start: int
    stop: int
    full0: int
    full1: int


def block_rows(sweep: Sweep) -> int:
    """Anchors of one block."""
    return 4 * BLOCK_I if sweep.serves == "both" else BLOCK_I


def make_tiles(sweep: Sweep) -> Iterator[Tile]:
    """The tiles of a sweep's bands; of the upper triangle only where the anchors are the keys."""
    N, rows = sweep.n_anchors, block_rows(sweep)
    blocks = _make_blocks(sweep, rows)
    k = 0
    while k < len(blocks):
        i0, n_rows = k * rows, min(rows, N - k * rows)
        count, step, j0, width = _group(blocks[k:], rows, N - i0, sweep)
        group = list(enumerate(blocks[k : k + count]))
        full0 = max(block.full0 - j0 - m * step for m, block in group)
        full1 = min(block.full1 - j0 - m * step for m, block in group)
        for c0, columns in _chunks(j0, j0 + width, count * n_rows):
            edges = _outside(columns, j0 + full0 - c0, j0 + full1 - c0)
            is_first = sweep.is_symmetric and c0 == j0
            mirror = max(i0 + n_rows - c0, 0) if sweep.is_symmetric else columns
            yield Tile(i0, c0, count, n_rows, step, columns, edges, is_first, mirror)
        k += count


def _make_blocks(sweep: Sweep, rows: int) -> list[Block]:
    N = sweep.n_anchors
    if sweep.serves == "both":
        bounds = [[0, sweep.n_keys, 0, 0]] * len(range(0, N, rows))
    else:
        first = torch.arange(0, N, rows, device=sweep.lo.device)
        last = (first + rows - 1).clamp(max=N - 1)
        of_blocks = (sweep.lo[first], sweep.hi[last], sweep.lo[last], sweep.hi[first])
        bounds = torch.stack(of_blocks, dim=1).tolist()
    blocks = []
    for k, (start, stop, full0, full1) in enumerate(bounds):
        if sweep.is_symmetric:
            # From the block's own anchors on; in all bands only if its last is in its first's.
            start, end = k * rows, min((k + 1) * rows, N)
            stop, full0 = max(stop, end), start if full1 >= end else full1
        blocks.append(Block(start, stop, full0, full1 if sweep.is_exact else full0))
    return blocks


def _group(blocks: list[Block], rows: int, n_left: int, sweep: Sweep) -> tuple[int, int, int, int]:
    """How many of the blocks go together, and the step, first key and width of their windows: as
    many as save most of the pairs and tiles that the blocks have one by one.
    """
    step, start, stop = rows, blocks[0].start, max(blocks[0].stop, blocks[0].start)
    found, most, apart = (1, step, start, stop - start), 0, 0
    for m, block in enumerate(blocks[: min(n_left // rows, GROUP_BLOCKS)]):
        if sweep.is_symmetric:
            start, stop = min(start, block.start - m * step), max(stop, block.stop - m * step)
        elif m > 0:
            group = blocks[: m + 1]
            step = max(round((block.start - group[0].start) / m), 1)
            start = min(t.start - k * step for k, t in enumerate(group))
            stop = max(t.stop - k * step for k, t in enumerate(group))
        count, width = m + 1, max(stop - start, 0)
        is_inside = start >= 0 and start + m * step + width <= sweep.n_keys
        if not is_inside or count * rows * width > TILE_PAIRS:
            break
        apart += rows * max(block.stop - block.start, 0) + TILE_COST
        saved = apart - count * rows * width - TILE_COST
        if saved > most:
            found, most = (count, step, start, width), saved
    return found


def _chunks(j0: int, j1: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """Starts and widths of the column ranges into which a wide tile is cut."""
    step = max(TILE_PAIRS // n_rows, n_rows)
    for start in range(j0, j1, step):
        yield start, min(step, j1 - start)


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
        if name not in self:
            start = -torch.inf if is_log else 0.0
            self[name] = t_ij.new_full((self.n_anchors,), start, dtype=dtype)
        self._combine(self[name][tile.anchors], reduce(t_ij, dim=2).view(-1), is_log)
        if tile.mirror < tile.width:
            of_keys = reduce(t_ij[:, :, tile.mirror :], dim=1)
            for k, keys in tile.mirrored:
                self._combine(self[name][keys], of_keys[k], is_log)

    @staticmethod
    def _combine(total: Tensor, part: Tensor, is_log: bool) -> None:
        if is_log:
            torch.logaddexp(total, part, out=total)
        else:
            total.add_(part)


def similarities(q_i: Tensor, q_j: Tensor, settings: Settings) -> Tensor:
    """``s_ij`` of unit features [N, D] and [K, D], or [count, N, D] and [count, K, D]."""
    s_ij = q_i.new_empty(*q_i.shape[:-1], q_j.shape[-2])
    product = s_ij.addmm_ if s_ij.dim() == 2 else s_ij.baddbmm_
    return product(q_i, q_j.mT, beta=0, alpha=1 / settings.temperature)


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
        t_ij.diagonal(dim1=1, dim2=2).fill_(fill)
    return t_ij
