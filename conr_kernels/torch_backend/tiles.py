"""Tiles of pairs for PyTorch operations: how sweeps are cut into them, and views of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.sweep import Sweep

#: Rows of a block, and the most pairs in one tile. Small blocks waste few pairs at the bands' ends;
#: a tile takes as many blocks as fit, in one batched product.
BLOCK_I = 64
TILE_PAIRS = 2**18
#: What the host does for a tile costs as much as so many pairs, and the mask of a pair at a band's
#: edge this part of a pair (measured; see ``make_tiles``). And the most blocks tried for one tile.
TILE_COST, EDGE_COST = 2**13, 0.5
GROUP_BLOCKS = 64


@dataclass(slots=True)
class Tile:
    """``count`` blocks of ``rows`` sorted anchors, each against its own ``width`` sorted keys.

    Attributes:
        serves, is_exact: as the sweep.
        i0, j0: the first anchor and key of the first block.
        step: block k's keys begin at ``j0 + k·step``; its anchors at ``i0 + k·rows``.
        edges: columns that may hold pairs outside the window, None for all; others are inside.
        has_diagonal: the anchors' own pairs are the blocks' diagonals.
        mirror: columns from here on also serve the transposed tile.
    """

    serves: str
    is_exact: bool
    i0: int
    j0: int
    count: int
    rows: int
    step: int
    width: int
    edges: tuple[slice | None, ...]
    has_diagonal: bool
    mirror: int

    @classmethod
    def of_all(cls, n_rows: int, n_keys: int, has_diagonal: bool) -> Tile:
        """All pairs of rows and keys in one tile; with the diagonal, of the rows themselves."""
        sizes = (0, 0, 1, n_rows, n_rows, n_keys)
        return cls("both", False, *sizes, (None,), has_diagonal, n_keys)

    @property
    def anchors(self) -> slice:
        return slice(self.i0, self.i0 + self.count * self.rows)

    def of_anchors(self, t: Tensor) -> Tensor:
        """A view of the tile's anchors in t [N, C]: [count, rows, C], or [rows, C] of one block."""
        if self.count > 1:
            return self._blocks(t, self.i0, self.rows, self.rows)
        return t if self.rows == t.shape[0] else t[self.i0 : self.i0 + self.rows]

    def of_keys(self, t: Tensor) -> Tensor:
        """A view of the tile's keys in t [K, C]: [count, width, C], or [width, C] of one block."""
        if self.count > 1:
            return self._blocks(t, self.j0, self.step, self.width)
        return t if self.width == t.shape[0] else t[self.j0 : self.j0 + self.width]

    def _blocks(self, t: Tensor, start: int, step: int, length: int) -> Tensor:
        row, column = t.stride()
        at = t.storage_offset() + start * row
        return t.as_strided((self.count, length, t.shape[1]), (step * row, row, column), at)

    @property
    def mirrored(self) -> Iterator[slice]:
        """The keys of each block's columns from ``mirror`` on, where ``mirror < width``."""
        for k in range(self.count):
            start = self.j0 + k * self.step
            yield slice(start + self.mirror, start + self.width)


class Block(NamedTuple):
    """Anchors ``[i0, i1)`` and their keys ``[start, stop)``, of which ``[full0, full1)`` are in
    every anchor's band.
    """

    i0: int
    i1: int
    start: int
    stop: int
    full0: int
    full1: int


def make_tiles(sweep: Sweep) -> list[Tile]:
    """The tiles of a sweep's bands; of the upper triangle alone where the anchors are the keys.

    Blocks are equally long or begin where the bands change, as between labels that many rows share:
    whichever costs less. Equal blocks mostly cost 1.2 to 1.5 times the lower bound.
    """
    blocks = _make_blocks(sweep, _cut_evenly(sweep))
    if cut := _cut_between_bands(sweep):
        between = _make_blocks(sweep, cut)
        if _least_costs(between, are_apart=True).sum() <= 1.5 * _least_costs(blocks).sum():
            blocks = between
    return list(_cut_tiles(sweep, blocks))


def share_of(sweep: Sweep, k: int, n: int) -> Sweep:
    """The k-th of n parts of a sweep with about as much work each."""
    between = _cut_between_bands(sweep)
    starts = between or _cut_evenly(sweep)
    # Blocks between bands seldom have equal lengths, and then each is a tile.
    costs = _least_costs(_make_blocks(sweep, starts), are_apart=len(between) > 0)
    return sweep.part(k, n, starts, costs)


def _least_costs(blocks: Tensor, are_apart: bool = False) -> Tensor:
    """A lower bound of the cost of each block [·, 6], or its cost as one tile; float64 [·]."""
    i0, i1, start, stop, full0, full1 = blocks.double().unbind(1)
    n_rows, width = i1 - i0, stop - start
    edges = width - (full1 - full0).clamp(min=0)
    n_tiles = n_rows * width / TILE_PAIRS
    if are_apart:
        n_tiles = n_tiles.clamp(min=1)
    return n_rows * (width + EDGE_COST * edges) + TILE_COST * n_tiles


