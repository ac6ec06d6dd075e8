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

from ..core.inputs import Inputs, Keys
from ..variants import Settings
from . import launch_dense as few
from . import launch_sweeps as many
from .availability import unavailable
from .call import layout_size as sweeps_layout_size
from .launch import on_device, place_of

__all__ = [
    "backward", "forward", "layout_size", "reduced", "reduced_gradient", "reduces",
    "takes_any_labels", "unavailable",
]  # fmt: skip


def layout_size(inputs: Inputs) -> int:
    """How many numbers the kernels for these rows write for the backward pass."""
    N, K, keys, variant = inputs.x.shape[0], inputs.n_keys, inputs.keys, inputs.settings.variant
    if N == 0:
        return 0
    if _are_few(inputs):
        return few.kept_size(N, K) * (2 if inputs.dtype == torch.float64 else 1)
    return sweeps_layout_size(N, K, keys is not None, variant.negatives == "confused")


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py), and what the backward pass reads (``layout``)."""
    N, x, dtype = inputs.x.shape[0], inputs.x, inputs.dtype
    loss = x.new_empty(N, dtype=dtype)
    stats = x.new_empty((N, inputs.settings.n_statistics), dtype=dtype)
    layout = x.new_empty(layout_size(inputs), dtype=torch.int32)
    if N > 0:
        on_device(_forward, x, inputs, (loss, stats, layout))
    return loss, stats, layout


def _forward(x: Tensor, inputs: Inputs, results: tuple[Tensor, ...]) -> None:
    x, y, p, w, keys, self_offset, settings, n_absent = _as_read(inputs)
    path = few if _are_few(inputs) else many
    plan = path.plan_of(x, y, keys, self_offset, settings, "none")
    path.forward(plan, place_of(x), x, y, p, w, keys, n_absent, *results)


def _as_read(inputs: Inputs) -> Inputs:
    """The rows as kernels read them. On a GPU labels and predictions are both float32, or of any
    dtype where kernels convert them; the interpreter compares in float64 where both are.
    """
    if inputs.x.is_cpu and inputs.y.dtype != inputs.p.dtype:
        raise RuntimeError(
            "Triton's interpreter takes targets and predictions that are both float64 or neither: "
            'convert one of them, or use backend="torch"'
        )
    return inputs.contiguous()


def backward(inputs: Inputs, coef_i: Tensor, coef_j: Tensor | None, layout: Tensor) -> Tensor:
    """Gradient of the features [N, D] from the scaled statistics of anchors and keys."""
    gradient = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    if inputs.x.shape[0] > 0:
        coef_i = coef_i.contiguous()
        coef_j = coef_i if coef_j is None else coef_j.contiguous()
        on_device(_backward, inputs.x, inputs, (coef_i, coef_j, layout, gradient))
    return gradient


def _backward(x: Tensor, inputs: Inputs, given: tuple[Tensor, ...]) -> None:
    x, y, p, _, keys, self_offset, settings, _ = inputs.contiguous()
    path = few if _are_few(inputs) else many
    plan = path.plan_of(x, y, keys, self_offset, settings, "none")
    path.backward(plan, place_of(x), x, y, p, keys, *given)


def _are_few(inputs: Inputs) -> bool:
    N, D = inputs.x.shape
    return few.serves(N, inputs.n_keys, D, inputs.x.dtype)


def reduces(
    x: Tensor, y: Tensor, further: Keys | None, settings: Settings, wants_gradient: bool
) -> bool:
    """Whether ``reduced`` serves these rows."""
    return further is None and x.shape[0] > 0


def takes_any_labels(x: Tensor) -> bool:
    """Whether ``reduced`` takes labels of any real dtype, [N] or [N, L]: its kernels convert, but
    not the interpreter.
    """
    return not x.is_cpu and few.serves(x.shape[0], *x.shape, x.dtype)


def reduced(
    inputs: Inputs, further: None, reduction: str, wants_gradient: bool
) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    """The mean or sum of the row losses, and tensors and a plan for ``reduced_gradient``."""
    return on_device(_reduced, inputs.x, inputs, reduction, wants_gradient)


def _reduced(
    x: Tensor, inputs: Inputs, reduction: str, wants_gradient: bool
) -> tuple[Tensor, tuple[Tensor, ...], few.Plan | many.Plan]:
    x, y, p, w, _, _, settings, _ = _as_read(inputs)
    path = few if few.serves(x.shape[0], *x.shape, x.dtype) else many
    plan = path.plan_of(x, y, None, 0, settings, reduction)
    return *path.reduced(plan, place_of(x), x, y, p, w, wants_gradient), plan


def reduced_gradient(x: Tensor, saved: tuple[Tensor, ...], plan: Any, upstream: Tensor) -> Tensor:
    """The gradient of the features for an upstream gradient of the reduced loss."""
    path = few if isinstance(plan, few.Plan) else many
    return on_device(path.reduced_gradient, x, *saved, plan, upstream)
