"""Few pairs, of a small batch alone or with many further keys (as of a memory bank): all of them in
the given order, without a sort. The rows themselves are one tile, which is kept for the backward
pass if there are no further keys.

Further keys have no row loss: their part of an anchor's gradient is the anchor's own coefficients
times sums over keys, which are found with the loss, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .pairs import How, Sums, Weighted, add_sums, gradient_weights, is_present
from .source import Rows, Source
from .tiles import Tile

#: Up to this many rows one tile holds all pairs.
KEPT_ROWS = 640
#: Sorting costs as much per key as its pairs with some 300 anchors, and at least as much as some
#: 2¹⁸ pairs (measured). And the pairs of one tile with further keys.
FEW_ROWS, FEW_PAIRS, TILE_PAIRS = 256, 2**18, 2**17


def is_small(n_rows: int, n_others: int, how: How) -> bool:
    """Whether this module serves that many anchors, among themselves and against other keys."""
    if n_others == 0 or n_rows > KEPT_ROWS:
        return n_rows <= KEPT_ROWS
    are_few = n_rows <= FEW_ROWS or n_rows * n_others <= FEW_PAIRS
    return are_few and n_rows > 0 and not how.is_shifted


def row_sums(
    rows: Rows, others: Source | None, how: How, wants_products: bool = False
) -> tuple[Sums, Weighted, list[Tensor]]:
    """The sums; the weighted pairs of the rows among themselves; and, if they are wanted, the
    products ``Σ_P exp(s_ij) q_j``, ``Σ_M φ exp(s_ij) q_j`` and, with ``log="inside"``, ``Σ_P q_j``
    over the other keys, each [N, D].
    """
    n = rows.q.shape[0]
    sums, products = Sums(n, how), []
    if wants_products and others is not None:
        products = [torch.zeros_like(rows.q) for _ in range(3 if how.is_inside else 2)]
    of_rows = add_sums(sums, Tile.of_all(n, n, has_diagonal=True), rows, rows, how)
    for tile, keys in _tiles(n, others):
        positive, negative = add_sums(sums, tile, rows, keys, how)
        for k, product in enumerate(products):
            weights = (positive, negative)[k] if k < 2 else is_present(positive, how)
            product.addmm_(weights, keys.q)
    return sums, of_rows, products


def gradient_sums(
    rows: Rows, others: Source | None, how: How, kept: Weighted | None = None
) -> Tensor:
    """``τ ∂L/∂q_i`` [N, D]; the other keys may be other ranks' anchors."""
    n = rows.q.shape[0]
    tile = Tile.of_all(n, n, has_diagonal=True)
    G = gradient_weights(tile, rows, rows, how, kept) @ rows.q
    for tile, keys in _tiles(n, others):
        G.addmm_(gradient_weights(tile, rows, keys, how), keys.q)
    return G


def add_products(G: Tensor, products: list[Tensor], rows: Rows) -> None:
    """Adds the other keys' part, from the products of ``row_sums``, to ``τ ∂L/∂q_i`` [N, D]."""
    coefs = (rows.alpha, rows.gamma, rows.beta)
    for product, coef, sign in zip(products, coefs, (1, 1, -1), strict=False):
        G.addcmul_(product, coef, value=sign)


def _tiles(n_rows: int, others: Source | None) -> Iterator[tuple[Tile, Rows]]:
    """The other keys, a block at a time, and the tile of each block."""
    if others is None:
        return
    width = max(TILE_PAIRS // max(n_rows, 1), 1)
    for start in range(0, len(others), width):
        part = others if width >= len(others) else others.part(slice(start, start + width))
        keys = part.take()
        yield Tile.of_all(n_rows, len(keys.y), has_diagonal=False), keys