def _cut_evenly(sweep: Sweep) -> list[int]:
    """Starts of equally long blocks, and N."""
    rows = 4 * BLOCK_I if sweep.serves == "both" else BLOCK_I
    return [*range(0, sweep.n_anchors, rows), sweep.n_anchors]


def _cut_between_bands(sweep: Sweep) -> list[int]:
    """Starts of blocks whose rows share a band, and N; empty if hardly any rows share one."""
    N = sweep.n_anchors
    if not sweep.is_exact or N == 0:
        return []
    lo, hi = sweep.lo[:N], sweep.hi[:N]
    changes = ((lo[1:] != lo[:-1]) | (hi[1:] != hi[:-1])).nonzero()[:, 0] + 1
    if len(changes) * BLOCK_I > 4 * N:
        return []
    cut = [0]
    for end in (*changes.tolist(), N):
        start, n_rows = cut[-1], end - cut[-1]
        if n_rows >= BLOCK_I or end == N:  # a few rows join the next band's
            n_blocks = -(-n_rows // (4 * BLOCK_I))
            cut += [start + n_rows * k // n_blocks for k in range(1, n_blocks + 1)]
    return cut


def _make_blocks(sweep: Sweep, cut: list[int]) -> Tensor:
    """The blocks that begin and end at the cuts, int64 [·, 6]: rows of ``Block``."""
    at = torch.tensor(cut, device="cpu")  # as bands are; a sweep of all pairs reads none
    i0, i1 = at[:-1], at[1:]
    if sweep.serves == "both":
        zero = torch.zeros_like(i0)
        start = i0 if sweep.is_symmetric else zero
        return torch.stack([i0, i1, start, zero + sweep.n_keys, zero, zero], dim=1)
    start, full0 = sweep.lo[i0], sweep.lo[i1 - 1]
    full1, stop = sweep.hi[i0], sweep.hi[i1 - 1]
    if sweep.is_symmetric:
        # From the block's own anchors on; in all bands only if its last is in its first's.
        start, stop = i0, stop.maximum(i1)
        full0 = torch.where(full1 >= i1, i0, full1)
    if not sweep.is_exact:
        full1 = full0
    return torch.stack([i0, i1, start, stop.maximum(start), full0, full1], dim=1)


def _cut_tiles(sweep: Sweep, table: Tensor) -> Iterator[Tile]:
    blocks = [Block(*block) for block in table.tolist()]
    k = 0
    while k < len(blocks):
        i0, n_rows = blocks[k].i0, blocks[k].i1 - blocks[k].i0
        count, step, j0, width = _group(blocks, k, sweep)
        group = list(enumerate(blocks[k : k + count]))
        full0 = max(block.full0 - j0 - m * step for m, block in group)
        full1 = min(block.full1 - j0 - m * step for m, block in group)
        for c0, columns in _chunks(j0, j0 + width, count * n_rows):
            edges = _outside(columns, j0 + full0 - c0, j0 + full1 - c0)
            is_first = sweep.is_symmetric and c0 == j0
            mirror = max(i0 + n_rows - c0, 0) if sweep.is_symmetric else columns
            yield Tile(
                sweep.serves,
                sweep.is_exact,
                i0,
                c0,
                count,
                n_rows,
                step,
                columns,
                edges,
                is_first,
                mirror,
            )
        k += count


def _group(blocks: list[Block], first: int, sweep: Sweep) -> tuple[int, int, int, int]:
    """How many blocks form one tile with the first, and the step, first key and width of their
    windows. Blocks of equal length are joined as long as that saves more than it adds in pairs.
    """
    i0, i1, start, stop, *_ = blocks[first]
    rows, alone = i1 - i0, stop - start
    room = TILE_PAIRS // max(rows * alone, 1)
    last = min(first + max(room, 1), first + GROUP_BLOCKS, len(blocks)) - 1
    step = rows
    if last > first and not sweep.is_symmetric:
        step = max(round((blocks[last].start - start) / (last - first)), 1)
    found, most, apart = (1, step, start, alone), 0, rows * alone
    for m in range(1, last + 1 - first):
        block = blocks[first + m]
        start = min(start, block.start - m * step)
        stop = max(stop, block.stop - m * step)
        pairs = (m + 1) * rows * (stop - start)
        is_inside = start >= 0 and stop + m * step <= sweep.n_keys
        if block.i1 - block.i0 != rows or not is_inside or pairs > TILE_PAIRS:
            break
        apart += rows * (block.stop - block.start) + TILE_COST
        if apart - pairs > most:
            found, most = (m + 1, step, start, stop - start), apart - pairs
    return found


def _chunks(j0: int, j1: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """Starts and widths of the ranges of columns into which a wide tile is cut."""
    step = max(TILE_PAIRS // n_rows, n_rows)
    for start in range(j0, j1, step):
        yield start, min(step, j1 - start)


def _outside(n_columns: int, full0: int, full1: int) -> tuple[slice, ...]:
    full0, full1 = max(full0, 0), min(full1, n_columns)
    if full0 >= full1:
        return (slice(0, n_columns),)
    sides = ((0, full0), (full1, n_columns))
    return tuple(slice(start, stop) for start, stop in sides if start < stop)
