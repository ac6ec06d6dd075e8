"""The Triton kernels for few rows, backward: gradients over parts of the keys, then their sum."""

import triton
import triton.language as tl

from .arithmetic import LN2, LOG2E, await_earlier, dot, scale_pair, sum_of_products, to_base_2
from .dense import load_chunk, padded_16, pairs_of_tile, store_total
from .pairs import load_labels


@triton.jit
def _coefficients(
    coef_ptr, rows, FIRST: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr
):  # fmt: skip
    """A coefficient of rows and its log₂ (columns FIRST and 3 + FIRST/2 of the five)."""
    of = tl.load(coef_ptr + rows * COLUMNS + FIRST)
    log = of
    if SHIFTED:
        of, log = to_base_2(of, tl.load(coef_ptr + rows * COLUMNS + 3 + FIRST // 2))
    return of, log


@triton.jit
def _add_product(G, W_ij, x_j, PRECISION: tl.constexpr):
    """``G + W_ij·x_j`` in the features' dtype; float16 kept in range by each row's largest."""
    if x_j.dtype == tl.float16:
        largest = tl.max(tl.abs(W_ij), axis=1)
        scale = tl.where(largest > 1e-30, largest, 1.0)
        W_ij = (W_ij * (1.0 / scale)[:, None]).to(tl.float16)
        return G + dot(W_ij, x_j, None, PRECISION) * scale[:, None]
    else:
        return dot(W_ij.to(x_j.dtype), x_j, G, PRECISION)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "self_offset", "n_tiles_j", "per_part"])
