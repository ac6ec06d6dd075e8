"""The Triton kernels of the backward pass where a row's gradient does not fit the registers
(``configs.REGISTER_D``): ``H_ij`` goes through memory, in phases over tiles that no program owns.

The pairs of tiles that the sweeps visit stand in a list, the positives' before the negatives', and
go through memory a window of the list at a time, which has pairs of one sweep only. Where bands are
long, a window has a piece of them, of many tiles of anchors: these share its keys, and their
products are work for all multiprocessors.
"""

import triton
import triton.language as tl

from .arithmetic import (
    await_earlier,
    dot,
    load_tile,
    load_transposed,
    similarity,
    start_next,
    store_part,
)
from .gradient import (
    coefficients_of,
    factor_of,
    load_sum,
    pair_gradients,
    poison_of,
    scale_of,
    store_gradient,
    store_sum,
    unit_columns,
)
from .layout import padded, parts_of, sweep_of
from .sweeps import anchors_of, in_parts
from .tile_list import HEAD, PER_TILE, sizes_of


@triton.jit
def _window(layout_ptr, list_ptr, windows_ptr, first, window, size):
    """Of ``window`` pairs from the ``first`` on: whether they are negatives', and in the order of
    the predictions; their sweep's part of the list; the first, how many there are, the entry that
    they begin in and the last that may have some, and how many entries the sweep has.
    """
    windows_ptr += first // window
    entry, following = tl.load(windows_ptr), tl.load(windows_ptr + 1)
    n_positives, n_negatives = tl.load(list_ptr + 3), tl.load(list_ptr + 4)
    negatives = first >= tl.load(list_ptr)
    end = tl.where(negatives, tl.load(list_ptr + 2), tl.load(list_ptr + 1)).to(tl.int64)
    is_other = negatives & (tl.load(layout_ptr) == 0)
    n_entries = tl.where(negatives, n_negatives, n_positives).to(tl.int32)
    first = first.to(tl.int64)
    n = tl.minimum(tl.maximum(end - first, 0), window).to(tl.int32)
    last = tl.where(first + window < end, following, n_entries - 1)
    list_ptr += HEAD + tl.where(negatives, size, 0)
    return negatives, is_other, list_ptr, first, n, entry, last, n_entries


@triton.jit
def _anchors_order(
    layout_ptr, n_anchors, n_keys, is_other, CONFUSED: tl.constexpr, SAME: tl.constexpr
):  # fmt: skip
    """The order of the anchors' labels, or that of their predictions."""
    _, order_ptr, _, _, _, step = parts_of(layout_ptr, n_anchors, n_keys, SAME)
    if CONFUSED:
        order_ptr += tl.where(is_other, step, 0)
    return order_ptr


@triton.jit
def _later_starts(entry, starts_ptr, n_entries):
    """The first pairs of the next entries; behind the last, numbers that no pair reaches."""
    LAST: tl.constexpr = 2**62 if starts_ptr.dtype.element_ty == tl.int64 else 2**31 - 1
    later = entry + 1 + tl.arange(0, 256)
    return tl.load(starts_ptr + later, mask=later < n_entries, other=LAST)


@triton.jit
def _entry_of(number, entry, later_starts, starts_ptr, n_entries):
    """The entry of a pair of tiles: the last one that does not begin behind it; from one on that
    does not, with ``_later_starts`` of it.
    """
    n = tl.sum((later_starts <= number).to(tl.int32), axis=0)
    entry += n
    while n == 256:
        n = tl.sum((_later_starts(entry, starts_ptr, n_entries) <= number).to(tl.int32), axis=0)
        entry += n
    return entry


@triton.jit
def _of_entry(entry, list_ptr, starts_ptr, n_tiles):
    """Its first pair; of its tile of anchors the runs of keys, and of those in full tiles."""
    ptr = list_ptr + entry % n_tiles
    n_a, a, b = tl.load(ptr), tl.load(ptr + n_tiles), tl.load(ptr + 2 * n_tiles)
    c0, c1 = tl.load(ptr + 3 * n_tiles), tl.load(ptr + 4 * n_tiles)
    d0, d1 = tl.load(ptr + 5 * n_tiles), tl.load(ptr + 6 * n_tiles)
    return tl.load(starts_ptr + entry), n_a, a, b, c0, c1, d0, d1


