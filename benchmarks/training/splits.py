"""Imbalanced training sets, balanced validation and test sets, and the shots of the labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Table

#: A bin with more than 100 training rows is many-shot, with fewer than 20 few-shot.
MANY, FEW = 100, 20
#: Most rows that a bin gives to the test set, and to the validation set; of small tables fewer.
ROWS_PER_BIN, TABLE_PER_ROW = 20, 100
TEST_SEED = 20_240_513


def _peak(u: Tensor, middle: float) -> Tensor:
    return torch.exp(-0.01 * (u - middle) ** 2)


#: Density of the training labels over their range, stretched to 0 … 100 (Puetz et al., 2026).
#: ``natural``: the law of the data.
PROTOCOLS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "natural": None,
    "extrapolation": lambda u: _peak(u, 50),
    "interpolation": lambda u: _peak(u, 25) + _peak(u, 75),
    "blind spot": lambda u: ((u < 40) | (u >= 60)).float(),
}


@dataclass(frozen=True)
class Part:
    """Some rows of a table."""

    inputs: Tensor
    labels: Tensor
    bins: Tensor


@dataclass(frozen=True)
class Split:
    """Training, validation and test rows, and ``counts`` [n_bins] of training rows per bin."""

    train: Part
    validation: Part
    test: Part
    counts: Tensor
    bin_width: float

    def shots(self, part: Part) -> dict[str, Tensor]:
        """Which rows of a part are in which shot; bins without training rows are few and zero."""
        n = self.counts[part.bins]
        return {
            "all": n >= 0,
            "many": n > MANY,
            "median": (n >= FEW) & (n <= MANY),
            "few": n < FEW,
            "zero": n == 0,
        }


def bin_index(labels: Tensor, width: float) -> Tensor:
    """Bin of each row [N, L]: ``⌊mean of the components / width⌋``, rounding of float32 undone."""
    v = labels.double().mean(dim=1) / width
    nearest = v.round()
    return torch.where((v - nearest).abs() < 1e-5, nearest, v.floor()).long()


def split(table: Table, seed: int, protocol: str = "natural", n_train: int = 3000) -> Split:
    """The rows of one seed; the test rows are the same for every seed.

    Every bin gives a third of its rows, at most 20 (or a hundredth of the table), to the test set,
    then as many to the validation set; the rest trains, at most ``n_train`` rows of it, drawn by
    the protocol's law. A bin with fewer than three rows only trains.
    """
    bins = bin_index(table.labels, table.bin_width)
    bins = bins - bins.min()
    quota = (bins.bincount() // 3).clamp(max=min(ROWS_PER_BIN, len(bins) // TABLE_PER_ROW))
    rest, test = _take(torch.arange(len(bins)), bins, quota, TEST_SEED)
    rest, validation = _take(rest, bins, quota, seed)
    train = _draw(rest, bins, protocol, n_train, seed)
    parts = [Part(table.inputs[t], table.labels[t], bins[t]) for t in (train, validation, test)]
    counts = bins[train].bincount(minlength=len(quota))
    return Split(*parts, counts, table.bin_width)


def _take(rows: Tensor, bins: Tensor, quota: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What remains of the rows, and ``quota`` of each bin, at random."""
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    rows = rows[bins[rows].argsort(stable=True)]
    sorted_bins = bins[rows]
    first = torch.searchsorted(sorted_bins, sorted_bins)
    is_taken = torch.arange(len(rows)) - first < quota[sorted_bins]
    return rows[~is_taken], rows[is_taken]


def _draw(rows: Tensor, bins: Tensor, protocol: str, n_train: int, seed: int) -> Tensor:
    law = PROTOCOLS[protocol]
    generator = torch.Generator().manual_seed(seed)
    if law is None:
        return rows[torch.randperm(len(rows), generator=generator)[:n_train]]
    u = 100 * bins[rows] / bins.max()
    chance = law(u)
    if protocol == "blind spot":  # the data's own law, with a hole
        n_rows = min(n_train, int((chance > 0).sum()))
    else:
        chance = chance / bins[rows].bincount()[bins[rows]]
        n_rows = min(n_train, len(rows) // 4)
    return rows[torch.multinomial(chance, n_rows, generator=generator)]
