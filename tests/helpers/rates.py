"""Batches with a negative pushing rate whose ``Z_i`` are positive, also at low temperatures."""

from __future__ import annotations

import torch
from torch import Tensor

from conr_kernels import Variant

#: Of each: the unit terms less ``|r| B`` stay above 0, fall below, or there are none.
NEGATIVE_RATES = [
    dict(variant=Variant(log, "weight", "all", unit_terms=unit_terms), push_scale=push_scale)
    for log in ("outside", "inside")
    for unit_terms, push_scale in ((True, -0.5), (True, -1.5), (False, -0.5))
]


def nearly_orthogonal_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels, predictions of 24 rows: 11 positives and 12 negatives each, ``|s_ij| < 1``
    at τ = 0.02.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(24) + 0.003 * torch.randn(24, 24, generator=generator)
    return x, 2.0 * (torch.arange(24) % 2), torch.zeros(24)
