"""The Triton kernels for few rows: no sort, every tile visited, few launches, any D.

The features are read as they are and their norms found on the way. The forward pass keeps s_ij and
the inverse norms: the backward pass forms no product of features. Where one program would read too
many columns, a launch before the forward's splits tiles and D.
"""

import triton
import triton.language as tl

from .arithmetic import (
    LOG2E,
    add_exponentials,
    dot,
    finish_rows,
    pair_total,
    scale_pair,
    store_rows,
    sum_of,
    to_base_2,
)
from .sweeps import negative_weights


@triton.jit
def _load_chunk(
    x_ptr, rows, n_rows, k, stride_n, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    columns = k + tl.arange(0, BLOCK_D).to(tl.int64)
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns[None, :] * stride_d
    x = tl.load(x_ptr + offsets, mask=(rows < n_rows)[:, None] & (columns < D)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _gram_tile(
    x_i_ptr, stride_in, stride_id, rows_i, n_i, x_j_ptr, stride_jn, stride_jd, rows_j, n_j, k0, k1,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``x_i·x_j`` and both squared norms over the columns ``k0 … k1``."""
    dtype: tl.constexpr = tl.float64 if x_i_ptr.dtype.element_ty == tl.float64 else tl.float32
    gram = tl.zeros((BLOCK_I, BLOCK_J), dtype)
    squares_i, squares_j = tl.zeros((BLOCK_I,), dtype), tl.zeros((BLOCK_J,), dtype)
    for k in range(k0, k1, BLOCK_D):
        x_i = _load_chunk(x_i_ptr, rows_i, n_i, k, stride_in, stride_id, D, BLOCK_D, UPCAST)
        x_j = _load_chunk(x_j_ptr, rows_j, n_j, k, stride_jn, stride_jd, D, BLOCK_D, UPCAST)
        gram = dot(x_i, tl.trans(x_j), gram, PRECISION)
        wide_i, wide_j = x_i.to(dtype), x_j.to(dtype)
        squares_i += tl.sum(wide_i * wide_i, axis=1)
        squares_j += tl.sum(wide_j * wide_j, axis=1)
    return gram, squares_i, squares_j


@triton.jit
def _inverse_root(squares):
    """In float64: it multiplies all of a row's exponents, which reach 200, and is rounded once."""
    is_zero = squares == 0
    norm = tl.sqrt(tl.where(is_zero, 1.0, squares).to(tl.float64))
    return tl.where(is_zero, 0.0, 1.0 / norm)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_tiles_j", "n_chunks"])
def conr_gram_kernel(
    x_ptr,
    key_x_ptr,
    gram_ptr,
    n_anchors,
    n_keys,
    stride_n,
    stride_d,
    key_stride_n,
    key_stride_d,
    n_tiles_j,
    n_chunks,
    width,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of ``x_i·x_j`` over one part of D, with the squared norms behind it; a program each.

    ``gram`` [parts, tiles, BLOCK_I·BLOCK_J + BLOCK_I + BLOCK_J].
    """
    SIZE: tl.constexpr = BLOCK_I * BLOCK_J + BLOCK_I + BLOCK_J
    n_tiles = tl.cdiv(n_anchors, BLOCK_I) * n_tiles_j
    pid = tl.program_id(0)
    tile, part = pid % n_tiles, pid // n_tiles
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    k0 = part * n_chunks * BLOCK_D
    gram, squares_i, squares_j = _gram_tile(
        x_ptr, stride_n, stride_d, (tile // n_tiles_j) * BLOCK_I + rows, n_anchors,
        key_x_ptr, key_stride_n, key_stride_d, (tile % n_tiles_j) * BLOCK_J + columns, n_keys,
        k0, tl.minimum(k0 + n_chunks * BLOCK_D, width), D,
        BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
    )  # fmt: skip
    gram_ptr += pid.to(tl.int64) * SIZE
    tl.store(gram_ptr + rows[:, None] * BLOCK_J + columns[None, :], gram)
    tl.store(gram_ptr + BLOCK_I * BLOCK_J + rows, squares_i)
    tl.store(gram_ptr + BLOCK_I * BLOCK_J + BLOCK_I + columns, squares_j)


@triton.jit
def _gram_sum(
    gram_ptr, tile_i, tile_j, n_tiles, n_tiles_j, n_parts, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """A tile's ``x_i·x_j`` and squared norms from the parts that ``conr_gram_kernel`` wrote."""
    SIZE: tl.constexpr = BLOCK_I * BLOCK_J + BLOCK_I + BLOCK_J
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    dtype: tl.constexpr = gram_ptr.dtype.element_ty
    gram = tl.zeros((BLOCK_I, BLOCK_J), dtype)
    squares_i, squares_j = tl.zeros((BLOCK_I,), dtype), tl.zeros((BLOCK_J,), dtype)
    # Unrolled: the parts' loads wait together.
    for part in tl.range(0, n_parts, loop_unroll_factor=4):
        offset = (part * n_tiles + tile_i * n_tiles_j + tile_j).to(tl.int64) * SIZE
        at = gram_ptr + offset
        gram += tl.load(at + rows[:, None] * BLOCK_J + columns[None, :])
        squares_i += tl.load(at + BLOCK_I * BLOCK_J + rows)
        squares_j += tl.load(at + BLOCK_I * BLOCK_J + BLOCK_I + columns)
    return gram, squares_i, squares_j


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "self_offset", "n_tiles_j", "n_parts"])
def conr_forward_dense_kernel(
    x_ptr,
    y_ptr,
    p_ptr,
    w_ptr,
    key_x_ptr,
    key_y_ptr,
    key_p_ptr,
    gram_ptr,
    loss_ptr,
    stats_ptr,
    s_ptr,
    n_anchors,
    n_keys,
    self_offset,
    stride_n,
    stride_d,
    key_stride_n,
    key_stride_d,
    s_stride,
    n_tiles_j,
    n_parts,
    width,
    h: tl.float64,
    push_scale: tl.float64,
    scale: tl.float64,
    D: tl.constexpr,
    L: tl.constexpr,
    RMSE: tl.constexpr,
    SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr,
    PUSHING: tl.constexpr,
    CONFUSED: tl.constexpr,
    UNIT_TERMS: tl.constexpr,
    COUNT_SELF: tl.constexpr,
    WEIGHTED_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Losses and statistics of BLOCK_I anchors against all keys; a program each.

    Leaves ``log₂e·s_ij`` [N, K] and the inverse norms of anchors [N] and keys [K] behind ``s_ptr``.
    """
    LN2: tl.constexpr = 0.6931471805599453
    IS_ONE_CHUNK: tl.constexpr = D <= BLOCK_D
    tile = tl.program_id(0)
    rows = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    is_row = rows < n_anchors
    i = tl.minimum(rows, n_anchors - 1)
    y_i_ptrs, p_i_ptrs = y_ptr + i * L, p_ptr + i * L
    y_i, p_i = tl.load(y_i_ptrs), tl.load(p_i_ptrs)
    h = tl.full((), h, y_i.dtype)
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    exponent = tl.full((), push_scale * LOG2E, dtype)
    inverse_i_ptr = s_ptr + n_anchors.to(tl.int64) * s_stride
    inverse_j_ptr = inverse_i_ptr + n_anchors
    if SHIFTED:
        E, B = tl.zeros((BLOCK_I,), dtype), tl.zeros((BLOCK_I,), dtype)
    else:
        E = tl.zeros((BLOCK_I, BLOCK_J), dtype)
        B = tl.zeros((BLOCK_I, BLOCK_J), dtype)
    top_E = tl.full((BLOCK_I,), float("-inf"), dtype)
    top_B = tl.full((BLOCK_I,), float("-inf"), dtype)
    # Reduced once after the loop, like E and B; a count is at most 2²⁰.
    n, m = tl.zeros((BLOCK_I, BLOCK_J), dtype), tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    s_sum = tl.zeros((BLOCK_I, BLOCK_J), dtype)
    poison_i, poison_j = tl.zeros((BLOCK_I,), dtype), tl.zeros((BLOCK_J,), dtype)
    if IS_ONE_CHUNK:
        x_i = _load_chunk(x_ptr, rows, n_anchors, 0, stride_n, stride_d, D, BLOCK_D, UPCAST)
        wide_i = x_i.to(dtype)
        squares_i = tl.sum(wide_i * wide_i, axis=1)

    for tile_j in range(n_tiles_j):
        columns = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
        j = tl.minimum(columns, n_keys - 1)
        is_key = columns < n_keys
        if IS_ONE_CHUNK:
            x_j = _load_chunk(
                key_x_ptr, columns, n_keys, 0, key_stride_n, key_stride_d, D, BLOCK_D, UPCAST
            )
            gram = dot(x_i, tl.trans(x_j), None, PRECISION)
            wide_j = x_j.to(dtype)
            squares_j = tl.sum(wide_j * wide_j, axis=1)
        elif gram_ptr is None:
            gram, squares_i, squares_j = _gram_tile(
                x_ptr, stride_n, stride_d, rows, n_anchors,
                key_x_ptr, key_stride_n, key_stride_d, columns, n_keys,
                0, width, D, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            gram, squares_i, squares_j = _gram_sum(
                gram_ptr, tile, tile_j, tl.num_programs(0) * n_tiles_j, n_tiles_j, n_parts,
                BLOCK_I, BLOCK_J,
            )  # fmt: skip
        inverse_i, inverse_j = _inverse_root(squares_i), _inverse_root(squares_j)
        factor_i, inverse_j = (inverse_i * scale).to(dtype), inverse_j.to(dtype)
        s_ij = (gram * factor_i[:, None]) * inverse_j[None, :]
        offsets = rows.to(tl.int64)[:, None] * s_stride + columns[None, :]
        tl.store(s_ptr + offsets, s_ij, mask=is_row[:, None] & (columns < s_stride)[None, :])
        if tile_j == 0:
            tl.store(inverse_i_ptr + rows, inverse_i.to(dtype), mask=is_row)
        if tile == 0:
            tl.store(inverse_j_ptr + columns, inverse_j, mask=is_key)

        total = pair_total(y_i, y_i_ptrs, 1, key_y_ptr + j * L, 1, L, RMSE)
        is_positive = (total <= h) & ((rows + self_offset)[:, None] != columns[None, :])
        is_positive = is_positive & is_key[None, :]
        weight = tl.where(is_positive, 1.0, 0.0).to(dtype)
        n += weight
        if INSIDE:
            s_sum += s_ij * weight
        E, top_E = add_exponentials(E, top_E, s_ij, weight, is_positive, SHIFTED, True)
        is_negative, phi_ij, t_ij = negative_weights(
            y_i, y_i_ptrs, key_y_ptr + j * L, p_i, p_i_ptrs, key_p_ptr + j * L,
            1, 1, h, exponent, s_ij, CONFUSED, L, RMSE, PUSHING,
        )  # fmt: skip
        is_negative = is_negative & is_key[None, :]
        phi_ij = tl.where(is_key[None, :], phi_ij, 0.0)
        m |= is_negative.to(tl.int32)
        B, top_B = add_exponentials(B, top_B, t_ij, phi_ij, is_negative, SHIFTED, True)
        # A non-finite feature has a non-finite squared norm.
        poison_i += squares_i * 0
        poison_j += squares_j * 0
        for c in range(L):
            y_j, p_j = tl.load(key_y_ptr + j * L + c), tl.load(key_p_ptr + j * L + c)
            poison_j += (y_j * 0 + p_j * 0).to(dtype)

    w = tl.full((BLOCK_I,), 1.0, tl.float64)
    if w_ptr is not None:
        w = tl.load(w_ptr + i).to(tl.float64)
    poison = poison_i.to(tl.float64) + w * 0 + tl.sum(poison_j, axis=0).to(tl.float64)
    loss, alpha, beta, gamma, log_alpha, log_gamma = finish_rows(
        sum_of(E, top_E, SHIFTED), sum_of(B, top_B, SHIFTED),
        tl.sum(s_sum, axis=1).to(tl.float64) * LN2, tl.sum(n, axis=1).to(tl.float64),
        tl.max(m, axis=1) != 0, w, n_keys.to(tl.float64), push_scale,
        SHIFTED, INSIDE, PUSHING, UNIT_TERMS, COUNT_SELF, WEIGHTED_ROWS,
    )  # fmt: skip
    store_rows(
        loss_ptr, stats_ptr, rows.to(tl.int64), is_row, poison,
        loss, alpha, beta, gamma, log_alpha, log_gamma, SHIFTED,
    )  # fmt: skip


@triton.jit
def _dense_coefficients(
    coef_ptr, rows, FIRST: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr
):  # fmt: skip
    """A coefficient of rows and its log₂ (columns FIRST and 3 + FIRST/2 of the five)."""
    of = tl.load(coef_ptr + rows * COLUMNS + FIRST)
    log = of
    if SHIFTED:
        of, log = to_base_2(of, tl.load(coef_ptr + rows * COLUMNS + 3 + FIRST // 2))
    return of, log


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "self_offset", "n_tiles_j"])
def conr_pair_gradient_kernel(
    y_ptr,
    p_ptr,
    coef_i_ptr,
    key_y_ptr,
    key_p_ptr,
    coef_j_ptr,
    s_ptr,
    W_ptr,
    radial_ptr,
    n_anchors,
    n_keys,
    self_offset,
    s_stride,
    n_tiles_j,
    h: tl.float64,
    push_scale: tl.float64,
    L: tl.constexpr,
    RMSE: tl.constexpr,
    SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr,
    PUSHING: tl.constexpr,
    CONFUSED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One tile of ``W_ij = H_ij/‖x_j‖`` and its part of ``q_i·∂L/∂q_i = Σ_j H_ij s_ij``, from the
    s_ij that the forward pass left; a program each.
    """
    LN2: tl.constexpr = 0.6931471805599453
    COLUMNS: tl.constexpr = 5 if SHIFTED else 3
    pid = tl.program_id(0)
    tile_i, tile_j = pid // n_tiles_j, pid % n_tiles_j
    rows = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    columns = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    is_row = rows < n_anchors
    # Beyond the last key all is the last key's, but s_ij, which is 0.
    i, j = tl.minimum(rows, n_anchors - 1), tl.minimum(columns, n_keys - 1)
    offsets = rows.to(tl.int64)[:, None] * s_stride + columns[None, :]
    is_kept = is_row[:, None] & (columns < s_stride)[None, :]
    s_ij = tl.load(s_ptr + offsets, mask=is_kept, other=0.0)
    y_i_ptrs, p_i_ptrs = y_ptr + i * L, p_ptr + i * L
    y_i, p_i = tl.load(y_i_ptrs), tl.load(p_i_ptrs)
    h = tl.full((), h, y_i.dtype)
    exponent = tl.full((), push_scale * LOG2E, s_ij.dtype)
    total = pair_total(y_i, y_i_ptrs, 1, key_y_ptr + j * L, 1, L, RMSE)
    is_positive = (total <= h) & ((rows + self_offset)[:, None] != columns[None, :])
    is_negative, phi_ij, t_ij = negative_weights(
        y_i, y_i_ptrs, key_y_ptr + j * L, p_i, p_i_ptrs, key_p_ptr + j * L,
        1, 1, h, exponent, s_ij, CONFUSED, L, RMSE, PUSHING,
    )  # fmt: skip

    alpha_i, log_alpha_i = _dense_coefficients(coef_i_ptr, i, 0, COLUMNS, SHIFTED)
    alpha_j, log_alpha_j = _dense_coefficients(coef_j_ptr, j, 0, COLUMNS, SHIFTED)
    gamma_i, log_gamma_i = _dense_coefficients(coef_i_ptr, i, 2, COLUMNS, SHIFTED)
    gamma_j, log_gamma_j = _dense_coefficients(coef_j_ptr, j, 2, COLUMNS, SHIFTED)
    H_ij = scale_pair(s_ij, alpha_i, alpha_j, log_alpha_i, log_alpha_j, SHIFTED)
    if INSIDE:
        beta_i = tl.load(coef_i_ptr + i * COLUMNS + 1)
        beta_j = tl.load(coef_j_ptr + j * COLUMNS + 1)
        H_ij -= beta_i[:, None] + beta_j[None, :]
    H_negative = scale_pair(t_ij, gamma_i, gamma_j, log_gamma_i, log_gamma_j, SHIFTED)
    H_negative = tl.where(is_negative, H_negative, 0.0) * phi_ij
    H_ij = tl.where(is_positive, H_ij, H_negative)
    H_ij = tl.where((columns < n_keys)[None, :], H_ij, 0.0)

    inverse_j = tl.load(s_ptr + n_anchors.to(tl.int64) * s_stride + n_anchors + j)
    tl.store(W_ptr + offsets, H_ij * inverse_j[None, :], mask=is_kept)
    radial = tl.sum(H_ij * s_ij, axis=1) * LN2
    tl.store(radial_ptr + rows * n_tiles_j + tile_j, radial, mask=is_row)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_tiles_j"])
def conr_feature_gradient_kernel(
    x_ptr,
    coef_i_ptr,
    key_x_ptr,
    s_ptr,
    W_ptr,
    radial_ptr,
    gradient_ptr,
    n_anchors,
    n_keys,
    stride_n,
    stride_d,
    key_stride_n,
    key_stride_d,
    s_stride,
    n_tiles_j,
    inverse_tau: tl.float64,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``( Σ_j W_ij x_j/τ − q_i radial_i )/‖x_i‖`` of BLOCK_I rows and BLOCK_D columns; a program
    each.
    """
    dtype: tl.constexpr = W_ptr.dtype.element_ty
    pid = tl.program_id(0)
    n_chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    rows = (pid // n_chunks) * BLOCK_I + tl.arange(0, BLOCK_I)
    k = (pid % n_chunks) * BLOCK_D
    is_row = rows < n_anchors
    G = tl.zeros((BLOCK_I, BLOCK_D), dtype)
    for tile_j in range(n_tiles_j):
        columns = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
        offsets = rows.to(tl.int64)[:, None] * s_stride + columns[None, :]
        is_kept = is_row[:, None] & (columns < s_stride)[None, :]
        W_ij = tl.load(W_ptr + offsets, mask=is_kept, other=0.0)
        x_j = _load_chunk(
            key_x_ptr, columns, n_keys, k, key_stride_n, key_stride_d, D, BLOCK_D, False
        )
        G = dot(W_ij, x_j.to(dtype), G, PRECISION)
    G *= tl.full((), inverse_tau, dtype)
    inverse = tl.load(s_ptr + n_anchors.to(tl.int64) * s_stride + rows, mask=is_row, other=0.0)
    x_i = _load_chunk(x_ptr, rows, n_anchors, k, stride_n, stride_d, D, BLOCK_D, False).to(dtype)
    poison = tl.zeros((BLOCK_I,), dtype)
    for c in tl.static_range(3):
        poison += tl.load(coef_i_ptr + rows * COLUMNS + c, mask=is_row, other=0.0) * 0
    q_i = x_i * inverse[:, None]
    if n_chunks == 1:
        radial = tl.sum(q_i * G, axis=1)
    else:
        radial = tl.zeros((BLOCK_I,), dtype)
        for tile_j in tl.range(0, n_tiles_j, loop_unroll_factor=4):
            radial += tl.load(radial_ptr + rows * n_tiles_j + tile_j, mask=is_row, other=0.0)
    G = (G - q_i * radial[:, None]) * inverse[:, None] + poison[:, None]
    columns = k + tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(gradient_ptr + offsets, G.to(gradient_ptr.dtype.element_ty), mask=mask)
