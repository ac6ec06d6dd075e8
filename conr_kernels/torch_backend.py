"""ConR as tiles of PyTorch operations: any device and dtype, O(N·D) memory, deterministic.

Two sweeps over exact bands (rows sorted by label for the positives, by prediction for the
negatives); one sweep over all pairs that serves both masks where the bands would cover most of
them; and for small batches one tile, kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import pair_distance
from .reference import poison as not_finite
from .rows import (
    collapse_statistics,
    finish_log_rows,
    finish_rows,
    to_log_statistics,
)
from .sweep import Sweep, banded_sweep, dense_sweep
from .torch_tiles import (
    Rows,
    Tile,
    Totals,
    drop_self,
    make_tiles,
    negative_weight,
    push,
    similarities,
    take_rows,
    times_coefficients,
    weigh,
    window_mask,
)
from .variants import Settings

#: Up to this many rows one tile holds all pairs; row losses keep it for backward.
KEPT_ROWS = 640
#: Where the bands hold more than this share of all pairs, one sweep over all pairs is faster.
DENSE_SHARE = 0.7
#: A negative's distance exceeds the window; from here on ``d_ij exp(−1/τ)`` is no zero in float32.
SMALLEST_WINDOW = 1e-20
#: Rows of the gradient that are finished at a time.
PROJECTED_ROWS = 1024

Keys = tuple[Tensor, Tensor, Tensor]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, and what to do; None where it can."""
    return None


def layout_size(n_anchors: int, n_keys: int, dtype: torch.dtype, settings: Settings) -> int:
    """int32 words kept for backward: the weighted pairs of both masks, for small batches only."""
    if n_keys != n_anchors or n_anchors > KEPT_ROWS:
        return 0
    return 2 * n_anchors * n_keys * dtype.itemsize // 4


