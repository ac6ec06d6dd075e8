"""The input of every backend: a call's rows, keys and settings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..variants import Settings
from .labels import accumulation_dtype

#: Features, labels and predictions of rows.
Keys = tuple[Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    """Anchors x [N, D] with labels y and predictions p [N, L], weights w [N] or None for 1.

    ``keys`` are all rows that can be positives or negatives, anchor i being key ``self_offset +
    i``; None where the anchors are the keys. ``n_absent``, a scalar tensor or None for 0, says how
    many of them ``unit_terms`` does not count.
    """

    x: Tensor
    y: Tensor
    p: Tensor
    w: Tensor | None
    keys: Keys | None
    self_offset: int
    settings: Settings
    n_absent: Tensor | None = None

    @property
    def n_keys(self) -> int:
        return (self.x if self.keys is None else self.keys[0]).shape[0]

    @property
    def all_keys(self) -> Keys:
        return (self.x, self.y, self.p) if self.keys is None else self.keys

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of losses, statistics and sums."""
        return accumulation_dtype(self.x)

    def contiguous(self) -> Inputs:
        """The same input in contiguous tensors."""
        x, y, p, w, keys, *rest = self
        keys = None if keys is None else tuple(t.contiguous() for t in keys)
        w = None if w is None else w.contiguous()
        return Inputs(x.contiguous(), y.contiguous(), p.contiguous(), w, keys, *rest)
