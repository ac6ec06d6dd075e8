"""ConR in Triton: one visit of each pair forward, one backward, no N×N value stored, no host
synchronisation.

Few rows (``launch_dense.serves``): every pair, no sort. More: two sweeps over the exact bands of
the sorted labels and predictions, or, chosen on the device where that is less, the negatives
outside the label bands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..variants import Settings
from . import launch_dense as few
from . import launch_sweeps as many
from . import run_sweeps
from .availability import unavailable
from .call import Keys
from .launch import on_device, place_of

__all__ = [
    "backward", "forward", "layout_size", "reduced", "reduced_gradient", "reduces",
    "takes_any_labels", "unavailable",
]  # fmt: skip


def layout_size(n_anchors: int, n_keys: int, dtype: torch.dtype, settings: Settings) -> int:
    """What ``few.kept_size`` or ``many.layout_size`` says; between them D decides which it is."""
    of_sweeps = many.layout_size(n_anchors, n_keys)
    if n_anchors * n_keys > few.DENSE_PAIRS:
        return of_sweeps
    of_dense = few.kept_size(n_anchors, n_keys) * (2 if dtype == torch.float64 else 1)
    return of_dense if n_anchors * n_keys <= few.KEPT_PAIRS else max(of_dense, of_sweeps)


def forward(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
    n_absent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py), and what ``layout_size`` says for the backward
    pass.
    """
    N, K = x.shape[0], (x if keys is None else keys[0]).shape[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = x.new_empty(N, dtype=dtype)
    stats = x.new_empty((N, 3 if settings.exponent_is_small else 5), dtype=dtype)
    layout = x.new_empty(layout_size(N, K, dtype, settings), dtype=torch.int32)
    if N > 0:
        rows = (y, p, w, keys, self_offset, settings, n_absent, loss, stats, layout)
        on_device(_forward, x, *rows)
    return loss, stats, layout


def _forward(
    x: Tensor, y: Tensor, p: Tensor, w: Tensor | None, keys: Keys | None, self_offset: int,
    settings: Settings, n_absent: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor,
) -> None:  # fmt: skip
    w = None if w is None else w.contiguous()
    (N, D), K = x.shape, (x if keys is None else keys[0]).shape[0]
    x, y, p, keys = _contiguous(x, y, p, keys)
    rows, results = (x, y, p, w, keys, n_absent), (loss, stats, layout)
    if few.serves(N, K, D, x.dtype):
        plan = few.plan_of(x, y, keys, self_offset, settings, "none")
        few.forward_dense(plan, place_of(x), *rows, *results)
    else:
        plan = many.plan_of(x, y, keys, self_offset, settings, "none")
        run_sweeps.forward(plan, place_of(x), *rows, *results)


def backward(
    coef_i: Tensor,
    coef_j: Tensor | None,
    layout: Tensor,
    x: Tensor,
    y: Tensor,
    p: Tensor,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
) -> Tensor:
    """Gradient of the features [N, D] from the scaled statistics of anchors and keys."""
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.shape[0] > 0:
        coef_i = coef_i.contiguous()
        coef_j = coef_i if coef_j is None else coef_j.contiguous()
        on_device(_backward, x, y, p, keys, self_offset, settings, coef_i, coef_j, layout, gradient)
    return gradient


def _backward(
    x: Tensor, y: Tensor, p: Tensor, keys: Keys | None, self_offset: int, settings: Settings,
    coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    (N, D), K = x.shape, (x if keys is None else keys[0]).shape[0]
    x, y, p, keys = _contiguous(x, y, p, keys)
    rows = (x, y, p, keys, coef_i, coef_j, layout, gradient)
    if few.serves(N, K, D, x.dtype):
        plan = few.plan_of(x, y, keys, self_offset, settings, "none")
        few.backward_dense(plan, place_of(x), *rows)
    else:
        plan = many.plan_of(x, y, keys, self_offset, settings, "none")
        run_sweeps.backward(plan, place_of(x), *rows)


def _contiguous(
    x: Tensor, y: Tensor, p: Tensor, keys: Keys | None
) -> tuple[Tensor, Tensor, Tensor, Keys | None]:
    if keys is not None:
        key_x, key_y, key_p = keys
        keys = key_x.contiguous(), key_y.contiguous(), key_p.contiguous()
    return x.contiguous(), y.contiguous(), p.contiguous(), keys


def reduces(
    x: Tensor, y: Tensor, further: Keys | None, settings: Settings, wants_gradient: bool
) -> bool:
    """Whether ``reduced`` serves these rows."""
    return further is None and x.shape[0] > 0


def takes_any_labels(x: Tensor) -> bool:
    """Whether ``reduced`` takes labels of any real dtype, [N] or [N, L]: its kernels convert."""
    N, D = x.shape
    return few.serves(N, N, D, x.dtype)


def reduced(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    further: None,
    settings: Settings,
    reduction: str,
    wants_gradient: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    """The mean or sum of the row losses, and tensors and a plan for ``reduced_gradient``."""
    return on_device(_reduced, x, y, p, w, settings, reduction, wants_gradient)


def _reduced(
    x: Tensor, y: Tensor, p: Tensor, w: Tensor | None, settings: Settings, reduction: str,
    wants_gradient: bool,
) -> tuple[Tensor, tuple[Tensor, ...], few.Plan | many.Plan]:  # fmt: skip
    N, D = x.shape
    x, y, p = x.contiguous(), y.contiguous(), p.contiguous()
    if few.serves(N, N, D, x.dtype):
        plan = few.plan_of(x, y, None, 0, settings, reduction)
        loss, workspace = few.reduced_dense(plan, place_of(x), x, y, p, w, wants_gradient)
        return loss, (workspace,), plan
    plan = many.plan_of(x, y, None, 0, settings, reduction)
    w = None if w is None else w.contiguous()
    return *run_sweeps.reduced(plan, place_of(x), x, y, p, w), plan


def reduced_gradient(x: Tensor, saved: tuple[Tensor, ...], plan: Any, upstream: Tensor) -> Tensor:
    """The gradient of the features for an upstream gradient of the reduced loss."""
    module = few if isinstance(plan, few.Plan) else run_sweeps
    return on_device(module.reduced_gradient, x, *saved, plan, upstream)
