"""The sweeps of the torch backend: orders, sums over the pairs of each anchor, and the gradient.

Rows sorted by label for the positives and by prediction for the negatives, or one sweep over all
pairs that serves both masks, where the bands would cover most of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..core.sweep import Sweep, banded_sweep, dense_sweep
from ..reference import pair_distance
from ..variants import Settings
from .pairs import (
    LN_2,
    Totals,
    drop_self,
    negative_weight,
    push,
    similarities,
    times_coefficients,
    weigh,
    window_mask,
)
from .source import Labels, Source
from .tiles import Rows, Tile, make_tiles

#: Where the bands hold more than this share of all pairs, one sweep over all pairs is faster.
DENSE_SHARE = 0.7


def find_sweeps(
    y: Tensor, p: Tensor, y_j: Tensor | None, p_j: Tensor | None, settings: Settings
) -> list[Sweep]:
    """Two banded sweeps, or one over all pairs. Bands are read on the host: on the CPU only."""
    N, K = len(y), len(y) if y_j is None else len(y_j)
    if y.device.type == "cpu" and settings.variant.negatives != "all":
        h, distance = settings.window, settings.distance
        sweeps = [
            banded_sweep("positives", y, y_j, h, distance),
            banded_sweep("negatives", p, p_j, h, distance),
        ]
        banded_pairs = sum(int((sweep.hi - sweep.lo).sum()) for sweep in sweeps)
        if banded_pairs <= DENSE_SHARE * N * K:
            return sweeps
    return [dense_sweep(N, None if y_j is None else K, y.device)]


def all_sweeps(labels: Labels, labels_j: Labels | None, settings: Settings) -> list[Sweep]:
    """First the anchors among themselves, where ``s_ij = s_ji`` saves half of the pairs, then
    against the other keys, if there are any. From labels and predictions of either.
    """
    own = find_sweeps(*labels, None, None, settings)
    return own if labels_j is None else own + find_sweeps(*labels, *labels_j, settings)


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
    own, cross = [], []
    for serves, of_sweep in zip(("positives", "negatives"), packed.long().chunk(2), strict=True):
        order, lo, hi = of_sweep.chunk(3)
        is_own = (order >= offset) & (order < offset + n)
        before = torch.cat([is_own.new_zeros(1, dtype=torch.int64), is_own.cumsum(0)])
        at = is_own.nonzero()[:, 0]
        lo, hi, own_order = (t.index_select(0, at) for t in (lo, hi, order))
        other_order = order.index_select(0, is_own.logical_not_().nonzero()[:, 0])
        own_order = own_order - offset
        other_order = other_order - n * (other_order >= offset)
        own_lo, own_hi = before.index_select(0, lo), before.index_select(0, hi)
        common = (serves, own_order)
        own.append(Sweep(*common, own_order, own_lo, own_hi, is_exact, True, n, n))
        bands = (lo - own_lo, hi - own_hi)
        cross.append(Sweep(*common, other_order, *bands, is_exact, False, n, len(order) - n))
    return own + cross if len(packed) > 6 * n else own


class SortedRows:
    """Anchors and other keys in the orders of sweeps, each order in the memory of the one before:
    rows are valid until the next are asked for.

    Memory fresh from the system costs more than the arithmetic on it.

    Attributes:
        q_i: the memory of the anchors' unit features, to be exchanged for other memory of that size
            when the rows in it are no longer needed.
    """

    def __init__(self, anchors: Source, others: Source | None, sweeps: list[Sweep]) -> None:
        self.anchors, self.others = anchors, others
        self.key_orders = [sweep.key_order for sweep in sweeps if not sweep.is_symmetric]
        self.q_i = self._memory(anchors, [sweep.anchor_order for sweep in sweeps])
        self.q_j: Tensor | None = None

    @staticmethod
    def _memory(source: Source, orders: list[Tensor | None]) -> Tensor | None:
        """For the longest of the orders; None where the source's own rows serve as they are."""
        of_all = 0 if source.is_ready else len(source)
        n_rows = max((of_all if order is None else len(order) for order in orders), default=0)
        return source.x.new_empty(n_rows, source.x.shape[1], dtype=source.dtype) if n_rows else None

    def of_anchors(self, sweep: Sweep) -> Rows:
        return self.anchors.take(sweep.anchor_order, self.q_i)

    def of_keys(self, sweep: Sweep, rows_i: Rows) -> Rows:
        if sweep.is_symmetric:
            return rows_i
        if self.q_j is None:
            self.q_j = self._memory(self.others, self.key_orders)
        return self.others.take(sweep.key_order, self.q_j)


