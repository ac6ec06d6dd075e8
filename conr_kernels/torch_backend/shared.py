"""Row losses and gradient of one process's rows where several processes share the union of their
rows as keys: each sums over its share of all pairs, with ``s_ij = s_ji``.
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
    """One share of all sweeps, and the layout of the whole sweeps (``pack_sweeps``). The first
    ``n_anchors`` keys are the anchors; ``share``: (k, n) for the k-th of n.
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
    """Row losses and statistics of this process's rows.

    Args:
        own: this process's rows among the anchors.
        poison: 0, or NaN if any input of the union is not finite.
        deal: exchanges this process's sums of all anchors [S, n_anchors] for all processes' sums of
            its own rows [n, S, n_own].
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
    """Gradient of this process's rows of a union of unit features; ``inverse``: of their norms
    [n_own, 1].
    """
    anchors, others = union.part(own), union.rest(own)
    sweeps = None
    if len(layout) > 0:
        sweeps = unpack_sweeps(layout, own.start, len(anchors), is_exact=union.y.shape[1] == 1)
    how = How.of(settings, union.y)
    G = gradient_sums(anchors, others, how, sweeps)
    return project(G, anchors, inverse, how)


def pack_sweeps(sweeps: list[Sweep]) -> Tensor:
    """Orders and bands as int32 of two sweeps of rows among themselves; empty for other sweeps."""
    if [sweep.serves for sweep in sweeps] != ["positives", "negatives"]:
        return torch.empty(0, dtype=torch.int32, device=sweeps[0].lo.device)
    parts = [t for sweep in sweeps for t in (sweep.key_order, sweep.lo, sweep.hi)]
    return torch.cat([t.to(torch.int32) for t in parts])


def unpack_sweeps(packed: Tensor, offset: int, n: int, is_exact: bool) -> list[Sweep]:
    """The sweeps of the n rows from ``offset`` on, among themselves and against the other rows,
    which are numbered without a gap.

    A row's place in the order of some of the rows is the number of these before it: nothing is
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
