"""Triton kernels that put rows in order: a stable sort of labels and predictions; bands, choice of
sweep and sorted copies.
"""

import triton
import triton.language as tl

from .arithmetic import await_earlier, store_tile, to_base_2
from .layout import ROW_PAD, choose_sweep, find_bands, padded, parts_of, ranks_of


@triton.jit(do_not_specialize=["n_keys"])
def conr_spread_kernel(
    y_ptr, p_ptr, spread_ptr, n_keys, L: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Extent of one component of the labels or predictions; one program each."""
    await_earlier(EARLY)
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
    EARLY: tl.constexpr,
):  # fmt: skip
    """The widest component of labels and of predictions: of keys [2, K], of anchors [2, N]."""
    await_earlier(EARLY)
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
def _flipped(bits, WIDE: tl.constexpr):
    """Bits of floating-point numbers as integers of the same order, in which -0 is 0; and back."""
    lowest: tl.constexpr = -(2**63) if WIDE else -(2**31)
    return tl.where(bits < 0, lowest - bits, bits)


@triton.jit
def _images(y_ptr, rows, n_rows):
    """Integers in the order of the rows' values: all NaN alike, then rows behind the last."""
    is_row = rows < n_rows
    y = tl.load(y_ptr + rows, mask=is_row, other=0.0)
    WIDE: tl.constexpr = y.dtype == tl.float64
    nan: tl.constexpr = 0x7FF8 << 48 if WIDE else 0x7FC0 << 16
    behind: tl.constexpr = 2**63 - 2 if WIDE else 2**31 - 2
    image = _flipped(y.to(tl.int64 if WIDE else tl.int32, bitcast=True), WIDE)
    return tl.where(is_row, tl.where(y == y, image, nan), behind)


@triton.jit
def _sort_tile(
    pid, y_ptr, images_ptr, order_ptr, n_rows, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    first = pid * ROWS // BLOCK * BLOCK
    here, rows = first + tl.arange(0, BLOCK), pid * ROWS + tl.arange(0, ROWS)
    image, others = _images(y_ptr, rows, n_rows), _images(y_ptr, here, n_rows)
    # Of equal values the earlier row comes first. A thread counts the others of whole rows.
    reach = image[None, :] + (here // ROWS < pid)[:, None]
    place = first + tl.sum((others[:, None] < reach).to(tl.int32), axis=0)
    is_equal = (image[:, None] == image[None, :]) & (rows[:, None] < rows[None, :])
    place += tl.sum(is_equal.to(tl.int32), axis=0)
    tl.store(images_ptr + place, image)
    tl.store(order_ptr + place, rows)


@triton.jit(do_not_specialize=["n_anchors", "n_keys"])
def conr_sort_kernel(
    key_y_ptr, key_p_ptr, y_ptr, p_ptr, images_j_ptr, sorted_j_ptr, images_i_ptr, sorted_i_ptr,
    n_anchors, n_keys, HAS_KEYS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Sorts each BLOCK of the keys' labels, then of the anchors', then of the predictions: images
    of their values and their rows, by counting; a program for each ROWS of them.
    """
    await_earlier(EARLY)
    pid = tl.program_id(0)
    keys, anchors = tl.cdiv(n_keys, BLOCK) * BLOCK, tl.cdiv(n_anchors, BLOCK) * BLOCK
    n_programs = (keys + (anchors if HAS_KEYS else 0)) // ROWS
    which = pid // n_programs
    pid = pid % n_programs
    if HAS_KEYS and pid * ROWS >= keys:
        pid -= keys // ROWS
        key_y_ptr, key_p_ptr, n_keys, keys = y_ptr, p_ptr, n_anchors, anchors
        images_j_ptr, sorted_j_ptr = images_i_ptr, sorted_i_ptr
    if which == 1:
        key_y_ptr = key_p_ptr
    behind = which.to(tl.int64) * keys
    images_j_ptr += behind
    sorted_j_ptr += behind
    _sort_tile(pid, key_y_ptr, images_j_ptr, sorted_j_ptr, n_keys, BLOCK, ROWS)


@triton.jit
def _merge_tile(
    pid, which, given, merged, values_ptr, layout_order_ptr, rank_ptr, step, n_rows, size, n_steps,
    LAST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    images_ptr, order_ptr = given
    total = tl.cdiv(n_rows, BLOCK) * BLOCK
    behind = which.to(tl.int64) * total
    images_ptr += behind
    here = pid * ROWS + tl.arange(0, ROWS)
    image = tl.load(images_ptr + here)
    row = tl.load(order_ptr + behind + here)
    own = pid * ROWS // size
    first = own // RUNS * RUNS
    runs = first + tl.arange(0, RUNS)[:, None]
    begin = tl.broadcast_to(tl.minimum(runs * size, total), (RUNS, ROWS))
    end = tl.minimum(begin + size, total)
    # Of equal values those of an earlier run come first.
    reach = image[None, :] + (runs < own)
    found = begin
    for k in range(tl.where(pid * ROWS < n_rows, n_steps, 0)):
        next = found + (size >> k)
        others = tl.load(images_ptr + tl.minimum(next, total) - 1)
        found = tl.where((next <= end) & (others < reach), next, found)
    is_before = tl.where(runs == own, here[None, :] - begin, found - begin)
    place = tl.where(row < n_rows, first * size + tl.sum(is_before, axis=0), row)
    if LAST:
        values = _flipped(image, image.dtype == tl.int64)
        values = values.to(values_ptr.dtype.element_ty, bitcast=True)
        tl.store(values_ptr + which.to(tl.int64) * n_rows + place, values, mask=row < n_rows)
        behind = which.to(tl.int64) * step
        is_padded = row < padded(n_rows)
        tl.store(layout_order_ptr + behind + place, tl.minimum(row, n_rows), mask=is_padded)
        tl.store(rank_ptr + behind + row, place, mask=is_padded)
    else:
        images_ptr, order_ptr = merged
        tl.store(images_ptr + behind + place, image)
        tl.store(order_ptr + behind + place, row)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "size", "n_steps"])
def conr_merge_kernel(
    images_j_ptr, sorted_j_ptr, images_i_ptr, sorted_i_ptr,
    merged_images_j_ptr, merged_j_ptr, merged_images_i_ptr, merged_i_ptr,
    key_values_ptr, values_ptr, layout_ptr, n_anchors, n_keys, size, n_steps,
    HAS_KEYS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RUNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merges each RUNS sorted runs of so many (``size``) images, ROWS of them a program: an image's
    place is the number of those before it in all of them, by binary search in each.

    The LAST merge, of all runs, leaves sorted values, and the layout's orders and ranks; of rows
    behind the last, each stands in its own place.
    """
    await_earlier(EARLY)
    pid = tl.program_id(0)
    keys, anchors = tl.cdiv(n_keys, BLOCK) * BLOCK, tl.cdiv(n_anchors, BLOCK) * BLOCK
    n_programs = (keys + (anchors if HAS_KEYS else 0)) // ROWS
    which = pid // n_programs
    pid = pid % n_programs
    order_j_ptr, order_i_ptr, _, _, _, _ = parts_of(layout_ptr, n_anchors, n_keys, not HAS_KEYS)
    rank_j_ptr, rank_i_ptr, step = ranks_of(layout_ptr, n_anchors, n_keys, not HAS_KEYS)
    if HAS_KEYS and pid * ROWS >= keys:
        pid -= keys // ROWS
        images_j_ptr, sorted_j_ptr, n_keys = images_i_ptr, sorted_i_ptr, n_anchors
        merged_images_j_ptr, merged_j_ptr = merged_images_i_ptr, merged_i_ptr
        key_values_ptr, order_j_ptr, rank_j_ptr = values_ptr, order_i_ptr, rank_i_ptr
    _merge_tile(
        pid, which, (images_j_ptr, sorted_j_ptr), (merged_images_j_ptr, merged_j_ptr),
        key_values_ptr, order_j_ptr, rank_j_ptr, step, n_keys, size, n_steps,
        LAST, BLOCK, ROWS, RUNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_anchors", "n_keys"])
def conr_rank_kernel(
    order_j_ptr, order_i_ptr, layout_ptr, n_anchors, n_keys,
    HAS_KEYS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What the last merge leaves in the layout, of orders that are given: of the keys' labels, then
    of the anchors', then of the predictions; a program for each ROWS of them.
    """
    await_earlier(EARLY)
    pid, n_rows = tl.program_id(0), n_keys
    n_programs = tl.cdiv(padded(n_keys), ROWS)
    of_keys = n_programs
    if HAS_KEYS:
        n_programs += tl.cdiv(padded(n_anchors), ROWS)
    which, pid = pid // n_programs, pid % n_programs
    order_ptr, to_order_i_ptr, _, _, _, _ = parts_of(layout_ptr, n_anchors, n_keys, not HAS_KEYS)
    rank_ptr, rank_i_ptr, step = ranks_of(layout_ptr, n_anchors, n_keys, not HAS_KEYS)
    if HAS_KEYS and pid >= of_keys:
        pid -= of_keys
        order_j_ptr, order_ptr, rank_ptr = order_i_ptr, to_order_i_ptr, rank_i_ptr
        n_rows = n_anchors
    here, behind = pid * ROWS + tl.arange(0, ROWS), which.to(tl.int64) * step
    is_row, is_padded = here < n_rows, here < padded(n_rows)
    row = tl.load(order_j_ptr + which.to(tl.int64) * n_rows + here, mask=is_row, other=n_rows)
    tl.store(order_ptr + behind + here, row.to(tl.int32), mask=is_padded)
    tl.store(rank_ptr + behind + tl.where(is_row, row.to(tl.int32), here), here, mask=is_padded)


@triton.jit
def _load_rows(x_ptr, rows, is_row, columns, D: tl.constexpr, dtype: tl.constexpr):
    mask = is_row[:, None] & (columns < D)[None, :]
    return tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _store_rows(
    q_ptr, places, columns, q, D_PAD: tl.constexpr, CHUNK: tl.constexpr, IN_HALVES: tl.constexpr
):  # fmt: skip
    """Columns of unit features times the scale, in rows of D_PAD numbers."""
    mask = (columns < D_PAD)[None, :] if D_PAD % CHUNK else None
    row_ptrs = q_ptr + places[:, None] * D_PAD
    store_tile(q, row_ptrs, columns[None, :], mask, D_PAD, IN_HALVES)


@triton.jit
def _copy_tile(
    pid, order, second, rank_ptr, given, w_ptr, coef_ptr, copies, sorted_coef_ptr, poison_ptr,
    n_rows, width, g, scale,
    ORDERS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, L: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, IN_HALVES: tl.constexpr,
):  # fmt: skip
    x_ptr, y_ptr, p_ptr = given
    q_ptr, inverse_ptr, sorted_y_ptr, sorted_p_ptr = copies
    rows = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n_rows
    n_padded = padded(n_rows).to(tl.int64)
    columns = tl.arange(0, CHUNK).to(tl.int64)

    dtype: tl.constexpr = inverse_ptr.dtype.element_ty
    squares = tl.zeros((ROWS,), dtype)
    poison = tl.zeros((ROWS,), tl.float32)
    if D_PAD <= CHUNK:
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
    factor = (inverse * scale).to(dtype)
    places = ()
    for copy in tl.static_range(ORDERS):
        ranks = tl.load(rank_ptr + (order + copy) * second.to(tl.int64) + rows)
        places = places + (ranks.to(tl.int64),)
    for copy in tl.static_range(ORDERS):
        place = places[copy] + copy * n_padded
        tl.store(inverse_ptr + place, inverse.to(dtype))
        if D_PAD <= CHUNK:
            _store_rows(q_ptr, place, columns, x * factor[:, None], D_PAD, CHUNK, IN_HALVES)
    if D_PAD > CHUNK:
        for k in range(0, width, CHUNK):
            q = _load_rows(x_ptr, rows, is_row, k + columns, D, dtype) * factor[:, None]
            for copy in tl.static_range(ORDERS):
                place = places[copy] + copy * n_padded
                _store_rows(q_ptr, place, k + columns, q, D_PAD, CHUNK, IN_HALVES)

    for c in range(L):
        y = tl.load(y_ptr + rows * L + c, mask=is_row, other=float("nan"))
        p = tl.load(p_ptr + rows * L + c, mask=is_row, other=float("nan"))
        poison += (y * 0 + p * 0).to(tl.float32)
        for copy in tl.static_range(ORDERS):
            place = places[copy] + (copy * L + c) * n_padded
            tl.store(sorted_y_ptr + place, y)
            tl.store(sorted_p_ptr + place, p)
    if w_ptr is not None:
        w = tl.load(w_ptr + rows, mask=is_row, other=0.0)
        poison += (w * 0).to(tl.float32)
    if poison_ptr is not None:
        tl.store(poison_ptr + rows, poison, mask=is_row & (order == 0))
    if coef_ptr is not None:
        coef_ptrs = coef_ptr + rows * COLUMNS
        for c in tl.static_range(3):
            coef = tl.load(coef_ptrs + c, mask=is_row, other=0.0)
            coef = (coef * g).to(coef.dtype)
            if COLUMNS == 5 and c != 1:
                log = tl.load(coef_ptrs + 3 + c // 2, mask=is_row, other=0.0)
                coef, log = to_base_2(coef, log)
                for copy in tl.static_range(ORDERS):
                    place = places[copy] + (copy * COLUMNS + 3 + c // 2) * n_padded
                    tl.store(sorted_coef_ptr + place, log)
            for copy in tl.static_range(ORDERS):
                place = places[copy] + (copy * COLUMNS + c) * n_padded
                tl.store(sorted_coef_ptr + place, coef)


@triton.jit(
    do_not_specialize=["n_anchors", "n_keys", "self_offset", "n_steps", "first", "order"]
)  # fmt: skip
def conr_order_kernel(
    key_values_ptr, values_ptr, layout_ptr,
    key_x_ptr, key_y_ptr, key_p_ptr, key_coef_ptr, q_j_ptr, inverse_j_ptr, y_j_ptr, p_j_ptr,
    coef_j_ptr, x_ptr, y_ptr, p_ptr, w_ptr, coef_ptr, q_i_ptr, inverse_i_ptr, y_i_ptr, p_i_ptr,
    coef_i_ptr, poison_ptr, upstream_ptr,
    n_anchors, n_keys, self_offset, n_steps, width, first, order,
    reach: tl.float64, factor: tl.float64, scale: tl.float64,
    HAS_KEYS: tl.constexpr, HAS_P: tl.constexpr, EXACT: tl.constexpr, BAND_ROWS: tl.constexpr,
    ORDERS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, L: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, IN_HALVES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """From the ``first`` program on: one for the choice of sweep; one per BAND_ROWS rows for the
    bands; one per ROWS rows for their copies: unit features times the scale, labels and
    coefficients times the upstream gradient and the factor. Poison, 0 or NaN, shows what is not
    finite in a row of the keys, then of the anchors, in the caller's order.

    Copies are in the ``order`` of the labels (0), or of the predictions (1) if the choice falls on
    it; or in both ORDERS, those of the predictions behind. Where no values are given, the layout
    has bands and choice, and the second copies are in the order that was chosen.
    """
    await_earlier(EARLY)
    keys, anchors = padded(n_keys), padded(n_anchors)
    n_bands = 1 + (2 if HAS_P else 1) * anchors // BAND_ROWS
    pid = tl.program_id(0) + first
    if pid < n_bands:
        if values_ptr is not None:
            if pid > 0:
                find_bands(
                    pid - 1, key_values_ptr, values_ptr, layout_ptr, n_anchors, n_keys,
                    self_offset, n_steps, reach, HAS_KEYS, BAND_ROWS,
                )  # fmt: skip
            elif HAS_P:
                choose_sweep(
                    key_values_ptr, values_ptr, layout_ptr, n_anchors, n_keys, n_steps, reach,
                    EXACT, BAND_ROWS,
                )  # fmt: skip
            else:
                tl.store(layout_ptr + tl.arange(0, ROW_PAD), 0)
    else:
        pid -= n_bands
        second = 1
        if (order == 1) | (values_ptr is None):
            second = tl.where(tl.load(layout_ptr) != 0, 0, 1)
        rank_j_ptr, rank_i_ptr, step = ranks_of(layout_ptr, n_anchors, n_keys, not HAS_KEYS)
        second *= step
        g = tl.full((), factor, tl.float64)
        if upstream_ptr is not None:
            g *= tl.load(upstream_ptr).to(tl.float64)
        if (order == 0) | (second != 0):
            if pid < keys // ROWS:
                _copy_tile(
                    pid, order, second, rank_j_ptr, (key_x_ptr, key_y_ptr, key_p_ptr),
                    None if HAS_KEYS else w_ptr, key_coef_ptr,
                    (q_j_ptr, inverse_j_ptr, y_j_ptr, p_j_ptr), coef_j_ptr, poison_ptr,
                    n_keys, width, g, scale, ORDERS, D, D_PAD, L, COLUMNS, ROWS, CHUNK, IN_HALVES,
                )  # fmt: skip
            elif HAS_KEYS:
                _copy_tile(
                    pid - keys // ROWS, order, second, rank_i_ptr, (x_ptr, y_ptr, p_ptr),
                    w_ptr, coef_ptr, (q_i_ptr, inverse_i_ptr, y_i_ptr, p_i_ptr), coef_i_ptr,
                    None if poison_ptr is None else poison_ptr + n_keys, n_anchors,
                    width, g, scale, ORDERS, D, D_PAD, L, COLUMNS, ROWS, CHUNK, IN_HALVES,
                )  # fmt: skip