@triton.jit
def _store_gradients(
    pairs, slot, H_ptr, H_scale_ptr, n_anchors, n_keys,
    NEGATIVES: tl.constexpr, EDGE: tl.constexpr, CONFUSED: tl.constexpr, L: tl.constexpr,
    RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr, PHI: tl.constexpr,
    RESCALE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``H_ij`` of a tile, to its slot of H."""
    s_ij, anchors, coef_i_ptrs, j0, y_j_ptr, p_j_ptr, coef_j_ptr = pairs
    # Of all columns at once, what the pairs need would spill; some pairs need more than others.
    PARTS: tl.constexpr = 4 if s_ij.shape[1] > 64 else 1
    WIDTH: tl.constexpr = s_ij.shape[1] // PARTS
    IS_HEAVY: tl.constexpr = L > 1 or SHIFTED
    H_ptr += slot * (s_ij.shape[0] * s_ij.shape[1])
    of_anchors = coefficients_of(coef_i_ptrs, padded(n_anchors), NEGATIVES, SHIFTED, INSIDE)
    parts = in_parts(s_ij, PARTS)
    done, largest = (), tl.zeros((s_ij.shape[0],), s_ij.dtype)
    for c in tl.static_range(PARTS):
        H_ij = pair_gradients(
            parts[c], anchors, of_anchors, j0 + c * WIDTH, y_j_ptr, p_j_ptr, coef_j_ptr, n_keys,
            NEGATIVES, EDGE, CONFUSED, L, RMSE, SHIFTED, INSIDE, PHI, WIDTH,
        )  # fmt: skip
        if RESCALE:
            largest = tl.maximum(largest, tl.max(tl.abs(H_ij), axis=1))
            done = done + (H_ij,)
        elif IS_HEAVY:
            store_part(H_ptr, H_ij, c * WIDTH, BLOCK_K, False)
        else:
            done = done + (H_ij.to(H_ptr.dtype.element_ty),)
        if IS_HEAVY:
            tl.debug_barrier()
    if RESCALE:
        IN_HALVES: tl.constexpr = H_ptr.dtype.element_ty == tl.float32
        scale = scale_of(largest, IN_HALVES)
        tl.store(H_scale_ptr + slot * s_ij.shape[0] + tl.arange(0, s_ij.shape[0]), scale)
        for c in tl.static_range(PARTS):
            H_ij = done[c] * (1.0 / scale)[:, None]
            store_part(H_ptr, H_ij, c * WIDTH, BLOCK_K, IN_HALVES)
    elif not IS_HEAVY:
        for c in tl.static_range(PARTS):
            store_part(H_ptr, done[c], c * WIDTH, BLOCK_K, False)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "first", "window", "piece", "apart"])
def conr_wide_scores_kernel(
    layout_ptr, list_ptr, windows_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr, q_j_ptr, y_j_ptr,
    p_j_ptr, coef_j_ptr, H_ptr, H_scale_ptr, n_anchors, n_keys, first, window, piece, apart, width,
    unit: tl.float64, h: tl.float64, push_scale: tl.float64,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, D_PAD: tl.constexpr,
    INSIDE: tl.constexpr, PHI: tl.constexpr, RESCALE: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """``H_ij`` of the pairs of tiles from the ``first`` of the list on, H [window, BLOCK_J /
    BLOCK_K, BLOCK_I, BLOCK_K]; programs take turns. The copies in the order of the predictions
    stand ``apart`` (1) or in the place of the others (0).

    In float16 and in halves, H_ij is divided by its row's scale in the tile, which H_scale [window,
    BLOCK_I] keeps.

    ``LATE``: the launch before is the products of the window before, which read H. So only what
    overwrites H awaits it, and programs without a tile too: that this launch has completed must say
    that those have. The first window's scores wait for the list and all before it.
    """
    if LATE:
        start_next(EARLY)
    else:
        await_earlier(EARLY)
    COLUMNS: tl.constexpr = 5 if SHIFTED else 3
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_tiles, size = sizes_of(n_anchors, n_keys, piece, BLOCK_I, BLOCK_J)
    negatives, is_other, list_ptr, first, n_here, entry, _, n_entries = _window(
        layout_ptr, list_ptr, windows_ptr, first, window, size
    )
    starts_ptr = list_ptr + PER_TILE * n_tiles
    _, _, self_ptr, _, _ = sweep_of(layout_ptr, n_anchors, n_keys, False, CONFUSED, SAME)
    behind = tl.where(is_other, apart, 0).to(tl.int64)
    behind_i, behind_j = behind * padded(n_anchors), behind * padded(n_keys)
    y_i_ptr += behind_i * L
    p_i_ptr += behind_i * L
    coef_i_ptr += behind_i * COLUMNS
    y_j_ptr += behind_j * L
    p_j_ptr += behind_j * L
    coef_j_ptr += behind_j * COLUMNS
    rows = tl.arange(0, BLOCK_I)
    n_programs = tl.num_programs(0)
    # Where a window without pairs begins nothing says; and behind the last tile nobody searches.
    entry = tl.where(n_here > 0, entry, 0)
    later_starts = _later_starts(entry, starts_ptr, n_entries)
    number = tl.where(tl.program_id(0) < n_here, first + tl.program_id(0), -1)
    entry = _entry_of(number, entry, later_starts, starts_ptr, n_entries)
    start, n_a, a, b, c0, c1, d0, d1 = _of_entry(entry, list_ptr, starts_ptr, n_tiles)
    for number in range(first + tl.program_id(0), first + n_here, n_programs):
        tile = entry % n_tiles
        t = number - start + entry // n_tiles * piece
        tile_j = t + tl.where(t < n_a, a, b)
        j0 = tile_j * BLOCK_J
        is_edge = 1
        if L == 1:  # whether not every pair lies in the anchors' bands, or one is an anchor's own
            is_full = ((c0 <= tile_j) & (tile_j < c1)) | ((d0 <= tile_j) & (tile_j < d1))
            is_edge = 1 - is_full.to(tl.int32)
        # Asked for before this tile's work, so that the next one does not wait for it.
        later_starts = _later_starts(entry, starts_ptr, n_entries)
        anchors = anchors_of(
            tile, y_i_ptr, p_i_ptr, self_ptr, n_anchors, h, push_scale, SAME, BLOCK_I, dtype
        )
        s_ij = similarity(
            0, q_i_ptr + (behind_i + tile.to(tl.int64) * BLOCK_I) * D_PAD,
            0, q_j_ptr + (behind_j + j0) * D_PAD, width, unit,
            D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        coef_i_ptrs, slot = coef_i_ptr + tile * BLOCK_I + rows, number - first
        pairs = s_ij, anchors, coef_i_ptrs, j0, y_j_ptr, p_j_ptr, coef_j_ptr
        if LATE:
            await_earlier(EARLY)
        for EDGE in tl.static_range(2):
            if is_edge == EDGE:
                if negatives:
                    _store_gradients(
                        pairs, slot, H_ptr, H_scale_ptr, n_anchors, n_keys, True, EDGE == 1,
                        CONFUSED, L, RMSE, SHIFTED, False, PHI, RESCALE, BLOCK_K,
                    )  # fmt: skip
                else:
                    _store_gradients(
                        pairs, slot, H_ptr, H_scale_ptr, n_anchors, n_keys, False, EDGE == 1,
                        False, L, RMSE, SHIFTED, INSIDE, "one", RESCALE, BLOCK_K,
                    )  # fmt: skip
        next = tl.where(number + n_programs < first + n_here, number + n_programs, -1)
        entry = _entry_of(next, entry, later_starts, starts_ptr, n_entries)
        start, n_a, a, b, c0, c1, d0, d1 = _of_entry(entry, list_ptr, starts_ptr, n_tiles)
    if LATE:
        await_earlier(EARLY)


@triton.jit
def _number_of(entry, tile, list_ptr, n_tiles, piece):
    """The number of a pair: of an entry's tile of anchors and this one as its keys."""
    a = tl.load(list_ptr + n_tiles + entry % n_tiles)
    start = tl.load(list_ptr + PER_TILE * n_tiles + entry).to(tl.int64)
    return start + tile - a - entry // n_tiles * piece


