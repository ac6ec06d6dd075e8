"""The sizes of a batch's sets, counted from labels and predictions alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import validation
from ..variants import DISTANCES, Variant, resolve_variant
from .counts import pair_counts
from .labels import as_keys, as_labels, as_weights

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
    """What the loss sees in a batch, on its device.

    Attributes:
        n_positives: ``n_i`` [N], int64; 0 for rows that take no part.
        n_negatives: ``m_i`` [N], int64, likewise.
        is_anchor: ``A_i`` [N], bool: the row has both.
        floor: a scalar, below which no features bring the mean loss (``conr_statistics``); with a
            group, that of the union.
        rows: a scalar, int64: how many of this process's rows take part.
    """

    n_positives: Tensor
    n_negatives: Tensor
    is_anchor: Tensor
    floor: Tensor
    rows: Tensor

    def summary(self) -> dict[str, float]:
        """Plain floats for a logger. Synchronises with the device once.

        Returns:
            ``rows``: how many of this process's rows take part. Their shares ``anchors``,
            ``without_positives`` and ``without_negatives``. Their average numbers of pairs
            ``mean_positives`` and ``mean_negatives``. And ``floor``.
        """
        n_i, m_i = self.n_positives.double(), self.n_negatives.double()
        n_absent = len(n_i) - self.rows  # these have neither positives nor negatives
        sums = (self.is_anchor.sum(), (n_i == 0).sum() - n_absent, (m_i == 0).sum() - n_absent)
        of_rows = torch.stack([*sums, n_i.sum(), m_i.sum()]).double() / self.rows.clamp(min=1)
        values = torch.cat([self.rows[None], of_rows, self.floor[None]]).tolist()
        names = ("rows", "anchors", "without_positives", "without_negatives")
        return dict(zip((*names, "mean_positives", "mean_negatives", "floor"), values, strict=True))


class LabelledRows(NamedTuple):
    """Checked input: labels and predictions [N, L], NaN in the rows that take no part."""

    y: Tensor
    p: Tensor
    w: Tensor | None
    mask: Tensor
    keys: tuple[Tensor, Tensor] | None
    window: float
    distance: str
    variant: Variant


def checked_rows(
    targets: Any, predictions: Any, window: Any, distance: Any, variant: Any, keys: Any, mask: Any,
    weights: Any,
) -> LabelledRows:  # fmt: skip
    """The arguments of ``conr_statistics``, checked and as ``count`` takes them."""
    window, _, _ = validation.check_scalars(window, 1.0, 0.0)
    validation.check_choice("distance", distance, DISTANCES)
    variant = resolve_variant(variant)
    keys = as_keys(keys)
    validation.check_statistics(targets, predictions, weights, keys, mask)
    y, p = as_labels(targets), as_labels(predictions)
    if mask is None:
        mask = torch.ones(len(y), dtype=torch.bool, device=y.device)
    else:
        mask = mask.reshape(-1)
        y, p = (t.masked_fill(~mask[:, None], torch.nan) for t in (y, p))
    if keys is not None:
        _, key_y, key_p, *masks = keys
        keys = (as_labels(key_y).to(y.dtype), as_labels(key_p).to(p.dtype))
        for is_key in masks:
            keys = tuple(t.masked_fill(~is_key.reshape(-1, 1), torch.nan) for t in keys)
    w = as_weights(weights, y) if variant.weighted_rows else None
    return LabelledRows(y, p, w, mask, keys, window, distance, variant)


def all_labels(rows: LabelledRows) -> tuple[Tensor, Tensor]:
    """Labels and predictions of the rows and then of the further keys."""
    if rows.keys is None:
        return rows.y, rows.p
    return torch.cat([rows.y, rows.keys[0]]), torch.cat([rows.p, rows.keys[1]])


def count(rows: LabelledRows, y_j: Tensor, p_j: Tensor, total: Any) -> ConRStatistics:
    """The statistics of the rows among the keys; ``total`` sums a tensor [2] over all processes."""
    of_pairs = (rows.window, rows.distance, rows.variant.negatives)
    n_i, m_i = torch.ops.conr_kernels.pair_counts(rows.y, rows.p, y_j, p_j, *of_pairs)
    is_anchor = (n_i > 0) & (m_i > 0)
    n = n_i.clamp(min=1).to(rows.y.dtype)
    floor_i = n.log() * (n / (n + rows.variant.count_self))
    floor_i = floor_i if rows.w is None else floor_i * rows.w
    n_rows = rows.mask.sum()
    floor, n_all = total(torch.stack([torch.where(is_anchor, floor_i, 0.0).sum(), n_rows])).unbind()
    return ConRStatistics(n_i, m_i, is_anchor, floor / n_all.clamp(min=1), n_rows)
