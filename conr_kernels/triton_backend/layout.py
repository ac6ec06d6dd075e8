"""Triton kernels that put rows in order: sort keys, exact bands, choice of sweep, sorted copies."""

import triton
import triton.language as tl

from .arithmetic import to_base_2


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
def padded(n):
    """Sorted arrays have zero features and NaN labels, which no set contains, up to there."""
    return tl.cdiv(n, 128) * 128


@triton.jit
def parts_of(layout_ptr, n_anchors, n_keys):
    """Behind a head of 128 numbers, whose first is the choice of sweep, for the order of the labels
    and that of the predictions: the orders of keys and of anchors, the anchors' places among the
    keys (once), the first keys of their bands and the first beyond.
    """
    keys, anchors = padded(n_keys), padded(n_anchors)
    order_i_ptr = layout_ptr + 128 + 2 * keys
    self_ptr = order_i_ptr + 2 * anchors
    lo_ptr = self_ptr + anchors
    return layout_ptr + 128, order_i_ptr, self_ptr, lo_ptr, lo_ptr + 2 * anchors


@triton.jit
def _band_tile(
    pid, key_values_ptr, key_order_ptr, anchor_values_ptr, anchor_order_ptr,
    order_j_ptr, order_i_ptr, lo_ptr, hi_ptr, self_ptr,
    n_anchors, n_keys, self_offset, n_steps, reach, HAS_KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = pid * ROWS + tl.arange(0, ROWS)
    n_padded_keys, n_padded = padded(n_keys), padded(n_anchors)
    order = tl.load(key_order_ptr + rows, mask=rows < n_keys, other=n_keys).to(tl.int32)
    tl.store(order_j_ptr + rows, order, mask=rows < n_padded_keys)
    i = tl.minimum(rows, n_anchors - 1)
    y_i = tl.load(anchor_values_ptr + i)
    reach = tl.full((), reach, y_i.dtype)
    last = n_keys - 1

    lo, hi = tl.zeros_like(rows), tl.zeros_like(rows)
    lo_end, hi_end = lo + n_keys, hi + n_keys
    for _ in range(n_steps):
        mid = (lo + lo_end) // 2
        found = (y_i - tl.load(key_values_ptr + tl.minimum(mid, last)) <= reach) | (mid > last)
        lo, lo_end = tl.where(found, lo, mid + 1), tl.where(found, mid, lo_end)
        lo = tl.minimum(lo, lo_end)
        mid = (hi + hi_end) // 2
        is_near = tl.load(key_values_ptr + tl.minimum(mid, last)) - y_i <= reach
        found = (mid > last) | (is_near == 0)
        hi, hi_end = tl.where(found, hi, mid + 1), tl.where(found, mid, hi_end)
        hi = tl.minimum(hi, hi_end)
    hi_end = tl.maximum(lo_end, hi_end)
    tl.store(lo_ptr + rows, lo_end, mask=rows < n_padded)
    tl.store(hi_ptr + rows, hi_end, mask=rows < n_padded)

    if HAS_KEYS:
        # Equal values stand in their first order: the pair (value, row) finds the anchor's own key.
        row = tl.load(anchor_order_ptr + i).to(tl.int32)
        tl.store(order_i_ptr + rows, tl.where(rows < n_anchors, row, n_anchors), rows < n_padded)
        row += self_offset
        here, end = tl.zeros_like(rows), tl.zeros_like(rows) + n_keys
        for _ in range(n_steps):
            mid = tl.minimum((here + end) // 2, last)
            y_j = tl.load(key_values_ptr + mid)
            row_j = tl.load(key_order_ptr + mid).to(tl.int32)
            found = (y_j > y_i) | ((y_j == y_i) & (row_j >= row))
            here, end = tl.where(found, here, mid + 1), tl.where(found, mid, end)
            here = tl.minimum(here, end)
        tl.store(self_ptr + rows, end, mask=rows < n_padded)
    return lo_end, hi_end


@triton.jit
def _at(values, index):
    """One of a tile's numbers."""
    is_it = tl.arange(0, values.shape[0]) == index
    return tl.sum(tl.where(is_it, values, 0), axis=0)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "self_offset", "n_steps"])
