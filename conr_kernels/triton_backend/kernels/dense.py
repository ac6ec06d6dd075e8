"""The Triton kernels for few rows, forward: every pair, no sort, tiles of rows and of keys, any D.

Sums of a row over parts of the keys, then losses, statistics and totals. ``kept`` is what the
gradient reads: inverse norms of anchors and keys and the anchors' factors of s_ij, each padded to a
multiple of 16, then, where pairs are few, ``log₂e·s_ij``.
"""

import triton
import triton.language as tl

from .arithmetic import (
    LN2,
    LOG2E,
    add_exponentials,
    await_earlier,
    counted_keys,
    dot,
    finish_rows,
    join_parts,
    rounded_statistics,
    store_columns,
    sum_of,
    sum_of_products,
)
from .pairs import load_labels, unrolled_total, weigh_negatives

#: Sections of ``kept`` and of the row sums start at multiples of this.
PAD = tl.constexpr(16)


@triton.jit
def padded_16(n):
    return tl.cdiv(n, PAD) * PAD


@triton.jit
def load_chunk(
    x_ptr, rows, n_rows, k, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Columns ``k … k + BLOCK_D`` of rows, 0 beyond the last row and column."""
    columns = k + tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=(rows < n_rows)[:, None] & (columns < D)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _gram_tile(
    x_i_ptr, rows_i, n_i, x_j_ptr, rows_j, n_j, k0, k1,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``x_i·x_j`` and both squared norms over the columns ``k0 … k1``."""
    dtype: tl.constexpr = tl.float64 if x_i_ptr.dtype.element_ty == tl.float64 else tl.float32
    gram = tl.zeros((BLOCK_I, BLOCK_J), dtype)
    squares_i, squares_j = tl.zeros((BLOCK_I,), dtype), tl.zeros((BLOCK_J,), dtype)
    for k in range(k0, k1, BLOCK_D):
        x_i = load_chunk(x_i_ptr, rows_i, n_i, k, D, BLOCK_D, UPCAST)
        x_j = load_chunk(x_j_ptr, rows_j, n_j, k, D, BLOCK_D, UPCAST)
        gram = dot(x_i, tl.trans(x_j), gram, PRECISION)
        squares_i += _squares(x_i, dtype)
        squares_j += _squares(x_j, dtype)
    return gram, squares_i, squares_j


@triton.jit
def _squares(x, dtype: tl.constexpr):
    wide = x.to(dtype)
    if x.dtype.primitive_bitwidth < 32:
        return tl.sum(wide * wide, axis=1)  # the products are exact
    else:
        return sum_of_products(wide, wide)


@triton.jit
def _inverse_root(squares):
    """``1/√squares`` to its last place, 0 of 0: all of a row's exponents, which reach 200, are
    multiplied by it.
    """
    if squares.dtype == tl.float64:
        is_zero = squares == 0
        return tl.where(is_zero, 0.0, 1.0 / tl.sqrt(tl.where(is_zero, 1.0, squares)))
    else:
        is_zero = squares < 1.1754944e-38  # what the approximation takes for 0
        root = tl.rsqrt(tl.where(is_zero, 1.0, squares))
        rest = tl.fma(-squares * root, root, 1.0)
        return tl.where(is_zero, 0.0, tl.fma(0.5 * root, rest, root))


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_tiles_j", "n_chunks"])
def conr_gram_kernel(
    x_ptr, key_x_ptr, gram_ptr, n_anchors, n_keys, n_tiles_j, n_chunks, width,
    D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of ``x_i·x_j`` over one part of D, with the squared norms behind it; a program each.

    ``gram`` [parts, tiles, BLOCK_I·BLOCK_J + BLOCK_I + BLOCK_J].
    """
    await_earlier(EARLY)
    SIZE: tl.constexpr = BLOCK_I * BLOCK_J + BLOCK_I + BLOCK_J
    n_tiles = tl.cdiv(n_anchors, BLOCK_I) * n_tiles_j
    pid = tl.program_id(0)
    tile, part = pid % n_tiles, pid // n_tiles
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    k0 = part * n_chunks * BLOCK_D
    gram, squares_i, squares_j = _gram_tile(
        x_ptr, (tile // n_tiles_j) * BLOCK_I + rows, n_anchors,
        key_x_ptr, (tile % n_tiles_j) * BLOCK_J + columns, n_keys,
        k0, tl.minimum(k0 + n_chunks * BLOCK_D, width), D,
        BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
    )  # fmt: skip
    gram_ptr += pid.to(tl.int64) * SIZE
    tl.store(gram_ptr + rows[:, None] * BLOCK_J + columns[None, :], gram)
    tl.store(gram_ptr + BLOCK_I * BLOCK_J + rows, squares_i)
    tl.store(gram_ptr + BLOCK_I * BLOCK_J + BLOCK_I + columns, squares_j)


@triton.jit
def _gram_sum(
    gram_ptr, tile, n_tiles, n_parts, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """A tile's ``x_i·x_j`` and squared norms from the parts that ``conr_gram_kernel`` wrote."""
    SIZE: tl.constexpr = BLOCK_I * BLOCK_J + BLOCK_I + BLOCK_J
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    dtype: tl.constexpr = gram_ptr.dtype.element_ty
    gram = tl.zeros((BLOCK_I, BLOCK_J), dtype)
    squares_i, squares_j = tl.zeros((BLOCK_I,), dtype), tl.zeros((BLOCK_J,), dtype)
    # Unrolled: the parts' loads wait together.
    for part in tl.range(0, n_parts, loop_unroll_factor=4):
        at = gram_ptr + (part * n_tiles + tile).to(tl.int64) * SIZE
        gram += tl.load(at + rows[:, None] * BLOCK_J + columns[None, :])
        squares_i += tl.load(at + BLOCK_I * BLOCK_J + rows)
        squares_j += tl.load(at + BLOCK_I * BLOCK_J + BLOCK_I + columns)
    return gram, squares_i, squares_j


@triton.jit
def pairs_of_tile(
    y_i, p_i, y_ptr, p_ptr, key_y_ptr, key_p_ptr, rows, columns, n_anchors, n_keys, self_offset,
    h, exponent, s_ij, WIDE: tl.constexpr, L: tl.constexpr, RMSE: tl.constexpr,
    PHI: tl.constexpr, CONFUSED: tl.constexpr,
):  # fmt: skip
    """``[j ∈ P_i]``, ``[j ∈ M_i]``, ``φ_ij`` (0 outside ``M_i``) and the negatives' exponents."""
    h = tl.full((), h, y_i.dtype)
    i, j = tl.minimum(rows, n_anchors - 1), tl.minimum(columns, n_keys - 1)
    is_pair = (rows < n_anchors)[:, None] & (columns < n_keys)[None, :]
    total = unrolled_total(y_i, y_ptr, i, key_y_ptr, j, L, RMSE, WIDE)
    is_other = (rows + self_offset)[:, None] != columns[None, :]
    is_positive = (total <= h) & is_other & is_pair
    is_negative = (total > h) & is_pair
    if CONFUSED:
        delta = unrolled_total(p_i, p_ptr, i, key_p_ptr, j, L, RMSE, WIDE)
        is_negative = is_negative & (delta <= h)
    exponent = tl.full((), exponent, s_ij.dtype)
    phi_ij, t_ij = weigh_negatives(total, is_negative, exponent, s_ij, L, RMSE, PHI)
    return is_positive, is_negative, phi_ij, t_ij


@triton.jit
def _add(total, top, t_ij, weight, is_in, SHIFTED: tl.constexpr):
    """Adds a tile's ``weight·exp2(t_ij)`` to the rows' ``total·exp2(top)``; unshifted top is 0."""
    if SHIFTED:
        return add_exponentials(total, top, t_ij, weight, is_in, True, True)
    else:
        return total + tl.sum(tl.exp2(t_ij) * weight, axis=1), top


@triton.jit(
    do_not_specialize=[
        "n_anchors", "n_keys", "self_offset", "n_tiles_j", "per_part", "n_gram_parts",
    ]
)  # fmt: skip
def conr_dense_sums_kernel(
    x_ptr, y_ptr, p_ptr, key_x_ptr, key_y_ptr, key_p_ptr, gram_ptr, kept_ptr, sums_ptr,
    n_anchors, n_keys, self_offset, n_tiles_j, per_part, n_gram_parts, width,
    h: tl.float64, push_scale: tl.float64, scale: tl.float64,
    D: tl.constexpr, L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr, PHI: tl.constexpr, CONFUSED: tl.constexpr, KEPT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK_I anchors over ``per_part`` tiles of keys; a program each.

    ``sums`` [4, 5 or 7, parts, N padded]: E, B, n, m, Σ_P s_ij, top of E, of B; not finite inputs
    make n NaN, which a key's are in every row.
    """
    await_earlier(EARLY)
    IS_ONE_CHUNK: tl.constexpr = D <= BLOCK_D
    n_parts = tl.cdiv(n_tiles_j, per_part)
    pid = tl.program_id(0)
    tile_i, part = pid // n_parts, pid % n_parts
    rows = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    is_row = rows < n_anchors
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_padded = padded_16(n_anchors)
    inverse_j_ptr = kept_ptr + n_padded
    factor_ptr = inverse_j_ptr + padded_16(n_keys)
    s_ptr = factor_ptr + n_padded
    i = tl.minimum(rows, n_anchors - 1)
    y_i, p_i = load_labels(y_ptr, i, 0, L, WIDE), load_labels(p_ptr, i, 0, L, WIDE)
    E, B = tl.zeros((BLOCK_I,), dtype), tl.zeros((BLOCK_I,), dtype)
    n, m = tl.zeros((BLOCK_I,), dtype), tl.zeros((BLOCK_I,), dtype)
    s_sum = tl.zeros((BLOCK_I,), dtype)
    top_E = tl.full((BLOCK_I,), float("-inf"), dtype)
    top_B = tl.full((BLOCK_I,), float("-inf"), dtype)
    if IS_ONE_CHUNK:
        x_i = load_chunk(x_ptr, rows, n_anchors, 0, D, BLOCK_D, UPCAST)
        squares_i = _squares(x_i, dtype)

    first = part * per_part
    for tile_j in range(first, tl.minimum(first + per_part, n_tiles_j)):
        columns = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
        if IS_ONE_CHUNK:
            x_j = load_chunk(key_x_ptr, columns, n_keys, 0, D, BLOCK_D, UPCAST)
            gram = dot(x_i, tl.trans(x_j), None, PRECISION)
            squares_j = _squares(x_j, dtype)
        elif gram_ptr is None:
            gram, squares_i, squares_j = _gram_tile(
                x_ptr, rows, n_anchors, key_x_ptr, columns, n_keys,
                0, width, D, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            n_tiles = tl.cdiv(n_anchors, BLOCK_I) * n_tiles_j
            gram, squares_i, squares_j = _gram_sum(
                gram_ptr, tile_i * n_tiles_j + tile_j, n_tiles, n_gram_parts, BLOCK_I, BLOCK_J
            )
        inverse_i, inverse_j = _inverse_root(squares_i), _inverse_root(squares_j)
        factor_i = (inverse_i.to(tl.float64) * scale).to(dtype)
        s_ij = (gram * factor_i[:, None]) * inverse_j[None, :]
        if tile_j == 0:
            tl.store(kept_ptr + rows, inverse_i, mask=rows < n_padded)
            tl.store(factor_ptr + rows, factor_i, mask=rows < n_padded)
        if tile_i == 0:
            tl.store(inverse_j_ptr + columns, inverse_j, mask=columns < padded_16(n_keys))
        if KEPT:
            offsets = rows.to(tl.int64)[:, None] * padded_16(n_keys) + columns[None, :]
            mask = is_row[:, None] & (columns < padded_16(n_keys))[None, :]
            tl.store(s_ptr + offsets, s_ij, mask=mask)

        is_positive, is_negative, phi_ij, t_ij = pairs_of_tile(
            y_i, p_i, y_ptr, p_ptr, key_y_ptr, key_p_ptr, rows, columns, n_anchors, n_keys,
            self_offset, h, push_scale * LOG2E, s_ij, WIDE, L, RMSE, PHI, CONFUSED,
        )  # fmt: skip
        # Ones made of s_ij: the masks are then found once, in the layout of its tile.
        one = s_ij * 0 + 1
        weight = tl.where(is_positive, one, 0.0)
        E, top_E = _add(E, top_E, s_ij, weight, is_positive, SHIFTED)
        B, top_B = _add(B, top_B, t_ij, phi_ij, is_negative, SHIFTED)
        m += tl.sum(tl.where(is_negative, one, 0.0), axis=1)
        if INSIDE:
            s_sum += tl.sum(s_ij * weight, axis=1)
        # A non-finite feature has a non-finite squared norm.
        poison_j = squares_j * 0
        j = tl.minimum(columns, n_keys - 1).to(tl.int64) * L
        for c in range(L):
            y_j, p_j = tl.load(key_y_ptr + j + c), tl.load(key_p_ptr + j + c)
            poison_j += y_j.to(dtype) * 0 + p_j.to(dtype) * 0
        n += tl.sum(weight, axis=1) + squares_i * 0 + tl.sum(poison_j, axis=0)

    field = n_parts.to(tl.int64) * n_padded
    sums_ptr += part.to(tl.int64) * n_padded
    tl.store(sums_ptr + rows, E, mask=is_row)
    tl.store(sums_ptr + field + rows, B, mask=is_row)
    tl.store(sums_ptr + 2 * field + rows, n, mask=is_row)
    tl.store(sums_ptr + 3 * field + rows, m, mask=is_row)
    if INSIDE or SHIFTED:
        tl.store(sums_ptr + 4 * field + rows, s_sum, mask=is_row)
    if SHIFTED:
        tl.store(sums_ptr + 5 * field + rows, top_E, mask=is_row)
        tl.store(sums_ptr + 6 * field + rows, top_B, mask=is_row)


@triton.jit
def _load_sums(sums_ptr, field, parts, n_parts, rows, n_rows, other):
    offsets = parts.to(tl.int64)[:, None] * padded_16(n_rows) + rows[None, :]
    mask = (parts < n_parts)[:, None] & (rows < n_rows)[None, :]
    return tl.load(sums_ptr + field + offsets, mask=mask, other=other)


@triton.jit
def _row_sum(
    sums_ptr, which: tl.constexpr, top_at: tl.constexpr, parts, n_parts, rows, n_rows,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """A sum over the parts in float64, or its natural logarithm where it was shifted."""
    field = n_parts.to(tl.int64) * padded_16(n_rows)
    total = _load_sums(sums_ptr, which * field, parts, n_parts, rows, n_rows, 0.0).to(tl.float64)
    if SHIFTED:
        tops = _load_sums(sums_ptr, top_at * field, parts, n_parts, rows, n_rows, float("-inf"))
        total, top = join_parts(total, tops.to(tl.float64), 0)
        return sum_of(total, top, True)
    else:
        return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_parts"])
def conr_dense_rows_kernel(
    w_ptr, n_absent_ptr, sums_ptr, loss_ptr, stats_ptr,
    n_anchors, n_keys, n_parts, push_scale: tl.float64,
    SHIFTED: tl.constexpr, INSIDE: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
    UNIT_TERMS: tl.constexpr, COUNT_SELF: tl.constexpr, WEIGHTED_ROWS: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Losses and statistics of ROWS rows from their sums over at most PARTS parts.

    ``n_absent``: how many keys ``unit_terms`` does not count.
    """
    await_earlier(EARLY)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n_anchors
    parts = tl.arange(0, PARTS)
    n = _row_sum(sums_ptr, 2, 0, parts, n_parts, rows, n_anchors, False)
    m = _row_sum(sums_ptr, 3, 0, parts, n_parts, rows, n_anchors, False)
    s_sum = tl.zeros((ROWS,), tl.float64)
    if INSIDE:
        s_sum = _row_sum(sums_ptr, 4, 0, parts, n_parts, rows, n_anchors, False) * LN2
    w = tl.full((ROWS,), 1.0, tl.float64)
    if w_ptr is not None:
        w = tl.load(w_ptr + rows, mask=is_row, other=1.0).to(tl.float64)
    n_counted = counted_keys(n_keys, n_absent_ptr, n)
    loss, alpha, beta, gamma, log_alpha, log_gamma = finish_rows(
        _row_sum(sums_ptr, 0, 5, parts, n_parts, rows, n_anchors, SHIFTED),
        _row_sum(sums_ptr, 1, 6, parts, n_parts, rows, n_anchors, SHIFTED),
        s_sum, n, m != 0, w, n_counted, push_scale,
        SHIFTED, INSIDE, SCALED, WEIGHTED, UNIT_TERMS, COUNT_SELF, WEIGHTED_ROWS,
    )  # fmt: skip
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    poison, rows = (n + w) * 0, rows.to(tl.int64)
    tl.store(loss_ptr + rows, (loss + poison).to(dtype), mask=is_row)
    stats = rounded_statistics(alpha, beta, gamma, log_alpha, log_gamma, poison, dtype, SHIFTED)
    store_columns(stats_ptr + rows * (5 if SHIFTED else 3), 1, is_row, stats, SHIFTED)


@triton.jit
def store_total(pid, loss_ptr, out_ptr, n_rows, factor, BLOCK: tl.constexpr):
    """``factor·Σ_i ℓ_i``, added in a fixed order by the first program."""
    if pid == 0:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, n_rows, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            total += tl.load(loss_ptr + rows, mask=rows < n_rows, other=0.0).to(tl.float64)
        tl.store(out_ptr, (tl.sum(total, axis=0) * factor).to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n_rows"])
def conr_total_kernel(
    loss_ptr, out_ptr, n_rows, factor: tl.float64, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The sum of losses, or of their parts' sums, times a factor; one program."""
    await_earlier(EARLY)
    store_total(tl.program_id(0), loss_ptr, out_ptr, n_rows, factor, BLOCK)
