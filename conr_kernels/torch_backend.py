"""ConR as tiles of PyTorch operations: any device and dtype, O(N·D) memory, deterministic.

Two sweeps over exact bands (rows sorted by label for the positives, by prediction for the negatives)
or, where those would cover most pairs, one sweep over all pairs that serves both masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import pair_distance, poison
from .rows import collapse_statistics, finish_log_rows, finish_rows, to_log_statistics
from .sweep import Sweep, banded_sweep, dense_sweep
from .variants import Settings

#: Up to this many pairs, or where the bands hold this share of all pairs, one sweep is faster.
DENSE_PAIRS = 512 * 512
DENSE_SHARE = 0.7
#: Rows of a tile, and the most pairs in one.
BLOCK_I = 256
TILE_PAIRS = 2**18

Keys = tuple[Tensor, Tensor, Tensor]
#: Weights of a tile's pairs: (columns, weight of each pair there); pairs in other columns weigh 1.
Weights = list[tuple[slice, Tensor]]


@dataclass(frozen=True)
class Rows:
    """Unit features [N, D], labels, predictions [N, L] and gradient coefficients in one order."""

    q: Tensor
    y: Tensor
    p: Tensor
    coef: Tensor | None = None

    def take(self, order: Tensor | None) -> Rows:
        if order is None:
            return self
        coef = None if self.coef is None else self.coef[order]
        return Rows(self.q[order], self.y[order], self.p[order], coef)


@dataclass(frozen=True)
class Tile:
    """Sorted anchors ``i`` against sorted keys ``j``; the keys ``full`` lie in every anchor's band.

    Keys from ``mirror`` on stand for the transposed tile too.
    """

    i: slice
    j: slice
    full: slice
    mirror: int

    @property
    def edges(self) -> list[slice]:
        """The tile's columns outside ``full``."""
        j0, j1 = self.j.start, self.j.stop
        f0, f1 = max(self.full.start, j0), min(self.full.stop, j1)
        if f0 >= f1:
            return [slice(0, j1 - j0)]
        return [slice(a - j0, b - j0) for a, b in ((j0, f0), (f1, j1)) if a < b]

    @property
    def mirrored(self) -> tuple[slice, slice] | None:
        """Keys and columns of the transposed tile."""
        start = max(self.mirror, self.j.start)
        if start >= self.j.stop:
            return None
        return slice(start, self.j.stop), slice(start - self.j.start, None)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, and what to do; None where it can."""
    return None


def layout_size(n_anchors: int, n_keys: int, settings: Settings) -> int:
    return 0


def forward(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py) and an empty layout: orders are found again in backward."""
    sums = row_sums(x, y, p, keys, self_offset, settings)
    dtype = sums["E"].dtype
    # Weights up to 1e30 meet sums up to 1e30 here; there are only N of each.
    wide = torch.float64 if x.device.type != "mps" else dtype
    finish = finish_log_rows if _is_shifted(y, keys, settings) else finish_rows
    loss, stats = finish(
        sums["E"].to(wide),
        sums["B"].to(wide),
        sums["s_sum"].to(wide) if "s_sum" in sums else None,
        sums["n"],
        sums["m"],
        len(x) if keys is None else len(keys[0]),
        None if w is None else w.to(wide),
        settings,
    )
    if stats.shape[1] == 3 and not settings.exponent_is_small:
        stats = to_log_statistics(stats)
    poisoned = poison(torch.linalg.vector_norm(x, dim=1, dtype=dtype), y, p, w, *(keys or ()))
    layout = torch.empty(0, dtype=torch.int32, device=x.device)
    return (loss + poisoned).to(dtype), (stats + poisoned).to(dtype), layout


