"""Batches as in training: labels from AgeDB-DIR's counts, predictions about 7 years off."""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conr_kernels import density_weights

AGES = Path(__file__).parent / "agedb_dir_train_ages.csv"
#: Mean absolute error of the predictions, in years: early in training, and of a trained model.
PREDICTION_ERROR, SMALL_ERROR = 7.0, 0.5


@dataclass(frozen=True)
class Batch:
    """Features [N, D] that require a gradient, labels, predictions and weights [N]."""

    x: Tensor
    y: Tensor
    p: Tensor
    w: Tensor


@functools.cache
def age_counts() -> tuple[Tensor, Tensor]:
    """The ages of AgeDB-DIR's training labels, and how many have each."""
    with AGES.open() as file:
        rows = [(float(row["age"]), float(row["count"])) for row in csv.DictReader(file)]
    ages, counts = torch.tensor(rows).unbind(1)
    return ages, counts


def make_batch(
    n: int,
    d: int = 128,
    labels: str = "agedb",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """The same rows for the same arguments on every device.

    Args:
        labels: ``"agedb"``: predictions with normal errors of 7 years on average; ``"converged"``:
            of half a year; ``"constant"``: the same labels, but every prediction is their mean, as
            early in training.
        dtype: of the features; labels, predictions and weights are float32.
    """
    generator = torch.Generator().manual_seed(n)
    ages, counts = age_counts()
    y = ages[torch.multinomial(counts, n, replacement=True, generator=generator)]
    error = SMALL_ERROR if labels == "converged" else PREDICTION_ERROR
    deviation = error * math.sqrt(math.pi / 2)
    p = y + deviation * torch.randn(n, generator=generator)
    if labels == "constant":
        p = y.mean().expand(n).contiguous()
    x = torch.randn(n, d, generator=generator)
    w = density_weights(y, "sqrt_inverse")
    x = x.to(device, dtype).requires_grad_()
    return Batch(x, *(t.to(device) for t in (y, p, w)))
