"""Orders and exact bands: pure tensors in, tensors out.

Rows sorted by a label have all rows within the window in one contiguous band. The bands are found
by binary search on the very predicate ``|y_i − y_j| ≤ h`` that the reference evaluates; because a
floating-point subtraction is monotone in each operand, the predicate is monotone along the order
and the search is exact, ties and rounding included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Of indices of keys, one for each anchor: whether something holds there.
Predicate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sweep:
    """Anchors and keys in one order, and every anchor's band of keys.

    Attributes:
        serves: ``"positives"``, ``"negatives"`` or ``"both"``.
        anchor_order, key_order: int64 [N], [K], or None for the given order; the same tensor where
            the anchors are the keys, also in a part, whose anchors are the first.
        lo, hi: int64 [N], non-decreasing: keys ``lo_i … hi_i − 1`` of the sorted keys are the band
            of sorted anchor i. Exact for one component; a superset for several.
        is_exact: every pair inside the band satisfies the predicate.
        is_symmetric: the anchors are the keys, so that ``s_ij = s_ji`` may be used; otherwise no
            anchor is among the keys.
        n_anchors, n_keys: N, K. In a part of a symmetric sweep the anchors are the first N keys,
            and meet only keys that do not precede them.
    """

    serves: str
    anchor_order: Tensor | None
    key_order: Tensor | None
    lo: Tensor
    hi: Tensor
    is_exact: bool
    is_symmetric: bool
    n_anchors: int
    n_keys: int

    def part(self, k: int, n: int, starts: list[int], costs: Tensor) -> Sweep:
        """The k-th of n parts of about equal work; each consists of consecutive blocks. In a
        symmetric sweep a part has the pairs of its anchors with one another and with later rows.

        Args:
            starts: the first anchor of each block, and N.
            costs: the work of each block, float64 on the CPU.
        """
        device, N = self.lo.device, self.n_anchors
        targets = torch.arange(1, n, device=costs.device) * (costs.sum() / n)
        cuts = torch.searchsorted(costs.cumsum(0) - costs / 2, targets).tolist()
        a, b = [0, *(starts[cut] for cut in cuts), N][k : k + 2]
        if self.is_symmetric:
            first, end = a, max(int(self.hi[b - 1]), b) if a < b else a
        else:
            first, end = (int(self.lo[a]), int(self.hi[b - 1])) if a < b else (0, 0)

        def cut(order: Tensor | None, start: int, stop: int) -> Tensor:
            return torch.arange(start, stop, device=device) if order is None else order[start:stop]

        key_order = cut(self.key_order, first, end)
        return replace(
            self,
            anchor_order=key_order if self.is_symmetric else cut(self.anchor_order, a, b),
            key_order=key_order,
            lo=self.lo[a:b] - first,
            hi=self.hi[a:b] - first,
            n_anchors=b - a,
            n_keys=end - first,
        )


def dense_sweep(n_anchors: int, n_keys: int | None, device: torch.device) -> Sweep:
    """All pairs in the given order; ``n_keys=None``: the anchors are the keys."""
    is_symmetric = n_keys is None
    n_keys = n_anchors if n_keys is None else n_keys
    lo = torch.zeros(n_anchors, dtype=torch.int64, device=device)
    hi = torch.full_like(lo, n_keys)
    return Sweep("both", None, None, lo, hi, False, is_symmetric, n_anchors, n_keys)


def banded_sweep(
    serves: str, y_i: Tensor, y_j: Tensor | None, window: float, distance: str
) -> Sweep:
    """The sweep over labels (or predictions) [N, L] of anchors against keys [K, L].

    ``y_j=None``: the anchors are the keys.
    """
    is_symmetric = y_j is None
    y_j = y_i if y_j is None else y_j
    component, reach = sort_reach(y_j, window, distance)
    sorted_j, key_order = y_j.index_select(1, component)[:, 0].sort(stable=True)
    sorted_i, anchor_order = sorted_j, key_order
    if not is_symmetric:
        sorted_i, anchor_order = y_i.index_select(1, component)[:, 0].sort(stable=True)
    lo, hi = bands(sorted_i, sorted_j, reach)
    orders_and_bands = (anchor_order, key_order, lo, hi)
    is_exact = y_i.shape[1] == 1
    return Sweep(serves, *orders_and_bands, is_exact, is_symmetric, len(y_i), len(y_j))


def sort_reach(y_j: Tensor, window: float, distance: str) -> tuple[Tensor, float]:
    """The component to sort by, int64 [1] on the labels' device, and how far bands reach in it."""
    n_components = y_j.shape[1]
    component = torch.zeros(1, dtype=torch.int64, device=y_j.device)
    if n_components == 1 or len(y_j) == 0:
        return component, float(window)
    # |Δ_c| ≤ L·d (mae), √L·d (rmse) for every component c; the margin covers d's rounding, down to
    # squares that underflow.
    reach = window * (n_components if distance == "mae" else n_components**0.5)
    spread = (y_j.amax(0) - y_j.amin(0)).nan_to_num(0.0)
    return spread.argmax().reshape(1), reach * (1 + 1e-5) + 1e-18


