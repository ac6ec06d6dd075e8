"""The loss of the union of all ranks' rows, by ``torch.distributed``: each rank's rows against
everybody's.

A rank sends its features and labels forward and 3 (at most 5) floats per row backward, from which
every rank computes the complete gradient of its own rows: no N×D gradient is ever reduced. On CPUs
the ranks share the forward pass (shared.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import notices, ops
from ..batch import Batch, reference_losses, without_absent
from ..core.rows import no_statistics, scale_statistics
from ..core.sets import ConRStatistics, Rows, checked_rows, count
from ..variants import Settings
from .agreement import agree, way
from .ranks import Union
from .shared import SharedRowLosses

#: From this many rows of the union on, half of a forward pass costs more than another exchange.
SHARED_ROWS = 2048


def union_loss(group: Any, prepared: Batch | Exception) -> Tensor:
    """The loss of the union of the batches that the ranks of the group have prepared, or of the
    errors that they met.

    Raises:
        RuntimeError, ValueError: as ``agree``.
    """
    batch, union = agree(group, prepared)
    n_present: Tensor | int = union.n_rows
    if union.has_mask:
        reach, n_present, n_absent = union.extent(batch)
        batch = without_absent(batch, reach, n_absent, union.offset)
        n_present = n_present.clamp(min=1)
    rows = _row_losses(batch, union)
    if batch.reduction == "none":
        return rows
    total = _Total.apply(rows.sum(), union)
    notices.look_for_anchors(batch, total, n_present)
    if batch.reduction == "sum":
        return total
    return total / (n_present if union.has_mask else max(union.n_rows, 1))


def gather_labels(group: Any, rows: Any) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Labels and predictions of all ranks' rows and keys, and the sum over the ranks.

    ``rows``: with y, p and keys of labels and predictions; or the error that came instead.
    """
    prepared = rows
    if not isinstance(rows, Exception):
        nothing = rows.y[:, :0]
        settings = Settings(rows.window, 1.0, 0.0, rows.variant, rows.distance)
        keys = None if rows.keys is None else (rows.keys[0][:, :0], *rows.keys)
        prepared = Batch(nothing, rows.y, rows.p, rows.w, keys, settings, "statistics", "torch")
    batch, union = agree(group, prepared)
    y, p = union.gather_columns((batch.y, batch.p), tuple(union.own_keys(batch)[1:]))

    def total(own: Tensor) -> Tensor:
        return union.gather(own[None], [1] * union.n_ranks).sum(0)

    return y, p, total


def union_statistics(group: Any, arguments: tuple[Any, ...]) -> ConRStatistics:
    """The statistics of this rank's rows among those of all ranks of the group."""
    try:
        rows: Rows | Exception = checked_rows(*arguments)
    except Exception as error:
        rows = error
    y_j, p_j, total = gather_labels(group, rows)
    return count(rows, y_j, p_j, total)


def _row_losses(batch: Batch, union: Union) -> Tensor:
    """``ℓ_i`` of this rank's rows."""
    if batch.backend != "reference":
        function = SharedRowLosses if _shares_forward(batch, union) else _RowLosses
        return function.apply(batch.x, batch, union)
    if union.n_ranks == 1:
        return reference_losses(batch.inputs(batch.all_keys()))
    x = _Gather.apply(batch.x, union)
    keys = union.gather_keys(batch, x)
    return reference_losses(batch._replace(x=x[union.own]).inputs(keys, union.offset))


def _shares_forward(batch: Batch, union: Union) -> bool:
    """Whether the ranks share the pairs: only there s_ij = s_ji is used, and the host reads."""
    is_served = way(batch) == "torch on the CPU"
    return is_served and union.n_ranks > 1 and union.n_rows >= SHARED_ROWS


class _RowLosses(torch.autograd.Function):
    """``ℓ_i`` of this rank's rows; backward gathers the other ranks' statistics, scaled
    upstream.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, union: Union) -> Tensor:
        if union.n_ranks == 1:
            keys = batch.all_keys()
        else:
            keys = union.gather_keys(batch, union.gather(x, union.sizes))
        inputs = batch.inputs(keys, union.offset)
        rows, stats, layout = ops.forward(inputs, batch.backend)
        ops.keep(ctx, inputs, batch.backend, stats, layout)
        ctx.union = union
        return rows

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ops.refuse_batched(g)
        stats, layout, inputs, backend = ops.kept(ctx)
        union = ctx.union
        coef_i, coef_j = scale_statistics(stats, g * union.n_ranks), None
        if inputs.keys is not None:
            coef_j = no_statistics(inputs.n_keys, stats)
            coef_j[: union.n_rows] = union.gather(coef_i, union.sizes)
        operator = torch.ops.conr_kernels.backward
        return ops.gradient(inputs, backend, coef_i, coef_j, layout, operator), None, None


class _Gather(torch.autograd.Function):
    """All ranks' rows. Backward: the sum of all ranks' gradients, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, union: Union) -> Tensor:
        ctx.union = union
        return union.gather(x, union.sizes)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _SumOwn.apply(g, ctx.union) * ctx.union.n_ranks, None


class _SumOwn(torch.autograd.Function):
    """The sum over ranks of this rank's rows: the transpose of gathering."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, union: Union) -> Tensor:
        ctx.union = union
        total = g.contiguous().clone()
        dist.all_reduce(total, group=union.group)
        return total[union.offset : union.offset + union.sizes[union.rank]]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(g, ctx.union), None


class _Total(torch.autograd.Function):
    """The sum over ranks, added in the ranks' order: the same bits everywhere."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, union: Union) -> Tensor:
        return union.gather(own[None], [1] * union.n_ranks).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
