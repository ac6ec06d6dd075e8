"""The union's row losses where the ranks share the forward pass, on CPUs: each pair of the union is
visited by one rank, for both of its rows. Ranks exchange unit features, norms and 3 to 5 sums per
row.

What needs no other rank's rows is done while these travel: forward, sorting and cutting into
shares; backward, the pairs of this rank's rows in the first order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..batch import Batch
from ..core.rows import no_statistics, scale_statistics
from ..torch_backend import shared as torch_shared
from ..torch_backend.source import Source, inverse_norms, not_finite, row_norms
from ..variants import Settings
from .ranks import Union


class SharedRowLosses(torch.autograd.Function):
    """``ℓ_i`` of this rank's rows. Backward gathers all ranks' statistics, times their upstream
    gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, union: Union) -> Tensor:
        rows, *saved = ops.without_autocast(_forward, x.device, x.detach(), batch, union)
        ctx.save_for_backward(x, *saved)
        ctx.union, ctx.settings = union, batch.settings
        return rows

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ops.refuse_batched(g)
        args = (*ctx.saved_tensors, g, ctx.union, ctx.settings)
        return ops.without_autocast(ops.once, g.device, _backward, *args), None, None


def _forward(x: Tensor, batch: Batch, union: Union) -> tuple[Tensor, ...]:
    """Losses; and for backward statistics, layout, all keys' unit features, labels and predictions,
    and the inverse norms of this rank's rows.

    Features of 16 bits travel as they are; unit features are kept in the dtype of sums.
    """
    key_x, *key_labels = union.own_keys(batch)
    norm, key_norm = row_norms(x), row_norms(key_x)
    inverse, dtype = inverse_norms(norm), norm.dtype
    columns = (batch.y, batch.p, norm)
    y, p, norms = union.gather_columns(columns, (*key_labels, key_norm))

    q = x.new_empty(union.n_rows + union.n_keys, x.shape[1])
    of_rows, of_keys = q[: union.n_rows], q[union.n_rows :]
    own_keys = of_keys[sum(union.key_sizes[: union.rank]) :][: len(key_x)]
    if x.dtype == dtype:
        torch.mul(x, inverse, out=of_rows[union.own])
        torch.mul(key_x, inverse_norms(key_norm), out=own_keys)
    else:
        of_rows[union.own], own_keys[:] = x, key_x
    pending = union.start_gather(of_rows, union.sizes)
    pending += union.start_gather(of_keys, union.key_sizes)
    share = (union.rank, union.n_ranks)
    shares, layout = torch_shared.union_sweeps(y, p, union.n_rows, batch.settings, share)
    for work in pending:
        work.wait()
    if q.dtype != dtype:
        q = q.to(dtype).mul_(inverse_norms(norms))

    rows, stats = torch_shared.forward(
        shares,
        Source(q, None, y, p),
        union.n_rows,
        not_finite(norms, y, p),
        union.own,
        batch.w,
        batch.n_absent,
        batch.settings,
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
    gradient = torch_shared.backward(keys, layout, inverse, union.own, settings)
    for work in pending:  # not waited for yet if no rank has other rows
        work.wait()
    return gradient.to(x.dtype)
