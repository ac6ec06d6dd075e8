"""The Triton kernels of the backward pass where a row's gradient does not fit the registers (D >
256): ``H_ij`` of some rows goes through memory, in phases over tiles that no program owns.
"""

import triton
import triton.language as tl

from .arithmetic import dot, load_tile, similarity
from .gradient import (
    coefficients_of,
    columns_of,
    in_parts,
    in_range,
    pair_gradients,
    poison_of,
    store_gradient,
    unit_columns,
)
from .layout import count_of, key_tiles, padded, sweep_of, tile_at
from .sweeps import anchors_of


@triton.jit
def _count_here(every, start, most):
    """Key tiles from the ``start``-th on, so many at most."""
    return tl.minimum(tl.maximum(count_of(every) - start, 0), most)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_slots", "first", "start"])
def conr_wide_scores_kernel(
    layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr, coef_j_ptr,
    H_ptr, H_scale_ptr, n_anchors, n_keys, n_slots, first, start, row_size, width,
    h: tl.float64, push_scale: tl.float64,
    NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
    PUSHING: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``H_ij`` of the tiles of anchors from ``first`` on and of the keys that each visits from its
    ``start``-th tile on, H [rows, row_size]. Of the n_slots programs that share a tile of anchors,
    each takes an equal part.

    In float16, H_ij is divided by its row's largest magnitude in the tile, which H_scale [tiles of
    anchors, tiles of keys, BLOCK_I] keeps.
    """
    pid = tl.program_id(0)
    here, slot = pid // n_slots, pid % n_slots
    tile = first + here
    _, _, self_ptr, _, _ = sweep_of(layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME)
    every, _, _ = key_tiles(
        tile, layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME, L == 1, BLOCK_I, BLOCK_J
    )
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    anchors = anchors_of(
        tile, y_i_ptr, p_i_ptr, self_ptr, n_anchors, h, push_scale, SAME, BLOCK_I, dtype
    )
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    of_anchors = coefficients_of(
        coef_i_ptr + tile * BLOCK_I + rows, padded(n_anchors), NEGATIVES, SHIFTED, INSIDE
    )
    q_i_ptr += tile.to(tl.int64) * BLOCK_I * D_PAD
    H_ptr += here.to(tl.int64) * BLOCK_I * row_size
    H_offsets = rows[:, None] * row_size + columns[None, :]
    n_tiles = _count_here(every, start, row_size // BLOCK_J)
    for t in range(n_tiles * slot // n_slots, n_tiles * (slot + 1) // n_slots):
        j0 = tile_at(start + t, every).to(tl.int64) * BLOCK_J
        s_ij = similarity(
            0, q_i_ptr, 0, q_j_ptr + j0 * D_PAD, width,
            D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        H_ij = pair_gradients(
            s_ij, anchors, of_anchors, j0, y_j_ptr, p_j_ptr, coef_j_ptr, n_keys,
            NEGATIVES, True, CONFUSED, L, RMSE, SHIFTED, INSIDE, PUSHING, BLOCK_J,
        )  # fmt: skip
        if RESCALE:
            H_ij, scale = in_range(H_ij)
            tl.store(H_scale_ptr + (here * (row_size // BLOCK_J) + t) * BLOCK_I + rows, scale)
        tl.store(H_ptr + t * BLOCK_J + H_offsets, H_ij.to(H_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "first", "start"])
def conr_wide_product_kernel(
    layout_ptr, q_j_ptr, H_ptr, H_scale_ptr, G_ptr, n_anchors, n_keys, first, start, row_size,
    NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``Σ_P H_ij q_j`` over those keys, to which further launches and the negatives add theirs, in
    the caller's order, G [N, D_PAD]: a program per tile of anchors and BLOCK_D columns, BLOCK_K
    keys a step.
    """
    N_BLOCKS: tl.constexpr = D_PAD // BLOCK_D
    STEPS: tl.constexpr = BLOCK_J // BLOCK_K
    PARTS: tl.constexpr = 4 if BLOCK_D > 128 else 1
    pid = tl.program_id(0)
    here, k = pid // N_BLOCKS, (pid % N_BLOCKS).to(tl.int64) * BLOCK_D
    tile = first + here
    _, order_ptr, _, _, _ = sweep_of(layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME)
    every, _, _ = key_tiles(
        tile, layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME, L == 1, BLOCK_I, BLOCK_J
    )
    dtype: tl.constexpr = G_ptr.dtype.element_ty
    rows = tl.arange(0, BLOCK_I)
    n_tiles = _count_here(every, start, row_size // BLOCK_J)
    H_ptr += here.to(tl.int64) * BLOCK_I * row_size
    H_offsets = rows[:, None] * row_size + tl.arange(0, BLOCK_K)[None, :]
    G = tl.zeros((BLOCK_I, BLOCK_D), dtype)
    for v in range(n_tiles * STEPS):
        t = v // STEPS
        j0 = tile_at(start + t, every).to(tl.int64) * BLOCK_J + v % STEPS * BLOCK_K
        H_ij = tl.load(H_ptr + v * BLOCK_K + H_offsets)
        q_j = load_tile(q_j_ptr + j0 * D_PAD, k, D_PAD, BLOCK_K, BLOCK_D, UPCAST)
        if UPCAST:
            H_ij = H_ij.to(tl.float32)
        if RESCALE:
            scale = tl.load(H_scale_ptr + (here * (row_size // BLOCK_J) + t) * BLOCK_I + rows)
            G += dot(H_ij, q_j, None, PRECISION) * scale[:, None]
        else:
            G = dot(H_ij, q_j, G, PRECISION)
    row = tl.load(order_ptr + tile * BLOCK_I + rows)
    is_first = (start == 0) & (not NEGATIVES)
    parts = in_parts(G, PARTS)
    for c in tl.static_range(PARTS):
        G_ptrs, mask = columns_of(
            G_ptr, row, k + c * (BLOCK_D // PARTS), n_anchors, D_PAD, BLOCK_D // PARTS
        )
        before = tl.load(G_ptrs, mask=mask & (n_tiles > 0) & (is_first == 0), other=0.0)
        tl.store(G_ptrs, parts[c] + before, mask=mask & ((n_tiles > 0) | is_first))
        if PARTS > 1:
            tl.debug_barrier()


@triton.jit(do_not_specialize=["n_anchors", "n_keys"])
def conr_wide_gradient_kernel(
    layout_ptr, coef_i_ptr, inverse_i_ptr, x_ptr, G_ptr, gradient_ptr,
    n_anchors, n_keys, width, kappa: tl.float64,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS rows from G; a program each.

    The radial part is that of G, from H_ij as it was rounded: nearly parallel features leave little
    else.
    """
    _, order_ptr, _, _, _ = sweep_of(layout_ptr, n_anchors, n_keys, True, CONFUSED, SAME)
    dtype: tl.constexpr = G_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, inverse = tl.load(order_ptr + rows), tl.load(inverse_i_ptr + rows)
    poison = poison_of(coef_i_ptr + rows, padded(n_anchors), dtype)
    factor = tl.full((), kappa, dtype)
    radial = tl.zeros((ROWS,), dtype)
    for k in range(0, width, CHUNK):
        G_ptrs, mask = columns_of(G_ptr, row, k, n_anchors, D_PAD, CHUNK)
        q_i = unit_columns(x_ptr, inverse, row, k, n_anchors, D, CHUNK)
        radial += tl.sum(q_i * tl.load(G_ptrs, mask=mask, other=0.0), axis=1)
    for k in range(0, width, CHUNK):
        G_ptrs, mask = columns_of(G_ptr, row, k, n_anchors, D_PAD, CHUNK)
        q_i = unit_columns(x_ptr, inverse, row, k, n_anchors, D, CHUNK)
        store_gradient(
            tl.load(G_ptrs, mask=mask, other=0.0) * factor, q_i, row, k, radial * factor,
            inverse, poison, gradient_ptr, n_anchors, D,
        )  # fmt: skip