def forward(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py) and the layout (see ``layout_size``)."""
    x = x.contiguous()  # results keep a transposed layout, and products its rounding
    is_shifted = _is_shifted(y, keys, settings)
    norm = row_norms(x)
    if _is_one_tile(x, keys):
        rows = take_rows(x, _inverse(norm), y, p, None, None)
        sums, pairs = one_tile_sums(rows, settings, is_shifted)
        layout = torch.stack(pairs)
    else:
        sums = row_sums(x, y, p, keys, self_offset, settings, norm, is_shifted)
        layout = norm.new_empty(0)
    loss, stats = _finish(sums, norm, y, p, w, keys, settings, is_shifted)
    stats = _stored(stats, norm.dtype, settings, is_shifted)
    return loss.to(norm.dtype), stats, layout.view(-1).view(torch.int32)


def loss_with_gradient(
    x: Tensor, y: Tensor, p: Tensor, w: Tensor | None, settings: Settings, is_mean: bool
) -> tuple[Tensor, Tensor]:
    """The mean or sum of the row losses of a small batch, and its gradient in the loss's dtype.

    Where every row has the same upstream gradient nothing need be kept: a third less host time. The
    bits are those of ``forward`` and ``backward``.
    """
    x = x.contiguous()
    is_shifted = _is_shifted(y, None, settings)
    norm = row_norms(x)
    inverse = _inverse(norm)
    rows = take_rows(x, inverse, y, p, None, None)
    underflows = is_shifted or settings.window < SMALLEST_WINDOW
    sums, pairs = one_tile_sums(rows, settings, is_shifted, counts_negatives=underflows)
    loss, stats = _finish(sums, norm, y, p, w, None, settings, is_shifted)
    loss, stats = loss.to(norm.dtype), _stored(stats, norm.dtype, settings, is_shifted)
    if not is_shifted and not settings.exponent_is_small:
        stats = collapse_statistics(stats)
    if is_mean:
        stats[:, :3].mul_(1 / len(x))
    G = _one_tile_gradient(*pairs, rows.q, stats, settings)
    loss = loss.mean() if is_mean else loss.sum()
    return loss, _project(G, rows.q, inverse, settings.temperature)


def _stored(stats: Tensor, dtype: torch.dtype, settings: Settings, is_shifted: bool) -> Tensor:
    """Statistics in the form and dtype in which they wait for the backward pass."""
    if not is_shifted and not settings.exponent_is_small:
        stats = to_log_statistics(stats)
    return stats.to(dtype)


def _finish(
    sums: dict[str, Tensor],
    norm: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    keys: Keys | None,
    settings: Settings,
    is_shifted: bool,
) -> tuple[Tensor, Tensor]:
    """Row losses and statistics in float64: weights up to 1e30 meet sums up to 1e30 in the rows."""
    wide = torch.float64 if norm.device.type != "mps" else torch.float32
    of_rows = {**sums, "poison": _poison(norm, y, p, w, keys)}
    if w is not None:
        of_rows["w"] = w
    # One conversion of all of them: on a small batch each costs as much as a sum over its pairs.
    wide_rows = torch.stack(list(of_rows.values())).to(wide).unbind()
    of_rows = dict(zip(of_rows, wide_rows, strict=True))
    n_keys = len(norm) if keys is None else len(keys[0])
    finish = finish_log_rows if is_shifted else finish_rows
    return finish(**of_rows, n_keys=n_keys, settings=settings)


def row_sums(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
    norm: Tensor,
    is_shifted: bool,
) -> dict[str, Tensor]:
    """``E`` = Σ_P exp s, ``B`` = Σ_M φ exp s (their logarithms if shifted), ``s_sum``, ``n``,
    ``m``.
    """
    sums: dict[str, Tensor] = {}
    for sweep, rows_i, rows_j in _sorted_rows(x, norm, y, p, keys, self_offset, settings):
        for name, total in _forward_sweep(sweep, rows_i, rows_j, settings, is_shifted).items():
            order = sweep.anchor_order
            if order is not None:
                total = torch.empty_like(total).index_copy_(0, order, total)
            if name in sums:
                combine = torch.logaddexp if is_shifted and name in ("E", "B") else torch.add
                total = combine(sums[name], total)
            sums[name] = total
    if len(x) == 0:
        names = ("E", "B", "n", "m", *["s_sum"] * (settings.variant.log == "inside"))
        return {name: norm.new_zeros(0) for name in names}
    return sums


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
    if coef_i.shape[1] == 5 and not _is_shifted(y, keys, settings):
        coef_i = collapse_statistics(coef_i)
        coef_j = None if coef_j is None else collapse_statistics(coef_j)
    x = x.contiguous()
    norm = row_norms(x)
    if _is_one_tile(x, keys):
        q = x * _inverse(norm)
        pairs = layout.view(norm.dtype).view(2, len(q), len(q)).unbind()
        G = _one_tile_gradient(*pairs, q, coef_i, settings)
        return _project(G, q, _inverse(norm), settings.temperature).to(x.dtype)
    G = G_sorted = None
    for sweep, rows_i, rows_j in _sorted_rows(
        x, norm, y, p, keys, self_offset, settings, coef_i, coef_j
    ):
        G_sorted = torch.zeros_like(rows_i.q) if G_sorted is None else G_sorted.zero_()
        _backward_sweep(G_sorted, sweep, rows_i, rows_j, settings)
        if sweep.anchor_order is None:
            G, G_sorted = G_sorted if G is None else G.add_(G_sorted), None
        elif G is None:
            G = torch.empty_like(G_sorted).index_copy_(0, sweep.anchor_order, G_sorted)
        else:
            G.index_add_(0, sweep.anchor_order, G_sorted)
    inverse = _inverse(norm)
    poison = (coef_i[:, :3] * 0).sum(dim=1, keepdim=True)
    for start in range(0, len(x), PROJECTED_ROWS):
        rows = slice(start, start + PROJECTED_ROWS)
        q = x[rows] * inverse[rows]
        _project(G[rows], q, inverse[rows], settings.temperature).add_(poison[rows])
    return G.to(x.dtype)


def _is_one_tile(x: Tensor, keys: Keys | None) -> bool:
    return keys is None and len(x) <= KEPT_ROWS


def row_norms(x: Tensor) -> Tensor:
    """``‖x_i‖`` [N, 1] in the accumulation dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x.contiguous(), dim=1, keepdim=True, dtype=dtype)


def _inverse(norm: Tensor) -> Tensor:
    """``1/‖x_i‖``, 0 for a zero row."""
    return norm.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)


def _project(G: Tensor, q: Tensor, inverse: Tensor, temperature: float) -> Tensor:
    """``∂L/∂x_i = (∂L/∂q_i − q_i (q_i·∂L/∂q_i)) / ‖x_i‖`` with ``∂L/∂q_i = G_i/τ``; in place."""
    radial = (q * G).sum(dim=1, keepdim=True)
    return G.addcmul_(q, radial, value=-1).mul_(inverse / temperature)