def _of_one_order(sweeps: list[Sweep]) -> Iterator[list[Sweep]]:
    """The sweeps in groups that have the anchors in one order."""
    while sweeps:
        same = [sweep for sweep in sweeps if _have_one_order(sweep, sweeps[0])]
        yield same
        sweeps = [sweep for sweep in sweeps if not any(sweep is t for t in same)]


def _have_one_order(a: Sweep, b: Sweep) -> bool:
    order_a, order_b = a.anchor_order, b.anchor_order
    if a.serves != b.serves or order_a is None or order_b is None or order_a is order_b:
        return a.serves == b.serves and order_a is order_b
    return torch.equal(order_a, order_b)


def row_sums(
    anchors: Source,
    others: Source | None,
    sweeps: list[Sweep],
    settings: Settings,
    is_shifted: bool,
    counts_negatives: bool = True,
) -> dict[str, Tensor]:
    """``E`` = Σ_P exp s, ``B`` = Σ_M φ exp s (their logarithms if shifted), ``s_sum``, ``n``,
    ``m``: of all anchors, over the pairs of the sweeps.

    Without ``counts_negatives`` m is 1 for any number of negatives, as a positive B shows them:
    see ``negatives_show``.
    """
    n, device = len(anchors), anchors.x.device
    start = -torch.inf if is_shifted else 0.0
    sums = {name: torch.zeros(n, dtype=wide_dtype(device), device=device) for name in ("n", "m")}
    for name in ("E", "B"):
        sums[name] = torch.full((n,), start, dtype=anchors.dtype, device=device)
    if settings.variant.log == "inside":
        sums["s_sum"] = torch.zeros(n, dtype=anchors.dtype, device=device)
    if len(anchors) == 0:
        return sums
    rows = SortedRows(anchors, others, sweeps)
    for same in _of_one_order(sweeps):
        order = same[0].anchor_order
        rows_i = rows.of_anchors(same[0])
        for sweep in same:
            rows_j = rows.of_keys(sweep, rows_i)
            totals = _forward_sweep(sweep, rows_i, rows_j, settings, is_shifted, counts_negatives)
            for name, part in totals.items():
                at = sums[name] if order is None else sums[name][order]
                is_log = is_shifted and name in ("E", "B")
                total = torch.logaddexp(at, part) if is_log else at + part
                sums[name] = total if order is None else sums[name].index_copy_(0, order, total)
    if not counts_negatives:
        sums["m"] = sums["B"].sign()
    if "s_sum" in sums and not is_shifted:
        sums["s_sum"] = sums["s_sum"].to(wide_dtype(device)) * LN_2
    return sums


def gradient_sums(
    anchors: Source, others: Source | None, sweeps: list[Sweep], settings: Settings
) -> Tensor:
    """``τ ∂L/∂q_i = Σ_j H_ij q_j`` [N, D]."""
    n, D = anchors.x.shape
    rows = SortedRows(anchors, others, sweeps)
    G = anchors.x.new_zeros(n, D, dtype=anchors.dtype)
    order = sweeps[0].anchor_order
    for same in _of_one_order(sweeps):
        G, rows.q_i = _reorder(G, order, same[0].anchor_order, rows.q_i)
        order = same[0].anchor_order
        rows_i = rows.of_anchors(same[0])
        for sweep in same:
            _backward_sweep(G, sweep, rows_i, rows.of_keys(sweep, rows_i), settings)
    return _reorder(G, order, None, rows.q_i)[0]