@triton.jit
def _lower_run(tile, nth, list_ptr, n_tiles, piece):
    """The earlier tiles whose nth pieces have this one as keys: a run, as ``a`` and ``b`` grow."""
    reached_ptr = list_ptr + 2 * n_tiles
    near, far = tile - nth * piece, tile - (nth + 1) * piece
    begin = tl.where(far < 0, 0, tl.load(reached_ptr + tl.maximum(far, 0))).to(tl.int32)
    end = tl.where(near < 0, 0, tl.load(reached_ptr + tl.maximum(near, 0))).to(tl.int32)
    lower = tl.load(list_ptr + 5 * n_tiles + tile).to(tl.int32)
    return tl.maximum(begin, lower), tl.minimum(end, tile)


@triton.jit
def _lower_entries(tile, nth, list_ptr, first, n_here, first_entry, last_entry, n_tiles, piece):
    """Their entries with a pair in the window, which may have a part of its first and its last."""
    begin, end = _lower_run(tile, nth, list_ptr, n_tiles, piece)
    is_before = _number_of(first_entry, tile, list_ptr, n_tiles, piece) < first
    is_in_last = _number_of(last_entry, tile, list_ptr, n_tiles, piece) < first + n_here
    begin = tl.maximum(nth * n_tiles + begin, first_entry + is_before.to(tl.int32))
    end = tl.minimum(nth * n_tiles + end, last_entry + is_in_last.to(tl.int32))
    return begin, tl.maximum(end, begin)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "first", "window", "piece", "apart"])
