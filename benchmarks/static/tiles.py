"""Which tiles of pairs the sweeps visit on AgeDB's labels: as the kernels' ``segments``, without
running one.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..batches import age_counts


@functools.cache
def batch(n: int) -> dict[str, Tensor]:
    """Sorted labels with AgeDB-DIR's counts, and sorted predictions about 7 years off."""
    ages, counts = (t.double() for t in age_counts())
    below = counts.cumsum(0)
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    y = ages[torch.searchsorted(below / below[-1], quantiles)]
    # Errors by their quantiles too, in an order without relation to the labels': no random numbers.
    golden = (torch.arange(n, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) + 0.25) % 1
    deviation = 7 * math.sqrt(math.pi / 2)
    errors = deviation * math.sqrt(2) * torch.special.erfinv(2 * golden.clamp(1e-9, 1 - 1e-9) - 1)
    return {"positives": y, "negatives": (y + errors).sort().values}


@functools.cache
def visits(
    n: int, k: int, block_i: int, block_j: int, sweep: str, reach: float, exact: bool, outside: bool
) -> tuple[tuple[int, int], ...]:
    """Full and edge tiles of every tile of anchors, n anchors against k keys.

    Args:
        sweep: ``"positives"`` or ``"negatives"``.
        reach: the window in units of the sorted component.
        exact: one component decides; otherwise no tile is full.
        outside: the negatives are all rows outside the label bands.
    """
    values, keys = (batch(size)["positives" if outside else sweep] for size in (n, k))
    lo = torch.searchsorted(keys, values - reach)
    hi = torch.searchsorted(keys, values + reach, right=True)
    first = torch.arange(0, n, block_i)
    last = (first + block_i - 1).clamp(max=n - 1)
    n_tiles = -(-k // block_j)
    start, stop = lo[first] // block_j, -(-hi[last] // block_j)
    full = (hi[first] // block_j - -(-lo[last] // block_j)).clamp(min=0) * exact
    if outside:
        full, edge = n_tiles - full, torch.zeros_like(full)
    else:
        edge = stop - start - full
        if sweep == "positives":  # tiles with a row's pair with itself are edges
            own = full.clamp(max=-(-block_i // block_j))
            full, edge = full - own, edge + own
    return tuple(zip(full.tolist(), edge.tolist(), strict=True))


@functools.cache
def upper_runs(
    n: int, own: int, met: int, sweep: str, reach: float
) -> tuple[tuple[int, int, int, int], ...]:
    """Of each tile of ``own`` rows, where each pair of rows is visited once, its tiles of ``met``
    keys, none before its own rows: the first and the end of all, and those of the full ones.
    """
    values = batch(n)[sweep]
    hi = torch.searchsorted(values, values + reach, right=True)
    first = torch.arange(0, n, own)
    last = (first + own - 1).clamp(max=n - 1)
    begin, reached = first // met, hi[first] // met
    c = own_end = begin + own // met
    if sweep == "negatives":
        c = torch.where(reached >= own_end, begin, own_end)
    runs = begin, -(-hi[last] // met), c, torch.maximum(reached, c)
    return tuple(zip(*(run.tolist() for run in runs), strict=True))


@functools.cache
def band_rows(n: int, sweep: str) -> int:
    """Keys in a row's band, on average; of both sweeps, in both bands."""
    if sweep == "both":
        return band_rows(n, "positives") + band_rows(n, "negatives")
    values = batch(n)[sweep]
    hi = torch.searchsorted(values, values + 1, right=True)
    return int((hi - torch.searchsorted(values, values - 1)).double().mean())