def row_sums(
    x: Tensor, y: Tensor, p: Tensor, keys: Keys | None, self_offset: int, settings: Settings
) -> dict[str, Tensor]:
    """``E`` = Σ_P exp s, ``B`` = Σ_M φ exp s (their logarithms if shifted), ``s_sum``, ``n``, ``m``."""
    anchors = Rows(normalize(x)[0], y, p)
    all_keys = anchors if keys is None else Rows(normalize(keys[0])[0], *keys[1:])
    is_shifted = _is_shifted(y, keys, settings)
    sums = {}
    for sweep in _sweeps(y, p, keys, self_offset, settings):
        rows_j = all_keys.take(sweep.key_order)
        rows_i = rows_j if keys is None else anchors.take(sweep.anchor_order)
        for name, total in _forward_sweep(sweep, rows_i, rows_j, settings, is_shifted).items():
            order = sweep.anchor_order
            sums[name] = (
                total if order is None else torch.empty_like(total).index_copy_(0, order, total)
            )
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
    q, inverse_norm = normalize(x)
    if coef_i.shape[1] == 5 and not _is_shifted(y, keys, settings):
        coef_i = collapse_statistics(coef_i)
        coef_j = None if coef_j is None else collapse_statistics(coef_j)
    anchors = Rows(q, y, p, coef_i)
    all_keys = anchors if keys is None else Rows(normalize(keys[0])[0], *keys[1:], coef_j)
    G = torch.zeros_like(q)
    for sweep in _sweeps(y, p, keys, self_offset, settings):
        rows_j = all_keys.take(sweep.key_order)
        rows_i = rows_j if keys is None else anchors.take(sweep.anchor_order)
        if sweep.anchor_order is None:
            _backward_sweep(G, sweep, rows_i, rows_j, settings)
        else:
            G_sorted = torch.zeros_like(q)
            _backward_sweep(G_sorted, sweep, rows_i, rows_j, settings)
            G.index_add_(0, sweep.anchor_order, G_sorted)
    G /= settings.temperature
    radial = (q * G).sum(dim=1, keepdim=True)
    poisoned = (coef_i[:, :3] * 0).sum(dim=1, keepdim=True)
    return G.sub_(q.mul_(radial)).mul_(inverse_norm).add_(poisoned).to(x.dtype)


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and ``1/‖x_i‖`` [N, 1] (0 for a zero row) in the accumulation dtype."""
    x = x.contiguous()
    x = x if x.dtype == torch.float64 else x.float()
    inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True).reciprocal_()
    inverse.masked_fill_(inverse == torch.inf, 0.0)
    return x * inverse, inverse


def _is_shifted(y: Tensor, keys: Keys | None, settings: Settings) -> bool:
    """Whether sums are kept as logarithms because an exponent may be large."""
    if settings.exponent_is_small:
        return False
    y = y if keys is None else keys[1]
    if settings.variant.pushing != "exponential" or y.device.type != "cpu" or len(y) == 0:
        return True
    largest_d = (y.amax(0) - y.amin(0)).max().item()
    return (
        not 2 / settings.temperature + abs(settings.push_scale) * largest_d
        <= settings.SAFE_EXPONENT
    )


def _sweeps(
    y: Tensor, p: Tensor, keys: Keys | None, self_offset: int, settings: Settings
) -> list[Sweep]:
    """Two banded sweeps, or one over all pairs. Bands are read on the host, hence only on the CPU."""
    N, K = len(y), len(y) if keys is None else len(keys[0])
    n_keys = None if keys is None else K
    dense = [dense_sweep(N, n_keys, self_offset, y.device)]
    if y.device.type != "cpu" or N * K <= DENSE_PAIRS or settings.variant.negatives == "all":
        return dense
    key_y, key_p = (None, None) if keys is None else keys[1:]
    h, distance = settings.window, settings.distance
    sweeps = [
        banded_sweep("positives", y, key_y, self_offset, h, distance),
        banded_sweep("negatives", p, key_p, self_offset, h, distance),
    ]
    banded_pairs = sum(int((sweep.hi - sweep.lo).sum()) for sweep in sweeps)
    return dense if banded_pairs > DENSE_SHARE * N * K else sweeps


def _tiles(sweep: Sweep) -> Iterator[Tile]:
    N = len(sweep.lo)
    starts = range(0, N, BLOCK_I)
    first = torch.arange(0, N, BLOCK_I)
    last = (first + BLOCK_I - 1).clamp(max=N - 1)
    if sweep.serves == "both":
        n_keys = int(sweep.n_keys)
        bounds = [(0, n_keys, n_keys, 0)] * len(starts)
    else:
        bounds = zip(
            *(
                t.tolist()
                for t in (sweep.lo[first], sweep.hi[last], sweep.lo[last], sweep.hi[first])
            )
        )
    for i0, (j0, j1, full0, full1) in zip(starts, bounds, strict=True):
        i1 = min(i0 + BLOCK_I, N)
        mirror = j1
        if sweep.is_symmetric:
            # j in [i0, hi of i0) is in every band only if the last anchor is in i0's band too.
            j0, full0, mirror = i0, i0 if full1 >= i1 else full1, i1
        if not sweep.is_exact:
            full1 = full0
        width = TILE_PAIRS // (i1 - i0)
        for c0 in range(j0, j1, width):
            yield Tile(slice(i0, i1), slice(c0, min(c0 + width, j1)), slice(full0, full1), mirror)


def _forward_sweep(
    sweep: Sweep, rows_i: Rows, rows_j: Rows, settings: Settings, is_shifted: bool
) -> dict[str, Tensor]:
    positives, negatives = sweep.serves != "negatives", sweep.serves != "positives"
    is_inside = settings.variant.log == "inside"
    N, fill = len(rows_i.q), -torch.inf if is_shifted else 0.0
    add = _add_logsumexp if is_shifted else _add_sum
    totals = {}
    if positives:
        totals["E"] = rows_i.q.new_full((N,), fill)
        totals["n"] = sweep.hi - sweep.lo - 1 if sweep.is_exact else torch.zeros_like(sweep.lo)
        if is_inside:
            totals["s_sum"] = rows_i.q.new_zeros(N)
    if negatives:
        totals["B"] = rows_i.q.new_full((N,), fill)
        totals["m"] = torch.zeros_like(sweep.lo)
    for tile in _tiles(sweep):
        s_ij = _similarities(tile, rows_i, rows_j, settings)
        if positives:
            t_ij = s_ij.clone() if negatives else s_ij
            weights = _positive_weights(tile, sweep, rows_i, rows_j, settings)
            if is_inside:
                kept = _drop_self(_multiply(t_ij.clone(), weights), tile, sweep, 0.0)
                _add_sum(totals["s_sum"], tile, kept)
            if not sweep.is_exact:
                _add_sum(totals["n"], tile, _drop_self(weights[0][1] != 0, tile, sweep, False))
            add(totals["E"], tile, _drop_self(_weigh(t_ij, weights, is_shifted), tile, sweep, fill))
        if negatives:
            t_ij, weight = _negatives(s_ij, tile, rows_i, rows_j, settings)
            _add_sum(totals["m"], tile, weight != 0)
            add(totals["B"], tile, _weigh(t_ij, [(slice(None), weight)], is_shifted))
    return totals


def _backward_sweep(
    G: Tensor, sweep: Sweep, rows_i: Rows, rows_j: Rows, settings: Settings
) -> None:
    """Adds ``τ ∂L/∂q_i = Σ_j H_ij q_j`` of the sweep's pairs to G [N, D]."""
    positives, negatives = sweep.serves != "negatives", sweep.serves != "positives"
    for tile in _tiles(sweep):
        s_ij = _similarities(tile, rows_i, rows_j, settings)
        coef_i, coef_j = rows_i.coef[tile.i], rows_j.coef[tile.j]
        H_ij = None
        if positives:
            t_ij = s_ij.clone() if negatives else s_ij
            weights = _positive_weights(tile, sweep, rows_i, rows_j, settings)
            H_ij = _scale(t_ij, weights, coef_i[:, 0::3], coef_j[:, 0::3])
            if settings.variant.log == "inside":
                H_ij -= _multiply(coef_i[:, 1, None] + coef_j[None, :, 1], weights)
            _drop_self(H_ij, tile, sweep, 0.0)
        if negatives:
            t_ij, weight = _negatives(s_ij, tile, rows_i, rows_j, settings)
            H_neg = _scale(t_ij, [(slice(None), weight)], coef_i[:, 2::2], coef_j[:, 2::2])
            H_ij = H_neg if H_ij is None else H_ij.add_(H_neg)
        G[tile.i].addmm_(H_ij, rows_j.q[tile.j])
        if tile.mirrored:
            keys, columns = tile.mirrored
            G[keys].addmm_(H_ij[:, columns].T, rows_i.q[tile.i])


