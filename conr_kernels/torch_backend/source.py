"""Rows in the caller's order, and their unit features in any other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.labels import accumulation_dtype

Labels = tuple[Tensor, Tensor]


class Rows(NamedTuple):
    """Unit features [N, D], labels and predictions [N, L], and gradient coefficients [N, 1] (α and
    γ as sign and logarithm: [N, 2]).
    """

    q: Tensor
    y: Tensor
    p: Tensor
    alpha: Tensor | None = None
    beta: Tensor | None = None
    gamma: Tensor | None = None

    def with_coefficients(self, coef: Tensor) -> Rows:
        """The rows with the coefficients of scaled statistics [N, 3] or [N, 5]."""
        return Rows(*self[:3], coef[:, 0::3], coef[:, 1:2], coef[:, 2::2])


@dataclass
class Source:
    """Rows in the caller's order: features [·, D] and their norms [·, 1], or unit features and no
    norms; labels, predictions [·, L].

    Attributes:
        coef: gradient coefficients, complete once the ``pending`` exchanges are.
        index: which of these rows are meant, None for all.
        memory: reused for the unit features in every order, which are valid until the next are
            taken: memory fresh from the system costs more than the arithmetic on it.
    """

    x: Tensor
    norm: Tensor | None
    y: Tensor
    p: Tensor
    coef: Tensor | None = None
    index: Tensor | None = None
    pending: tuple[Any, ...] = ()
    memory: Tensor | None = None

    def __post_init__(self) -> None:
        self.inverse = None if self.norm is None else inverse_norms(self.norm)

    def __len__(self) -> int:
        return len(self.y if self.index is None else self.index)

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.x)

    @property
    def labels(self) -> Labels:
        if self.index is None:
            return self.y, self.p
        return self.y[self.index], self.p[self.index]

    def as_given(self) -> Rows:
        """All rows in the caller's order, in memory of their own."""
        rows = Rows(self.x * self.inverse, self.y, self.p)
        return rows if self.coef is None else rows.with_coefficients(self.coef)

    def take(self, order: Tensor | None = None) -> Rows:
        """The rows in that order."""
        for work in self.pending:
            work.wait()
        at = self.index
        if order is not None:
            at = order if at is None else at.index_select(0, order)
        rows = (self.inverse, self.y, self.p, self.coef)
        if at is not None:
            rows = (None if t is None else t.index_select(0, at) for t in rows)
        inverse, y, p, coef = rows
        q = self.x if at is None and inverse is None else self._unit_features(at, inverse)
        if coef is None:
            return Rows(q, y, p)
        # Contiguous columns: the sum of two that are not takes three times as long.
        return Rows(q, y, p).with_coefficients(coef.mT.contiguous().mT)

    def _unit_features(self, at: Tensor | None, inverse: Tensor | None) -> Tensor:
        n = len(self.x if at is None else at)
        if self.memory is None or len(self.memory) < n:
            self.memory = None  # before there is other memory
            self.memory = self.x.new_empty(n, self.x.shape[1], dtype=self.dtype)
        q = self.memory[:n]
        if at is None:
            return torch.mul(self.x, inverse, out=q)
        if self.x.dtype == q.dtype:
            torch.index_select(self.x, 0, at, out=q)
        else:
            q.copy_(self.x.index_select(0, at))
        return q if inverse is None else q.mul_(inverse)

    def part(self, rows: slice) -> Source:
        """Some of the rows; for a source without ``index``, and without its ``pending``."""
        tensors = (self.x, self.norm, self.y, self.p, self.coef)
        return Source(*(None if t is None else t[rows] for t in tensors))

    def rest(self, rows: slice) -> Source | None:
        """The other rows, None if there are none; for a source without ``index``."""
        n = len(self) - (rows.stop - rows.start)
        if n == 0:
            return None
        if rows.start == 0 or rows.stop == len(self):  # in one piece
            part = self.part(slice(rows.stop, None) if rows.start == 0 else slice(0, rows.start))
            return replace(part, pending=self.pending)
        index = torch.arange(n, device=self.y.device)
        index[rows.start :] += rows.stop - rows.start
        return replace(self, index=index)

    def poison(self, others: Source | None) -> Tensor:
        """For each row [N] 0 if its inputs are finite, else NaN; NaN for all if those of another
        key are not.
        """
        total = self.norm * 0
        for labels in (self.y, self.p):  # times 0 before any sum, which might overflow
            if labels.shape[1] > 1:
                labels = (labels * 0).sum(dim=1, keepdim=True)
            total.add_(labels, alpha=0)
        if others is not None:
            at = slice(None) if others.index is None else others.index
            total.add_(not_finite(others.norm[at], *others.labels))
        return total[:, 0]


def not_finite(*tensors: Tensor) -> Tensor:
    """0, or NaN if any element is not finite."""
    return sum((t * 0).sum() for t in tensors)


def row_norms(x: Tensor) -> Tensor:
    """``‖x_i‖`` [N, 1] in the accumulation dtype."""
    dtype = accumulation_dtype(x)
    return torch.linalg.vector_norm(x.contiguous(), dim=1, keepdim=True, dtype=dtype)


def inverse_norms(norm: Tensor) -> Tensor:
    """``1/‖x_i‖``, 0 for a zero row."""
    return norm.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)
