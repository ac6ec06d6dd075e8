"""Few anchors against many other keys, as of a memory bank: tiles of all pairs, no sort, nothing
kept.

Keys without a row loss leave an anchor a gradient that is its own coefficients times sums over
keys: these are found with the loss, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import pair_distance
from ..variants import Settings
from .pairs import LN_2, negative_weight, push, similarities, times_coefficients
from .source import Source
from .tiles import Rows

#: Sorting a key costs as much as its pairs with some 300 anchors; and sorting at all as much as
#: some 2¹⁸ pairs (measured). Pairs of one tile.
FEW_ROWS, FEW_PAIRS, TILE_PAIRS = 256, 2**18, 2**17


def are_few(n_rows: int, others: Source | None) -> bool:
    """Whether these functions serve that many anchors against the other keys."""
    if others is None or others.index is not None or n_rows == 0:
        return False
    return n_rows <= FEW_ROWS or n_rows * len(others) <= FEW_PAIRS


def add_sums(
    sums: dict[str, Tensor],
    rows: Rows,
    others: Source,
    settings: Settings,
    counts_negatives: bool,
    products: list[Tensor] | None = None,
) -> None:
    """Adds the pairs with the other keys to the sums of ``one_tile_sums``; unshifted.

    Args:
        products: ``Σ_P exp(s_ij) q_j``, ``Σ_M φ exp(s_ij) q_j`` and, with ``log="inside"``,
            ``Σ_P q_j``, each [N, D], to be added to; None where no gradient is wanted.
    """
    for j, s_ij, positive, negative, log_phi in _tiles(rows, others, settings):
        sums["n"] += positive.sum(1)
        if counts_negatives:
            sums["m"] += negative.sign().sum(1)
        if settings.variant.log == "inside":
            sums["s_sum"] += (s_ij * positive).sum(1).to(sums["s_sum"].dtype) * LN_2
            if products is not None:
                products[2].addmm_(positive, j.q)
        positive.mul_(s_ij.exp2_())
        negative.mul_(push(s_ij, log_phi, False))
        sums["E"] += positive.sum(1)
        sums["B"] += negative.sum(1)
        if products is not None:
            products[0].addmm_(positive, j.q)
            products[1].addmm_(negative, j.q)
    if not counts_negatives:
        sums["m"] = sums["B"].sign()


def add_products(G: Tensor, products: list[Tensor], coef: Tensor) -> None:
    """Adds to ``τ ∂L/∂q_i`` [N, D] what the other keys' products of ``add_sums`` make of it."""
    of_positives, of_negatives, *unweighted = products
    G.addcmul_(of_positives, coef[:, :1]).addcmul_(of_negatives, coef[:, 2:3])
    if unweighted:
        G.addcmul_(unweighted[0], coef[:, 1:2], value=-1)


def add_gradient(G: Tensor, rows: Rows, others: Source, settings: Settings) -> None:
    """Adds ``Σ_j H_ij q_j`` of the other keys to G [N, D]; these may be other ranks' anchors."""
    for j, s_ij, positive, negative, log_phi in _tiles(rows, others, settings):
        linear = None
        if settings.variant.log == "inside":
            linear = positive * (rows.beta + j.beta.mT)
        H_ij = times_coefficients(positive.mul_(s_ij.exp2_()), rows.alpha, j.alpha)
        negative.mul_(push(s_ij, log_phi, False))
        H_ij += times_coefficients(negative, rows.gamma, j.gamma)
        G.addmm_(H_ij if linear is None else H_ij.sub_(linear), j.q)


def _tiles(
    rows: Rows, others: Source, settings: Settings
) -> Iterator[tuple[Rows, Tensor, Tensor, Tensor, Tensor | None]]:
    """Some of the keys, ``s_ij`` / ln 2, ``[j ∈ P_i]``, and ``negative_weight``'s two."""
    width = max(TILE_PAIRS // len(rows.q), 1)
    for start in range(0, len(others), width):
        keys = others.part(slice(start, start + width)).take(None, None)
        keys.q = keys.q.contiguous()  # products round as the strides are
        s_ij = similarities(rows.q, keys.q, settings, as_powers_of_two=True)
        d_ij = pair_distance(rows.y, keys.y, settings.distance)
        positive = torch.le(d_ij, settings.window, out=torch.empty_like(s_ij))
        yield keys, s_ij, positive, *negative_weight(d_ij, rows, keys, None, settings)
