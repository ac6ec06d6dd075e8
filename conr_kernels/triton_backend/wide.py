"""The Triton kernels of the backward pass where a row's gradient does not fit the registers (D >
256): ``H_ij`` goes through memory, in phases over tiles that no program owns.

The pairs of tiles that the sweeps visit stand in a list, the positives' before the negatives', and
go through memory a window of the list at a time, which has pairs of one sweep only.
"""

import triton
import triton.language as tl

from .arithmetic import dot, load_tile, similarity
from .gradient import (
    coefficients_of,
    in_parts,
    load_sum,
    pair_gradients,
    poison_of,
    store_gradient,
    store_sum,
    unit_columns,
)
from .layout import count_of, key_tiles, padded, sweep_of
from .sweeps import anchors_of


@triton.jit
def _list_sweep(
    list_ptr, start, layout_ptr, n_anchors, n_keys,
    NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr, L: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_anchors, BLOCK_I)
    row = n_tiles + 1
    for t in range(0, n_tiles, BLOCK):
        tile = t + tl.arange(0, BLOCK)
        is_tile = tile < n_tiles
        every, _, _ = key_tiles(
            tl.minimum(tile, n_tiles - 1), layout_ptr, n_anchors, n_keys,
            NEGATIVES, CONFUSED, SAME, L == 1, BLOCK_I, BLOCK_J,
        )  # fmt: skip
        a0, a1, b0, _, _, _ = every
        # Anchors that are no positives of themselves are not finite: NaN, whatever is left in G.
        n = tl.where(is_tile, count_of(every), 0).to(tl.int64)
        ptrs = list_ptr + tile
        tl.store(ptrs, start + tl.cumsum(n, axis=0) - n, mask=is_tile)
        tl.store(ptrs + row, a1 - a0, mask=is_tile)
        tl.store(ptrs + 2 * row, a0, mask=is_tile)
        tl.store(ptrs + 3 * row, b0 - (a1 - a0), mask=is_tile)
        start += tl.sum(n, axis=0)
    tl.store(list_ptr + n_tiles, start)
    return start


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "window", "second"])
def conr_wide_list_kernel(
    layout_ptr, list_ptr, n_anchors, n_keys, window, second,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, L: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The list [2, 4, n_tiles + 1], of each tile of anchors and behind the last: the number of its
    first pair; how many tiles of keys its first piece has, where that begins, and where the second
    would if it counted from the first's begin. The negatives' numbers begin with a window, not
    before ``second``. One program.
    """
    start = _list_sweep(
        list_ptr, tl.zeros((), tl.int64), layout_ptr, n_anchors, n_keys,
        False, CONFUSED, SAME, L, BLOCK_I, BLOCK_J, BLOCK,
    )  # fmt: skip
    start = tl.maximum(tl.cdiv(start, window) * window, second)
    list_ptr += 4 * (tl.cdiv(n_anchors, BLOCK_I) + 1)
    _list_sweep(
        list_ptr, start, layout_ptr, n_anchors, n_keys,
        True, CONFUSED, SAME, L, BLOCK_I, BLOCK_J, BLOCK,
    )  # fmt: skip


@triton.jit
def _window(layout_ptr, list_ptr, n_tiles, first, window):
    """Of ``window`` pairs from the ``first`` on: whether they are negatives', and in the order of
    the predictions; their sweep's part of the list, the first and how many there are.
    """
    first = first.to(tl.int64)
    sweep = 4 * (n_tiles + 1)
    negatives = first >= tl.load(list_ptr + sweep)
    list_ptr += tl.where(negatives, sweep, 0)
    n = tl.load(list_ptr + n_tiles) - first
    is_other = negatives & (tl.load(layout_ptr) == 0)
    return negatives, is_other, list_ptr, first, tl.minimum(tl.maximum(n, 0), window).to(tl.int32)


@triton.jit
def _anchors_order(
    layout_ptr, n_anchors, n_keys, is_other, CONFUSED: tl.constexpr, SAME: tl.constexpr
):  # fmt: skip
    """The order of the anchors' labels, or that of their predictions."""
    _, order_ptr, _, _, _ = sweep_of(layout_ptr, n_anchors, n_keys, False, CONFUSED, SAME)
    if CONFUSED:
        order_ptr += tl.where(is_other, padded(n_keys) if SAME else padded(n_anchors), 0)
    return order_ptr


@triton.jit
def _tile_of(number, list_ptr, n_tiles):
    """The tile of anchors of a pair of tiles: the last one that does not begin behind it."""
    n = 0
    for t in range(0, n_tiles, 1024):
        tile = t + tl.arange(0, 1024)
        starts = tl.load(list_ptr + tile, mask=tile < n_tiles, other=2**62)
        n += tl.sum((starts <= number).to(tl.int32), axis=0)
    return n - 1


@triton.jit
def _keys_of(tile, list_ptr, n_tiles):
    """A tile of anchors' first pair, and what ``_key_at`` takes."""
    ptr, row = list_ptr + tile, n_tiles + 1
    return tl.load(ptr), (tl.load(ptr + row), tl.load(ptr + 2 * row), tl.load(ptr + 3 * row))


@triton.jit
def _key_at(t, pieces, BLOCK_J: tl.constexpr):
    """The first key of the t-th tile."""
    n_a, a, b = pieces
    return (t + tl.where(t < n_a, a, b)) * BLOCK_J


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "first", "window", "apart"])
def conr_wide_scores_kernel(
    layout_ptr, list_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr,
    coef_j_ptr, H_ptr, H_scale_ptr, n_anchors, n_keys, first, window, apart, width,
    h: tl.float64, push_scale: tl.float64,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
    PUSHING: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``H_ij`` of the pairs of tiles from the ``first`` of the list on, H [window, BLOCK_I,
    BLOCK_J]; programs take turns. The copies in the order of the predictions stand ``apart`` (1) or
    in the place of the others (0).

    In float16, H_ij is divided by its row's largest magnitude in the tile, which H_scale [window,
    BLOCK_I] keeps.
    """
    COLUMNS: tl.constexpr = 5 if SHIFTED else 3
    # Of all columns at once, what the pairs need would spill.
    PARTS: tl.constexpr = 4 if BLOCK_J > 64 else 1
    WIDTH: tl.constexpr = BLOCK_J // PARTS
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_tiles = tl.cdiv(n_anchors, BLOCK_I)
    negatives, is_other, list_ptr, first, n_here = _window(
        layout_ptr, list_ptr, n_tiles, first, window
    )
    _, _, self_ptr, _, _ = sweep_of(layout_ptr, n_anchors, n_keys, False, CONFUSED, SAME)
    n_padded, behind = padded(n_anchors), tl.where(is_other, apart, 0).to(tl.int64)
    behind_i, behind_j = behind * n_padded, behind * padded(n_keys)
    y_i_ptr += behind_i * L
    p_i_ptr += behind_i * L
    coef_i_ptr += behind_i * COLUMNS
    y_j_ptr += behind_j * L
    p_j_ptr += behind_j * L
    coef_j_ptr += behind_j * COLUMNS
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, WIDTH)
    H_ptrs = H_ptr + rows[:, None] * BLOCK_J + columns[None, :]
    for number in range(first + tl.program_id(0), first + n_here, tl.num_programs(0)):
        tile = _tile_of(number, list_ptr, n_tiles)
        begin, pieces = _keys_of(tile, list_ptr, n_tiles)
        j0 = _key_at(number - begin, pieces, BLOCK_J)
        anchors = anchors_of(
            tile, y_i_ptr, p_i_ptr, self_ptr, n_anchors, h, push_scale, SAME, BLOCK_I, dtype
        )
        s_ij = similarity(
            0, q_i_ptr + (behind_i + tile.to(tl.int64) * BLOCK_I) * D_PAD,
            0, q_j_ptr + (behind_j + j0) * D_PAD, width, 1.0,
            D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        coef_ptrs = coef_i_ptr + tile * BLOCK_I + rows
        parts = in_parts(s_ij, PARTS)
        done, largest = (), tl.zeros((BLOCK_I,), dtype)
        for c in tl.static_range(PARTS):
            j = j0 + c * WIDTH
            if negatives:
                of_anchors = coefficients_of(coef_ptrs, n_padded, True, SHIFTED, False)
                H_ij = pair_gradients(
                    parts[c], anchors, of_anchors, j, y_j_ptr, p_j_ptr, coef_j_ptr, n_keys,
                    True, True, CONFUSED, L, RMSE, SHIFTED, False, PUSHING, WIDTH,
                )  # fmt: skip
            else:
                of_anchors = coefficients_of(coef_ptrs, n_padded, False, SHIFTED, INSIDE)
                H_ij = pair_gradients(
                    parts[c], anchors, of_anchors, j, y_j_ptr, p_j_ptr, coef_j_ptr, n_keys,
                    False, True, False, L, RMSE, SHIFTED, INSIDE, "none", WIDTH,
                )  # fmt: skip
            if RESCALE:
                largest = tl.maximum(largest, tl.max(tl.abs(H_ij), axis=1))
            done = done + (H_ij,)
            if PARTS > 1:
                tl.debug_barrier()
        if RESCALE:
            scale = tl.where(largest > 1e-30, largest, 1.0)
            tl.store(H_scale_ptr + (number - first) * BLOCK_I + rows, scale)
        at = (number - first) * (BLOCK_I * BLOCK_J)
        for c in tl.static_range(PARTS):
            H_ij = done[c]
            if RESCALE:
                H_ij *= (1.0 / scale)[:, None]
            tl.store(H_ptrs + at + c * WIDTH, H_ij.to(H_ptr.dtype.element_ty))
            if PARTS > 1:
                tl.debug_barrier()


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "first", "window", "apart"])
def conr_wide_product_kernel(
    layout_ptr, list_ptr, q_j_ptr, H_ptr, H_scale_ptr, G_ptr, G_rest_ptr,
    n_anchors, n_keys, first, window, apart,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    RESCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``Σ H_ij q_j`` over those pairs, added to what windows before have left in G [N, D], in the
    caller's order: tiles of anchors × BLOCK_D columns, which programs take in turn, BLOCK_K keys a
    step.
    """
    N_BLOCKS: tl.constexpr = D_PAD // BLOCK_D
    STEPS: tl.constexpr = BLOCK_J // BLOCK_K
    PARTS: tl.constexpr = 4 if BLOCK_D > 128 else 1
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_tiles = tl.cdiv(n_anchors, BLOCK_I)
    negatives, is_other, list_ptr, first, n_here = _window(
        layout_ptr, list_ptr, n_tiles, first, window
    )
    order_ptr = _anchors_order(layout_ptr, n_anchors, n_keys, is_other, CONFUSED, SAME)
    q_j_ptr += tl.where(is_other, apart, 0).to(tl.int64) * padded(n_keys) * D_PAD
    rows = tl.arange(0, BLOCK_I)
    H_offsets = rows[:, None] * BLOCK_J + tl.arange(0, BLOCK_K)[None, :]
    if n_here > 0:
        first_tile = _tile_of(first, list_ptr, n_tiles)
        last_tile = _tile_of(first + n_here - 1, list_ptr, n_tiles)
        n_items = (last_tile - first_tile + 1).to(tl.int64) * N_BLOCKS
        for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            tile, k = first_tile + item // N_BLOCKS, item % N_BLOCKS * BLOCK_D
            begin, pieces = _keys_of(tile, list_ptr, n_tiles)
            t0 = tl.maximum(first - begin, 0)
            n = tl.minimum(tl.load(list_ptr + tile + 1), first + n_here) - begin - t0
            slot = begin + t0 - first
            G = tl.zeros((BLOCK_I, BLOCK_D), dtype)
            for v in range((n * STEPS).to(tl.int32)):
                t, key = v // STEPS, v % STEPS * BLOCK_K
                j0 = _key_at(t0 + t, pieces, BLOCK_J) + key
                H_ij = tl.load(H_ptr + (slot + t) * (BLOCK_I * BLOCK_J) + key + H_offsets)
                q_j = load_tile(q_j_ptr + j0 * D_PAD, k, D_PAD, BLOCK_K, BLOCK_D, PRECISION, UPCAST)
                if UPCAST:
                    H_ij = H_ij.to(tl.float32)
                if RESCALE:
                    scale = tl.load(H_scale_ptr + (slot + t) * BLOCK_I + rows)
                    G += dot(H_ij, q_j, None, PRECISION) * scale[:, None]
                else:
                    G = dot(H_ij, q_j, G, PRECISION)
            row = tl.load(order_ptr + tile * BLOCK_I + rows)
            is_first = (t0 == 0) & (negatives == 0)
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
    layout_ptr, coef_i_ptr, inverse_i_ptr, x_ptr, G_ptr, G_rest_ptr, gradient_ptr,
    n_anchors, n_keys, width, apart, kappa: tl.float64,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS rows from G, whose memory it may share; a program each.

    The radial part is that of G, from H_ij as it was rounded: nearly parallel features leave little
    else.
    """
    is_other = (apart == 0) & (tl.load(layout_ptr) == 0)
    order_ptr = _anchors_order(layout_ptr, n_anchors, n_keys, is_other, CONFUSED, SAME)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, inverse = tl.load(order_ptr + rows), tl.load(inverse_i_ptr + rows)
    dtype: tl.constexpr = inverse.dtype
    poison = poison_of(coef_i_ptr + rows, padded(n_anchors), dtype)
    factor = tl.full((), kappa, dtype)
    radial = tl.zeros((ROWS,), dtype)
    for k in range(0, width, CHUNK):
        G = load_sum(row, k, G_ptr, G_rest_ptr, n_anchors, D, CHUNK)
        q_i = unit_columns(x_ptr, inverse, row, k, n_anchors, D, CHUNK)
        radial += tl.sum(q_i * G, axis=1)
    for k in range(0, width, CHUNK):
        G = load_sum(row, k, G_ptr, G_rest_ptr, n_anchors, D, CHUNK)
        q_i = unit_columns(x_ptr, inverse, row, k, n_anchors, D, CHUNK)
        store_gradient(
            G * factor, q_i, row, k, radial * factor, inverse, poison, gradient_ptr, n_anchors, D
        )