def conr_wide_product_kernel(
    layout_ptr, list_ptr, windows_ptr, q_j_ptr, H_ptr, H_scale_ptr, G_ptr, G_rest_ptr,
    n_anchors, n_keys, first, window, piece, apart,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    MIRRORED: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """``Σ H_ij q_j`` over those pairs, mirrored both ways, added to what windows before left in
    G [N, D], in the caller's order: tiles of anchors × BLOCK_D columns, in turns of programs.

    The launch before is the scores', which writes H alone: what leads to H does not await it.
    """
    start_next(EARLY)
    N_BLOCKS: tl.constexpr = D_PAD // BLOCK_D
    STEPS: tl.constexpr = BLOCK_J // BLOCK_K
    PARTS: tl.constexpr = 4 if BLOCK_D > 64 else 1
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_tiles, size = sizes_of(n_anchors, n_keys, piece, BLOCK_I, BLOCK_J)
    negatives, is_other, list_ptr, first, n_here, first_entry, last_entry, _ = _window(
        layout_ptr, list_ptr, windows_ptr, first, window, size
    )
    starts_ptr = list_ptr + PER_TILE * n_tiles
    order_ptr = _anchors_order(layout_ptr, n_anchors, n_keys, is_other, CONFUSED, SAME)
    q_j_ptr += tl.where(is_other, apart, 0).to(tl.int64) * padded(n_keys) * D_PAD
    rows = tl.arange(0, BLOCK_I)
    await_earlier(EARLY)
    if n_here > 0:
        # All entries of a tile of anchors are one program's.
        n_items = last_entry - first_entry + 1
        if MIRRORED:  # and tiles behind the last one that are its keys: no other's are further on
            n_last, last = _of_entry(last_entry, list_ptr, starts_ptr, n_tiles)[1:3]
            last += tl.minimum(n_last, (last_entry // n_tiles + 1) * piece) - 1
            n_items += (last - last_entry % n_tiles).to(tl.int32)
        n_items = tl.minimum(n_items, n_tiles) * N_BLOCKS
        for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            tile = (first_entry + item // N_BLOCKS) % n_tiles
            k = item % N_BLOCKS * tl.full((), BLOCK_D, tl.int64)
            G, n_pairs = tl.zeros((BLOCK_I, BLOCK_D), dtype), tl.zeros((), tl.int32)
            for nth in range(first_entry // n_tiles, last_entry // n_tiles + 1):
                if MIRRORED:
                    entry, end = _lower_entries(
                        tile, nth, list_ptr, first, n_here, first_entry, last_entry, n_tiles, piece
                    )
                    x, start_ptr = entry - nth * n_tiles, starts_ptr + entry
                    a_ptr = list_ptr + n_tiles + x
                    next_start, next_a = tl.load(start_ptr), tl.load(a_ptr)
                    for v in range((end - entry) * STEPS):
                        # Where bands of what is not finite disagree, another's slot.
                        slot = next_start - next_a + tile - nth * piece - first
                        slot = tl.minimum(tl.maximum(slot, 0), window - 1)
                        # Asked for a step ahead.
                        next_start = tl.load(start_ptr + (v + 1) // STEPS)
                        next_a = tl.load(a_ptr + (v + 1) // STEPS)
                        H_ptrs = H_ptr + (slot * (BLOCK_I * STEPS) + v % STEPS * BLOCK_K) * BLOCK_K
                        H_ij = load_transposed(H_ptrs, BLOCK_I, BLOCK_K, UPCAST)
                        j0 = (x * STEPS + v) * tl.full((), BLOCK_K, tl.int64)
                        q_j = load_tile(
                            q_j_ptr + j0 * D_PAD, k, D_PAD, BLOCK_K, BLOCK_D, PRECISION, UPCAST
                        )
                        G = dot(H_ij, q_j, G, PRECISION)
                    n_pairs += end - entry
                entry = nth * n_tiles + tile
                start, n_a, a, b = _of_entry(entry, list_ptr, starts_ptr, n_tiles)[:4]
                begin = tl.maximum(start.to(tl.int64), first)
                n = tl.minimum(tl.load(starts_ptr + entry + 1), first + n_here) - begin
                n = tl.maximum(n, 0).to(tl.int32)
                key, slot = begin - start + nth * piece, begin - first
                for v in range(n * STEPS):
                    step = key * STEPS + v
                    run = a if MIRRORED else tl.where(step < n_a * STEPS, a, b)
                    j0 = step * BLOCK_K + run * BLOCK_J
                    H_ptrs = H_ptr + (slot * STEPS + v) * (BLOCK_I * BLOCK_K)
                    H_ij = load_tile(H_ptrs, 0, BLOCK_K, BLOCK_I, BLOCK_K, PRECISION, UPCAST)
                    q_j = load_tile(
                        q_j_ptr + j0 * D_PAD, k, D_PAD, BLOCK_K, BLOCK_D, PRECISION, UPCAST
                    )
                    if RESCALE:
                        scale = tl.load(H_scale_ptr + (slot + v // STEPS) * BLOCK_I + rows)
                        G += dot(H_ij, q_j, None, PRECISION) * scale[:, None]
                    else:
                        G = dot(H_ij, q_j, G, PRECISION)
                n_pairs += n
            if n_pairs > 0:
                # Whose first piece has the tile's first pair: no later piece stands before.
                own = _lower_run(tile, 0, list_ptr, n_tiles, piece)[0] if MIRRORED else tile
                is_first = (negatives == 0) & (tl.load(starts_ptr + own) + tile - own >= first)
                row = tl.load(order_ptr + tile * BLOCK_I + rows)
                parts = in_parts(G, PARTS)
                for c in tl.static_range(PARTS):
                    part = parts[c]
                    if is_first == 0:
                        part += load_sum(row, k + c * WIDTH, G_ptr, G_rest_ptr, n_anchors, D, WIDTH)
                    store_sum(part, row, k + c * WIDTH, G_ptr, G_rest_ptr, n_anchors, D)
                    if PARTS > 1:
                        tl.debug_barrier()


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "apart"])
def conr_wide_gradient_kernel(
    layout_ptr, coef_i_ptr, inverse_i_ptr, x_ptr, G_ptr, G_rest_ptr, upstream_ptr, gradient_ptr,
    n_anchors, n_keys, width, apart, kappa: tl.float64,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS rows from G, whose memory it may share, times the upstream gradient
    where the coefficients are without; a program each.

    The radial part is G's, from H_ij as it was rounded: nearly parallel features leave little else.
    """
    await_earlier(EARLY)
    is_other = (apart == 0) & (tl.load(layout_ptr) == 0)
    order_ptr = _anchors_order(layout_ptr, n_anchors, n_keys, is_other, CONFUSED, SAME)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, inverse = tl.load(order_ptr + rows), tl.load(inverse_i_ptr + rows)
    dtype: tl.constexpr = inverse.dtype
    poison = poison_of(coef_i_ptr + rows, padded(n_anchors), dtype)
    factor = factor_of(kappa, upstream_ptr).to(dtype)
    if D <= CHUNK:
        G = load_sum(row, 0, G_ptr, G_rest_ptr, n_anchors, D, CHUNK) * factor
        q_i = unit_columns(x_ptr, inverse, row, 0, n_anchors, D, CHUNK)
        radial = tl.sum(q_i * G, axis=1)
        store_gradient(G, q_i, row, 0, radial, inverse, poison, gradient_ptr, n_anchors, D)
    else:
        radial = tl.zeros((ROWS,), dtype)
        for k in range(0, width, CHUNK):
            G = load_sum(row, k, G_ptr, G_rest_ptr, n_anchors, D, CHUNK) * factor
            q_i = unit_columns(x_ptr, inverse, row, k, n_anchors, D, CHUNK)
            radial += tl.sum(q_i * G, axis=1)
        for k in range(0, width, CHUNK):
            G = load_sum(row, k, G_ptr, G_rest_ptr, n_anchors, D, CHUNK) * factor
            q_i = unit_columns(x_ptr, inverse, row, k, n_anchors, D, CHUNK)
            store_gradient(G, q_i, row, k, radial, inverse, poison, gradient_ptr, n_anchors, D)
