"""Errors per shot, the error over balanced bins of labels, and the collapse penalty."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Errors below are taken as this in the geometric mean, which one exact hit would make 0.
SMALLEST_ERROR = 1e-6


def row_errors(p: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of each row [N] over the components of predictions and labels [N, L]."""
    return (p - y).abs().mean(dim=1)


def scores(p: Tensor, y: Tensor, shots: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """``(shot, metric)`` → value; an empty shot has none."""
    errors, squares = row_errors(p, y), (p - y).square().mean(dim=1)
    found = {("all", "bMAE"): balanced_mae(errors, y)}
    for shot, rows in shots.items():
        if rows.any():
            e = errors[rows]
            found[shot, "MAE"] = e.mean().item()
            found[shot, "GM"] = e.clamp(min=SMALLEST_ERROR).log().mean().exp().item()
            found[shot, "RMSE"] = squares[rows].mean().sqrt().item()
    return found


def balanced_mae(errors: Tensor, y: Tensor) -> float:
    """bMAE: the mean over Freedman–Diaconis bins of the labels of the bins' mean errors."""
    v = y.double().mean(dim=1)
    bins = (v - v.min()).div(freedman_diaconis(v)).floor().long()
    sums = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add(0, bins, errors.double())
    counts = bins.bincount()
    return (sums[counts > 0] / counts[counts > 0]).mean().item()


def freedman_diaconis(v: Tensor) -> float:
    """Bin width ``2 · interquartile range / ∛N``; one bin for all if that is 0."""
    low, high = torch.quantile(v, torch.tensor([0.25, 0.75], dtype=v.dtype))
    width = 2 * (high - low).item() / len(v) ** (1 / 3)
    return width if width > 0 else (v.max() - v.min()).item() + 1


def collapse_penalty(p: Tensor, y: Tensor, at: Tensor, window: float) -> Tensor:
    """``P`` at each value ``at`` [K] for predictions and labels [N] (appendix A.1 of the paper).

    The mean error of the rows that are predicted like the value, within the window, although their
    labels are not; 0 where there are none.
    """
    is_confused = ((p - at[:, None]).abs() <= window) & ((y - at[:, None]).abs() > window)
    total = (is_confused * (p - y).abs()).sum(dim=1)
    return total / is_confused.sum(dim=1).clamp(min=1)
