"""Rows in the caller's order, and their unit features in any other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .tiles import Rows

Keys = tuple[Tensor, Tensor, Tensor]
Labels = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """Rows in the caller's order: features [·, D] and their norms [·, 1], or unit features and no
    norms; labels, predictions [·, L].

    Attributes:
        coef: gradient coefficients, there when what is ``pending`` has come.
        index: which of all these rows are meant, None for all of them.
    """

    x: Tensor
    norm: Tensor | None
    y: Tensor
    p: Tensor
    coef: Tensor | None = None
    index: Tensor | None = None
    pending: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.y if self.index is None else self.index)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def labels(self) -> Labels:
        if self.index is None:
            return self.y, self.p
        return self.y[self.index], self.p[self.index]

    @property
    def is_ready(self) -> bool:
        """Whether the rows in the given order are unit features as they stand."""
        return self.index is None and self.norm is None

    def take(self, order: Tensor | None, memory: Tensor | None) -> Rows:
        """The rows in that order; their unit features in the memory, if it is given and needed."""
        for work in self.pending:
            work.wait()
        if order is None:
            at = self.index
        else:
            at = order if self.index is None else self.index.index_select(0, order)
        rows = (self.norm, self.y, self.p, self.coef)
        if at is None:
            norm, y, p, coef = rows
            q = self.x if norm is None else torch.mul(self.x, inverse_norms(norm), out=memory)
            return self._rows(q, y, p, coef)
        norm, y, p, coef = (None if t is None else t.index_select(0, at) for t in rows)
        q = None if memory is None else memory[: len(at)]
        if self.x.dtype == self.dtype:
            q = torch.index_select(self.x, 0, at, out=q)
        else:
            x = self.x.index_select(0, at)
            q = x.to(self.dtype) if q is None else q.copy_(x)
        return self._rows(q if norm is None else q.mul_(inverse_norms(norm)), y, p, coef)

    @staticmethod
    def _rows(q: Tensor, y: Tensor, p: Tensor, coef: Tensor | None) -> Rows:
        # Contiguous columns: the sum of two that are not takes three times as long.
        columns = () if coef is None else (coef[:, 0::3], coef[:, 1:2], coef[:, 2::2])
        return Rows(q, y, p, *(t.contiguous() for t in columns))

    def part(self, rows: slice) -> Source:
        """Some of the rows of a source of all rows; they wait for nothing."""
        tensors = (self.x, self.norm, self.y, self.p, self.coef)
        return Source(*(None if t is None else t[rows] for t in tensors))

    def rest(self, rows: slice) -> Source | None:
        """The other rows of a source of all rows; None where there are none."""
        n = len(self) - (rows.stop - rows.start)
        if n == 0:
            return None
        if rows.start == 0 or rows.stop == len(self):  # in one piece
            part = self.part(slice(rows.stop, None) if rows.start == 0 else slice(0, rows.start))
            return replace(part, pending=self.pending)
        index = torch.arange(n, device=self.y.device)
        index[rows.start :] += rows.stop - rows.start
        return replace(self, index=index)

    def not_finite(self) -> Tensor:
        """0, or NaN if any feature, label or prediction is not finite."""
        norm = self.norm if self.index is None else self.norm[self.index]
        return not_finite(norm, *self.labels)


def not_finite(*tensors: Tensor) -> Tensor:
    """0, or NaN if any element is not finite."""
    return sum((t * 0).sum() for t in tensors)


def other_keys(keys: Keys | None, rows: slice, coef_j: Tensor | None = None) -> Source | None:
    """The keys that are no anchors, as these rows are; None where there are none."""
    if keys is None or len(keys[0]) == rows.stop - rows.start:
        return None
    x, y, p = keys
    rest = Source(x, None, y, p, coef_j).rest(rows)
    return replace(rest, norm=row_norms(rest.x))  # these are no unit features


def row_norms(x: Tensor) -> Tensor:
    """``‖x_i‖`` [N, 1] in the accumulation dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x.contiguous(), dim=1, keepdim=True, dtype=dtype)


def inverse_norms(norm: Tensor) -> Tensor:
    """``1/‖x_i‖``, 0 for a zero row."""
    return norm.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)
