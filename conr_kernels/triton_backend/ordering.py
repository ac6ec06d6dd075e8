"""Triton kernels that put rows in order: sort keys, exact bands, choice of sweep, sorted copies."""

import triton
import triton.language as tl

from .arithmetic import halves_of, to_base_2, to_halves
from .layout import padded, parts_of


@triton.jit(do_not_specialize=["n_keys"])
def conr_spread_kernel(y_ptr, p_ptr, spread_ptr, n_keys, L: tl.constexpr, BLOCK: tl.constexpr):
    """Extent of one component of the labels or predictions; one program each."""
    c = tl.program_id(0)
    which = c // L
    column_ptr = y_ptr + c
    if which == 1:
        column_ptr = p_ptr + (c - L)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    low = tl.full((BLOCK,), float("inf"), dtype)
    high = tl.full((BLOCK,), float("-inf"), dtype)
    for start in range(0, n_keys, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        is_row = rows < n_keys
        y = tl.load(column_ptr + rows.to(tl.int64) * L, mask=is_row, other=0.0)
        low = tl.minimum(low, tl.where(is_row, y, float("inf")))
        high = tl.maximum(high, tl.where(is_row, y, float("-inf")))
    tl.store(spread_ptr + c, tl.max(high, axis=0) - tl.min(low, axis=0))


@triton.jit(do_not_specialize=["n_keys", "n_anchors"])
def conr_sort_keys_kernel(
    spread_ptr, key_y_ptr, key_p_ptr, y_ptr, p_ptr, key_values_ptr, anchor_values_ptr,
    n_keys, n_anchors,
    HAS_KEYS: tl.constexpr, L: tl.constexpr, L_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The widest component of labels and of predictions: of keys [2, K], of anchors [2, N]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    components = tl.arange(0, L_PAD)
    for which in tl.static_range(2):
        spread = tl.load(
            spread_ptr + which * L + components, mask=components < L, other=float("-inf")
        )
        best = tl.argmax(tl.where(spread == spread, spread, float("-inf")), axis=0)
        key_ptr = key_p_ptr if which == 1 else key_y_ptr
        is_key = rows < n_keys
        value = tl.load(key_ptr + rows * L + best, mask=is_key, other=0.0)
        tl.store(key_values_ptr + which * n_keys.to(tl.int64) + rows, value, mask=is_key)
        if HAS_KEYS:
            anchor_ptr = p_ptr if which == 1 else y_ptr
            is_anchor = rows < n_anchors
            value = tl.load(anchor_ptr + rows * L + best, mask=is_anchor, other=0.0)
            tl.store(
                anchor_values_ptr + which * n_anchors.to(tl.int64) + rows, value, mask=is_anchor
            )


@triton.jit
def _ends(y_i, is_lo, key_values_ptr, n_keys, n_steps, reach):
    """``min { j : y_i − y_j ≤ reach }``, where a band begins, or ``min { j : not y_j − y_i ≤ reach
    }``, where it ends, by binary search on the very comparison.
    """
    reach = tl.full((), reach, y_i.dtype)
    found = tl.zeros(y_i.shape, tl.int32)
    end = found + n_keys
    for _ in range(n_steps):
        mid = (found + end) // 2
        y_j = tl.load(key_values_ptr + tl.minimum(mid, n_keys - 1))
        is_near = tl.where(is_lo, y_i - y_j, y_j - y_i) <= reach
        is_found = (is_near == is_lo) | (mid >= n_keys)
        found, end = tl.where(is_found, found, mid + 1), tl.where(is_found, mid, end)
        found = tl.minimum(found, end)
    return end


@triton.jit
def _band_tile(
    pid, key_values_ptr, key_order_ptr, anchor_values_ptr, anchor_order_ptr,
    order_j_ptr, order_i_ptr, lo_ptr, hi_ptr, self_ptr, rank_ptr,
    n_anchors, n_keys, self_offset, n_steps, reach, HAS_KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Bands and orders of a tile; with HAS_KEYS the anchors' places among the keys."""
    rows = pid * ROWS + tl.arange(0, ROWS)
    n_padded_keys, n_padded = padded(n_keys), padded(n_anchors)
    order = tl.load(key_order_ptr + rows, mask=rows < n_keys, other=n_keys).to(tl.int32)
    tl.store(order_j_ptr + rows, order, mask=rows < n_padded_keys)
    if rank_ptr is not None:
        tl.store(rank_ptr + tl.where(rows < n_keys, order, rows), rows, mask=rows < n_padded_keys)
    i = tl.minimum(rows, n_anchors - 1)
    y_i = tl.load(anchor_values_ptr + i)
    is_lo = tl.arange(0, 2)[:, None] == 0
    ends = _ends(
        tl.broadcast_to(y_i[None, :], (2, ROWS)), is_lo, key_values_ptr, n_keys, n_steps, reach
    )
    tl.store(lo_ptr + rows, tl.sum(tl.where(is_lo, ends, 0), axis=0), mask=rows < n_padded)
    tl.store(hi_ptr + rows, tl.max(ends, axis=0), mask=rows < n_padded)

    if HAS_KEYS:
        # Equal values stand in their first order: the pair (value, row) finds the anchor's own key.
        row = tl.load(anchor_order_ptr + i).to(tl.int32)
        tl.store(order_i_ptr + rows, tl.where(rows < n_anchors, row, n_anchors), rows < n_padded)
        row += self_offset
        here, end = tl.zeros_like(rows), tl.zeros_like(rows) + n_keys
        for _ in range(n_steps):
            mid = tl.minimum((here + end) // 2, n_keys - 1)
            y_j = tl.load(key_values_ptr + mid)
            row_j = tl.load(key_order_ptr + mid).to(tl.int32)
            found = (y_j > y_i) | ((y_j == y_i) & (row_j >= row))
            here, end = tl.where(found, here, mid + 1), tl.where(found, mid, end)
            here = tl.minimum(here, end)
        tl.store(self_ptr + rows, end, mask=rows < n_padded)


@triton.jit
def _bands(
    pid, key_values_ptr, key_order_ptr, values_ptr, order_ptr, layout_ptr, rank_ptr,
    n_anchors, n_keys, self_offset, n_steps, reach,
    HAS_KEYS: tl.constexpr, HAS_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The bands of ROWS sorted anchors in both orders."""
    keys, anchors = padded(n_keys), padded(n_anchors)
    order_j_ptr, order_i_ptr, self_ptr, lo_ptr, hi_ptr = parts_of(layout_ptr, n_anchors, n_keys)
    _band_tile(
        pid, key_values_ptr, key_order_ptr, values_ptr, order_ptr,
        order_j_ptr, order_i_ptr, lo_ptr, hi_ptr, self_ptr, rank_ptr,
        n_anchors, n_keys, self_offset, n_steps, reach, HAS_KEYS, ROWS,
    )  # fmt: skip
    if HAS_P:
        # The negatives never include the anchor itself: its place in this order is not needed.
        order_ptr += n_anchors
        _band_tile(
            pid, key_values_ptr + n_keys, key_order_ptr + n_keys, values_ptr + n_anchors, order_ptr,
            order_j_ptr + keys, order_i_ptr + anchors, lo_ptr + anchors, hi_ptr + anchors,
            self_ptr, None if rank_ptr is None else rank_ptr + keys,
            n_anchors, n_keys, self_offset, n_steps, reach, False, ROWS,
        )  # fmt: skip
        if HAS_KEYS:
            rows = pid * ROWS + tl.arange(0, ROWS)
            order = tl.load(order_ptr + rows, mask=rows < n_anchors, other=n_anchors)
            tl.store(order_i_ptr + anchors + rows, order.to(tl.int32), mask=rows < anchors)


@triton.jit
def _choose(
    key_values_ptr, values_ptr, layout_ptr, n_anchors, n_keys, n_steps, reach,
    EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes down whether the negatives of all tiles of ROWS anchors visit fewer keys outside the
    bands of the labels than in those of the predictions (1), and there no prediction is known to be
    out of the window of another (2).
    """
    BLOCK: tl.constexpr = 512
    is_lo = tl.arange(0, 2)[:, None] == 0
    sign = tl.where(is_lo, -1, 1)
    excess = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n_anchors, BLOCK * ROWS):
        first = start + tl.arange(0, BLOCK)[None, :] * ROWS
        last = tl.minimum(first + ROWS, n_anchors) - 1
        is_tile = first < n_anchors
        first = tl.minimum(first, n_anchors - 1)
        # From where the first row's band of predictions begins to where the last one's ends.
        p_i = tl.load(values_ptr + n_anchors + tl.where(is_lo, first, last))
        ends = _ends(p_i, is_lo, key_values_ptr + n_keys, n_keys, n_steps, reach)
        here = tl.sum(sign * ends, axis=0) - n_keys
        if EXACT:
            # All anchors' label bands contain what lies between these.
            y_i = tl.load(values_ptr + tl.where(is_lo, last, first))
            ends = _ends(y_i, is_lo, key_values_ptr, n_keys, n_steps, reach)
            here += tl.maximum(tl.sum(sign * ends, axis=0), 0)
        excess += tl.where(tl.reshape(is_tile, (BLOCK,)), here, 0)
    choice = (tl.sum(excess, axis=0) >= 0).to(tl.int32)
    if EXACT:
        p_i, p_j = values_ptr + n_anchors, key_values_ptr + n_keys
        reach = tl.full((), reach, p_i.dtype.element_ty)
        is_near = tl.load(p_i + n_anchors - 1) - tl.load(p_j) <= reach
        is_near = is_near & (tl.load(p_j + n_keys - 1) - tl.load(p_i) <= reach)
        choice += choice & is_near.to(tl.int32)
    tl.store(layout_ptr, choice)


@triton.jit
def _load_rows(x_ptr, rows, is_row, columns, D: tl.constexpr, dtype: tl.constexpr):
    mask = is_row[:, None] & (columns < D)[None, :]
    return tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _store_unit(q, row_ptrs, columns, D_PAD: tl.constexpr, IN_HALVES: tl.constexpr):
    """Stores columns of unit features times the scale in rows of D_PAD numbers."""
    if IN_HALVES:
        large, small = to_halves(q)
        tl.store(halves_of(row_ptrs) + columns, large)
        tl.store(halves_of(row_ptrs) + D_PAD + columns, small)
    else:
        tl.store(row_ptrs + columns, q.to(row_ptrs.dtype.element_ty))


@triton.jit
def _gather_tile(
    pid, which, apart, order_ptr, given, w_ptr, coef_ptr, copies, sorted_coef_ptr, poison_ptr,
    n_rows, width, g, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, L: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, IN_HALVES: tl.constexpr,
):  # fmt: skip
    x_ptr, y_ptr, p_ptr = given
    q_ptr, inverse_ptr, sorted_y_ptr, sorted_p_ptr = copies
    here = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n_padded = padded(n_rows).to(tl.int64)
    rows = tl.load(order_ptr + here, mask=here < n_rows, other=n_rows)
    is_row = rows < n_rows
    behind = which * apart * n_padded
    q_ptr += behind * D_PAD
    inverse_ptr += behind
    sorted_y_ptr += behind * L
    sorted_p_ptr += behind * L
    rows = rows.to(tl.int64)
    columns = tl.arange(0, CHUNK).to(tl.int64)

    dtype: tl.constexpr = inverse_ptr.dtype.element_ty
    squares = tl.zeros((ROWS,), dtype)
    poison = tl.zeros((ROWS,), tl.float32)
    if D_PAD == CHUNK:
        x = _load_rows(x_ptr, rows, is_row, columns, D, dtype)
        squares += tl.sum(x * x, axis=1)
        poison += tl.sum((x * 0).to(tl.float32), axis=1)
    else:
        for k in range(0, width, CHUNK):
            x = _load_rows(x_ptr, rows, is_row, k + columns, D, dtype)
            squares += tl.sum(x * x, axis=1)
            poison += tl.sum((x * 0).to(tl.float32), axis=1)
    # A row's factor multiplies all its exponents, which reach 200: it is rounded once.
    is_zero = squares == 0
    norm = tl.sqrt(tl.where(is_zero, 1.0, squares).to(tl.float64))
    inverse = tl.where(is_zero, 0.0, 1.0 / norm)
    tl.store(inverse_ptr + here, inverse.to(dtype))
    factor = (inverse * scale).to(dtype)
    q_ptr += here[:, None] * D_PAD
    if D_PAD == CHUNK:
        _store_unit(x * factor[:, None], q_ptr, columns[None, :], D_PAD, IN_HALVES)
    else:
        for k in range(0, width, CHUNK):
            x = _load_rows(x_ptr, rows, is_row, k + columns, D, dtype)
            _store_unit(x * factor[:, None], q_ptr, k + columns[None, :], D_PAD, IN_HALVES)

    for c in range(L):
        y = tl.load(y_ptr + rows * L + c, mask=is_row, other=float("nan"))
        p = tl.load(p_ptr + rows * L + c, mask=is_row, other=float("nan"))
        tl.store(sorted_y_ptr + c * n_padded + here, y)
        tl.store(sorted_p_ptr + c * n_padded + here, p)
        poison += (y * 0 + p * 0).to(tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + rows, mask=is_row, other=0.0)
        poison += (w * 0).to(tl.float32)
    if poison_ptr is not None:
        tl.store(poison_ptr + rows, poison, mask=is_row & (which == 0))
    if coef_ptr is not None:
        coef_ptrs = coef_ptr + rows * COLUMNS
        sorted_ptrs = sorted_coef_ptr + behind * COLUMNS + here
        beta = tl.load(coef_ptrs + 1, mask=is_row, other=0.0)
        tl.store(sorted_ptrs + n_padded, (beta * g).to(beta.dtype))
        for c in tl.static_range(0, 3, 2):
            coef = tl.load(coef_ptrs + c, mask=is_row, other=0.0)
            coef = (coef * g).to(coef.dtype)
            if COLUMNS == 5:
                log = tl.load(coef_ptrs + 3 + c // 2, mask=is_row, other=0.0)
                coef, log = to_base_2(coef, log)
                tl.store(sorted_ptrs + (3 + c // 2) * n_padded, log)
            tl.store(sorted_ptrs + c * n_padded, coef)


@triton.jit(
    do_not_specialize=["n_anchors", "n_keys", "self_offset", "n_steps", "first", "apart"]
)  # fmt: skip
def conr_order_kernel(
    key_values_ptr, key_order_ptr, values_ptr, order_ptr, layout_ptr, rank_ptr,
    key_x_ptr, key_y_ptr, key_p_ptr, key_coef_ptr, q_j_ptr, inverse_j_ptr, y_j_ptr, p_j_ptr,
    coef_j_ptr, x_ptr, y_ptr, p_ptr, w_ptr, coef_ptr, q_i_ptr, inverse_i_ptr, y_i_ptr, p_i_ptr,
    coef_i_ptr, poison_ptr, upstream_ptr,
    n_anchors, n_keys, self_offset, n_steps, width, first, apart,
    reach: tl.float64, factor: tl.float64, scale: tl.float64,
    HAS_KEYS: tl.constexpr, HAS_P: tl.constexpr, EXACT: tl.constexpr, BAND_ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, L: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, IN_HALVES: tl.constexpr,
):  # fmt: skip
    """From the ``first`` program on: one for the choice of sweep; one per BAND_ROWS rows for the
    bands; one per ROWS rows for the copies in the order of the labels, then in that of the
    predictions: unit features times the scale, labels and coefficients times the upstream gradient
    and the factor. Poison, 0 or NaN, shows what is not finite in a row of the keys, then of the
    anchors, in the caller's order.

    The copies in the second order stand ``apart`` (1), behind the first, or replace them (0) if the
    choice falls on that order. Where no sorts are given, the layout has orders and choice, and the
    second copies are in the order that was chosen.
    """
    keys, anchors = padded(n_keys), padded(n_anchors)
    n_bands = 1 + tl.maximum(keys, anchors) // BAND_ROWS
    n_programs = (keys + (anchors if HAS_KEYS else 0)) // ROWS
    pid = tl.program_id(0) + first
    if pid < n_bands:
        if key_values_ptr is not None:
            if pid > 0:
                _bands(
                    pid - 1, key_values_ptr, key_order_ptr, values_ptr, order_ptr, layout_ptr,
                    rank_ptr, n_anchors, n_keys, self_offset, n_steps, reach,
                    HAS_KEYS, HAS_P, BAND_ROWS,
                )  # fmt: skip
            elif HAS_P:
                _choose(
                    key_values_ptr, values_ptr, layout_ptr, n_anchors, n_keys, n_steps, reach,
                    EXACT, BAND_ROWS,
                )  # fmt: skip
    else:
        pid -= n_bands
        which = pid // n_programs
        pid = pid % n_programs
        if key_values_ptr is None:
            order_j_ptr, order_i_ptr, _, _, _ = parts_of(layout_ptr, n_anchors, n_keys)
            step_j, step_i, is_chosen = keys, anchors, which == 1
        else:
            order_j_ptr, order_i_ptr = key_order_ptr, order_ptr
            step_j, step_i, is_chosen = n_keys, n_anchors, (which == 1) & (apart == 0)
        is_outside = False
        if is_chosen:
            is_outside = tl.load(layout_ptr) != 0
        if (which == 1) & (is_outside == 0):
            order_j_ptr += step_j
            order_i_ptr += step_i
        g = tl.full((), factor, tl.float64)
        if upstream_ptr is not None:
            g *= tl.load(upstream_ptr).to(tl.float64)
        if (is_outside == 0) | (apart == 1):
            if pid < keys // ROWS:
                _gather_tile(
                    pid, which, apart, order_j_ptr, (key_x_ptr, key_y_ptr, key_p_ptr),
                    None if HAS_KEYS else w_ptr, key_coef_ptr,
                    (q_j_ptr, inverse_j_ptr, y_j_ptr, p_j_ptr), coef_j_ptr, poison_ptr,
                    n_keys, width, g, scale, D, D_PAD, L, COLUMNS, ROWS, CHUNK, IN_HALVES,
                )  # fmt: skip
            elif HAS_KEYS:
                _gather_tile(
                    pid - keys // ROWS, which, apart, order_i_ptr, (x_ptr, y_ptr, p_ptr),
                    w_ptr, coef_ptr, (q_i_ptr, inverse_i_ptr, y_i_ptr, p_i_ptr), coef_i_ptr,
                    None if poison_ptr is None else poison_ptr + n_keys,
                    n_anchors, width, g, scale, D, D_PAD, L, COLUMNS, ROWS, CHUNK,
                    IN_HALVES,
                )  # fmt: skip