def conr_dense_gradient_kernel(
    x_ptr, y_ptr, p_ptr, coef_i_ptr, key_x_ptr, key_y_ptr, key_p_ptr, coef_j_ptr, kept_ptr,
    G_ptr, radial_ptr, loss_ptr, out_ptr,
    n_anchors, n_keys, self_offset, n_tiles_j, per_part,
    h: tl.float64, push_scale: tl.float64, factor: tl.float64,
    D: tl.constexpr, L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr, PHI: tl.constexpr, CONFUSED: tl.constexpr, KEPT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``Σ_j H_ij q_j`` of BLOCK_I anchors over ``per_part`` tiles of keys and BLOCK_D columns; a
    program each. The first adds up the losses where their total is wanted.

    G [parts, N, D]; where D has several chunks, ``Σ_j H_ij s_ij`` [parts, N padded] too.
    """
    await_earlier(EARLY)
    COLUMNS: tl.constexpr = 5 if SHIFTED else 3
    N_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    n_parts = tl.cdiv(n_tiles_j, per_part)
    pid = tl.program_id(0)
    chunk, part = pid % N_CHUNKS, (pid // N_CHUNKS) % n_parts
    rows = (pid // N_CHUNKS // n_parts) * BLOCK_I + tl.arange(0, BLOCK_I)
    if out_ptr is not None:
        store_total(pid, loss_ptr, out_ptr, n_anchors, factor, 1024)
    is_row = rows < n_anchors
    i = tl.minimum(rows, n_anchors - 1).to(tl.int64)
    k = chunk * BLOCK_D
    dtype: tl.constexpr = kept_ptr.dtype.element_ty
    n_padded = padded_16(n_anchors)
    inverse_j_ptr = kept_ptr + n_padded
    factor_ptr = inverse_j_ptr + padded_16(n_keys)
    s_ptr = factor_ptr + n_padded
    alpha_i, log_alpha_i = _coefficients(coef_i_ptr, i, 0, COLUMNS, SHIFTED)
    gamma_i, log_gamma_i = _coefficients(coef_i_ptr, i, 2, COLUMNS, SHIFTED)
    y_i, p_i = load_labels(y_ptr, i, 0, L, WIDE), load_labels(p_ptr, i, 0, L, WIDE)
    if not KEPT:
        x_i = load_chunk(x_ptr, rows, n_anchors, 0, D, BLOCK_D, UPCAST)
        factor_i = tl.load(factor_ptr + i)
    G = tl.zeros((BLOCK_I, BLOCK_D), dtype)
    radial = tl.zeros((BLOCK_I,), dtype)

    first = part * per_part
    for tile_j in range(first, tl.minimum(first + per_part, n_tiles_j)):
        columns = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
        j = tl.minimum(columns, n_keys - 1).to(tl.int64)
        x_j = load_chunk(key_x_ptr, columns, n_keys, k, D, BLOCK_D, UPCAST)
        inverse_j = tl.load(inverse_j_ptr + j)
        if KEPT:
            offsets = rows.to(tl.int64)[:, None] * padded_16(n_keys) + columns[None, :]
            mask = is_row[:, None] & (columns < padded_16(n_keys))[None, :]
            s_ij = tl.load(s_ptr + offsets, mask=mask, other=0.0)
        else:
            gram = dot(x_i, tl.trans(x_j), None, PRECISION)
            s_ij = (gram * factor_i[:, None]) * inverse_j[None, :]
        is_positive, is_negative, phi_ij, t_ij = pairs_of_tile(
            y_i, p_i, y_ptr, p_ptr, key_y_ptr, key_p_ptr, rows, columns, n_anchors, n_keys,
            self_offset, h, push_scale * LOG2E, s_ij, WIDE, L, RMSE, PHI, CONFUSED,
        )  # fmt: skip
        alpha_j, log_alpha_j = _coefficients(coef_j_ptr, j, 0, COLUMNS, SHIFTED)
        gamma_j, log_gamma_j = _coefficients(coef_j_ptr, j, 2, COLUMNS, SHIFTED)
        if SHIFTED:
            H_ij = scale_pair(s_ij, alpha_i, alpha_j, log_alpha_i, log_alpha_j, SHIFTED)
            H_negative = scale_pair(t_ij, gamma_i, gamma_j, log_gamma_i, log_gamma_j, SHIFTED)
            H_negative *= phi_ij
        else:
            # Without a shift both have the exponent s_ij.
            P_ij = tl.exp2(s_ij)
            H_ij = P_ij * (alpha_i[:, None] + alpha_j[None, :])
            H_negative = P_ij * phi_ij * (gamma_i[:, None] + gamma_j[None, :])
        if INSIDE:
            beta_i = tl.load(coef_i_ptr + i * COLUMNS + 1)
            beta_j = tl.load(coef_j_ptr + j * COLUMNS + 1)
            H_ij -= beta_i[:, None] + beta_j[None, :]
        H_ij = tl.where(is_positive, H_ij, tl.where(is_negative, H_negative, 0.0))
        if L > 4:
            # A sum of one number, which no layout passes: Triton 3.6 would carry that of the
            # product's factor up to the masks, where it cannot lower it.
            H_ij = tl.sum(H_ij[:, :, None], axis=2)
        if N_CHUNKS > 1:
            radial += tl.sum(H_ij * s_ij, axis=1) * LN2
        G = _add_product(G, H_ij * inverse_j[None, :], x_j, PRECISION)

    columns = k + tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (columns < D)[None, :]
    offsets = (part.to(tl.int64) * n_anchors + rows)[:, None] * D + columns[None, :]
    tl.store(G_ptr + offsets, G, mask=mask)
    if N_CHUNKS > 1:
        radial_ptr += part.to(tl.int64) * n_padded
        tl.store(radial_ptr + rows, radial, mask=is_row & (chunk == 0))


@triton.jit(do_not_specialize=["n_anchors", "n_parts"])
def conr_dense_finish_kernel(
    x_ptr, coef_ptr, kept_ptr, G_ptr, radial_ptr, upstream_ptr, gradient_ptr,
    n_anchors, n_parts, factor: tl.float64, inverse_tau: tl.float64,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """``(Σ_j H_ij q_j/τ − q_i radial_i)/‖x_i‖`` times the upstream gradient of ROWS rows and
    BLOCK_D columns; a program each.
    """
    await_earlier(EARLY)
    N_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    dtype: tl.constexpr = kept_ptr.dtype.element_ty
    rows = (pid // N_CHUNKS) * ROWS + tl.arange(0, ROWS)
    k = (pid % N_CHUNKS) * BLOCK_D
    is_row = rows < n_anchors
    columns = k + tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    G = tl.zeros((ROWS, BLOCK_D), dtype)
    for _ in range(n_parts):
        G += tl.load(G_ptr + offsets, mask=mask, other=0.0)
        G_ptr += n_anchors.to(tl.int64) * D
    G *= tl.full((), inverse_tau, dtype)
    inverse = tl.load(kept_ptr + rows, mask=is_row, other=0.0)
    q_i = load_chunk(x_ptr, rows, n_anchors, k, D, BLOCK_D, False).to(dtype) * inverse[:, None]
    if N_CHUNKS == 1:
        radial = sum_of_products(q_i, G)
    else:
        radial = tl.zeros((ROWS,), dtype)
        for _ in range(n_parts):
            radial += tl.load(radial_ptr + rows, mask=is_row, other=0.0)
            radial_ptr += padded_16(n_anchors)
    poison = tl.zeros((ROWS,), dtype)
    for c in tl.static_range(3):
        poison += tl.load(coef_ptr + rows * COLUMNS + c, mask=is_row, other=0.0) * 0
    G = (G - q_i * radial[:, None]) * inverse[:, None] + poison[:, None]
    if upstream_ptr is not None:
        G *= (tl.load(upstream_ptr).to(tl.float64) * factor).to(dtype)
    tl.store(gradient_ptr + offsets, G.to(gradient_ptr.dtype.element_ty), mask=mask)