def bands(sorted_i: Tensor, sorted_j: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """The first key within reach and the first beyond it, for every sorted anchor: int64 [N] each.

    ``lo_i = min { j : y_i − y_j ≤ reach }``, ``hi_i = min { j : not y_j − y_i ≤ reach }``.
    """

    def reaches_back(j: Tensor) -> Tensor:
        return sorted_i - sorted_j[j] <= reach

    def is_beyond(j: Tensor) -> Tensor:
        return ~(sorted_j[j] - sorted_i <= reach)

    n_keys = len(sorted_j)
    lo = hi = None
    if sorted_i.device.type == "cpu" and n_keys > 0:
        # A guess by rounded addition, right except at ties; used if the predicate confirms it.
        wide_i, wide_j = sorted_i.double(), sorted_j.double()
        margin = float(torch.tensor(reach, dtype=sorted_i.dtype, device="cpu"))
        lo = _confirmed(torch.searchsorted(wide_j, wide_i - margin), reaches_back, n_keys)
        if sorted_i is not sorted_j:
            guess = torch.searchsorted(wide_j, wide_i + margin, right=True)
            hi = _confirmed(guess, is_beyond, n_keys)
    lo = _first(n_keys, len(sorted_i), sorted_i.device, reaches_back) if lo is None else lo
    if hi is None and sorted_i is sorted_j and sorted_i.device.type == "cpu":
        # Key j is in the band of i exactly if i is in that of j: as many as have lo_j ≤ i.
        hi = torch.bincount(lo, minlength=n_keys + 1)[:n_keys].cumsum(0)
    hi = _first(n_keys, len(sorted_i), sorted_i.device, is_beyond) if hi is None else hi
    return lo, torch.maximum(lo, hi)


def _confirmed(guess: Tensor, holds: Predicate, n_keys: int) -> Tensor | None:
    """The guess if it is the first index at which the predicate holds, for every row; else None."""
    holds_there = holds(guess.clamp(max=n_keys - 1)) | (guess == n_keys)
    fails_before = ~holds((guess - 1).clamp(min=0)) | (guess == 0)
    return guess if bool((holds_there & fails_before).all()) else None


def _first(n_keys: int, n_rows: int, device: torch.device, holds: Predicate) -> Tensor:
    """Smallest index at which a monotone predicate holds (n_keys where none), for every row."""
    low = torch.zeros(n_rows, dtype=torch.int64, device=device)
    high = torch.full_like(low, n_keys)
    for _ in range(n_keys.bit_length()):
        mid = (low + high) // 2
        found = holds(mid.clamp(max=max(n_keys - 1, 0))) | (mid >= n_keys)
        high = torch.where(found, mid, high)
        low = torch.where(found, low, mid + 1).minimum(high)
    return high
