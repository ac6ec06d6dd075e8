"""ConR as tiles of PyTorch operations: any device and dtype, O(N·D) memory, deterministic.

Two sweeps over exact bands (rows sorted by label for the positives, by prediction for the
negatives); one sweep over all pairs that serves both masks where the bands would cover most of
them; and for small batches one tile, kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.inputs import Inputs, Keys
from ..core.rows import collapse_statistics, finish_log_rows, finish_rows, to_log_statistics
from ..core.sweep import Sweep
from ..reference import pair_distance
from ..variants import Settings
from . import few
from .pairs import LN_2, negative_weight, push, similarities, times_coefficients
from .source import Source, inverse_norms, other_keys, row_norms
from .sweeps import (
    all_sweeps,
    gradient_sums,
    negatives_show,
    pack_sweeps,
    row_sums,
    unpack_sweeps,
    wide_dtype,
)
from .tiles import Rows, share_of

#: Up to this many rows one tile holds all pairs; row losses keep it for backward.
KEPT_ROWS = 640
#: Rows of the gradient that are finished at a time.
PROJECTED_ROWS = 1024


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, and what to do; None where it can."""
    return None


def layout_size(n_anchors: int, n_keys: int, dtype: torch.dtype, settings: Settings) -> int:
    """int32 words kept for backward: the weighted pairs of both masks, for small batches only."""
    if n_keys != n_anchors or n_anchors > KEPT_ROWS:
        return 0
    return 2 * n_anchors * n_keys * dtype.itemsize // 4


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py) and the layout (see ``layout_size``)."""
    x, y, p, w, keys, self_offset, settings, n_absent = inputs
    x = x.contiguous()  # results keep a transposed layout, and products its rounding
    is_shifted = _is_shifted(y, keys, settings)
    counts_negatives = not negatives_show(settings, is_shifted)
    anchors = Source(x, row_norms(x), y, p)
    others = other_keys(keys, slice(self_offset, self_offset + len(x)))
    if _is_one_tile(x, keys):
        rows = Rows(x * inverse_norms(anchors.norm), y, p)
        sums, pairs = one_tile_sums(rows, settings, is_shifted, counts_negatives)
        layout = torch.stack(pairs)
    elif _are_few(len(x), others, is_shifted):
        rows = Rows(x * inverse_norms(anchors.norm), y, p)
        sums, _ = one_tile_sums(rows, settings, is_shifted, counts_negatives)
        few.add_sums(sums, rows, others, settings, counts_negatives)
        layout = anchors.norm.new_empty(0)
    else:
        sweeps = _sweeps(anchors, others, settings)
        sums = row_sums(anchors, others, sweeps, settings, is_shifted, counts_negatives)
        layout = anchors.norm.new_empty(0)
    n_keys: Tensor | int = len(x) if others is None else len(x) + len(others)
    if n_absent is not None:
        n_keys = n_keys - n_absent
    loss, stats = _finish(sums, _poison(anchors, others), n_keys, w, settings, is_shifted)
    stats = _stored(stats, anchors.norm.dtype, settings, is_shifted)
    return loss.to(anchors.norm.dtype), stats, layout.view(-1).view(torch.int32)


def union_sweeps(
    y: Tensor, p: Tensor, n_anchors: int, settings: Settings, share: tuple[int, int]
) -> tuple[list[Sweep], Tensor]:
    """For keys of which the first ``n_anchors`` are the anchors: the k-th of n shares of all
    sweeps, and the layout of the whole.
    """
    others = (y[n_anchors:], p[n_anchors:]) if n_anchors < len(y) else None
    sweeps = all_sweeps((y[:n_anchors], p[:n_anchors]), others, settings)
    return [share_of(sweep, *share) for sweep in sweeps], pack_sweeps(sweeps)


def shared_forward(
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
    """Row losses and statistics of the own rows, where several processes have the same keys.

    Each sums over its shares of the pairs of all anchors (``union_sweeps``), and uses ``s_ij =
    s_ji`` in all of it.

    Args:
        poison: 0, or NaN if any input of the union is not finite.
        deal: exchanges these sums [S, n_anchors] of the own rows for all processes' sums of them
            [n, S, n_own].
    """
    is_shifted = _is_shifted(union.y, None, settings)
    counts_negatives = not negatives_show(settings, is_shifted)
    anchors = union.part(slice(0, n_anchors))
    others = union.rest(slice(0, n_anchors))
    sums = row_sums(anchors, others, shares, settings, is_shifted, counts_negatives)
    if not counts_negatives:
        del sums["m"]

    dealt = deal(torch.stack([t.to(wide_dtype(union.x.device)) for t in sums.values()]))
    sums = dict(zip(sums, dealt.sum(0).unbind(), strict=True))
    if is_shifted:
        for k, name in enumerate(sums):
            if name in ("E", "B"):
                sums[name] = dealt[:, k].logsumexp(0)
    if not counts_negatives:
        sums["m"] = sums["B"].sign()
    poison = poison.expand(own.stop - own.start)
    n_keys = len(union) if n_absent is None else len(union) - n_absent
    loss, stats = _finish(sums, poison, n_keys, w, settings, is_shifted)
    return loss.to(union.dtype), stats.to(union.dtype)


def shared_backward(
    union: Source, layout: Tensor, inverse: Tensor, own: slice, settings: Settings
) -> Tensor:
    """Gradient of the own anchors of a union of unit features, of inverse norms [N, 1]."""
    anchors, others = union.part(own), union.rest(own)
    if len(layout) > 0:
        sweeps = unpack_sweeps(layout, own.start, len(anchors), is_exact=union.y.shape[1] == 1)
    else:
        sweeps = _sweeps(anchors, others, settings)
    G = gradient_sums(anchors, others, sweeps, settings)
    poison = _poison_of_coefficients(anchors.coef)
    for start in range(0, len(G), PROJECTED_ROWS):
        rows = slice(start, start + PROJECTED_ROWS)
        of_rows = (G[rows], anchors.x[rows], inverse[rows])
        _project(*of_rows, settings.temperature).add_(poison[rows])
    return G


def reduces(
    x: Tensor, y: Tensor, further: Keys | None, settings: Settings, wants_gradient: bool
) -> bool:
    """Whether ``reduced`` serves these rows and further keys."""
    if not wants_gradient or further is None or len(further[0]) == 0:
        return wants_gradient and 0 < len(y) <= KEPT_ROWS
    others = Source(further[0], None, *further[1:])
    return _are_few(len(y), others, _is_shifted(y, _with_rows(y, further), settings))


def reduced(
    inputs: Inputs, further: Keys | None, reduction: str, wants_gradient: bool
) -> tuple[Tensor, tuple[Tensor], None]:
    """The mean or sum of the row losses of a small batch, and its gradient in the loss's dtype.

    Where every row has the same upstream gradient nothing need be kept: a third less host time. The
    bits are those of ``forward`` and ``backward``.
    """
    x, y, p, w, _, _, settings, _ = inputs
    x = x.contiguous()
    others = None
    if further is not None and len(further[0]) > 0:
        others = Source(further[0], row_norms(further[0]), *further[1:])
    is_shifted = others is None and _is_shifted(y, None, settings)
    anchors = Source(x, row_norms(x), y, p)
    norm, inverse = anchors.norm, inverse_norms(anchors.norm)
    rows = Rows(x * inverse, y, p)
    counts_negatives = not negatives_show(settings, is_shifted)
    sums, pairs = one_tile_sums(rows, settings, is_shifted, counts_negatives)
    n_keys = len(x)
    if others is not None:
        n_keys += len(others)
        n_products = 3 if settings.variant.log == "inside" else 2
        products = [torch.zeros_like(rows.q) for _ in range(n_products)]
        few.add_sums(sums, rows, others, settings, counts_negatives, products)
    loss, stats = _finish(sums, _poison(anchors, others), n_keys, w, settings, is_shifted)
    loss, stats = loss.to(norm.dtype), _stored(stats, norm.dtype, settings, is_shifted)
    if not is_shifted and not settings.exponent_is_small:
        stats = collapse_statistics(stats)
    if reduction == "mean":
        stats[:, :3].mul_(1 / len(x))
    G = _one_tile_gradient(*pairs, rows.q, stats, settings)
    if others is not None:
        few.add_products(G, products, stats)
    loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss, (_project(G, rows.q, inverse, settings.temperature),), None


def reduced_gradient(x: Tensor, saved: tuple[Tensor], plan: None, upstream: Tensor) -> Tensor:
    """The gradient that ``reduced`` found, times the upstream gradient."""
    (gradient,) = saved
    return (gradient * upstream).to(x.dtype)


def _stored(stats: Tensor, dtype: torch.dtype, settings: Settings, is_shifted: bool) -> Tensor:
    """Statistics in the form and dtype in which they wait for the backward pass."""
    if not is_shifted and not settings.exponent_is_small:
        stats = to_log_statistics(stats)
    return stats.to(dtype)


def _finish(
    sums: dict[str, Tensor],
    poison: Tensor,
    n_keys: Tensor | int,
    w: Tensor | None,
    settings: Settings,
    is_shifted: bool,
) -> tuple[Tensor, Tensor]:
    """Row losses and statistics in float64: weights up to 1e30 meet sums up to 1e30 in the rows."""
    of_rows = {**sums, "poison": poison}
    if w is not None:
        of_rows |= {"w": w, "poison": torch.add(poison, w, alpha=0)}
    # One conversion of all of them: on a small batch each costs as much as a sum over its pairs.
    wide_rows = torch.stack(list(of_rows.values())).to(wide_dtype(poison.device)).unbind()
    of_rows = dict(zip(of_rows, wide_rows, strict=True))
    finish = finish_log_rows if is_shifted else finish_rows
    return finish(**of_rows, n_keys=n_keys, settings=settings)


def backward(inputs: Inputs, coef_i: Tensor, coef_j: Tensor | None, layout: Tensor) -> Tensor:
    """Gradient of the features [N, D] from the scaled statistics of anchors and keys."""
    x, y, p, _, keys, self_offset, settings, _ = inputs
    if coef_i.shape[1] == 5 and not _is_shifted(y, keys, settings):
        coef_i = collapse_statistics(coef_i)
        coef_j = None if coef_j is None else collapse_statistics(coef_j)
    x = x.contiguous()
    anchors = Source(x, row_norms(x), y, p, coef_i)
    inverse = inverse_norms(anchors.norm)
    if _is_one_tile(x, keys):
        q = x * inverse
        pairs = layout.view(q.dtype).view(2, len(q), len(q)).unbind()
        G = _one_tile_gradient(*pairs, q, coef_i, settings)
        return _project(G, q, inverse, settings.temperature).to(x.dtype)
    others = other_keys(keys, slice(self_offset, self_offset + len(x)), coef_j)
    if _are_few(len(x), others, coef_i.shape[1] == 5):
        rows = anchors.take(None, None)
        _, pairs = one_tile_sums(rows, settings, False)
        G = _one_tile_gradient(*pairs, rows.q, coef_i, settings)
        few.add_gradient(G, rows, others, settings)
    else:
        G = gradient_sums(anchors, others, _sweeps(anchors, others, settings), settings)
    poison = _poison_of_coefficients(coef_i)
    for start in range(0, len(x), PROJECTED_ROWS):
        rows = slice(start, start + PROJECTED_ROWS)
        q = x[rows] * inverse[rows]
        _project(G[rows], q, inverse[rows], settings.temperature).add_(poison[rows])
    return G.to(x.dtype)


def _poison_of_coefficients(coef: Tensor) -> Tensor:
    """0 or NaN [N, 1]; the other columns may be −∞."""
    return (coef[:, :3] * 0).sum(dim=1, keepdim=True)


def _sweeps(anchors: Source, others: Source | None, settings: Settings) -> list[Sweep]:
    return all_sweeps(anchors.labels, None if others is None else others.labels, settings)


def _are_few(n_rows: int, others: Source | None, is_shifted: bool) -> bool:
    return n_rows <= KEPT_ROWS and not is_shifted and few.are_few(n_rows, others)


def _with_rows(y: Tensor, further: Keys) -> Keys:
    """Keys with the rows' labels among them, for their range alone."""
    return further[0], torch.cat([y, further[1]]), further[2]