def _reorder(
    t: Tensor, order: Tensor | None, new_order: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows that are in one order in another, in the given memory; and the memory that is then free.

    Nothing is moved where both orders are one tensor. Gathered: that takes a fourth of scattering.
    """
    if new_order is order:
        return t, memory
    at = new_order
    if order is not None:
        numbers = torch.arange(len(order), device=order.device)
        at = torch.empty_like(order).index_copy_(0, order, numbers)
        at = at if new_order is None else at.index_select(0, new_order)
    return torch.index_select(t, 0, at, out=memory), t


def negatives_show(settings: Settings, is_shifted: bool) -> bool:
    """Whether ``B`` > 0 where there is a negative: no ``φ exp(s_ij)`` underflows."""
    return not is_shifted and settings.window >= settings.SMALLEST_WINDOW


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which rows are finished: weights up to 1e30 meet sums up to 1e30 there."""
    return torch.float64 if device.type != "mps" else torch.float32


def _forward_sweep(
    sweep: Sweep,
    rows_i: Rows,
    rows_j: Rows,
    settings: Settings,
    is_shifted: bool,
    counts_negatives: bool,
) -> dict[str, Tensor]:
    """The sums of ``row_sums`` that the sweep serves, in its order."""
    totals = Totals(len(rows_i.y))
    if sweep.serves == "positives" and sweep.is_exact:
        n_i = sweep.hi - sweep.lo - int(sweep.is_symmetric)
        totals["n"] = n_i.new_zeros(len(rows_i.y), dtype=wide_dtype(n_i.device))
        totals["n"][: sweep.n_anchors] = n_i[: sweep.n_anchors]
    for tile, i, j in _tiles(sweep, rows_i, rows_j, settings):
        _add_sums(totals, sweep, tile, i, j, settings, is_shifted, counts_negatives)
    return totals


# The tensors of one tile end with these functions, so that the next tile finds their memory in the
# caches.


def _add_sums(
    totals: Totals,
    sweep: Sweep,
    tile: Tile,
    i: Rows,
    j: Rows,
    settings: Settings,
    is_shifted: bool,
    counts_negatives: bool,
) -> None:
    positives, negatives = sweep.serves != "negatives", sweep.serves != "positives"
    dtype, wide = i.q.dtype, wide_dtype(i.q.device)
    s_ij = similarities(i.q, j.q, settings, as_powers_of_two=not is_shifted)
    if positives:
        masks = _positive_masks(tile, i, j, settings, sweep.is_exact)
        if not sweep.is_exact:
            totals.add("n", tile, masks[0][1], wide)
        if settings.variant.log == "inside":
            s_positive = _apply(s_ij.clone(), masks, False)
            totals.add("s_sum", tile, drop_self(s_positive, tile, 0.0), dtype)
    t_ij = s_ij if is_shifted else s_ij.exp2_()
    if positives:
        value = _apply(t_ij.clone() if negatives else t_ij, masks, is_shifted)
        drop_self(value, tile, -torch.inf if is_shifted else 0.0)
        totals.add("E", tile, value, dtype, is_shifted)
    if negatives:
        d_ij = pair_distance(i.y, j.y, settings.distance)
        weight, log_phi = negative_weight(d_ij, i, j, tile.edges, settings)
        if counts_negatives:
            totals.add("m", tile, weight.sign(), wide)
        value = weigh(push(t_ij, log_phi, is_shifted), weight, is_shifted)
        totals.add("B", tile, value, dtype, is_shifted)


def _backward_sweep(
    G: Tensor, sweep: Sweep, rows_i: Rows, rows_j: Rows, settings: Settings
) -> None:
    """Adds ``τ ∂L/∂q_i = Σ_j H_ij q_j`` of the sweep's pairs to G [N, D]."""
    for tile, i, j in _tiles(sweep, rows_i, rows_j, settings):
        _add_products(G, tile, _gradient_weights(sweep, tile, i, j, settings), i.q, j.q)


def _gradient_weights(sweep: Sweep, tile: Tile, i: Rows, j: Rows, settings: Settings) -> Tensor:
    """``H_ij`` of a tile."""
    H_ij = None
    columns = i.gamma if i.alpha is None else i.alpha
    is_shifted = columns.shape[-1] == 2
    s_ij = similarities(i.q, j.q, settings, as_powers_of_two=not is_shifted)
    t_ij = s_ij if is_shifted else s_ij.exp2_()
    if sweep.serves != "negatives":
        masks = _positive_masks(tile, i, j, settings, sweep.is_exact)
        value = _apply(t_ij if sweep.serves == "positives" else t_ij.clone(), masks, is_shifted)
        H_ij = times_coefficients(value, i.alpha, j.alpha)
        if settings.variant.log == "inside":
            H_ij -= _apply(i.beta + j.beta.mT, masks, False)
        drop_self(H_ij, tile, 0.0)
    if sweep.serves != "positives":
        d_ij = pair_distance(i.y, j.y, settings.distance)
        weight, log_phi = negative_weight(d_ij, i, j, tile.edges, settings)
        value = weigh(push(t_ij, log_phi, is_shifted), weight, is_shifted)
        del d_ij, weight
        value = times_coefficients(value, i.gamma, j.gamma)
        H_ij = value if H_ij is None else H_ij.add_(value)
    return H_ij


def _add_products(G: Tensor, tile: Tile, H_ij: Tensor, q_i: Tensor, q_j: Tensor) -> None:
    if tile.count == 1:
        G[tile.anchors].addmm_(H_ij, q_j)
    else:
        G[tile.anchors].view(q_i.shape).baddbmm_(H_ij, q_j)
    if tile.mirror < tile.width:
        H_ji = H_ij[..., tile.mirror :].mT
        of_blocks = ((H_ji,), (q_i,)) if tile.count == 1 else (H_ji.unbind(), q_i.unbind())
        for keys, H_jk, q_k in zip(tile.mirrored, *of_blocks, strict=True):
            G[keys].addmm_(H_jk, q_k)


def _tiles(
    sweep: Sweep, rows_i: Rows, rows_j: Rows, settings: Settings
) -> Iterator[tuple[Tile, Rows, Rows]]:
    """The tiles of a sweep with what is needed of their anchors and keys: a view less is time
    saved.
    """
    of_positives = {"p": None, "gamma": None}
    of_negatives = {"alpha": None, "beta": None}
    unused = {"positives": of_positives, "negatives": of_negatives}.get(sweep.serves, {})
    if settings.variant.log == "outside":
        unused = {**unused, "beta": None}
    rows_i, rows_j = (replace(t, **unused) for t in (rows_i, rows_j))
    # Of a tile without edges all pairs are in the window.
    inside = {"p": None} if sweep.serves == "negatives" else {"p": None, "y": None}
    inside_i, inside_j = (replace(t, **inside) for t in (rows_i, rows_j))
    for tile in make_tiles(sweep):
        i, j = tile.of(rows_i, rows_j) if tile.edges else tile.of(inside_i, inside_j)
        yield tile, i, j


#: (columns, mask) of a tile; the other columns are positives.
Masks = list[tuple[slice, Tensor]]


def _positive_masks(tile: Tile, i: Rows, j: Rows, settings: Settings, is_exact: bool) -> Masks:
    dtype = i.q.dtype
    masks = []
    for columns in tile.edges:
        d_ij = pair_distance(i.y, j.y[..., columns, :], settings.distance)
        masks.append((columns, window_mask(d_ij, settings, dtype)))
    if not is_exact:  # one mask of all columns, which also counts
        drop_self(masks[0][1], tile, 0.0)
    return masks


def _apply(t_ij: Tensor, masks: Masks, is_log: bool) -> Tensor:
    for columns, mask in masks:
        weigh(t_ij[..., columns], mask, is_log)
    return t_ij
