"""``conr_statistics``: what the loss sees in a batch; sets.py counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .core.sets import ConRStatistics, all_labels, checked_rows, count
from .large_batch.memory_bank import MemoryBank
from .large_batch.ranks import check_group
from .large_batch.union import union_statistics
from .variants import Variant

__all__ = ["ConRStatistics", "conr_statistics"]


def conr_statistics(
    targets: Tensor,
    predictions: Tensor,
    *,
    window: float = 1.0,
    distance: str = "mae",
    variant: str | Variant = "paper",
    keys: tuple[Tensor, ...] | MemoryBank | None = None,
    mask: Tensor | None = None,
    group: Any = None,
    weights: Tensor | float | None = None,
) -> ConRStatistics:
    r"""The sizes of the sets that ``conr_loss`` finds in a batch, exactly, and a floor of the loss.

    For each row, the numbers of positives ``n_i`` and negatives ``m_i`` and whether it is an anchor
    (``A_i``: it has both); and::

        floor = (1/N) Σ_i A_i (n_i/c_i) log n_i        [times w_i with weighted_rows]

    with ``c_i = n_i`` [+ 1 with ``count_self``]. As ``ℓ_i ≥ (n_i/c_i) log n_i`` while no ``S_ij``
    is negative, no features bring the mean loss below it: what can be learnt is the excess. O(N)
    memory, no synchronisation on a GPU; O(N log N) time for one component, O(N²) for several.

    Args:
        targets, predictions, window, distance, variant, keys, group: as in ``conr_loss``. With a
            ``group`` the counts are of this process's rows in the union; the floor is the union's.
        mask: bool [N] or [N, 1], True for the rows that take part; None for all of them.
        weights: density weights, used by the floor of variants with ``weighted_rows``.

    Returns:
        ``ConRStatistics``. A row with a NaN label is in nobody's sets, and two labels of the same
        infinity are not in each other's: their distance is NaN.

    Raises:
        TypeError, ValueError: bad input; with a ``group`` on every rank.
    """
    arguments = (targets, predictions, window, distance, variant, keys, mask, weights)
    if group is None:
        rows = checked_rows(*arguments)
        return count(rows, *all_labels(rows), lambda sums: sums)
    check_group(group)
    if torch.compiler.is_compiling():
        from .large_batch import tracing

        return tracing.union_statistics(group, arguments)
    return union_statistics(group, arguments)
