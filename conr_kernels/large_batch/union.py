"""The loss of the union of all ranks' rows, by ``torch.distributed``: each rank's rows against
everybody's.

A rank sends its features and labels forward and 3 (at most 5) floats per row backward, from which
every rank computes the complete gradient of its own rows: no N×D gradient is ever reduced. On CPUs
the ranks share the forward pass (shared.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import notices, ops
from ..batch import Batch, reference_losses, without_absent
from ..core.rows import no_statistics, scale_statistics
from ..core.sets import ConRStatistics, checked_rows, count
from ..variants import Settings
from .agreement import agree, backend_kind
from .ranks import Union
from .shared import SharedRowLosses

#: From this many rows of the union on, sharing the forward pass saves more than exchanges cost.
SHARED_ROWS = 2048


def union_loss(group: Any, prepared: Batch | Exception) -> Tensor:
    """The loss of the union of the batches that the ranks of the group have prepared; ``prepared``:
    this rank's, or the error that it raised instead.

    Raises:
        RuntimeError, ValueError: as ``agree``.
    """
    batch, union = agree(group, prepared)
    n_present: Tensor | int = union.n_rows
    if union.has_mask:
        if batch.mask is None:
            batch = batch._replace(mask=torch.ones_like(batch.y[:, 0], dtype=torch.bool))
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


def union_statistics(group: Any, arguments: tuple[Any, ...]) -> ConRStatistics:
    """The statistics of this rank's rows among those of all ranks of the group.

    ``arguments``: those of ``checked_rows``.
    """
    prepared: Batch | Exception
    try:
        rows = checked_rows(*arguments)
        settings = Settings(rows.window, 1.0, 0.0, rows.variant, rows.distance)
        no_features, keys = rows.y[:, :0], rows.keys
        keys = None if keys is None else (keys[0][:, :0], *keys)
        prepared = Batch(no_features, *rows[:3], keys, settings, "statistics", "torch")
    except Exception as error:
        prepared = error
    batch, union = agree(group, prepared)
    y_j, p_j = union.gather_columns((batch.y, batch.p), tuple(union.own_keys(batch)[1:]))
    return count(rows, y_j, p_j, lambda own: union.of_ranks(own).sum(0))


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
    """Whether the ranks share the forward pass (shared.py)."""
    is_served = backend_kind(batch) == "torch on the CPU"
    return is_served and union.n_ranks > 1 and union.n_rows >= SHARED_ROWS


class _RowLosses(torch.autograd.Function):
    """``ℓ_i`` of this rank's rows. Backward gathers all ranks' statistics, times their upstream
    gradients.
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
    """All ranks' rows. Backward: the sum of all ranks' gradients times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, union: Union) -> Tensor:
        ctx.union = union
        return union.gather(x, union.sizes)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _SumOwn.apply(g, ctx.union) * ctx.union.n_ranks, None


class _SumOwn(torch.autograd.Function):
    """The sum over all ranks, of this rank's rows: the transpose of ``_Gather``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, union: Union) -> Tensor:
        ctx.union = union
        total = g.contiguous().clone()
        dist.all_reduce(total, group=union.group)
        return total[union.own]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(g, ctx.union), None


class _Total(torch.autograd.Function):
    """The sum over all ranks, added in their order: the same bits on each."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, union: Union) -> Tensor:
        return union.of_ranks(own).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
