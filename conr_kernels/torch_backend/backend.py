"""ConR as tiles of PyTorch operations: any device and dtype, O(N·D) memory, deterministic.

Two sweeps over exact bands (rows sorted by label for the positives, by prediction for the
negatives); one sweep over all pairs that serves both masks where the bands would cover most of
them; and for small batches one tile, kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.inputs import Inputs, Keys
from ..core.rows import RowSums, finish_rows, to_log_statistics
from ..variants import Settings
from . import small
from .pairs import LN_2, How, Sums, wide_dtype
from .source import Source, row_norms
from .sweeps import gradient_sums, row_sums

#: Rows of the gradient that are finished at a time.
PROJECTED_ROWS = 1024


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, and what to do; None where it can."""
    return None


def layout_size(inputs: Inputs) -> int:
    """int32 words kept for backward: the weighted pairs of both masks, for small batches only."""
    N = inputs.x.shape[0]
    if inputs.n_keys != N or N > small.KEPT_ROWS:
        return 0
    return 2 * N * N * inputs.dtype.itemsize // 4


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py) and the layout (see ``layout_size``)."""
    anchors, others, how = _prepare(inputs)
    layout = anchors.norm.new_empty(0)
    if _is_small(anchors, others, how):
        sums, kept, _ = small.row_sums(anchors.as_given(), others, how)
        if others is None:
            layout = torch.stack(kept)
    else:
        sums = row_sums(anchors, others, how)
    n_keys: Tensor | int = inputs.n_keys
    if inputs.n_absent is not None:
        n_keys = n_keys - inputs.n_absent
    loss, stats = finish(sums, anchors.poison(others), n_keys, inputs.w, how)
    # A copy of one row too: operators hand out no two views of one memory.
    stats = stats.mT.clone(memory_format=torch.contiguous_format)
    if stats.shape[1] < inputs.settings.n_statistics:
        stats = to_log_statistics(stats)
    return loss, stats, layout.view(-1).view(torch.int32)


def backward(inputs: Inputs, coef_i: Tensor, coef_j: Tensor | None, layout: Tensor) -> Tensor:
    """Gradient of the features [N, D] from the scaled statistics of anchors and keys."""
    anchors, others, how = _prepare(inputs, None, coef_i, coef_j)
    if _is_small(anchors, others, how):
        rows, kept = anchors.as_given(), None
        if others is None:
            kept = layout.view(rows.q.dtype).view(2, len(rows.q), len(rows.q)).unbind()
        G = small.gradient_sums(rows, others, how, kept)
        project_rows(G, rows.q, anchors.inverse, how)
    else:
        G = gradient_sums(anchors, others, how)
        project(G, anchors, anchors.inverse, how)
    return G.to(inputs.x.dtype)


def reduces(
    x: Tensor, y: Tensor, further: Keys | None, settings: Settings, wants_gradient: bool
) -> bool:
    """Whether ``reduced`` serves these rows and further keys."""
    if not wants_gradient or len(y) == 0:
        return False
    labels = (y,) if further is None else (y, further[1])
    n_others = 0 if further is None else len(further[0])
    return small.is_small(len(y), n_others, How.of(settings, *labels))


def reduced(
    inputs: Inputs, further: Keys | None, reduction: str, wants_gradient: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], None]:
    """The mean or sum of the row losses of a small batch; its gradient times ``τ ‖x_i‖``, and
    ``1/(τ ‖x_i‖)``: their product may be beyond the dtype until it meets the upstream gradient.

    Where every row has the same upstream gradient no pair need be kept: a third less host time. The
    bits are those of ``forward`` and ``backward``.
    """
    anchors, others, how = _prepare(inputs, further)
    rows, n_keys = anchors.as_given(), len(anchors) + (0 if others is None else len(others))
    sums, pairs, products = small.row_sums(rows, others, how, wants_products=True)
    loss, stats = finish(sums, anchors.poison(others), n_keys, inputs.w, how)
    if reduction == "mean":
        stats[:3].mul_(1 / len(anchors))
    rows = rows.with_coefficients(stats.mT)
    G = small.gradient_sums(rows, None, how, pairs)
    small.add_products(G, products, rows)
    loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss, (tangential(G, rows.q), anchors.inverse / how.settings.temperature), None


def reduced_gradient(
    x: Tensor, saved: tuple[Tensor, Tensor], plan: None, upstream: Tensor
) -> Tensor:
    """The gradient that ``reduced`` found, times the upstream gradient."""
    G, scale = saved
    return (G * (scale * upstream)).to(x.dtype)


def _prepare(
    inputs: Inputs,
    further: Keys | None = None,
    coef_i: Tensor | None = None,
    coef_j: Tensor | None = None,
) -> tuple[Source, Source | None, How]:
    """The anchors; the keys that are no anchors, or None; and how their pairs are summed.

    Args:
        further: keys beside the rows, for inputs without keys. coef_i, coef_j: as in ``backward``.
    """
    x, y, p, _, keys, self_offset, settings, _ = inputs
    labels = [y] if keys is None else [keys[1]]
    labels += [] if further is None else [further[1]]
    how = How.of(settings, *labels)
    if coef_i is not None and not settings.exponent_is_small and not how.is_shifted:
        # The other columns are logarithms of 1.
        coef_i, coef_j = coef_i[:, :3], None if coef_j is None else coef_j[:, :3]
    x = x.contiguous()  # results keep a transposed layout, and products its rounding
    anchors, others = Source(x, row_norms(x), y, p, coef_i), None
    if further is not None and len(further[0]) > 0:
        others = Source(further[0], row_norms(further[0]), *further[1:])
    elif keys is not None:
        own = slice(self_offset, self_offset + len(x))
        others = Source(keys[0], None, *keys[1:], coef_j).rest(own)
        others = None if others is None else replace(others, norm=row_norms(others.x))
    return anchors, others, how


def _is_small(anchors: Source, others: Source | None, how: How) -> bool:
    if others is None:
        return small.is_small(len(anchors), 0, how)
    return others.index is None and small.is_small(len(anchors), len(others), how)


def finish(
    sums: Sums, poison: Tensor, n_keys: Tensor | int, w: Tensor | None, how: How
) -> tuple[Tensor, Tensor]:
    """Row losses [N] and the columns of the statistics [3 or 5, N]."""
    of_rows = {**sums, "poison": poison}
    if w is not None:
        of_rows |= {"w": w, "poison": torch.add(poison, w, alpha=0)}
    # One conversion for all: on a small batch each costs as much as a sum over its pairs.
    wide_rows = torch.stack(list(of_rows.values())).to(wide_dtype(poison.device)).unbind()
    of_rows = dict(zip(of_rows, wide_rows, strict=True))
    of_rows.setdefault("m", of_rows["B"])  # positive where there are negatives
    if how.is_inside and not how.is_shifted:
        of_rows["s_sum"] *= LN_2
    finished = finish_rows(RowSums(**of_rows), n_keys, how.settings, how.is_shifted)
    finished = finished.to(poison.dtype)
    return finished[0], finished[1:]


def project(G: Tensor, anchors: Source, inverse: Tensor, how: How) -> Tensor:
    """``∂L/∂x_i`` from ``G_i = τ ∂L/∂q_i``, a block of rows at a time; in place."""
    for start in range(0, len(G), PROJECTED_ROWS):
        rows = slice(start, start + PROJECTED_ROWS)
        q = anchors.x[rows] if anchors.norm is None else anchors.x[rows] * inverse[rows]
        project_rows(G[rows], q, inverse[rows], how)
    return G


def project_rows(G: Tensor, q: Tensor, inverse: Tensor, how: How) -> Tensor:
    """``∂L/∂x_i = (∂L/∂q_i − q_i (q_i·∂L/∂q_i)) / ‖x_i‖`` with ``∂L/∂q_i = G_i/τ``; in place."""
    return tangential(G, q).mul_(inverse / how.settings.temperature)


def tangential(G: Tensor, q: Tensor) -> Tensor:
    """``G_i − q_i (q_i·G_i)``; in place."""
    radial = (q * G).sum(dim=1, keepdim=True)
    return G.addcmul_(q, radial, value=-1)
