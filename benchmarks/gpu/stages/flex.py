"""FlexAttention as a comparator: log-sum-exp over positives and over negatives, by ``score_mod``.

Both masks are N×N predicates of labels in the caller's order, so that a block mask would hold
every block; pairs outside a mask get a score that no sum notices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ...batches import Batch
from ...providers import PUSH_SCALE, TEMPERATURE, WINDOW
from .. import device

#: A score whose exponential is 0 in float32 beside any other.
OUTSIDE = -1e4
VALUE_WIDTH = 16


def _log_sum_exp(q: Tensor, score_mod: Callable[..., Tensor]) -> Tensor:
    rows = q[None, None]
    v = q.new_zeros(1, 1, len(q), VALUE_WIDTH)
    options = dict(score_mod=score_mod, scale=1 / TEMPERATURE)
    if hasattr(flex, "AuxRequest"):
        aux = flex.flex_attention(rows, rows, v, return_aux=flex.AuxRequest(lse=True), **options)[1]
        return aux.lse[0, 0]
    return flex.flex_attention(rows, rows, v, return_lse=True, **options)[1][0, 0]


def _log_sums(q: Tensor, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    def of_positives(score, b, h, i, j):
        is_in = ((y[i] - y[j]).abs() <= WINDOW) & (i != j)
        return torch.where(is_in, score, OUTSIDE)

    def of_negatives(score, b, h, i, j):
        d_ij = (y[i] - y[j]).abs()
        is_in = (d_ij > WINDOW) & ((p[i] - p[j]).abs() <= WINDOW)
        return torch.where(is_in, score + torch.where(is_in, d_ij, 1.0).log(), OUTSIDE)

    return _log_sum_exp(q, of_positives), _log_sum_exp(q, of_negatives)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiled, as it is meant to be used; a rehearsal runs its slow equivalent, forward only."""
    if device.REHEARSAL:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
        return _log_sums
    return torch.compile(_log_sums, dynamic=False)


def flex_losses(batch: Batch, reduction: str) -> Tensor:
    x = batch.x.detach() if device.REHEARSAL else batch.x
    q = F.normalize(x.float(), dim=1).to(x.dtype)
    log_E, log_B = _compiled()(q, batch.y, batch.p)
    is_anchor = (log_E > OUTSIDE / 2) & (log_B > OUTSIDE / 2)
    ordered = batch.y.sort().values
    n = torch.searchsorted(ordered, batch.y + WINDOW, right=True)
    n = (n - torch.searchsorted(ordered, batch.y - WINDOW) - 1).clamp(min=1)
    rows = n.log() + F.softplus((PUSH_SCALE * batch.w).log() + log_B - log_E)
    rows = torch.where(is_anchor, rows, 0.0)
    return rows if reduction == "none" else rows.mean()