def conr_bands_kernel(
    key_values_ptr, key_order_ptr, values_ptr, order_ptr, layout_ptr, excess_ptr,
    n_anchors, n_keys, self_offset, n_steps, reach: tl.float64,
    HAS_KEYS: tl.constexpr, HAS_P: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every sorted anchor's band, by binary search on ``|y_i − y_j| ≤ reach`` itself; a program
    per ROWS rows. ``excess``: how many more keys those rows' negatives visit in the bands of the
    predictions than outside those of the labels.

    ``lo_i = min { j : y_i − y_j ≤ reach }``, ``hi_i = min { j : not y_j − y_i ≤ reach }``.
    """
    pid = tl.program_id(0)
    keys, anchors = padded(n_keys), padded(n_anchors)
    order_j_ptr, order_i_ptr, self_ptr, lo_ptr, hi_ptr = parts_of(layout_ptr, n_anchors, n_keys)
    lo, hi = _band_tile(
        pid, key_values_ptr, key_order_ptr, values_ptr, order_ptr,
        order_j_ptr, order_i_ptr, lo_ptr, hi_ptr, self_ptr,
        n_anchors, n_keys, self_offset, n_steps, reach, HAS_KEYS, ROWS,
    )  # fmt: skip
    if HAS_P:
        # The negatives never include the anchor itself: its place in this order is not needed.
        p_lo, p_hi = _band_tile(
            pid, key_values_ptr + n_keys, key_order_ptr + n_keys, values_ptr + n_anchors,
            order_ptr + n_anchors,
            order_j_ptr + keys, order_i_ptr + anchors, lo_ptr + anchors, hi_ptr + anchors,
            self_ptr, n_anchors, n_keys, self_offset, n_steps, reach, False, ROWS,
        )  # fmt: skip
        if HAS_KEYS:
            rows = pid * ROWS + tl.arange(0, ROWS)
            is_row = rows < n_anchors
            order = tl.load(order_ptr + n_anchors + rows, mask=is_row, other=n_anchors)
            tl.store(order_i_ptr + anchors + rows, order.to(tl.int32), mask=rows < anchors)
        excess = _at(p_hi, ROWS - 1) - _at(p_lo, 0) - n_keys
        if EXACT:
            excess += tl.maximum(_at(hi, 0) - _at(lo, ROWS - 1), 0)
        tl.store(excess_ptr + pid, excess, mask=pid * ROWS < n_anchors)
    elif pid == 0:
        tl.store(layout_ptr, 1)


@triton.jit
def _choose(excess_ptr, n_anchors, BLOCK: tl.constexpr):
    """Whether the negatives are cheaper outside the label bands."""
    total = tl.zeros((BLOCK,), tl.int64)
    n_tiles = padded(n_anchors) // 128
    for start in range(0, n_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(excess_ptr + tile, mask=tile < n_tiles, other=0)
    return tl.sum(total, axis=0) >= 0


@triton.jit
def _load_rows(x_ptr, rows, is_row, columns, D: tl.constexpr, dtype: tl.constexpr):
    mask = is_row[:, None] & (columns < D)[None, :]
    return tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _gather_tile(
    pid, which, apart, order_ptr, given, w_ptr, coef_ptr, copies, sorted_coef_ptr, poison_ptr,
    n_rows, width, g, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, L: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    x_ptr, y_ptr, p_ptr = given
    q_ptr, inverse_ptr, sorted_y_ptr, sorted_p_ptr = copies
    here = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n_padded = padded(n_rows).to(tl.int64)
    rows = tl.load(order_ptr + here)
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
    q_ptrs = q_ptr + here[:, None] * D_PAD + columns[None, :]
    if D_PAD == CHUNK:
        tl.store(q_ptrs, (x * factor[:, None]).to(q_ptr.dtype.element_ty))
    else:
        for k in range(0, width, CHUNK):
            x = _load_rows(x_ptr, rows, is_row, k + columns, D, dtype)
            tl.store(q_ptrs + k, (x * factor[:, None]).to(q_ptr.dtype.element_ty))

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
        coef_ptrs, sorted_ptrs = (
            coef_ptr + rows * COLUMNS,
            sorted_coef_ptr + behind * COLUMNS + here,
        )
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


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "first", "apart"])
def conr_gather_kernel(
    layout_ptr, excess_ptr, key_x_ptr, key_y_ptr, key_p_ptr, key_coef_ptr,
    q_j_ptr, inverse_j_ptr, y_j_ptr, p_j_ptr, coef_j_ptr,
    x_ptr, y_ptr, p_ptr, w_ptr, coef_ptr, q_i_ptr, inverse_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr,
    poison_ptr, upstream_ptr, n_anchors, n_keys, width, first, apart,
    factor: tl.float64, scale: tl.float64,
    HAS_KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, L: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Unit features times the scale, labels and coefficients times the upstream gradient and the
    factor, in the order of the labels, then in that of the predictions; from the ``first`` program
    on, one per ROWS rows. Poison, 0 or NaN, shows what is not finite in a row of the keys, then of
    the anchors, in the caller's order.

    The copies in the second order stand ``apart`` (1), behind the first, or replace them (0). Where
    the choice, which the first such program of the forward pass writes down, falls on the order of
    the labels, they are in that order.
    """
    keys, anchors = padded(n_keys), padded(n_anchors)
    n_programs = (keys + (anchors if HAS_KEYS else 0)) // ROWS
    pid = tl.program_id(0) + first
    which = pid // n_programs
    pid = pid % n_programs
    order_j_ptr, order_i_ptr, _, _, _ = parts_of(layout_ptr, n_anchors, n_keys)
    is_needed = (which == 0) | (apart == 1)
    if which == 1:
        if excess_ptr is not None:
            is_outside = _choose(excess_ptr, n_anchors, 256)
            if pid == 0:
                tl.store(layout_ptr, is_outside.to(tl.int32))
        else:
            is_outside = tl.load(layout_ptr) != 0
        is_needed |= is_outside == 0
        order_j_ptr += tl.where(is_outside, 0, keys)
        order_i_ptr += tl.where(is_outside, 0, anchors)
    g = tl.full((), factor, tl.float64)
    if upstream_ptr is not None:
        g *= tl.load(upstream_ptr).to(tl.float64)
    if is_needed:
        if pid < keys // ROWS:
            _gather_tile(
                pid, which, apart, order_j_ptr, (key_x_ptr, key_y_ptr, key_p_ptr),
                None if HAS_KEYS else w_ptr, key_coef_ptr,
                (q_j_ptr, inverse_j_ptr, y_j_ptr, p_j_ptr), coef_j_ptr, poison_ptr,
                n_keys, width, g, scale, D, D_PAD, L, COLUMNS, ROWS, CHUNK,
            )  # fmt: skip
        elif HAS_KEYS:
            _gather_tile(
                pid - keys // ROWS, which, apart, order_i_ptr, (x_ptr, y_ptr, p_ptr),
                w_ptr, coef_ptr, (q_i_ptr, inverse_i_ptr, y_i_ptr, p_i_ptr), coef_i_ptr,
                None if poison_ptr is None else poison_ptr + n_keys,
                n_anchors, width, g, scale, D, D_PAD, L, COLUMNS, ROWS, CHUNK,
            )  # fmt: skip


@triton.jit
def sweep_of(
    layout_ptr, n_anchors, n_keys,
    NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Whether the negatives are visited outside the label bands, and what the layout says of the
    sweep's anchors: their order, their places among the keys, their bands.
    """
    order_j_ptr, order_i_ptr, self_ptr, lo_ptr, hi_ptr = parts_of(layout_ptr, n_anchors, n_keys)
    order_ptr = order_j_ptr if SAME else order_i_ptr
    is_outside = tl.load(layout_ptr) != 0
    if NEGATIVES and CONFUSED:
        anchors = tl.where(is_outside, 0, padded(n_anchors))
        order_ptr += tl.where(is_outside, 0, padded(n_keys)) if SAME else anchors
        lo_ptr += anchors
        hi_ptr += anchors
    return is_outside, order_ptr, self_ptr, lo_ptr, hi_ptr


@triton.jit
def key_tiles(
    tile, layout_ptr, n_anchors, n_keys, NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr,
    SAME: tl.constexpr, EXACT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The key tiles that a tile of anchors visits: all; those whose every pair lies in the anchors'
    bands, but for tiles that may hold an anchor's pair with itself; the others.
    """
    is_outside, _, self_ptr, lo_ptr, hi_ptr = sweep_of(
        layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME
    )
    first = tile * BLOCK_I
    last = tl.minimum(first + BLOCK_I, n_anchors) - 1
    lo = tl.load(lo_ptr + first) // BLOCK_J
    hi = tl.cdiv(tl.load(hi_ptr + last), BLOCK_J)
    f0, f1 = hi, hi
    if EXACT:
        f0 = tl.cdiv(tl.load(lo_ptr + last), BLOCK_J)
        f1 = tl.load(hi_ptr + first) // BLOCK_J
        is_empty = f1 <= f0
        f0, f1 = tl.where(is_empty, hi, f0), tl.where(is_empty, hi, f1)
    if not NEGATIVES:
        if SAME:
            self_first, self_last = first, last
        else:
            self_first, self_last = tl.load(self_ptr + first), tl.load(self_ptr + last)
        s0 = tl.minimum(tl.maximum(self_first // BLOCK_J, f0), f1)
        s1 = tl.minimum(tl.maximum(self_last // BLOCK_J + 1, f0), f1)
        every = _union(lo, hi, hi, hi)
        full, edges = _union(f0, s0, s1, f1), (lo, f0, s0, s1, f1, hi)
    else:
        end = tl.cdiv(n_keys, BLOCK_J)
        if CONFUSED:
            # Outside: all but the tiles that hold positives alone, and no predictions are known.
            lo, hi = tl.where(is_outside, 0, lo), tl.where(is_outside, end, hi)
            g0 = tl.where(is_outside, f1, f0)
            every = _union(lo, tl.where(is_outside, f0, f1), f1, hi)
            full, edges = _union(g0, f1, f1, f1), _union(lo, f0, f1, hi)
        else:
            every = _union(0, f0, f1, end)
            full, edges = every, _union(end, end, end, end)
    return every, full, edges


@triton.jit
def _union(a0, a1, b0, b1):
    return a0, a1, b0, b1, b1, b1


@triton.jit
def count_of(pieces):
    a0, a1, b0, b1, c0, c1 = pieces
    return a1 - a0 + b1 - b0 + c1 - c0


@triton.jit
def tile_at(t, pieces):
    """The t-th tile of ``[a0, a1) ∪ [b0, b1) ∪ [c0, c1)``."""
    a0, a1, b0, b1, c0, _ = pieces
    n_a, n_b = a1 - a0, b1 - b0
    after_a = tl.where(t < n_a + n_b, b0 + t - n_a, c0 + t - n_a - n_b)
    return tl.where(t < n_a, a0 + t, after_a)