def _similarities(tile: Tile, rows_i: Rows, rows_j: Rows, settings: Settings) -> Tensor:
    q_i, q_j = rows_i.q[tile.i], rows_j.q[tile.j]
    s_ij = q_i.new_empty(len(q_i), len(q_j))
    return s_ij.addmm_(q_i, q_j.T, beta=0, alpha=1 / settings.temperature)


def _positive_weights(
    tile: Tile, sweep: Sweep, rows_i: Rows, rows_j: Rows, settings: Settings
) -> Weights:
    """``[d_ij ≤ h]`` on the columns where it is not known to hold."""
    weights = []
    for columns in tile.edges:
        d_ij = pair_distance(rows_i.y[tile.i], rows_j.y[tile.j][columns], settings.distance)
        weights.append((columns, (d_ij <= settings.window).to(rows_i.q.dtype)))
    return weights


def _negatives(
    s_ij: Tensor, tile: Tile, rows_i: Rows, rows_j: Rows, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Exponents ``s_ij (+ e·d_ij)`` and weights ``[j ∈ M_i]·(d_ij or 1)``; overwrites ``s_ij``."""
    h, dtype = settings.window, s_ij.dtype
    d_ij = pair_distance(rows_i.y[tile.i], rows_j.y[tile.j], settings.distance)
    if settings.scales_by_distance:
        weight = torch.threshold_(d_ij, h, 0.0).to(dtype)
    else:
        weight = (d_ij > h).to(dtype)
    if settings.variant.pushing == "exponential":
        s_ij.add_(d_ij.to(dtype), alpha=settings.push_scale)
    if settings.variant.negatives == "confused":
        for columns in tile.edges:
            delta_ij = pair_distance(rows_i.p[tile.i], rows_j.p[tile.j][columns], settings.distance)
            weight[:, columns] *= delta_ij <= h
    return s_ij, weight


def _weigh(t_ij: Tensor, weights: Weights, is_shifted: bool) -> Tensor:
    """``weight · exp(t_ij)``, or its logarithm; in place."""
    if not is_shifted:
        return _multiply(t_ij.exp_(), weights)
    for columns, weight in weights:
        t_ij[:, columns] += weight.log()
    return t_ij


def _multiply(t_ij: Tensor, weights: Weights) -> Tensor:
    for columns, weight in weights:
        t_ij[:, columns] *= weight
    return t_ij


def _scale(t_ij: Tensor, weights: Weights, coef_i: Tensor, coef_j: Tensor) -> Tensor:
    """``weight · exp(t_ij) · (c_i + c_j)`` with coefficients [N, 1], or [N, 2] as sign and logarithm."""
    if coef_i.shape[1] == 1:
        return _weigh(t_ij, weights, is_shifted=False).mul_(coef_i + coef_j.T)
    t_ij = _weigh(t_ij, weights, is_shifted=True)
    of_i = (t_ij + coef_i[:, 1:]).exp_().mul_(coef_i[:, :1])
    of_j = t_ij.add_(coef_j[:, 1]).exp_().mul_(coef_j[:, 0])
    return of_i.add_(of_j)


def _drop_self(t_ij: Tensor, tile: Tile, sweep: Sweep, fill: float) -> Tensor:
    """Sets the pairs of an anchor with itself to ``fill``; in place."""
    if sweep.is_symmetric:
        if tile.j.start == tile.i.start:
            t_ij.diagonal().fill_(fill)
        return t_ij
    column = sweep.self_key[tile.i, None] - tile.j.start
    is_here = (column >= 0) & (column < t_ij.shape[1])
    column = column.clamp(0, t_ij.shape[1] - 1)
    return t_ij.scatter_(1, column, t_ij.gather(1, column).masked_fill(is_here, fill))


def _add_sum(total: Tensor, tile: Tile, t_ij: Tensor) -> None:
    total[tile.i] += t_ij.sum(dim=1)
    if tile.mirrored:
        keys, columns = tile.mirrored
        total[keys] += t_ij[:, columns].sum(dim=0)


def _add_logsumexp(total: Tensor, tile: Tile, t_ij: Tensor) -> None:
    total[tile.i] = torch.logaddexp(total[tile.i], t_ij.logsumexp(dim=1))
    if tile.mirrored:
        keys, columns = tile.mirrored
        total[keys] = torch.logaddexp(total[keys], t_ij[:, columns].logsumexp(dim=0))
