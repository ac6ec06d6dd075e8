"""Which window: the shares of positives and negatives over windows, and one between label steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import validation
from .core.counts import pair_counts
from .density import label_rows
from .variants import DISTANCES

#: At most this many rows are looked at, evenly spaced.
SAMPLE = 4096
#: A proposal leaves at most this share of a batch's rows without a positive.
ALONE = 0.05


class WindowSuggestion(NamedTuple):
    """The proposed window, and the table that it is taken from.

    Attributes:
        window: the proposal.
        step: the difference of which all labels' differences are multiples; None where there is no
            such step.
        windows: about a dozen, ascending. For each of them:
        positives: the mean share of the other rows that are a row's positives;
        negatives: the same of its negatives; None without predictions;
        alone: the share of a batch's rows to be expected without a positive.
    """

    window: float
    step: float | None
    windows: list[float]
    positives: list[float]
    negatives: list[float] | None
    alone: list[float]

    def __str__(self) -> str:
        header, columns = f"{'window':>10s} positives", [self.positives]
        if self.negatives is not None:
            header, columns = header + " negatives", [*columns, self.negatives]
        lines = [header + " rows without positive"]
        for h, *shares in zip(self.windows, *columns, self.alone, strict=True):
            lines.append(f"{h:10.4g} " + " ".join(f"{share:9.2%}" for share in shares))
        step = "no common step" if self.step is None else f"steps of {self.step:.4g}"
        return "\n".join([*lines, f"proposed: {self.window:.4g} (labels with {step})"])


def suggest_window(
    targets: Any, predictions: Any = None, *, batch_size: int = 64, distance: str = "mae"
) -> WindowSuggestion:
    """A window for these labels: the smallest at which hardly any row of a batch is without a
    positive, between two steps of the labels where they have a common step.

    Labels on a grid, such as ages or tenths, have many pairs whose difference *is* a multiple of
    the step. With a window of just that, rounding decides on every one of them; half a step more
    holds the same pairs in any units and dtype.

    Args:
        targets: the training labels [N, …]: a Tensor, array, column or list.
        predictions: of a trained or half-trained model, like targets, for the negatives' shares.
        batch_size: rows of a training batch; of all ranks and the memory bank together.
        distance: over the components of a label, as in ``conr_loss``.

    Returns:
        ``WindowSuggestion``; printed, it is a table.

    Raises:
        TypeError, ValueError: bad input, or labels that are all the same.
    """
    validation.check_counts(batch_size=batch_size)
    validation.check_choice("distance", distance, DISTANCES)
    y = label_rows("targets", targets).double()
    p = y if predictions is None else label_rows("predictions", predictions).double()
    if p.shape != y.shape:
        raise ValueError(
            "targets and predictions must have the same rows and components, got "
            f"{tuple(y.shape)} and {tuple(p.shape)}"
        )
    is_finite = y.isfinite().all(1) & p.isfinite().all(1)
    at = is_finite.nonzero()[:, 0]
    at = at[torch.linspace(0, max(len(at) - 1, 0), min(len(at), SAMPLE)).long()]
    spread = (y[at].amax(0) - y[at].amin(0)).max().item() if len(at) > 0 else 0.0
    if spread == 0:
        raise ValueError("targets must have labels that differ, got none that do")

    step = _common_step(y[is_finite], _precision(targets))
    windows = _candidates(step, spread)
    found: list[tuple[float, float, float]] = []
    for window in windows:
        n_i, m_i = pair_counts(y[at], p[at], y[at], p[at], window, distance, "confused")
        share = n_i / (len(at) - 1)
        alone = (1 - share) ** (batch_size - 1)
        found.append(
            (share.mean().item(), (m_i / (len(at) - 1)).mean().item(), alone.mean().item())
        )
    positives, negatives, alone = map(list, zip(*found, strict=True))
    best = next((h for h, a in zip(windows, alone, strict=True) if a <= ALONE), windows[-1])
    shown = None if predictions is None else negatives
    return WindowSuggestion(best, step, windows, positives, shown, alone)


def _precision(targets: Any) -> float:
    """The relative rounding of the labels as they were given."""
    dtype = getattr(targets, "dtype", None)
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not isinstance(dtype, torch.dtype) and "float32" in str(dtype):
        return torch.finfo(torch.float32).eps
    return torch.finfo(dtype).eps if is_float else torch.finfo(torch.float64).eps


def _common_step(y: Tensor, precision: float) -> float | None:
    """The difference of which all differences of labels are multiples, to rounding; else None."""
    gaps = torch.cat([column.unique().diff() for column in y.unbind(1)])
    rounding = 4 * precision * y.abs().max().item()
    gaps = gaps[gaps > rounding]
    step = gaps.min().item()
    multiples = gaps / step
    tolerance = 0.01 + rounding / step * multiples
    is_grid = ((multiples - multiples.round()).abs() <= tolerance).all() and rounding < step / 4
    return step if is_grid and len(y) > 2 else None


def _candidates(step: float | None, spread: float) -> list[float]:
    """About a dozen windows: half-way between steps, or halvings of the labels' range."""
    if step is None:
        return [spread / 2**k for k in range(12, 0, -1)]
    windows, k = [], 0
    while (k + 0.5) * step < spread and len(windows) < 16:
        windows.append((k + 0.5) * step)
        k = max(k + 1, k * 3 // 2)
    return windows
