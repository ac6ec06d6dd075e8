"""The Triton kernels of the two banded sweeps, forward and backward with the gradient in registers.

A program owns BLOCK_I sorted anchors. Tiles of keys outside its bands are never visited; tiles
inside every anchor's band (*full*) and those across a border (*edge*) go through separate loops.
"""

import triton
import triton.language as tl

from .triton_layout import segments, tile_at
from .triton_math import (
    add_exponentials,
    distance_of,
    dot,
    finish_rows,
    load_tile,
    pair_total,
    scale_pair,
    similarity,
    store_rows,
    sum_of,
)


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


@triton.jit
def load_coefficients(coef_ptrs, n_padded, FIRST: tl.constexpr, SHIFTED: tl.constexpr):
    """A coefficient [·] and its logarithm (columns FIRST and 3 + FIRST/2 of the five)."""
    of = tl.load(coef_ptrs + FIRST * n_padded)
    log = of
    if SHIFTED:
        log = tl.load(coef_ptrs + (3 + FIRST // 2) * n_padded)
    return of, log


@triton.jit
def add_product(G, H_ij, q_j, RESCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``G + H_ij·q_j``; RESCALE keeps float16 products in range by each row's largest magnitude."""
    if RESCALE:
        largest = tl.max(tl.abs(H_ij), axis=1)
        scale = tl.where(largest > 1e-30, largest, 1.0)
        H_ij = (H_ij * (1.0 / scale)[:, None]).to(tl.float16)
        if UPCAST:
            H_ij = H_ij.to(tl.float32)
        G += dot(H_ij, q_j, None, PRECISION) * scale[:, None]
    else:
        if not UPCAST:
            H_ij = H_ij.to(q_j.dtype)
        G = dot(H_ij, q_j, G, PRECISION)
    return G


@triton.jit
def halves(G):
    """The left and the right columns of a tile."""
    parts = tl.reshape(G, (G.shape[0], 2, G.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _store_sum(G, row, first, G_ptr, G_rest_ptr, n_anchors, D: tl.constexpr):
    """Stores columns ``first …`` of G; as two bfloat16 summands where there is a G_rest."""
    k = first + tl.arange(0, G.shape[1])
    offsets = row[:, None] * D + k[None, :]
    mask = (row < n_anchors)[:, None] & (k < D)[None, :]
    head = G.to(G_ptr.dtype.element_ty)
    tl.store(G_ptr + offsets, head, mask=mask)
    if G_rest_ptr is not None:
        tl.store(G_rest_ptr + offsets, (G - head.to(G.dtype)).to(tl.bfloat16), mask=mask)


@triton.jit
def _add_sum(G, row, first, G_ptr, G_rest_ptr, n_anchors, D: tl.constexpr):
    """Adds what ``_store_sum`` stored."""
    k = first + tl.arange(0, G.shape[1])
    offsets = row[:, None] * D + k[None, :]
    mask = (row < n_anchors)[:, None] & (k < D)[None, :]
    G += tl.load(G_ptr + offsets, mask=mask, other=0.0).to(G.dtype)
    if G_rest_ptr is not None:
        G += tl.load(G_rest_ptr + offsets, mask=mask, other=0.0).to(G.dtype)
    return G


@triton.jit
def unit_columns(
    row, first, inverse, x_ptr, n_anchors, stride_n, stride_d, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Columns ``[first, first + WIDTH)`` of the rows' unit features."""
    k = first + tl.arange(0, WIDTH)
    mask = (row < n_anchors)[:, None] & (k < D)[None, :]
    offsets = row[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_d
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(inverse.dtype) * inverse[:, None]


@triton.jit
def _store_gradient(
    G, q, row, first, radial, inverse, poison, gradient_ptr, n_anchors, D: tl.constexpr
):  # fmt: skip
    k = first + tl.arange(0, G.shape[1])
    mask = (row < n_anchors)[:, None] & (k < D)[None, :]
    G = (G - q * radial[:, None]) * inverse[:, None] + poison[:, None]
    offsets = row[:, None] * D + k[None, :]
    tl.store(gradient_ptr + offsets, G.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_anchors", "n_keys"])
def conr_backward_positives_kernel(
    layout_ptr,
    q_i_ptr,
    y_i_ptr,
    coef_i_ptr,
    q_j_ptr,
    y_j_ptr,
    coef_j_ptr,
    G_ptr,
    G_rest_ptr,
    n_anchors,
    n_keys,
    h: tl.float64,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    L: tl.constexpr,
    RMSE: tl.constexpr,
    SAME: tl.constexpr,
    SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``Σ_P H_ij q_j`` in the caller's order; as two bfloat16 summands where G is 16 bits wide."""
    PAD: tl.constexpr = 128
    EXACT: tl.constexpr = L == 1
    IN_HALVES: tl.constexpr = BLOCK_D > 128
    tile = tl.program_id(0)
    keys, anchors = tl.cdiv(n_keys, PAD) * PAD, tl.cdiv(n_anchors, PAD) * PAD
    order_i_ptr = layout_ptr + PAD + (0 if SAME else 2 * keys)
    self_ptr = layout_ptr + PAD + 2 * keys + 2 * anchors
    lo_ptr = self_ptr + anchors
    lo, hi, f0, f1, s0, s1 = segments(
        tile, lo_ptr, lo_ptr + 2 * anchors, self_ptr, n_anchors,
        True, SAME, EXACT, BLOCK_I, BLOCK_J,
    )  # fmt: skip

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
    alpha_i, log_alpha_i = load_coefficients(coef_i_ptr + i0 + rows, anchors, 0, SHIFTED)
    if INSIDE:
        beta_i = tl.load(coef_i_ptr + i0 + rows + anchors)
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    G = tl.zeros((BLOCK_I, BLOCK_D), dtype)

    for t in range(s0 - f0 + f1 - s1):
        j0 = tile_at(t, f0, s0, s1, f1, f1).to(tl.int64) * BLOCK_J
        q_j = load_tile(q_j_ptr + j0 * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
        s_ij = dot(q_i, tl.trans(q_j), None, PRECISION)
        alpha_j, log_alpha_j = load_coefficients(coef_j_ptr + j0 + columns, keys, 0, SHIFTED)
        H_ij = scale_pair(s_ij, alpha_i, alpha_j, log_alpha_i, log_alpha_j, SHIFTED)
        if INSIDE:
            beta_j = tl.load(coef_j_ptr + j0 + columns + keys)
            H_ij -= beta_i[:, None] + beta_j[None, :]
        G = add_product(G, H_ij, q_j, RESCALE, PRECISION, UPCAST)

    for t in range(f0 - lo + s1 - s0 + hi - f1):
        j0 = tile_at(t, lo, f0, s0, s1, f1).to(tl.int64) * BLOCK_J
        q_j = load_tile(q_j_ptr + j0 * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
        s_ij = dot(q_i, tl.trans(q_j), None, PRECISION)
        total = pair_total(y_i, y_i_ptrs, anchors, y_j_ptr + j0 + columns, keys, L, RMSE)
        is_in = (total <= h) & (self_i[:, None] != (j0.to(tl.int32) + columns)[None, :])
        alpha_j, log_alpha_j = load_coefficients(coef_j_ptr + j0 + columns, keys, 0, SHIFTED)
        H_ij = scale_pair(s_ij, alpha_i, alpha_j, log_alpha_i, log_alpha_j, SHIFTED)
        if INSIDE:
            beta_j = tl.load(coef_j_ptr + j0 + columns + keys)
            H_ij -= beta_i[:, None] + beta_j[None, :]
        H_ij = tl.where(is_in, H_ij, 0.0)
        G = add_product(G, H_ij, q_j, RESCALE, PRECISION, UPCAST)

    row = tl.load(order_i_ptr + i0 + rows).to(tl.int64)
    if IN_HALVES:
        left, right = halves(G)
        _store_sum(left, row, 0, G_ptr, G_rest_ptr, n_anchors, D)
        _store_sum(right, row, BLOCK_D // 2, G_ptr, G_rest_ptr, n_anchors, D)
    else:
        _store_sum(G, row, 0, G_ptr, G_rest_ptr, n_anchors, D)


@triton.jit(do_not_specialize=["n_anchors", "n_keys"])
def conr_backward_negatives_kernel(
    layout_ptr,
    q_i_ptr,
    y_i_ptr,
    p_i_ptr,
    coef_i_ptr,
    inverse_i_ptr,
    q_j_ptr,
    y_j_ptr,
    p_j_ptr,
    coef_j_ptr,
    x_ptr,
    G_ptr,
    G_rest_ptr,
    gradient_ptr,
    n_anchors,
    n_keys,
    stride_n,
    stride_d,
    h: tl.float64,
    push_scale: tl.float64,
    kappa: tl.float64,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    L: tl.constexpr,
    RMSE: tl.constexpr,
    SAME: tl.constexpr,
    SHIFTED: tl.constexpr,
    PUSHING: tl.constexpr,
    CONFUSED: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds ``Σ_M H_ij q_j`` to the positives' part and turns it into the gradient of x.

    G and the gradient may share their memory: a program reads and writes its own rows only.
    """
    PAD: tl.constexpr = 128
    EXACT: tl.constexpr = L == 1
    IN_HALVES: tl.constexpr = BLOCK_D > 128
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
    gamma_i, log_gamma_i = load_coefficients(coef_i_ptr + i0 + rows, anchors, 2, SHIFTED)
    G = tl.zeros((BLOCK_I, BLOCK_D), dtype)

    for t in range(f1 - f0 + g1 - g0):
        j0 = tile_at(t, f0, f1, g0, g1, g1).to(tl.int64) * BLOCK_J
        q_j = load_tile(q_j_ptr + j0 * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
        s_ij = dot(q_i, tl.trans(q_j), None, PRECISION)
        is_in, phi_ij, t_ij = negative_weights(
            y_i, y_i_ptrs, y_j_ptr + j0 + columns, p_i, p_i_ptrs, p_j_ptr + j0 + columns,
            anchors, keys, h, exponent, s_ij, False, L, RMSE, PUSHING,
        )  # fmt: skip
        gamma_j, log_gamma_j = load_coefficients(coef_j_ptr + j0 + columns, keys, 2, SHIFTED)
        H_ij = scale_pair(t_ij, gamma_i, gamma_j, log_gamma_i, log_gamma_j, SHIFTED)
        if SHIFTED:
            H_ij = tl.where(is_in, H_ij, 0.0)
        G = add_product(G, H_ij * phi_ij, q_j, RESCALE, PRECISION, UPCAST)

    for t in range(e1 - e0 + e3 - e2):
        j0 = tile_at(t, e0, e1, e2, e3, e3).to(tl.int64) * BLOCK_J
        q_j = load_tile(q_j_ptr + j0 * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
        s_ij = dot(q_i, tl.trans(q_j), None, PRECISION)
        is_in, phi_ij, t_ij = negative_weights(
            y_i, y_i_ptrs, y_j_ptr + j0 + columns, p_i, p_i_ptrs, p_j_ptr + j0 + columns,
            anchors, keys, h, exponent, s_ij, CONFUSED, L, RMSE, PUSHING,
        )  # fmt: skip
        gamma_j, log_gamma_j = load_coefficients(coef_j_ptr + j0 + columns, keys, 2, SHIFTED)
        H_ij = scale_pair(t_ij, gamma_i, gamma_j, log_gamma_i, log_gamma_j, SHIFTED)
        if SHIFTED:
            H_ij = tl.where(is_in, H_ij, 0.0)
        G = add_product(G, H_ij * phi_ij, q_j, RESCALE, PRECISION, UPCAST)

    order_ptr = layout_ptr + PAD + (0 if SAME else 2 * keys)
    if CONFUSED:
        order_ptr += tl.where(tl.load(layout_ptr) == 0, keys if SAME else anchors, 0)
    row = tl.load(order_ptr + i0 + rows).to(tl.int64)
    inverse = tl.load(inverse_i_ptr + i0 + rows)
    poison = tl.zeros((BLOCK_I,), dtype)
    for c in tl.static_range(3):
        poison += tl.load(coef_i_ptr + c * anchors + i0 + rows) * 0
    factor = tl.full((), kappa, dtype)
    if IN_HALVES:
        # A quarter's loads at a time: all at once would spill beside so wide a G.
        WIDTH: tl.constexpr = BLOCK_D // 4
        left, right = halves(G)
        first, second = halves(left)
        third, fourth = halves(right)
        parts = (first, second, third, fourth)
        radial = tl.zeros((BLOCK_I,), dtype)
        done = ()
        for c in tl.static_range(4):
            part = _add_sum(parts[c], row, c * WIDTH, G_ptr, G_rest_ptr, n_anchors, D) * factor
            q = unit_columns(
                row, c * WIDTH, inverse, x_ptr, n_anchors, stride_n, stride_d, D, WIDTH
            )
            radial += tl.sum(q * part, axis=1)
            done = done + (part,)
            tl.debug_barrier()
        for c in tl.static_range(4):
            q = unit_columns(
                row, c * WIDTH, inverse, x_ptr, n_anchors, stride_n, stride_d, D, WIDTH
            )
            _store_gradient(
                done[c], q, row, c * WIDTH, radial, inverse, poison, gradient_ptr, n_anchors, D
            )
            tl.debug_barrier()
    else:
        G = _add_sum(G, row, 0, G_ptr, G_rest_ptr, n_anchors, D) * factor
        q = unit_columns(row, 0, inverse, x_ptr, n_anchors, stride_n, stride_d, D, BLOCK_D)
        radial = tl.sum(q * G, axis=1)
        _store_gradient(G, q, row, 0, radial, inverse, poison, gradient_ptr, n_anchors, D)
