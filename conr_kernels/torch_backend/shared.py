"""Row losses and gradient of one process's rows where several have the same keys, the union of
their rows: each sums over its share of the pairs of all anchors, and uses ``s_ij = s_ji`` in all of
it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.sweep import Sweep
from ..variants import Settings
from .backend import finish, project
from .pairs import How, Sums
from .source import Source
from .sweeps import all_sweeps, gradient_sums, row_sums
from .tiles import share_of


def union_sweeps(
    y: Tensor, p: Tensor, n_anchors: int, settings: Settings, share: tuple[int, int]
) -> tuple[list[Sweep], Tensor]:
    """For keys of which the first ``n_anchors`` are the anchors: the k-th of n shares of all
    sweeps, and the layout of the whole.
    """
    others = (y[n_anchors:], p[n_anchors:]) if n_anchors < len(y) else None
    sweeps = all_sweeps((y[:n_anchors], p[:n_anchors]), others, settings)
    return [share_of(sweep, *share) for sweep in sweeps], pack_sweeps(sweeps)


def forward(
    shares: list[Sweep],
    union: Source,
    n_anchors: int,
    poison: Tensor,
    own: slice,
    w: Tensor | None,
    n_absent: Tensor | None,
    settings: Settings,
    deal: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Row losses and statistics of the own rows.

    Args:
        poison: 0, or NaN if any input of the union is not finite.
        deal: exchanges these sums [S, n_anchors] of the own rows for all processes' sums of them
            [n, S, n_own].
    """
    how = How.of(settings, union.y)
    anchors, others = union.part(slice(0, n_anchors)), union.rest(slice(0, n_anchors))
    sums = row_sums(anchors, others, how, shares)
    dealt = deal(torch.stack(list(sums.values()))).unbind(1)
    own_sums = Sums(own.stop - own.start, how)
    for name, parts in zip(sums, dealt, strict=True):
        own_sums[name] = parts.logsumexp(0) if how.is_log(name) else parts.sum(0)
    n_keys = len(union) if n_absent is None else len(union) - n_absent
    poison = poison.to(union.dtype).expand(own.stop - own.start)
    loss, stats = finish(own_sums, poison, n_keys, w, how)
    return loss, stats.mT.contiguous()


def backward(
    union: Source, layout: Tensor, inverse: Tensor, own: slice, settings: Settings
) -> Tensor:
    """Gradient of the own anchors of a union of unit features, of inverse norms [N, 1]."""
    anchors, others = union.part(own), union.rest(own)
    sweeps = None
    if len(layout) > 0:
        sweeps = unpack_sweeps(layout, own.start, len(anchors), is_exact=union.y.shape[1] == 1)
    how = How.of(settings, union.y)
    G = gradient_sums(anchors, others, how, sweeps)
    return project(G, anchors, inverse, how)


def pack_sweeps(sweeps: list[Sweep]) -> Tensor:
    """Orders and bands as int32, two sweeps of rows among themselves; nothing of other sweeps."""
    if [sweep.serves for sweep in sweeps] != ["positives", "negatives"]:
        return torch.empty(0, dtype=torch.int32, device=sweeps[0].lo.device)
    parts = [t for sweep in sweeps for t in (sweep.key_order, sweep.lo, sweep.hi)]
    return torch.cat([t.to(torch.int32) for t in parts])


def unpack_sweeps(packed: Tensor, offset: int, n: int, is_exact: bool) -> list[Sweep]:
    """The sweeps of n of the rows, the offset-th and following, among themselves and against the
    other rows, whose numbers close the gap.

    Their places in an order of some rows are the numbers of these rows before them: nothing is
    sorted or searched.
    """
    sweeps = []
    for serves, of_sweep in zip(("positives", "negatives"), packed.long().chunk(2), strict=True):
        order, lo, hi = of_sweep.chunk(3)
        n_others = len(order) - n
        is_own = (order >= offset) & (order < offset + n)
        before = torch.cat([is_own.new_zeros(1, dtype=torch.int64), is_own.cumsum(0)])
        at = is_own.nonzero()[:, 0]
        lo, hi, own_order = (t.index_select(0, at) for t in (lo, hi, order))
        other_order = order.index_select(0, is_own.logical_not_().nonzero()[:, 0])
        own_order = own_order - offset
        other_order = other_order - n * (other_order >= offset)
        own_lo, own_hi = before.index_select(0, lo), before.index_select(0, hi)
        common = (serves, own_order)
        sweeps.append(Sweep(*common, own_order, own_lo, own_hi, is_exact, True, n, n))
        if n_others > 0:
            bands = (lo - own_lo, hi - own_hi)
            sweeps.append(Sweep(*common, other_order, *bands, is_exact, False, n, n_others))
    return sweeps
