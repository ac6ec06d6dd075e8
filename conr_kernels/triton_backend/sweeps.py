"""The Triton kernels of the two banded sweeps, forward.

A program owns BLOCK_I sorted anchors. Tiles of keys outside its bands are never visited; tiles
inside every anchor's band (*full*) and those across a border (*edge*) go through separate loops.
"""

import triton
import triton.language as tl

from .arithmetic import (
    add_exponentials,
    distance_of,
    finish_rows,
    load_tile,
    pair_total,
    similarity,
    store_rows,
    sum_of,
)
from .layout import segments, tile_at


@triton.jit
def negative_weights(
    y_i, y_i_ptrs, y_j_ptrs, p_i, p_i_ptrs, p_j_ptrs, step_i, step_j, h, exponent, t_ij,
    DELTA: tl.constexpr, L: tl.constexpr, RMSE: tl.constexpr, PUSHING: tl.constexpr,
):  # fmt: skip
    """``[j ∈ M_i]``, ``φ_ij`` (0 outside ``M_i``) and the exponent of a tile; DELTA: compare
    predictions.
    """
    total = pair_total(y_i, y_i_ptrs, step_i, y_j_ptrs, step_j, L, RMSE)
    is_in = total > h
    if DELTA:
        is_in = is_in & (pair_total(p_i, p_i_ptrs, step_i, p_j_ptrs, step_j, L, RMSE) <= h)
    if PUSHING == "exponential":
        t_ij += tl.where(is_in, distance_of(total, L, RMSE).to(t_ij.dtype) * exponent, 0.0)
    if PUSHING == "linear" or PUSHING == "distance":
        phi_ij = tl.where(is_in, distance_of(total, L, RMSE), 0.0).to(t_ij.dtype)
    else:
        phi_ij = tl.where(is_in, 1.0, 0.0).to(t_ij.dtype)
    return is_in, phi_ij, t_ij


