"""Means over seeds, and paired differences with 95 % t intervals."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .rows import Row

#: Quantile 0.975 of Student's t for 1, 2, … degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_975_LARGE = 2.0

Values = dict[int, float]


@dataclass(frozen=True)
class Difference:
    """Of pairs of the same seed: mean of ``b − a``, half the interval's length, number of pairs."""

    mean: float
    half: float
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ± {self.half:.2g}" if math.isfinite(self.half) else "–"


def by_run(rows: Iterable[Row], metric: str, shot: str) -> dict[tuple, Values]:
    """Values by seed of ``(data, protocol, method, conr, batch)``."""
    found: dict[tuple, Values] = defaultdict(dict)
    for row in rows:
        if (row.metric, row.shot) == (metric, shot):
            found[row.data, row.protocol, row.method, row.conr, row.batch][row.seed] = row.value
    return found


def paired(a: Values, b: Values, relative: bool = False) -> Difference:
    """``b − a`` over the seeds that both have; ``relative``: in per cent of the mean of a."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return Difference(math.nan, math.inf, 0)
    unit = 100 / statistics.fmean(a[s] for s in seeds) if relative else 1.0
    differences = [unit * (b[s] - a[s]) for s in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return Difference(mean, math.inf, 1)
    t = T_975[len(seeds) - 2] if len(seeds) - 2 < len(T_975) else T_975_LARGE
    half = t * statistics.stdev(differences) / math.sqrt(len(seeds))
    return Difference(mean, half, len(seeds))


def mean(values: Values) -> float:
    return statistics.fmean(values.values())
