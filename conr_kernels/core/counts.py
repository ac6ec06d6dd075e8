"""How many pairs a label window and a prediction window hold, exactly, without visiting pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import pair_distance
from .sweep import bands

#: The most pairs of vector labels that are compared at a time.
BLOCK_PAIRS = 2**20


def pair_counts(
    y_i: Tensor, p_i: Tensor, y_j: Tensor, p_j: Tensor, window: float, distance: str, negatives: str
) -> tuple[Tensor, Tensor]:
    """``n_i`` and ``m_i``, int64 [N], of anchors [N, L] that are all among the keys [K, L].

    A distance that is NaN is neither within the window nor beyond it: a row with a NaN label is in
    nobody's sets, and two labels of the same infinity are not in each other's. With one component
    the counts take O(K log K) by sorting; with several, all pairs are compared, a bounded block at
    a time. No host synchronisation on a GPU.
    """
    if len(y_i) == 0:
        nothing = y_i.new_zeros(0, dtype=torch.int64)
        return nothing, nothing.clone()
    count = _count_sorted if y_i.shape[1] == 1 else _count_blocks
    n_i, m_i = count(y_i, p_i, y_j, p_j, window, distance, negatives)
    return n_i - y_i.isfinite().all(dim=1).long(), m_i  # d_ii = 0, or NaN, which counts nowhere


def _count_blocks(
    y_i: Tensor, p_i: Tensor, y_j: Tensor, p_j: Tensor, window: float, distance: str, negatives: str
) -> tuple[Tensor, Tensor]:
    counts = []
    rows = max(BLOCK_PAIRS // len(y_j), 1)
    for y, p in zip(y_i.split(rows), p_i.split(rows), strict=True):
        d_ij = pair_distance(y, y_j, distance)
        negative = d_ij > window
        if negatives == "confused":
            negative &= pair_distance(p, p_j, distance) <= window
        counts.append(torch.stack([(d_ij <= window).sum(1), negative.sum(1)]))
    n_i, m_i = torch.cat(counts, dim=1).unbind()
    return n_i, m_i


def _count_sorted(
    y_i: Tensor, p_i: Tensor, y_j: Tensor, p_j: Tensor, window: float, distance: str, negatives: str
) -> tuple[Tensor, Tensor]:
    y_order, *in_y = _bands_of(y_i[:, 0], y_j[:, 0], window)
    n_i = in_y[1] - in_y[0]
    # For anchors whose label is finite, +∞ or −∞: the keys at a distance that is not NaN.
    y = y_i[:, 0]
    kind = (y == torch.inf) + 2 * (y == -torch.inf).long()
    is_apart = torch.stack([~(each - y_j[:, 0]).isnan() for each in (0.0, torch.inf, -torch.inf)])
    if negatives == "all":
        return n_i, torch.where(y.isnan(), 0, is_apart.sum(1)[kind] - n_i)
    p_order, *in_p = _bands_of(p_i[:, 0], p_j[:, 0], window)
    before = torch.nn.functional.pad(is_apart[:, p_order].long().cumsum(1), (1, 0))
    similar_p = before[kind, in_p[1]] - before[kind, in_p[0]]
    place_in_p = torch.empty_like(p_order)
    place_in_p[p_order] = torch.arange(len(p_order), device=p_order.device)
    similar = _count_within(place_in_p[y_order], *in_y, *in_p)
    return n_i, torch.where(y.isnan(), 0, similar_p - similar)


def _bands_of(y_i: Tensor, y_j: Tensor, window: float) -> tuple[Tensor, Tensor, Tensor]:
    """The keys' order, NaN last, and each anchor's band in it: empty for a NaN anchor, and with a
    finite window for an infinite one.
    """
    sorted_j, order = y_j.sort(stable=True)
    n_valid = sorted_j.isnan().logical_not_().sum()
    if window == torch.inf:  # all keys but NaN and the anchor's own infinity
        lo = torch.where(y_i == -torch.inf, (y_j == -torch.inf).sum(), 0)
        hi = torch.where(y_i == torch.inf, n_valid - (y_j == torch.inf).sum(), n_valid)
        return order, lo, torch.where(y_i.isnan(), lo, hi)
    sorted_i, anchor_order = (sorted_j, order) if y_i is y_j else y_i.sort(stable=True)
    lo, hi = (torch.empty_like(anchor_order) for _ in range(2))
    # As infinity, a NaN key lies behind every finite anchor's band.
    at = bands(sorted_i, sorted_j.nan_to_num(torch.inf, torch.inf, -torch.inf), window)
    for band, found in zip((lo, hi), at, strict=True):
        band[anchor_order] = found
    return order, lo, torch.where(y_i.isfinite(), hi, lo)


def _count_within(places: Tensor, lo: Tensor, hi: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """How many of ``places[lo_i:hi_i]`` lie in ``[a_i, b_i)``; places are a permutation of 0…K−1.

    Bit by bit from the highest: the places with a 0 move to the front and those with a 1 behind
    them, in their order, and so do the limits of every count (a wavelet matrix).
    """
    limits = torch.stack([a, b])
    start, stop = lo.expand_as(limits), hi.expand_as(limits)
    below = torch.zeros_like(limits)
    for bit in reversed(range(len(places).bit_length())):
        is_high = (places >> bit) & 1
        low = torch.cat([is_high.new_zeros(1), (1 - is_high).cumsum(0)])  # bits 0 before each place
        n_low = low[-1]
        low_start, low_stop = low[start], low[stop]
        goes_high = ((limits >> bit) & 1).bool()
        below += torch.where(goes_high, low_stop - low_start, 0)
        start = torch.where(goes_high, start - low_start + n_low, low_start)
        stop = torch.where(goes_high, stop - low_stop + n_low, low_stop)
        at = torch.arange(len(places), device=places.device)
        at = torch.where(is_high.bool(), at - low[:-1] + n_low, low[:-1])
        places = torch.empty_like(places).scatter_(0, at, places)
    return below[1] - below[0]
