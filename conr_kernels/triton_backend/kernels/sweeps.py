"""The Triton kernels of the two banded sweeps, forward, and what every sweep does with its pairs.

Tiles of keys outside the bands of a tile of anchors are never visited; those inside every anchor's
band (*full*) and those across a border (*edge*) go through separate loops.
"""

import triton
import triton.language as tl

from .arithmetic import (
    FOLD,
    LN2,
    LOG2E,
    add_exponentials,
    await_earlier,
    counted_keys,
    finish_rows,
    fold,
    in_registers,
    join_parts,
    load_tile,
    rounded_statistics,
    similarity,
    store_columns,
    sum_of,
    to_base_2,
)
from .layout import (
    chosen_copies,
    count_of,
    key_tiles,
    padded,
    ranks_of,
    sweep_of,
    tile_at,
)
from .pairs import pair_total, weigh_negatives


@triton.jit
def anchors_of(
    tile, y_i_ptr, p_i_ptr, self_ptr, n_anchors, h, push_scale,
    SAME: tl.constexpr, BLOCK_I: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """What the pairs of a tile of anchors have in common: the anchors' labels, predictions and own
    places among the keys; window and push scale.
    """
    rows = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    y_i_ptrs, p_i_ptrs = y_i_ptr + rows, p_i_ptr + rows
    y_i, p_i = tl.load(y_i_ptrs), tl.load(p_i_ptrs)
    self_i = rows
    if not SAME:
        self_i = tl.load(self_ptr + rows)
    exponent = tl.full((), push_scale * LOG2E, dtype)
    h = tl.full((), h, y_i.dtype)
    return y_i, y_i_ptrs, p_i, p_i_ptrs, self_i, padded(n_anchors), h, exponent


@triton.jit
def pairs_of(
    s_ij, anchors, j0, y_j_ptr, p_j_ptr, n_keys,
    NEGATIVES: tl.constexpr, EDGE: tl.constexpr, CONFUSED: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, PHI: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """``[j ∈ P_i]`` or ``[j ∈ M_i]``, ``φ_ij`` (0 outside the set) and the exponent of a tile."""
    y_i, y_i_ptrs, p_i, p_i_ptrs, self_i, step_i, h, exponent = anchors
    j, step_j = j0 + tl.arange(0, BLOCK_J), padded(n_keys)
    if NEGATIVES:
        total = pair_total(y_i, y_i_ptrs, step_i, y_j_ptr + j, step_j, L, RMSE)
        is_in = total > h
        if EDGE and CONFUSED:
            delta = pair_total(p_i, p_i_ptrs, step_i, p_j_ptr + j, step_j, L, RMSE)
            is_in = is_in & (delta <= h)
        phi_ij, t_ij = weigh_negatives(total, is_in, exponent, s_ij, L, RMSE, PHI)
    elif EDGE:
        total = pair_total(y_i, y_i_ptrs, step_i, y_j_ptr + j, step_j, L, RMSE)
        is_in = (total <= h) & (self_i[:, None] != j.to(tl.int32)[None, :])
        phi_ij, t_ij = tl.where(is_in, 1.0, 0.0).to(s_ij.dtype), s_ij
    else:
        is_in, phi_ij, t_ij = True, 1.0, s_ij
    return is_in, phi_ij, t_ij


@triton.jit
def in_parts(G, PARTS: tl.constexpr):
    """A tile, or its quarters by columns: all loads beside a wide one at once would spill."""
    parts = (G,)
    if PARTS > 1:
        left, right = _halves(G)
        parts = _halves(left) + _halves(right)
    return parts


@triton.jit
def whole(parts):
    """The tile whose parts these are."""
    PARTS: tl.constexpr = len(parts)
    if PARTS == 1:
        tile = parts[0]
    else:
        tile = _whole(_whole(parts[0], parts[1]), _whole(parts[2], parts[3]))
    return tile


@triton.jit
def _whole(left, right):
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _halves(G):
    """The left and the right columns of a tile."""
    parts = tl.reshape(G, (G.shape[0], 2, G.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _add_tile(
    sums, tile_j, anchors, q_i, q_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr, n_keys, width, unit,
    EDGE: tl.constexpr, NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
    PHI: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums with those of a tile of pairs added."""
    total, top, extra, n = sums
    j0 = tile_j.to(tl.int64) * BLOCK_J
    q_j_ptr += j0 * D_PAD
    q_j = load_tile(q_j_ptr, 0, D_PAD, BLOCK_J, BLOCK_D, PRECISION, UPCAST)
    s_ij = similarity(
        q_i, q_i_ptr, q_j, q_j_ptr, width, unit, D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST
    )
    is_in, phi_ij, t_ij = pairs_of(
        s_ij, anchors, j0, y_j_ptr, p_j_ptr, n_keys,
        NEGATIVES, EDGE, CONFUSED, L, RMSE, PHI, BLOCK_J,
    )  # fmt: skip
    if NEGATIVES and TINY:
        extra += fold(is_in.to(extra.dtype))
    if INSIDE and not NEGATIVES:
        extra += fold(s_ij * phi_ij)
    if EDGE and L > 1 and not NEGATIVES:
        n += fold(is_in.to(tl.int32))
    total, top = add_exponentials(total, top, t_ij, phi_ij, is_in, SHIFTED, EDGE or NEGATIVES)
    return total, top, extra, n


@triton.jit
def _sums_of_sweep(
    here, layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr, sums_ptr, n_ptr,
    n_anchors, n_keys, n_slots, width, apart, unit, h, push_scale,
    NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
    PHI: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """One sweep's part of the sums, of the tile of anchors and the slot of program ``here``."""
    tile, slot = here // n_slots, here % n_slots
    is_outside, order_ptr, self_ptr, lo_ptr, hi_ptr = sweep_of(
        layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME
    )
    if CONFUSED:
        q_i_ptr, y_i_ptr, p_i_ptr, _ = chosen_copies(
            q_i_ptr, y_i_ptr, p_i_ptr, n_anchors, is_outside, apart, D_PAD, L
        )
        q_j_ptr, y_j_ptr, p_j_ptr, _ = chosen_copies(
            q_j_ptr, y_j_ptr, p_j_ptr, n_keys, is_outside, apart, D_PAD, L
        )
    _, full, edges = key_tiles(
        tile, layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME, L == 1, BLOCK_I, BLOCK_J
    )
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    anchors = anchors_of(
        tile, y_i_ptr, p_i_ptr, self_ptr, n_anchors, h, push_scale, SAME, BLOCK_I, dtype
    )
    q_i_ptr += tile.to(tl.int64) * BLOCK_I * D_PAD
    q_i = load_tile(q_i_ptr, 0, D_PAD, BLOCK_I, BLOCK_D, PRECISION, UPCAST)
    if RESIDENT and D_PAD == BLOCK_D:
        q_i = in_registers(q_i, PRECISION)
    total = tl.zeros((BLOCK_I,) if SHIFTED else (BLOCK_I, FOLD), dtype)
    top = tl.full((BLOCK_I,), float("-inf"), dtype)
    extra = tl.zeros((BLOCK_I, FOLD), dtype)
    n = tl.zeros((BLOCK_I, FOLD), tl.int32)
    n_full, n_edges = count_of(full), count_of(edges)
    for t in range(n_full * slot // n_slots, n_full * (slot + 1) // n_slots):
        total, top, extra, n = _add_tile(
            (total, top, extra, n), tile_at(t, full), anchors, q_i, q_i_ptr, q_j_ptr,
            y_j_ptr, p_j_ptr, n_keys, width, unit, False, NEGATIVES, CONFUSED, D_PAD, L, RMSE,
            SHIFTED, INSIDE, PHI, TINY, PRECISION, UPCAST, BLOCK_I, BLOCK_J, BLOCK_D,
        )  # fmt: skip
    for t in range(n_edges * slot // n_slots, n_edges * (slot + 1) // n_slots):
        total, top, extra, n = _add_tile(
            (total, top, extra, n), tile_at(t, edges), anchors, q_i, q_i_ptr, q_j_ptr,
            y_j_ptr, p_j_ptr, n_keys, width, unit, True, NEGATIVES, CONFUSED, D_PAD, L, RMSE,
            SHIFTED, INSIDE, PHI, TINY, PRECISION, UPCAST, BLOCK_I, BLOCK_J, BLOCK_D,
        )  # fmt: skip

    rows = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    row = tl.load(order_ptr + rows)
    is_row = row < n_anchors
    stride = n_slots.to(tl.int64) * n_anchors
    parts = slot.to(tl.int64) * n_anchors + row
    sums_ptrs = sums_ptr + (3 * stride if NEGATIVES else 0) + parts
    if SHIFTED:
        tl.store(sums_ptrs, total, mask=is_row)
        tl.store(sums_ptrs + stride, top, mask=is_row)
    else:
        tl.store(sums_ptrs, tl.sum(total, axis=1), mask=is_row)
    if TINY if NEGATIVES else INSIDE:
        tl.store(sums_ptrs + 2 * stride, tl.sum(extra, axis=1), mask=is_row)
    if not NEGATIVES:
        if L == 1:
            in_band = tl.load(hi_ptr + rows) - tl.load(lo_ptr + rows) - 1
            n_here = tl.where(slot == 0, in_band, 0)
        else:
            n_here = tl.sum(n, axis=1)
        tl.store(n_ptr + parts, n_here, mask=is_row)


@triton.jit
def program_of(SWEEPS: tl.constexpr):
    """Its number in its sweep, a sweep's programs, and whether it is the negatives' (the last)."""
    here, n_programs = tl.program_id(0), tl.num_programs(0)
    negatives = SWEEPS == "negatives"
    if SWEEPS == "both":
        n_programs = n_programs // 2
        negatives = here >= n_programs
        here = here % n_programs
    return here, n_programs, negatives


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_slots", "apart"])
def conr_forward_kernel(
    layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr, sums_ptr, n_ptr,
    n_anchors, n_keys, n_slots, width, apart, unit: tl.float64, h: tl.float64,
    push_scale: tl.float64,
    SWEEPS: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
    PHI: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Parts of a row's sums in the caller's order: of the n_slots programs that share a tile of
    anchors, each takes an equal part of its key tiles.

    sums [2 sweeps, 3, n_slots, N]: ``Σ_P exp(s_ij)`` or ``Σ_M φ_ij exp(s_ij)``, where exponents are
    large divided by ``exp2(top)``; ``top``; ``Σ_P s_ij/log 2`` (INSIDE) or the number of negatives
    (TINY: φ·exp(s) may underflow, so that a sum of 0 is no proof that there is none). n [n_slots,
    N]: positives.
    """
    await_earlier(EARLY)
    here, _, negatives = program_of(SWEEPS)
    if negatives:
        _sums_of_sweep(
            here, layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr, sums_ptr, n_ptr,
            n_anchors, n_keys, n_slots, width, apart, unit, h, push_scale,
            True, CONFUSED, SAME, D_PAD, L, RMSE, SHIFTED, False, PHI, TINY, PRECISION, UPCAST,
            BLOCK_I, BLOCK_J, BLOCK_D, RESIDENT,
        )  # fmt: skip
    else:
        _sums_of_sweep(
            here, layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr, sums_ptr, n_ptr,
            n_anchors, n_keys, n_slots, width, apart, unit, h, push_scale,
            False, False, SAME, D_PAD, L, RMSE, SHIFTED, INSIDE, "one", False, PRECISION, UPCAST,
            BLOCK_I, BLOCK_J, BLOCK_D, RESIDENT,
        )  # fmt: skip


@triton.jit
def _sum_of_parts(sums_ptrs, stride, is_part, SHIFTED: tl.constexpr, EXTRA: tl.constexpr):
    """A row's sum or its logarithm, and what stands in the third column, in float64."""
    total = tl.load(sums_ptrs, mask=is_part, other=0.0).to(tl.float64)
    extra = tl.zeros((total.shape[0],), tl.float64)
    top = extra
    if SHIFTED:
        tops = tl.load(sums_ptrs + stride, mask=is_part, other=float("-inf")).to(tl.float64)
        total, top = join_parts(total, tops, 1)
    if EXTRA:
        parts = tl.load(sums_ptrs + 2 * stride, mask=is_part, other=0.0)
        extra = tl.sum(parts.to(tl.float64), axis=1)
    return sum_of(total, top, SHIFTED), extra


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_slots"])
def conr_finish_kernel(
    sums_ptr, n_ptr, poison_ptr, w_ptr, n_absent_ptr, layout_ptr, loss_ptr, stats_ptr,
    n_anchors, n_keys, n_slots, push_scale: tl.float64,
    SAME: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr, SCALED: tl.constexpr,
    WEIGHTED: tl.constexpr, UNIT_TERMS: tl.constexpr, COUNT_SELF: tl.constexpr,
    WEIGHTED_ROWS: tl.constexpr, TINY: tl.constexpr, ORDERS: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, REDUCED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Losses, or their sum (REDUCED), and statistics of ROWS rows from at most SLOTS parts of their
    sums; a program each.

    Statistics [N, 3 or 5]; or, where the layout is given, as the gradient reads them: [3 or 5, N
    padded] for each of the ORDERS. What is not finite among further keys is shared out to all
    rows.
    """
    await_earlier(EARLY)
    pid = tl.program_id(0)
    rows, slots = pid * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS)
    is_row = rows < n_anchors
    is_part = is_row[:, None] & (slots < n_slots)[None, :]
    stride = n_slots.to(tl.int64) * n_anchors
    parts = slots.to(tl.int64)[None, :] * n_anchors + rows[:, None]
    E, s_sum = _sum_of_parts(sums_ptr + parts, stride, is_part, SHIFTED, INSIDE)
    B, found = _sum_of_parts(sums_ptr + 3 * stride + parts, stride, is_part, SHIFTED, TINY)
    n = tl.sum(tl.load(n_ptr + parts, mask=is_part, other=0), axis=1).to(tl.float64)
    if SHIFTED:
        has_negative = float("-inf") < B
    elif TINY:
        has_negative = found > 0
    else:
        has_negative = B > 0
    poison = tl.load(poison_ptr + (0 if SAME else n_keys) + rows, mask=is_row, other=0.0)
    if not SAME:
        of_keys = tl.zeros((ROWS,), tl.float32)
        for start in range(pid * ROWS, n_keys, tl.num_programs(0) * ROWS):
            here = start + tl.arange(0, ROWS)
            of_keys += tl.load(poison_ptr + here, mask=here < n_keys, other=0.0)
        poison += tl.sum(of_keys, axis=0)
    w = tl.full((ROWS,), 1.0, tl.float64)
    if w_ptr is not None:
        w = tl.load(w_ptr + rows, mask=is_row, other=0.0).to(tl.float64)
    n_counted = counted_keys(n_keys, n_absent_ptr, n)
    loss, alpha, beta, gamma, log_alpha, log_gamma = finish_rows(
        E, B, s_sum * LN2, n, has_negative, w, n_counted, push_scale,
        SHIFTED, INSIDE, SCALED, WEIGHTED, UNIT_TERMS, COUNT_SELF, WEIGHTED_ROWS,
    )  # fmt: skip
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    poison, rows = poison.to(tl.float64), rows.to(tl.int64)
    loss = (loss + poison).to(dtype)
    if REDUCED:
        tl.store(loss_ptr + pid, tl.sum(tl.where(is_row, loss, 0.0).to(tl.float64), axis=0))
    else:
        tl.store(loss_ptr + rows, loss, mask=is_row)
    stats = rounded_statistics(alpha, beta, gamma, log_alpha, log_gamma, poison, dtype, SHIFTED)
    COLUMNS: tl.constexpr = 5 if SHIFTED else 3
    if layout_ptr is None:
        store_columns(stats_ptr + rows * COLUMNS, 1, is_row, stats, SHIFTED)
    else:
        alpha, beta, gamma, log_alpha, log_gamma = stats
        if SHIFTED:
            alpha, log_alpha = to_base_2(alpha, log_alpha)
            gamma, log_gamma = to_base_2(gamma, log_gamma)
        n_padded = padded(n_anchors).to(tl.int64)
        rank_ptr, _, step = ranks_of(layout_ptr, n_anchors, n_keys, True)
        for _ in tl.static_range(ORDERS):
            # Rows behind the last have 0, in their own places.
            ptrs = stats_ptr + tl.load(rank_ptr + rows)
            columns = (alpha, beta, gamma, log_alpha, log_gamma)
            store_columns(ptrs, n_padded, rows < n_padded, columns, SHIFTED)
            rank_ptr += step
            stats_ptr += COLUMNS * n_padded