def _poison(norm: Tensor, y: Tensor, p: Tensor, w: Tensor | None, keys: Keys | None) -> Tensor:
    """0 for each row [N] with finite inputs, else NaN; NaN everywhere if a key is not finite."""
    total = norm * 0
    for labels in (y, p):  # times 0 before any sum, which might overflow
        if labels.shape[1] > 1:
            labels = (labels * 0).sum(dim=1, keepdim=True)
        total.add_(labels, alpha=0)
    total = total[:, 0]
    if w is not None:
        total.add_(w, alpha=0)
    return total if keys is None else total + not_finite(*keys)


def _is_shifted(y: Tensor, keys: Keys | None, settings: Settings) -> bool:
    """Whether sums are kept as logarithms because an exponent may be large."""
    if settings.exponent_is_small:
        return False
    y = y if keys is None else keys[1]
    if settings.variant.pushing != "exponential" or y.device.type != "cpu" or len(y) == 0:
        return True
    largest_d = (y.amax(0) - y.amin(0)).max().item()
    largest_exponent = 2 / settings.temperature + abs(settings.push_scale) * largest_d
    return not largest_exponent <= settings.SAFE_EXPONENT


def _sweeps(
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


def _sorted_rows(
    x: Tensor,
    norm: Tensor,
    y: Tensor,
    p: Tensor,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
    coef_i: Tensor | None = None,
    coef_j: Tensor | None = None,
) -> Iterator[tuple[Sweep, Rows, Rows]]:
    """Every sweep with its anchors and keys in its order; valid until the next is asked for.

    First the anchors among themselves, where ``s_ij = s_ji`` saves half of the pairs, then the
    anchors against the other keys.
    """
    anchors = (x, _inverse(norm), y, p, coef_i)
    q_i = q_j = None
    for sweep in _sweeps(y, p, None, None, settings):
        rows = take_rows(*anchors, sweep.anchor_order, q_i)
        q_i = rows.q
        yield sweep, rows, rows
    if keys is None or len(keys[0]) == len(x):
        return
    behind = self_offset + len(x)

    def others_of(t: Tensor) -> Tensor:
        return torch.cat([t[:self_offset], t[behind:]]) if self_offset else t[behind:]

    key_x, key_y, key_p = map(others_of, keys)
    coef_j = None if coef_j is None else others_of(coef_j)
    others = (key_x, _inverse(row_norms(key_x)), key_y, key_p, coef_j)
    for sweep in _sweeps(y, p, key_y, key_p, settings):
        rows_i = take_rows(*anchors, sweep.anchor_order, q_i)
        rows_j = take_rows(*others, sweep.key_order, q_j)
        q_i, q_j = rows_i.q, rows_j.q
        yield sweep, rows_i, rows_j


def one_tile_sums(
    rows: Rows, settings: Settings, is_shifted: bool, counts_negatives: bool = True
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The sums of ``row_sums`` from one tile, and the tile's pairs weighted by either mask.

    Without ``counts_negatives`` m is 1 for any number of negatives: where ``φ exp(s_ij)`` cannot
    underflow, a positive sum shows that there is one.
    """
    s_ij = similarities(rows.q, rows.q, settings)
    d_ij = pair_distance(rows.y, rows.y, settings.distance)
    positive = torch.le(d_ij, settings.window, out=torch.empty_like(s_ij)).fill_diagonal_(0.0)
    negative, log_phi = negative_weight(d_ij, rows, rows, None, settings)
    # Counts up to 2²⁴ are exact in float32; a sum that converts its terms is several times slower.
    sums = {"n": positive.sum(1)}
    if counts_negatives:
        sums["m"] = negative.sign().sum(1)
    if settings.variant.log == "inside":
        sums["s_sum"] = (s_ij * positive).sum(1)
    if is_shifted:
        positive.log_().add_(s_ij)
        negative.log_().add_(push(s_ij, log_phi, True))
        sums["E"], sums["B"] = positive.logsumexp(1), negative.logsumexp(1)
    else:
        positive.mul_(s_ij.exp_())
        negative.mul_(push(s_ij, log_phi, False))
        sums["E"], sums["B"] = positive.sum(1), negative.sum(1)
    if not counts_negatives:
        sums["m"] = sums["B"].sign()
    return sums, (positive, negative)


def _one_tile_gradient(
    positive: Tensor, negative: Tensor, q: Tensor, coef: Tensor, settings: Settings
) -> Tensor:
    """``τ ∂L/∂q_i`` [N, D] from the weighted pairs."""
    alpha, gamma = coef[:, 0::3], coef[:, 2::2]
    H_ij = times_coefficients(positive, alpha, alpha)
    H_ij += times_coefficients(negative, gamma, gamma)
    if settings.variant.log == "inside":
        absent = 0.0 if coef.shape[1] == 3 else -torch.inf
        H_ij -= (positive > absent).to(q.dtype).mul_(coef[:, 1:2] + coef[:, 1])
    return H_ij @ q


def _forward_sweep(
    sweep: Sweep, rows_i: Rows, rows_j: Rows, settings: Settings, is_shifted: bool
) -> dict[str, Tensor]:
    """The sums of ``row_sums`` that the sweep serves, in its order."""
    positives, negatives = sweep.serves != "negatives", sweep.serves != "positives"
    dtype, device = rows_i.q.dtype, rows_i.q.device
    wide = torch.float64 if device.type != "mps" else torch.float32
    totals = Totals(sweep.n_anchors)
    if positives and sweep.is_exact:
        totals["n"] = (sweep.hi - sweep.lo - int(sweep.is_symmetric)).to(wide)
    for tile in make_tiles(sweep):
        i, j = tile.of(rows_i, rows_j)
        s_ij = similarities(i.q, j.q, settings)
        if positives:
            masks = _positive_masks(tile, i, j, settings, sweep.is_exact)
            if not sweep.is_exact:
                totals.add("n", tile, masks[0][1], wide)
            if settings.variant.log == "inside":
                s_positive = _apply(s_ij.clone(), masks, False)
                totals.add("s_sum", tile, drop_self(s_positive, tile, 0.0), dtype)
        t_ij = s_ij if is_shifted else s_ij.exp_()
        if positives:
            value = _apply(t_ij.clone() if negatives else t_ij, masks, is_shifted)
            drop_self(value, tile, -torch.inf if is_shifted else 0.0)
            totals.add("E", tile, value, dtype, is_shifted)
        if negatives:
            d_ij = pair_distance(i.y, j.y, settings.distance)
            weight, log_phi = negative_weight(d_ij, i, j, tile.edges, settings)
            totals.add("m", tile, weight.sign(), wide)
            value = weigh(push(t_ij, log_phi, is_shifted), weight, is_shifted)
            totals.add("B", tile, value, dtype, is_shifted)
    return totals


def _backward_sweep(
    G: Tensor, sweep: Sweep, rows_i: Rows, rows_j: Rows, settings: Settings
) -> None:
    """Adds ``τ ∂L/∂q_i = Σ_j H_ij q_j`` of the sweep's pairs to G [N, D]."""
    positives, negatives = sweep.serves != "negatives", sweep.serves != "positives"
    is_shifted = rows_i.coef.shape[1] == 5
    for tile in make_tiles(sweep):
        i, j = tile.of(rows_i, rows_j)
        s_ij = similarities(i.q, j.q, settings)
        t_ij = s_ij if is_shifted else s_ij.exp_()
        H_ij = None
        if positives:
            masks = _positive_masks(tile, i, j, settings, sweep.is_exact)
            value = _apply(t_ij.clone() if negatives else t_ij, masks, is_shifted)
            H_ij = times_coefficients(value, i.coef[..., 0::3], j.coef[..., 0::3])
            if settings.variant.log == "inside":
                H_ij -= _apply(i.coef[..., 1:2] + j.coef[..., 1:2].mT, masks, False)
            drop_self(H_ij, tile, 0.0)
        if negatives:
            d_ij = pair_distance(i.y, j.y, settings.distance)
            weight, log_phi = negative_weight(d_ij, i, j, tile.edges, settings)
            value = weigh(push(t_ij, log_phi, is_shifted), weight, is_shifted)
            value = times_coefficients(value, i.coef[..., 2::2], j.coef[..., 2::2])
            H_ij = value if H_ij is None else H_ij.add_(value)
        G[tile.anchors].view(i.q.shape).baddbmm_(H_ij, j.q)
        for k, keys in tile.mirrored:
            G[keys].addmm_(H_ij[k, :, tile.mirror :].T, i.q[k])


#: (columns, mask) of a tile; the other columns are positives.
Masks = list[tuple[slice, Tensor]]


def _positive_masks(tile: Tile, i: Rows, j: Rows, settings: Settings, is_exact: bool) -> Masks:
    dtype = i.q.dtype
    masks = []
    for columns in tile.edges:
        d_ij = pair_distance(i.y, j.y[:, columns], settings.distance)
        masks.append((columns, window_mask(d_ij, settings, dtype)))
    if not is_exact:  # one mask of all columns, which also counts
        drop_self(masks[0][1], tile, 0.0)
    return masks


def _apply(t_ij: Tensor, masks: Masks, is_log: bool) -> Tensor:
    for columns, mask in masks:
        weigh(t_ij[..., columns], mask, is_log)
    return t_ij
