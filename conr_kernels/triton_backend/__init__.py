"""ConR in Triton: one visit of each pair forward, one backward, no N×N value stored, no host
synchronisation.

Up to ``DENSE_PAIRS`` pairs: every pair, no sort. Above: two sweeps over the exact bands of the
sorted labels and predictions, or, chosen on the device where that is less, the negatives outside
the label bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..variants import Settings
from . import call as calls
from .availability import unavailable
from .call import ROW_PAD, Call, Keys, padded
from .launch_dense import backward_dense, forward_dense, row_of_s
from .launch_sweeps import backward_sweeps, forward_sweeps

__all__ = ["backward", "forward", "layout_size", "unavailable"]


def layout_size(n_anchors: int, n_keys: int, dtype: torch.dtype, settings: Settings) -> int:
    """Few pairs: s_ij and the inverse norms. Else a head (the choice of sweep), both orders of keys
    and anchors, the anchors' places, the bands.
    """
    if n_anchors * n_keys <= calls.DENSE_PAIRS:
        numbers = n_anchors * row_of_s(n_keys) + n_anchors + n_keys
        return numbers * (2 if dtype == torch.float64 else 1)
    return ROW_PAD + 2 * padded(n_keys) + 7 * padded(n_anchors)


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
    call = Call(x, y, p, keys, self_offset, settings)
    loss = x.new_empty(call.N, dtype=call.dtype)
    stats = x.new_empty((call.N, 3 if settings.exponent_is_small else 5), dtype=call.dtype)
    layout = x.new_empty(layout_size(call.N, call.K, call.dtype, settings), dtype=torch.int32)
    if call.N > 0:
        w = None if w is None else w.contiguous()
        with call.device_guard():
            if call.is_dense:
                forward_dense(call, w, loss, stats, layout)
            else:
                forward_sweeps(call, w, loss, stats, layout)
    return loss, stats, layout


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
    call = Call(x, y, p, keys, self_offset, settings)
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    if call.N > 0:
        coef_i = coef_i.contiguous()
        coef_j = coef_i if coef_j is None else coef_j.contiguous()
        with call.device_guard():
            if call.is_dense:
                backward_dense(call, coef_i, coef_j, layout, gradient)
            else:
                backward_sweeps(call, coef_i, coef_j, layout, gradient)
    return gradient
