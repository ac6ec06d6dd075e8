"""What the loss sees in a batch, from labels and predictions alone: positives, negatives, floor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import validation
from .batch import Keys, _labels, _weights
from .core.counts import pair_counts
from .variants import DISTANCES, Variant, resolve_variant

_library = torch.library.Library("conr_kernels", "FRAGMENT")
_library.define(
    "pair_counts(Tensor y_i, Tensor p_i, Tensor y_j, Tensor p_j, float window, str distance, "
    "str negatives) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _pair_counts_fake(y_i: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n_i = y_i.new_empty((y_i.shape[0],), dtype=torch.int64)
    return n_i, torch.empty_like(n_i)


_library.impl("pair_counts", pair_counts, "CompositeExplicitAutograd")
torch.library.register_fake("conr_kernels::pair_counts", _pair_counts_fake, lib=_library)


class ConRStatistics(NamedTuple):
    """``n_i`` and ``m_i`` [N] int64, ``A_i`` [N] bool, the floor of the mean loss, a scalar; and
    how many rows take part, a scalar.
    """

    n_positives: Tensor
    n_negatives: Tensor
    is_anchor: Tensor
    floor: Tensor
    rows: Tensor

    def summary(self) -> dict[str, float]:
        """Plain floats for a logger, of this process's rows: how many take part; the shares of them
        that are anchors, have no positive, have no negative; means of positives and negatives; and
        the floor. Synchronises once.
        """
        n_i, m_i = self.n_positives.double(), self.n_negatives.double()
        out = len(n_i) - self.rows  # rows that take no part have neither
        sums = (self.is_anchor.sum(), (n_i == 0).sum() - out, (m_i == 0).sum() - out)
        of_rows = torch.stack([*sums, n_i.sum(), m_i.sum()]).double() / self.rows.clamp(min=1)
        values = torch.cat([self.rows[None], of_rows, self.floor[None]]).tolist()
        names = ("rows", "anchors", "without_positives", "without_negatives")
        return dict(zip((*names, "mean_positives", "mean_negatives", "floor"), values, strict=True))


def conr_statistics(
    targets: Tensor,
    predictions: Tensor,
    *,
    window: float = 1.0,
    distance: str = "mae",
    variant: str | Variant = "paper",
    keys: Keys | None = None,
    mask: Tensor | None = None,
    group: Any = None,
    weights: Tensor | float | None = None,
) -> ConRStatistics:
    r"""The sets that ``conr_loss`` finds in a batch, exactly, and how low they let the loss fall.

    Of every row the positives ``n_i`` and negatives ``m_i``, whether it is an anchor (``A_i``: it
    has both), and::

        floor = (1/N) Σ_i A_i (n_i/c_i) log n_i        [times w_i with weighted_rows]

    with ``c_i = n_i`` [+ 1 with ``count_self``]. As ``ℓ_i ≥ (n_i/c_i) log n_i`` while no ``S_ij``
    is
    negative, no features bring the mean loss below it: what can be learnt is the excess. O(N)
    memory, no synchronisation on a GPU; O(N log N) time for one component, N² comparisons for more.

    Args:
        targets, predictions, window, distance, variant, keys, group: as in ``conr_loss``. With a
            ``group`` the counts are of this process's rows in the union; the floor is the union's.
        mask: bool [N] or [N, 1], True for the rows that take part; None for all of them.
        weights: density weights, used by the floor of variants with ``weighted_rows``.

    Returns:
        ``ConRStatistics``. A NaN label is in nobody's sets.

    Raises:
        TypeError, ValueError: bad input; with a ``group`` on every rank.
    """
    arguments = (targets, predictions, window, distance, variant, keys, mask, weights)
    if group is None:
        rows = _prepare(*arguments)
        y_j, p_j = (rows.y, rows.p) if rows.keys is None else _with_keys(rows)
        return _count(rows, y_j, p_j, lambda sums: sums)
    if torch.compiler.is_compiling():
        from .large_batch import tracing

        return tracing.union_statistics(group, arguments)
    return union_statistics(group, arguments)


class Rows(NamedTuple):
    """Checked input: labels and predictions [N, L], NaN in the rows that take no part."""

    y: Tensor
    p: Tensor
    w: Tensor | None
    takes_part: Tensor
    keys: tuple[Tensor, Tensor] | None
    window: float
    distance: str
    variant: Variant


def _prepare(
    targets: Any, predictions: Any, window: Any, distance: Any, variant: Any, keys: Any, mask: Any,
    weights: Any,
) -> Rows:  # fmt: skip
    validation.check_scalars(window, 1.0, 0.0)
    validation.check_choice("distance", distance, DISTANCES)
    variant = resolve_variant(variant)
    if isinstance(keys, torch.nn.Module):  # a MemoryBank
        keys = keys.keys()
    validation.check_statistics(targets, predictions, keys, mask, weights)
    y, p = _labels(targets), _labels(predictions)
    takes_part = torch.ones(len(y), dtype=torch.bool, device=y.device)
    if mask is not None:
        takes_part = mask.reshape(-1)
        y, p = (t.masked_fill(~takes_part[:, None], torch.nan) for t in (y, p))
    if keys is not None:
        keys = (_labels(keys[1]).to(y.dtype), _labels(keys[2]).to(p.dtype))
    w = _weights(weights, y) if variant.weighted_rows else None
    return Rows(y, p, w, takes_part, keys, float(window), distance, variant)


def _with_keys(rows: Rows) -> tuple[Tensor, Tensor]:
    return torch.cat([rows.y, rows.keys[0]]), torch.cat([rows.p, rows.keys[1]])


def _count(rows: Rows, y_j: Tensor, p_j: Tensor, total: Any) -> ConRStatistics:
    """The statistics of the rows among the keys; ``total`` adds [2] up over all processes."""
    of_pairs = (rows.window, rows.distance, rows.variant.negatives)
    n_i, m_i = torch.ops.conr_kernels.pair_counts(rows.y, rows.p, y_j, p_j, *of_pairs)
    is_anchor = (n_i > 0) & (m_i > 0)
    n = n_i.clamp(min=1).to(rows.y.dtype)
    floor_i = n.log() * (n / (n + rows.variant.count_self))
    floor_i = floor_i if rows.w is None else floor_i * rows.w
    n_rows = rows.takes_part.sum()
    floor, n_all = total(torch.stack([torch.where(is_anchor, floor_i, 0.0).sum(), n_rows])).unbind()
    return ConRStatistics(n_i, m_i, is_anchor, floor / n_all.clamp(min=1), n_rows)


def union_statistics(group: Any, arguments: tuple[Any, ...]) -> ConRStatistics:
    """The statistics of this rank's rows among those of all ranks of the group."""
    from .large_batch.union import gather_labels

    try:
        rows: Rows | Exception = _prepare(*arguments)
    except Exception as error:
        rows = error
    y_j, p_j, total = gather_labels(group, rows)
    return _count(rows, y_j, p_j, total)
