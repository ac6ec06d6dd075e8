"""The union's row losses where the ranks share the forward pass, on CPUs: each pair of the union is
one rank's, for both of its rows. Unit features travel, and the ranks exchange 3 to 5 sums per row.

What can be done without the other ranks' rows is done while these travel: forward the sorting,
backward the own rows' pairs among themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops, torch_backend
from .batch import Batch
from .rows import no_statistics, scale_statistics
from .torch_sweeps import Source, inverse_norms, not_finite, row_norms
from .variants import Settings

if TYPE_CHECKING:
    from .distributed import Union


class SharedRowLosses(torch.autograd.Function):
    """``ℓ_i`` of this rank's rows; backward gathers the other ranks' statistics, scaled
    upstream.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, union: Union) -> Tensor:
        rows, *saved = ops.without_autocast(_forward, x.device, x.detach(), batch, union)
        ctx.save_for_backward(x, *saved)
        ctx.union, ctx.settings = union, batch.settings
        return rows

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        backward = _BackwardOnce.apply if torch.is_grad_enabled() else _backward
        args = (*ctx.saved_tensors, g, ctx.union, ctx.settings)
        return ops.without_autocast(backward, g.device, *args), None, None


class _BackwardOnce(torch.autograd.Function):
    """The gradient where a graph of it is asked for: it has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return _backward(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        ops.refuse()


def _forward(x: Tensor, batch: Batch, union: Union) -> tuple[Tensor, ...]:
    """Losses; and for backward statistics, layout, all keys' unit features, labels and predictions,
    and the own rows' inverse norms.
    """
    norm = row_norms(x)
    inverse = inverse_norms(norm)
    dtype = norm.dtype  # of the sums; narrower features travel as they are
    key_x, *key_labels = union.own_keys(batch)
    columns = (batch.y, batch.p, norm)
    y, p, norms = union.gather_columns(columns, (*key_labels, row_norms(key_x)))

    q = x.new_empty(union.n_rows, x.shape[1])
    if x.dtype == dtype:
        torch.mul(x, inverse, out=q[union.own])
    else:
        q[union.own] = x
    pending = union.start_gather(q, union.sizes)
    sweeps = torch_backend.union_sweeps(y, p, union.n_rows, batch.settings)
    for work in pending:
        work.wait()
    if union.n_keys > 0:
        key_q = key_x * inverse_norms(row_norms(key_x)) if x.dtype == dtype else key_x
        q = torch.cat([q, union.gather(key_q, union.key_sizes)])
    if q.dtype != dtype:
        q = q.to(dtype).mul_(inverse_norms(norms))

    rows, stats, layout = torch_backend.shared_forward(
        sweeps,
        Source(q, None, y, p),
        not_finite(norms, y, p),
        union.own,
        batch.w,
        batch.settings,
        (union.rank, union.n_ranks),
        union.deal,
    )
    return rows, stats, layout, q, y, p, inverse


def _backward(
    x: Tensor,
    stats: Tensor,
    layout: Tensor,
    q: Tensor,
    y: Tensor,
    p: Tensor,
    inverse: Tensor,
    g: Tensor,
    union: Union,
    settings: Settings,
) -> Tensor:
    coef = no_statistics(len(q), stats)
    coef[union.own] = scale_statistics(stats, g * union.n_ranks)
    pending = union.start_gather(coef[: union.n_rows], union.sizes)
    keys = Source(q, None, y, p, coef, pending=tuple(pending))
    gradient = torch_backend.shared_backward(keys, layout, inverse, union.own, settings)
    for work in pending:  # where there was no other row to wait for
        work.wait()
    return gradient.to(x.dtype)
