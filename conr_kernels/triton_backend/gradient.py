"""The Triton kernels of the two banded sweeps, backward, with a row's gradient in registers.

Tiles are visited as in the forward pass: see triton_sweeps.py.
"""

import triton
import triton.language as tl

from .arithmetic import dot, load_tile, pair_total, scale_pair
from .layout import segments, tile_at
from .sweeps import negative_segments, negative_weights


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
