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

    A NaN label is in no set of anybody, a NaN prediction in none that predictions decide. One
    component: O(K log K) by sorted orders; several: all pairs, a bounded block at a time. No host
    synchronisation on a GPU.
    """
    if len(y_i) == 0:
        nothing = y_i.new_zeros(0, dtype=torch.int64)
        return nothing, nothing.clone()
    count = _count_sorted if y_i.shape[1] == 1 else _count_blocks
    n_i, m_i = count(y_i, p_i, y_j, p_j, window, distance, negatives)
    return n_i - _is_valid(y_i).long(), m_i  # of the positives, one is the anchor itself


def _is_valid(y: Tensor) -> Tensor:
    return ~y.isnan().any(dim=1)


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
    if negatives == "all":
        return n_i, torch.where(_is_valid(y_i), _is_valid(y_j).sum() - n_i, 0)
    p_order, *in_p = _bands_of(p_i[:, 0], p_j[:, 0], window)
    has_label = _is_valid(y_j)[p_order].long().cumsum(0)
    has_label = torch.cat([has_label.new_zeros(1), has_label])
    similar_p = has_label[in_p[1]] - has_label[in_p[0]]
    place_in_p = torch.empty_like(p_order)
    place_in_p[p_order] = torch.arange(len(p_order), device=p_order.device)
    similar = _count_within(place_in_p[y_order], *in_y, *in_p)
    return n_i, torch.where(_is_valid(y_i), similar_p - similar, 0)


def _bands_of(y_i: Tensor, y_j: Tensor, window: float) -> tuple[Tensor, Tensor, Tensor]:
    """The keys' order, NaN last, and each anchor's band in it: empty for a NaN anchor."""
    sorted_j, order = y_j.sort(stable=True)
    sorted_i, anchor_order = (sorted_j, order) if y_i is y_j else y_i.sort(stable=True)
    lo, hi = (torch.empty_like(anchor_order) for _ in range(2))
    n_valid = sorted_j.isnan().logical_not_().sum()
    # As the greatest number a NaN key is behind every band but that of an infinite window.
    at = bands(sorted_i, sorted_j.nan_to_num(torch.inf, torch.inf, -torch.inf), window)
    for band, found in zip((lo, hi), at, strict=True):
        band[anchor_order] = found.minimum(n_valid)
    return order, lo, torch.where(y_i.isnan(), lo, hi)


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
        low = torch.cat([is_high.new_zeros(1), (1 - is_high).cumsum(0)])  # zeros before
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
