"""Tiles of pairs for PyTorch operations: which there are, and views of the rows that meet there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .sweep import Sweep

#: Rows of a block, and the most pairs in one tile. Small blocks waste few pairs at the bands' ends;
#: a tile takes as many blocks as fit, in one batched product.
BLOCK_I = 64
TILE_PAIRS = 2**18
#: What the host does for a tile takes as long as so many pairs, and the mask of a pair at a band's
#: edge this part of a pair (measured; see ``make_tiles``). The most blocks tried for one tile.
TILE_COST, EDGE_COST = 2**14, 0.5
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
    def edge_width(self) -> int:
        return sum(columns.stop - columns.start for columns in self.edges)

    @property
    def mirrored(self) -> Iterator[tuple[int, slice]]:
        """Blocks, and the keys of their columns from ``mirror`` on."""
        if self.mirror < self.width:
            for k in range(self.count):
                start = self.j0 + k * self.step
                yield k, slice(start + self.mirror, start + self.width)


@dataclass(slots=True)
class Block:
    """Anchors ``[i0, i1)`` and their keys ``[start, stop)``; ``[full0, full1)`` are in every one's
    band.
    """

    i0: int
    i1: int
    start: int
    stop: int
    full0: int
    full1: int


def block_rows(sweep: Sweep) -> int:
    """Anchors of one block where all are equally long."""
    return 4 * BLOCK_I if sweep.serves == "both" else BLOCK_I


def make_tiles(sweep: Sweep) -> list[Tile]:
    """The tiles of a sweep's bands; of the upper triangle only where the anchors are the keys.

    Blocks are equally long, or begin where the bands change, as between labels that many rows
    share: whichever costs less.
    """
    rows, N = block_rows(sweep), sweep.n_anchors
    cuts = [[*range(0, N, rows), N]]
    if sweep.is_exact and N > 0:
        cuts.append(_cut_between_bands(sweep))
    return min((list(_cut_tiles(sweep, cut)) for cut in cuts if cut), key=_cost)


def _cost(tiles: list[Tile]) -> float:
    return sum(t.count * t.rows * (t.width + EDGE_COST * t.edge_width) + TILE_COST for t in tiles)


def _cut_between_bands(sweep: Sweep) -> list[int]:
    """Starts of blocks whose rows have one band, and N; nothing if hardly any rows have one."""
    N = sweep.n_anchors
    lo, hi = sweep.lo[:N], sweep.hi[:N]
    changes = ((lo[1:] != lo[:-1]) | (hi[1:] != hi[:-1])).nonzero()[:, 0] + 1
    if len(changes) * BLOCK_I > 4 * N:
        return []
    cut = [0]
    for end in (*changes.tolist(), N):
        start, n_rows = cut[-1], end - cut[-1]
        if n_rows >= BLOCK_I or end == N:  # a few rows go with the next band's
            n_blocks = -(-n_rows // (4 * BLOCK_I))
            cut += [start + n_rows * k // n_blocks for k in range(1, n_blocks + 1)]
    return cut


def _cut_tiles(sweep: Sweep, cut: list[int]) -> Iterator[Tile]:
    blocks = _make_blocks(sweep, cut)
    k = 0
    while k < len(blocks):
        i0, n_rows = blocks[k].i0, blocks[k].i1 - blocks[k].i0
        count, step, j0, width = _group(blocks[k : k + GROUP_BLOCKS], sweep)
        group = list(enumerate(blocks[k : k + count]))
        full0 = max(block.full0 - j0 - m * step for m, block in group)
        full1 = min(block.full1 - j0 - m * step for m, block in group)
        for c0, columns in _chunks(j0, j0 + width, count * n_rows):
            edges = _outside(columns, j0 + full0 - c0, j0 + full1 - c0)
            is_first = sweep.is_symmetric and c0 == j0
            mirror = max(i0 + n_rows - c0, 0) if sweep.is_symmetric else columns
            yield Tile(i0, c0, count, n_rows, step, columns, edges, is_first, mirror)
        k += count


def _make_blocks(sweep: Sweep, cut: list[int]) -> list[Block]:
    if sweep.serves == "both":
        bounds = [[0, sweep.n_keys, 0, 0]] * (len(cut) - 1)
    else:
        at = torch.tensor(cut, device=sweep.lo.device)
        first, last = at[:-1], at[1:] - 1
        of_blocks = (sweep.lo[first], sweep.hi[last], sweep.lo[last], sweep.hi[first])
        bounds = torch.stack(of_blocks, dim=1).tolist()
    blocks = []
    for i0, i1, (start, stop, full0, full1) in zip(cut, cut[1:], bounds, strict=False):
        if sweep.is_symmetric:
            # From the block's own anchors on; in all bands only if its last is in its first's.
            start, stop, full0 = i0, max(stop, i1), i0 if full1 >= i1 else full1
        blocks.append(Block(i0, i1, start, stop, full0, full1 if sweep.is_exact else full0))
    return blocks


def _group(blocks: list[Block], sweep: Sweep) -> tuple[int, int, int, int]:
    """How many of the blocks go together, and the step, first key and width of their windows: as
    many of equal length as save most of the pairs and tiles that the blocks have one by one.
    """
    rows = blocks[0].i1 - blocks[0].i0
    step, start, stop = rows, blocks[0].start, max(blocks[0].stop, blocks[0].start)
    found, most, apart = (1, step, start, stop - start), 0, 0
    for m, block in enumerate(blocks):
        if sweep.is_symmetric:
            start, stop = min(start, block.start - m * step), max(stop, block.stop - m * step)
        elif m > 0:
            group = blocks[: m + 1]
            step = max(round((block.start - group[0].start) / m), 1)
            start = min(t.start - k * step for k, t in enumerate(group))
            stop = max(t.stop - k * step for k, t in enumerate(group))
        count, width = m + 1, max(stop - start, 0)
        is_inside = start >= 0 and start + m * step + width <= sweep.n_keys
        if not is_inside or count * rows * width > TILE_PAIRS or block.i1 - block.i0 != rows:
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