@triton.jit
def negative_segments(
    tile, layout_ptr, n_anchors, n_keys, EXACT: tl.constexpr, CONFUSED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The order of the negatives (1: of the labels), its full tiles ``[f0, f1) ∪ [g0, g1)`` and
    its edges.
    """
    PAD: tl.constexpr = 128
    keys, anchors = tl.cdiv(n_keys, PAD) * PAD, tl.cdiv(n_anchors, PAD) * PAD
    lo_ptr = layout_ptr + PAD + 2 * keys + 3 * anchors
    is_dense = tl.load(layout_ptr)
    if CONFUSED:
        band_ptr = lo_ptr + tl.where(is_dense == 0, anchors, 0)
    else:
        band_ptr = lo_ptr
    lo, hi, f0, f1, s0, s1 = segments(
        tile, band_ptr, band_ptr + 2 * anchors, band_ptr, n_anchors,
        False, True, EXACT, BLOCK_I, BLOCK_J,
    )  # fmt: skip
    n_tiles = tl.cdiv(n_keys, BLOCK_J)
    if CONFUSED:
        e0 = tl.where(is_dense == 0, lo, 0)
        e3 = tl.where(is_dense == 0, hi, n_tiles)
        g0 = tl.where(is_dense == 0, f0, f1)
        return g0, f1, f1, f1, e0, f0, f1, e3
    else:
        return 0, f0, f1, n_tiles, 0, 0, 0, 0


@triton.jit(do_not_specialize=["n_anchors", "n_keys"])
def conr_forward_positives_kernel(
    layout_ptr,
    q_i_ptr,
    y_i_ptr,
    q_j_ptr,
    y_j_ptr,
    poison_ptr,
    E_ptr,
    s_sum_ptr,
    n_ptr,
    n_anchors,
    n_keys,
    width,
    h: tl.float64,
    D_PAD: tl.constexpr,
    L: tl.constexpr,
    RMSE: tl.constexpr,
    SAME: tl.constexpr,
    SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``E_i = Σ_P exp(s_ij)`` or its logarithm, ``Σ_P s_ij`` and ``n_i``, in the caller's order.

    A row that is not finite has n_i = −1; keys that are not are shared out to all rows.
    """
    PAD: tl.constexpr = 128
    EXACT: tl.constexpr = L == 1
    LN2: tl.constexpr = 0.6931471805599453
    tile = tl.program_id(0)
    keys, anchors = tl.cdiv(n_keys, PAD) * PAD, tl.cdiv(n_anchors, PAD) * PAD
    order_i_ptr = layout_ptr + PAD + (0 if SAME else 2 * keys)
    self_ptr = layout_ptr + PAD + 2 * keys + 2 * anchors
    lo_ptr = self_ptr + anchors
    hi_ptr = lo_ptr + 2 * anchors
    lo, hi, f0, f1, s0, s1 = segments(
        tile, lo_ptr, hi_ptr, self_ptr, n_anchors, True, SAME, EXACT, BLOCK_I, BLOCK_J
    )

    i0 = tile.to(tl.int64) * BLOCK_I
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    q_i_ptr += i0 * D_PAD
    y_i_ptrs = y_i_ptr + i0 + rows
    y_i = tl.load(y_i_ptrs)
    h = tl.full((), h, y_i.dtype)
    if SAME:
        self_i = tile * BLOCK_I + rows
    else:
        self_i = tl.load(self_ptr + i0 + rows)
    q_i = load_tile(q_i_ptr, 0, D_PAD, BLOCK_I, BLOCK_D, UPCAST)

    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    if SHIFTED:
        E = tl.zeros((BLOCK_I,), dtype)
    else:
        E = tl.zeros((BLOCK_I, BLOCK_J), dtype)
    top = tl.full((BLOCK_I,), float("-inf"), dtype)
    s_sum = tl.zeros((BLOCK_I,), dtype)
    count = tl.zeros((BLOCK_I,), tl.int32)

    for t in range(s0 - f0 + f1 - s1):
        j0 = tile_at(t, f0, s0, s1, f1, f1).to(tl.int64) * BLOCK_J
        q_j = load_tile(q_j_ptr + j0 * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
        s_ij = similarity(
            q_i, q_i_ptr, q_j, q_j_ptr + j0 * D_PAD, width,
            D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        if INSIDE:
            s_sum += tl.sum(s_ij, axis=1)
        E, top = add_exponentials(E, top, s_ij, 1.0, True, SHIFTED, False)

    for t in range(f0 - lo + s1 - s0 + hi - f1):
        j0 = tile_at(t, lo, f0, s0, s1, f1).to(tl.int64) * BLOCK_J
        q_j = load_tile(q_j_ptr + j0 * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
        s_ij = similarity(
            q_i, q_i_ptr, q_j, q_j_ptr + j0 * D_PAD, width,
            D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        total = pair_total(y_i, y_i_ptrs, anchors, y_j_ptr + j0 + columns, keys, L, RMSE)
        is_in = (total <= h) & (self_i[:, None] != (j0.to(tl.int32) + columns)[None, :])
        weight = tl.where(is_in, 1.0, 0.0).to(dtype)
        if INSIDE:
            s_sum += tl.sum(s_ij * weight, axis=1)
        if not EXACT:
            count += tl.sum(is_in.to(tl.int32), axis=1)
        E, top = add_exponentials(E, top, s_ij, weight, is_in, SHIFTED, True)

    row = tl.load(order_i_ptr + i0 + rows)
    is_row = row < n_anchors
    if EXACT:
        count = tl.load(hi_ptr + i0 + rows) - tl.load(lo_ptr + i0 + rows) - 1
    if SAME:
        poison = tl.load(poison_ptr + i0 + rows)
    else:
        poison = tl.load(poison_ptr + keys + i0 + rows)
        of_keys = tl.zeros((BLOCK_I,), tl.float32)
        for start in range(tile * BLOCK_I, keys, tl.num_programs(0) * BLOCK_I):
            of_keys += tl.load(poison_ptr + start + rows, mask=start + rows < keys, other=0.0)
        poison += tl.sum(of_keys, axis=0)
    count = tl.where(poison == 0, count, -1)
    tl.store(n_ptr + row, count, mask=is_row)
    tl.store(E_ptr + row, sum_of(E, top, SHIFTED), mask=is_row)
    if INSIDE:
        tl.store(s_sum_ptr + row, s_sum.to(tl.float64) * LN2, mask=is_row)


@triton.jit(do_not_specialize=["n_anchors", "n_keys"])
def conr_forward_negatives_kernel(
    layout_ptr,
    q_i_ptr,
    y_i_ptr,
    p_i_ptr,
    q_j_ptr,
    y_j_ptr,
    p_j_ptr,
    w_ptr,
    E_ptr,
    s_sum_ptr,
    n_ptr,
    loss_ptr,
    stats_ptr,
    n_anchors,
    n_keys,
    width,
    h: tl.float64,
    push_scale: tl.float64,
    D_PAD: tl.constexpr,
    L: tl.constexpr,
    RMSE: tl.constexpr,
    SAME: tl.constexpr,
    SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr,
    PUSHING: tl.constexpr,
    CONFUSED: tl.constexpr,
    UNIT_TERMS: tl.constexpr,
    COUNT_SELF: tl.constexpr,
    WEIGHTED_ROWS: tl.constexpr,
    TINY: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``Σ_M φ_ij exp(s_ij)``, then the loss and the statistics of the row, in the caller's order.

    TINY: φ·exp(s) may underflow, so that a positive sum is no proof of a negative: look at φ
    itself.
    """
    PAD: tl.constexpr = 128
    EXACT: tl.constexpr = L == 1
    LOG2E: tl.constexpr = 1.4426950408889634
    tile = tl.program_id(0)
    keys, anchors = tl.cdiv(n_keys, PAD) * PAD, tl.cdiv(n_anchors, PAD) * PAD
    f0, f1, g0, g1, e0, e1, e2, e3 = negative_segments(
        tile, layout_ptr, n_anchors, n_keys, EXACT, CONFUSED, BLOCK_I, BLOCK_J
    )
    i0 = tile.to(tl.int64) * BLOCK_I
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    q_i_ptr += i0 * D_PAD
    y_i_ptrs, p_i_ptrs = y_i_ptr + i0 + rows, p_i_ptr + i0 + rows
    y_i, p_i = tl.load(y_i_ptrs), tl.load(p_i_ptrs)
    h = tl.full((), h, y_i.dtype)
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    exponent = tl.full((), push_scale * LOG2E, dtype)
    q_i = load_tile(q_i_ptr, 0, D_PAD, BLOCK_I, BLOCK_D, UPCAST)

    if SHIFTED:
        B = tl.zeros((BLOCK_I,), dtype)
    else:
        B = tl.zeros((BLOCK_I, BLOCK_J), dtype)
    top = tl.full((BLOCK_I,), float("-inf"), dtype)
    found = tl.zeros((BLOCK_I,), tl.int32)

    for t in range(f1 - f0 + g1 - g0):
        j0 = tile_at(t, f0, f1, g0, g1, g1).to(tl.int64) * BLOCK_J
        q_j = load_tile(q_j_ptr + j0 * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
        s_ij = similarity(
            q_i, q_i_ptr, q_j, q_j_ptr + j0 * D_PAD, width,
            D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        is_in, phi_ij, t_ij = negative_weights(
            y_i, y_i_ptrs, y_j_ptr + j0 + columns, p_i, p_i_ptrs, p_j_ptr + j0 + columns,
            anchors, keys, h, exponent, s_ij, False, L, RMSE, PUSHING,
        )  # fmt: skip
        if TINY:
            found |= tl.max(is_in.to(tl.int32), axis=1)
        B, top = add_exponentials(B, top, t_ij, phi_ij, is_in, SHIFTED, True)

    for t in range(e1 - e0 + e3 - e2):
        j0 = tile_at(t, e0, e1, e2, e3, e3).to(tl.int64) * BLOCK_J
        q_j = load_tile(q_j_ptr + j0 * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
        s_ij = similarity(
            q_i, q_i_ptr, q_j, q_j_ptr + j0 * D_PAD, width,
            D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        is_in, phi_ij, t_ij = negative_weights(
            y_i, y_i_ptrs, y_j_ptr + j0 + columns, p_i, p_i_ptrs, p_j_ptr + j0 + columns,
            anchors, keys, h, exponent, s_ij, CONFUSED, L, RMSE, PUSHING,
        )  # fmt: skip
        if TINY:
            found |= tl.max(is_in.to(tl.int32), axis=1)
        B, top = add_exponentials(B, top, t_ij, phi_ij, is_in, SHIFTED, True)

    order_ptr = layout_ptr + PAD + (0 if SAME else 2 * keys)
    if CONFUSED:
        order_ptr += tl.where(tl.load(layout_ptr) == 0, keys if SAME else anchors, 0)
    row = tl.load(order_ptr + i0 + rows).to(tl.int64)
    is_row = row < n_anchors
    total = sum_of(B, top, SHIFTED)
    if SHIFTED:
        has_negative = top > float("-inf")
    elif TINY:
        has_negative = found != 0
    else:
        has_negative = total > 0
    n = tl.load(n_ptr + row, mask=is_row, other=0).to(tl.float64)
    poison = tl.where(n < 0, float("nan"), 0.0).to(tl.float64)
    E = tl.load(E_ptr + row, mask=is_row, other=0.0)
    s_sum, w = tl.zeros_like(E), tl.full(E.shape, 1.0, tl.float64)
    if INSIDE:
        s_sum = tl.load(s_sum_ptr + row, mask=is_row, other=0.0)
    if w_ptr is not None:
        w = tl.load(w_ptr + row, mask=is_row, other=0.0).to(tl.float64)
    loss, alpha, beta, gamma, log_alpha, log_gamma = finish_rows(
        E, total, s_sum, n, has_negative, w, n_keys.to(tl.float64), push_scale,
        SHIFTED, INSIDE, PUSHING, UNIT_TERMS, COUNT_SELF, WEIGHTED_ROWS,
    )  # fmt: skip
    store_rows(
        loss_ptr, stats_ptr, row, is_row, poison,
        loss, alpha, beta, gamma, log_alpha, log_gamma, SHIFTED,
    )  # fmt: skip
