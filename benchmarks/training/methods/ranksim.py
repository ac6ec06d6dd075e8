"""RankSim: labels and features of a batch shall rank their neighbours alike (Gong et al., 2022).

Written from the paper's equations. A patent application covers the method: it is here to be
compared with, and no part of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .base import Method, Step

#: λ of the blackbox differentiation.
INTERPOLATION = 2.0


class RankSim(Method):
    """``mean_i mean_j (rank_j S^y_i − rank_j S^x_i)²`` over rows of different labels."""

    def term(self, step: Step) -> Tensor:
        order = torch.randperm(len(step.y), device=step.y.device)
        y, inverse = step.y[order].unique(dim=0, return_inverse=True)
        first = torch.full((len(y),), len(order), device=y.device)
        first = first.scatter_reduce(0, inverse, torch.arange(len(order), device=y.device), "amin")
        q = functional.normalize(step.x[order[first]], dim=1)
        by_label = ranks(-(y[:, None] - y).abs().mean(dim=2))
        return (by_label - BlackboxRanks.apply(q @ q.T)).square().mean()


def ranks(s: Tensor) -> Tensor:
    """Rank of every entry in its row over the row's length, 1 for the smallest; ties by place."""
    order = s.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(s.shape[1], 0, -1, device=s.device, dtype=s.dtype) / s.shape[1]
    return torch.empty_like(s).scatter_(1, order, places.expand_as(s))


class BlackboxRanks(torch.autograd.Function):
    """Ranks, with the derivative of their piecewise linear interpolation (Rolínek et al., 2020):
    ``∂L/∂s = (rank(s + λ ∂L/∂rank) − rank(s)) / λ``, ranks rising with s."""

    @staticmethod
    def forward(ctx, s: Tensor) -> Tensor:
        found = ranks(s)
        ctx.save_for_backward(s, found)
        return found

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        s, found = ctx.saved_tensors
        return (ranks(s + INTERPOLATION * upstream) - found) / INTERPOLATION
