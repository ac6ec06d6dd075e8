"""Many pairs: rows sorted by label for the positives and by prediction for the negatives, or one
sweep over all pairs that serves both masks, where the bands would cover most of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.sweep import Sweep, banded_sweep, dense_sweep
from ..variants import Settings
from .pairs import How, Sums, add_products, add_sums, gradient_weights
from .source import Labels, Source
from .tiles import make_tiles

#: Where the bands hold more than this share of all pairs, one sweep over all pairs is faster.
DENSE_SHARE = 0.7


def find_sweeps(labels: Labels, labels_j: Labels | None, settings: Settings) -> list[Sweep]:
    """Two banded sweeps, or one over all pairs. The host reads the bands, so only on the CPU."""
    (y, p), (y_j, p_j) = labels, labels_j or (None, None)
    N, K = len(y), None if y_j is None else len(y_j)
    if y.device.type == "cpu" and settings.variant.negatives != "all":
        h, distance = settings.window, settings.distance
        sweeps = [
            banded_sweep("positives", y, y_j, h, distance),
            banded_sweep("negatives", p, p_j, h, distance),
        ]
        banded_pairs = sum(int((sweep.hi - sweep.lo).sum()) for sweep in sweeps)
        if banded_pairs <= DENSE_SHARE * N * (N if K is None else K):
            return sweeps
    return [dense_sweep(N, K, y.device)]


def all_sweeps(labels: Labels, labels_j: Labels | None, settings: Settings) -> list[Sweep]:
    """The anchors among themselves, where ``s_ij = s_ji`` saves half of the pairs, and against the
    other keys, if there are any; sweeps that have the anchors in one order follow one another.
    """
    own = find_sweeps(labels, None, settings)
    cross = [] if labels_j is None else find_sweeps(labels, labels_j, settings)
    return sorted(own + cross, key=lambda sweep: sweep.serves == "negatives")


def _sweeps(anchors: Source, others: Source | None, how: How) -> list[Sweep]:
    return all_sweeps(anchors.labels, None if others is None else others.labels, how.settings)


def row_sums(
    anchors: Source, others: Source | None, how: How, sweeps: list[Sweep] | None = None
) -> Sums:
    """Sums of all anchors over the pairs of the sweeps, by default over all pairs."""
    sums = Sums(len(anchors), how)
    for name in how.sums:
        sums.start(name, anchors.x.device)
    last = None
    for sweep in sweeps or _sweeps(anchors, others, how):
        order = sweep.anchor_order
        if last is None or not _are_one(order, last.anchor_order):
            rows_i = anchors.take(order)
        last = sweep
        rows_j = rows_i if sweep.is_symmetric else others.take(sweep.key_order)
        of_sweep = Sums(len(rows_i.y), how)
        if sweep.is_exact and sweep.serves == "positives":
            n_i = sweep.hi - sweep.lo - int(sweep.is_symmetric)
            of_sweep.add("n", slice(0, sweep.n_anchors), n_i)
        for tile in make_tiles(sweep):
            add_sums(of_sweep, tile, rows_i, rows_j, how)
        for name, part in of_sweep.items():
            sums.add(name, slice(None) if order is None else order, part)
    anchors.memory = None
    return sums


def gradient_sums(
    anchors: Source, others: Source | None, how: How, sweeps: list[Sweep] | None = None
) -> Tensor:
    """``τ ∂L/∂q_i = Σ_j H_ij q_j`` [N, D]."""
    G = anchors.x.new_zeros(anchors.x.shape, dtype=anchors.dtype)
    last = None
    for sweep in sweeps or _sweeps(anchors, others, how):
        if last is None or not _are_one(sweep.anchor_order, last.anchor_order):
            if last is not None:
                G = _reorder(G, last.anchor_order, sweep.anchor_order, anchors)
            rows_i = anchors.take(sweep.anchor_order)
        last = sweep
        rows_j = rows_i if sweep.is_symmetric else others.take(sweep.key_order)
        for tile in make_tiles(sweep):
            add_products(G, tile, gradient_weights(tile, rows_i, rows_j, how), rows_i, rows_j)
    G = _reorder(G, last.anchor_order, None, anchors)
    anchors.memory = None
    return G


def _are_one(order: Tensor | None, other: Tensor | None) -> bool:
    if order is None or other is None:
        return order is other
    return torch.equal(order, other)


def _reorder(G: Tensor, order: Tensor | None, new_order: Tensor | None, anchors: Source) -> Tensor:
    """Rows moved from one order to another, in the anchors' memory, which takes over that of G.

    Gathered: that takes a quarter of the time of scattering.
    """
    if new_order is order:
        return G
    at = new_order
    if order is not None:
        numbers = torch.arange(len(order), device=order.device)
        at = torch.empty_like(order).index_copy_(0, order, numbers)
        at = at if new_order is None else at.index_select(0, new_order)
    memory, anchors.memory = anchors.memory, G
    return torch.index_select(G, 0, at, out=memory)