def _is_one_tile(x: Tensor, keys: Keys | None) -> bool:
    is_alone = keys is None or len(keys[0]) == len(x)
    return is_alone and len(x) <= KEPT_ROWS


def _project(G: Tensor, q: Tensor, inverse: Tensor, temperature: float) -> Tensor:
    """``∂L/∂x_i = (∂L/∂q_i − q_i (q_i·∂L/∂q_i)) / ‖x_i‖`` with ``∂L/∂q_i = G_i/τ``; in place."""
    radial = (q * G).sum(dim=1, keepdim=True)
    return G.addcmul_(q, radial, value=-1).mul_(inverse / temperature)


def _poison(anchors: Source, others: Source | None) -> Tensor:
    """0 for each row [N] with finite inputs, else NaN; NaN everywhere if another key is not
    finite.
    """
    total = anchors.norm * 0
    for labels in (anchors.y, anchors.p):  # times 0 before any sum, which might overflow
        if labels.shape[1] > 1:
            labels = (labels * 0).sum(dim=1, keepdim=True)
        total.add_(labels, alpha=0)
    total = total[:, 0]
    return total if others is None else total + others.not_finite()


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


def one_tile_sums(
    rows: Rows, settings: Settings, is_shifted: bool, counts_negatives: bool = True
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The sums of ``row_sums`` from one tile, and the tile's pairs weighted by either mask.

    Without ``counts_negatives`` m is 1 for any number of negatives, as there.
    """
    s_ij = similarities(rows.q, rows.q, settings, as_powers_of_two=not is_shifted)
    d_ij = pair_distance(rows.y, rows.y, settings.distance)
    positive = torch.le(d_ij, settings.window, out=torch.empty_like(s_ij)).fill_diagonal_(0.0)
    negative, log_phi = negative_weight(d_ij, rows, rows, None, settings)
    # Counts up to 2²⁴ are exact in float32; a sum that converts its terms is several times slower.
    sums = {"n": positive.sum(1)}
    if counts_negatives:
        sums["m"] = negative.sign().sum(1)
    if settings.variant.log == "inside":
        s_sum = (s_ij * positive).sum(1)
        sums["s_sum"] = s_sum if is_shifted else s_sum.to(wide_dtype(s_sum.device)) * LN_2
    if is_shifted:
        positive.log_().add_(s_ij)
        negative.log_().add_(push(s_ij, log_phi, True))
        sums["E"], sums["B"] = positive.logsumexp(1), negative.logsumexp(1)
    else:
        positive.mul_(s_ij.exp2_())
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
