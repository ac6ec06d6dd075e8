"""Which window: shares of positives and negatives, for windows between possible distances."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import validation
from .core.counts import pair_counts
from .core.labels import as_labels
from .density import label_rows
from .reference import pair_distance
from .variants import DISTANCES

#: The most rows that are looked at, evenly spaced; and of how many the distances to all of these.
SAMPLE, PART = 4096, 256
#: A proposal leaves at most this share of a batch's rows without a positive.
ALONE = 0.05
#: The shares of pairs within the windows that are tried first; then FINE between two of these.
LEVELS = (0.0, *(2.0 ** (-k / 2) for k in range(16, 0, -1)), 1.0)
FINE = 16


class WindowSuggestion(NamedTuple):
    """The proposed window, and the table that it is taken from.

    Attributes:
        window: the proposal.
        step: the number of which all differences of labels are multiples; None if there is none.
        windows: some twenty windows at most, ascending. For each of them:
        positives: the mean share of the other rows that are a row's positives;
        negatives: the same for negatives; None without predictions;
        alone: the expected share of a batch's rows without a positive.
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
    positive, half-way between two distances that labels can have.

    Labels on a grid, such as ages or tenths, have many pairs whose distance *is* a multiple of
    the step. With a window of exactly that, rounding decides on every one of them; a window
    half-way to the next possible distance holds the same pairs in any units and in every dtype that
    holds the labels. With L components of a common step, the possible distances are the multiples
    of ``step / L`` (``"mae"``) and ``step·√(k / L)`` (``"rmse"``). Without a common step, as with
    components in steps of 1 and of 0.3, the window lies half-way between two neighbouring distances
    of the rows looked at, where these are far apart; other rows may have other distances.

    Labels are taken as the loss on a CPU compares them: in float32, which holds integers up to
    2²⁴ (float64 labels in float64). Rows that are not finite are left out, and single outliers
    change nothing. "Smallest" is among the windows tried, which are denser around the proposal; if
    none is large enough, the widest is proposed. It falls as the batch grows: where the labels' own
    noise is larger, the noise is the better window.

    Args:
        targets: the training labels [N, …]: a Tensor, array, column or list.
        predictions: like targets, of a trained or half-trained model; for the negatives' shares.
        batch_size: rows of a training batch, all ranks and the memory bank together.
        distance: over the components of a label, as in ``conr_loss``.

    Returns:
        ``WindowSuggestion``; printed, it is a table.

    Raises:
        TypeError, ValueError: bad input, or labels that the loss cannot tell apart.
    """
    validation.check_counts(batch_size=batch_size)
    validation.check_choice("distance", distance, DISTANCES)
    given = label_rows("targets", targets)
    y = as_labels(given)
    p = y if predictions is None else as_labels(label_rows("predictions", predictions))
    if p.shape != y.shape:
        raise ValueError(
            "targets and predictions must have the same rows and components, got "
            f"{tuple(y.shape)} and {tuple(p.shape)}"
        )
    is_finite = y.isfinite().all(1) & p.isfinite().all(1)
    at = _sample(y, is_finite.nonzero()[:, 0])
    wide = y[at].double()
    d = pair_distance(wide[:: max(len(at) // PART, 1)], wide, distance).flatten().sort().values
    if len(d) == 0 or d[-1] == 0:
        given = given[is_finite]
        is_lost = not given.dtype.is_floating_point and bool((given != given[:1]).any())
        where = f" in {y.dtype}, as the loss compares {given.dtype} ones" if is_lost else ""
        hint = ": subtract the least of them" if is_lost else ""
        if len(given) < len(y):
            hint = f" in the {len(given)} of {len(y)} rows whose values are finite" + hint
        raise ValueError(f"targets must have labels that differ{where}, got none that do{hint}")

    precision = _precision(given)
    step = _common_step(y[is_finite].double(), precision)
    typical = wide.abs().median(0).values.mean().item()
    windows, widths = _between(d, step, y.shape[1], distance, 4 * precision * typical)
    rows = (y[at], p[at], y[at], p[at])
    kind = "all" if predictions is None else "confused"
    found: dict[int, tuple[float, float, float]] = {}

    def serves(gap: int) -> bool:
        if gap not in found:
            n_i, m_i = pair_counts(*rows, windows[gap].item(), distance, kind)
            share, negatives = (n.double() / (len(at) - 1) for n in (n_i, m_i))
            alone = (1 - share) ** (batch_size - 1)
            found[gap] = tuple(t.mean().item() for t in (share, negatives, alone))
        return found[gap][-1] <= ALONE

    share = torch.searchsorted(d, windows, right=True).double() / len(d)
    edges = torch.searchsorted(share, share.new_tensor(LEVELS)).tolist()
    coarse = _widest(widths, edges)
    is_enough = [serves(gap) for gap in coarse]
    k = bisect_left(is_enough, True)
    best = coarse[min(k, len(coarse) - 1)]
    if any(is_enough):
        start = coarse[k - 1] + 1 if k > 0 else 0
        fine = _widest(widths, [start + (best - start) * k // FINE for k in range(FINE + 1)])
        best = [*fine, best][bisect_left(fine, True, key=serves)]
    shown = sorted(found)
    positives, negatives, alone = map(list, zip(*(found[gap] for gap in shown), strict=True))
    negatives = None if predictions is None else negatives
    of_shown = (windows[shown].tolist(), positives, negatives, alone)
    return WindowSuggestion(windows[best].item(), step, *of_shown)


def _sample(y: Tensor, rows: Tensor) -> Tensor:
    """At most SAMPLE of the rows, evenly spaced; if these are all equal, also one that differs."""
    n = min(len(rows), SAMPLE)
    # In integers: floats of the default dtype do not hold the numbers of all rows.
    at = rows[torch.arange(n, device=rows.device) * (len(rows) - 1) // max(n - 1, 1)]
    differs = (y[rows] != y[at[:1]]).any(1)
    if differs.any() and (y[at] == y[at[:1]]).all():
        at = torch.cat([at, rows[differs][:1]])
    return at


def _precision(given: Tensor) -> float:
    """The relative rounding of the labels: of their dtype, or of the loss's where it takes integers
    inexactly.
    """
    if given.dtype.is_floating_point:
        return torch.finfo(given.dtype).eps
    is_exact = len(given) == 0 or given.double().abs().max() <= 2**24
    return torch.finfo(torch.float64 if is_exact else torch.float32).eps


def _distinct(v: Tensor, rounding: Tensor) -> Tensor:
    """The values of an ascending ``v`` [n]; of values that differ by ``rounding`` [n] only, the
    first. Runs of close values that extend farther than that are kept.
    """
    starts = torch.ones_like(v, dtype=torch.bool)
    starts[1:] = v.diff() > rounding[1:]
    first = starts.nonzero()[:, 0]
    last = torch.cat([first[1:], first.new_tensor([len(v)])]) - 1
    is_noise = v[last] - v[first] <= rounding[first]
    return v[starts | ~is_noise[starts.cumsum(0) - 1]]


def _common_step(y: Tensor, precision: float) -> float | None:
    """The number of which all differences of labels are multiples up to rounding, or None."""
    of_columns = []
    for column in y.unbind(1):
        v, typical = column.unique(), column.abs().median()
        v = _distinct(v, 2 * precision * v.abs().clamp(min=typical))
        rounding = 4 * precision * torch.maximum(v[1:].abs(), v[:-1].abs()).clamp(min=typical)
        of_columns.append(torch.stack([v.diff(), rounding]))
    gaps, rounding = torch.cat(of_columns, dim=1)
    if gaps.numel() == 0 or len(y) <= 2:
        return None
    step = gaps.min().item()
    if rounding.median() > step / 4:  # neighbours in the labels' dtype: a grid if it is filled
        multiples = gaps / step
        return step if (multiples == multiples.round()).all() and multiples.median() == 1 else None
    reach, total, most = step, 1.0, min(gaps.max(), 8 * gaps.median()).item()
    while reach < most:  # counting the steps of wider gaps takes a more exact step
        reach *= 2
        near = gaps[gaps <= reach]
        total = (near / step).round().sum().item()
        step = near.sum().item() / total
    multiples = gaps / step
    tolerance = 0.01 + (rounding + multiples / total * rounding.median()) / step
    return step if ((multiples - multiples.round()).abs() <= tolerance).all() else None


def _between(
    d: Tensor, step: float | None, n_components: int, distance: str, rounding: float
) -> tuple[Tensor, Tensor]:
    """The windows half-way from each distance but the largest to the next possible one, and how far
    apart the two are.
    """
    d = d.clamp(max=2 * validation.FLOAT32_MAX).unique_consecutive()
    if step is None:
        found = _distinct(d, torch.full_like(d, rounding))
        low, high = found[:-1], found[1:]
    else:
        power = 2 if distance == "rmse" and n_components > 1 else 1
        unit = step / n_components ** (1 / power)
        k = (d / unit).pow(power).round().unique_consecutive()[:-1]
        low, high = (unit * each.pow(1 / power) for each in (k, k + 1))
    if len(low) == 0:  # labels that rounding alone tells apart
        low, high = d[:-1], d[1:]
    is_finite = (low + high) / 2 <= validation.FLOAT32_MAX
    return ((low + high) / 2)[is_finite], (high - low)[is_finite]


def _widest(widths: Tensor, edges: list[int]) -> list[int]:
    """The first of the widest gaps in every stretch between two edges."""
    chosen = []
    for a, b in pairwise(edges):
        if a < b:
            stretch = widths[a:b]
            chosen.append(a + int((stretch >= 0.9 * stretch.max()).nonzero()[0, 0]))
    return chosen
