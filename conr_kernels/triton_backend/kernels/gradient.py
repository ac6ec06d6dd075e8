"""The Triton kernels of the two banded sweeps, backward, with a row's gradient in registers.

Tiles are visited as in the forward pass: see sweeps.py.
"""

import triton
import triton.language as tl

from .arithmetic import (
    await_earlier,
    dot,
    in_registers,
    load_tile,
    scale_pair,
    similarity,
    to_halves,
)
from .layout import chosen_copies, count_of, key_tiles, padded, sweep_of, tile_at
from .sweeps import anchors_of, in_parts, pairs_of


@triton.jit
def coefficients_of(
    coef_ptrs, n_padded,
    NEGATIVES: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """``α`` or ``γ``, its log₂ where exponents are large, and ``β`` of rows."""
    of = tl.load(coef_ptrs + (2 * n_padded if NEGATIVES else 0))
    log, beta = of, of
    if SHIFTED:
        log = tl.load(coef_ptrs + (4 if NEGATIVES else 3) * n_padded)
    if INSIDE and not NEGATIVES:
        beta = tl.load(coef_ptrs + n_padded)
    return of, log, beta


@triton.jit
def pair_gradients(
    s_ij, anchors, of_anchors, j0, y_j_ptr, p_j_ptr, coef_j_ptr, n_keys,
    NEGATIVES: tl.constexpr, EDGE: tl.constexpr, CONFUSED: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
    PHI: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """``H_ij`` of a tile."""
    is_in, phi_ij, t_ij = pairs_of(
        s_ij, anchors, j0, y_j_ptr, p_j_ptr, n_keys,
        NEGATIVES, EDGE, CONFUSED, L, RMSE, PHI, BLOCK_J,
    )  # fmt: skip
    of_i, log_i, beta_i = of_anchors
    of_j, log_j, beta_j = coefficients_of(
        coef_j_ptr + j0 + tl.arange(0, BLOCK_J), padded(n_keys), NEGATIVES, SHIFTED, INSIDE
    )
    H_ij = scale_pair(t_ij, of_i, of_j, log_i, log_j, SHIFTED)
    if NEGATIVES:
        if SHIFTED:
            H_ij = tl.where(is_in, H_ij, 0.0)
        H_ij *= phi_ij
    else:
        if INSIDE:
            H_ij -= beta_i[:, None] + beta_j[None, :]
        if EDGE:
            H_ij = tl.where(is_in, H_ij, 0.0)
    return H_ij


@triton.jit
def scale_of(largest, IN_HALVES: tl.constexpr):
    """What rows with these largest magnitudes are divided by, as float16 has few exponents: for
    halves a power of two, which leaves less than 2¹⁵.
    """
    if IN_HALVES:
        bits = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True)
        return (bits & 0x7F800000).to(tl.float32, bitcast=True) * 2.0**-14
    else:
        return tl.where(largest > 1e-30, largest, 1.0)


@triton.jit
def in_range(H_ij):
    """``H_ij`` by its rows' scale, and this."""
    scale = scale_of(tl.max(tl.abs(H_ij), axis=1), False)
    return H_ij * (1.0 / scale)[:, None], scale


@triton.jit
def halves_in_range(H_ij, UPCAST: tl.constexpr):
    """The same in halves."""
    scale = scale_of(tl.max(tl.abs(H_ij), axis=1), True)
    large, small = to_halves(H_ij * (1.0 / scale)[:, None])
    if UPCAST:
        large, small = large.to(tl.float32), small.to(tl.float32)
    return (large, small), scale


@triton.jit
def _add_tile(
    G, tile_j, anchors, of_anchors, q_i, q_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr, coef_j_ptr, n_keys,
    width, unit, EDGE: tl.constexpr, NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr,
    D_PAD: tl.constexpr, L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr, PHI: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``G + Σ_j H_ij q_j`` over a tile of pairs."""
    j0 = tile_j.to(tl.int64) * BLOCK_J
    q_j_ptr += j0 * D_PAD
    q_j = load_tile(q_j_ptr, 0, D_PAD, BLOCK_J, D_PAD, PRECISION, UPCAST)
    s_ij = similarity(
        q_i, q_i_ptr, q_j, q_j_ptr, width, unit, D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST
    )
    H_ij = pair_gradients(
        s_ij, anchors, of_anchors, j0, y_j_ptr, p_j_ptr, coef_j_ptr, n_keys,
        NEGATIVES, EDGE, CONFUSED, L, RMSE, SHIFTED, INSIDE, PHI, BLOCK_J,
    )  # fmt: skip
    if PRECISION == "fp16x3":
        H_ij, scale = halves_in_range(H_ij, UPCAST)
        # Tensor cores cut off what they add to a sum: a tile's is rounded.
        G += dot(H_ij, q_j, None, PRECISION) * scale[:, None]
    elif RESCALE:
        H_ij, scale = in_range(H_ij)
        H_ij = H_ij.to(tl.float16)
        G += dot(H_ij.to(tl.float32) if UPCAST else H_ij, q_j, None, PRECISION) * scale[:, None]
    else:
        G = dot(H_ij if UPCAST else H_ij.to(q_j.dtype), q_j, G, PRECISION)
    return G


@triton.jit
def columns_of(ptr, row, first, n_anchors, D: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to columns ``[first, first + WIDTH)`` of rows of a matrix [N, D], and their mask."""
    k = first + tl.arange(0, WIDTH)
    mask = (row < n_anchors)[:, None] & (k < D)[None, :]
    return ptr + row.to(tl.int64)[:, None] * D + k[None, :], mask


@triton.jit
def store_sum(G, row, first, G_ptr, G_rest_ptr, n_anchors, D: tl.constexpr):
    """Stores columns ``first …`` of G; where there is a G_rest, its halves of 16 bits."""
    if G_rest_ptr is not None:
        bits = G.to(tl.int32, bitcast=True)
        rest_ptrs, mask = columns_of(G_rest_ptr, row, first, n_anchors, D, G.shape[1])
        tl.store(rest_ptrs, bits.to(tl.int16), mask=mask)
        G = (bits >> 16).to(tl.int16)
    G_ptrs, mask = columns_of(G_ptr, row, first, n_anchors, D, G.shape[1])
    tl.store(G_ptrs, G, mask=mask)


@triton.jit
def load_sum(row, first, G_ptr, G_rest_ptr, n_anchors, D: tl.constexpr, WIDTH: tl.constexpr):
    """What ``store_sum`` stored."""
    G_ptrs, mask = columns_of(G_ptr, row, first, n_anchors, D, WIDTH)
    G = tl.load(G_ptrs, mask=mask, other=0)
    if G_rest_ptr is not None:
        rest_ptrs, mask = columns_of(G_rest_ptr, row, first, n_anchors, D, WIDTH)
        rest = tl.load(rest_ptrs, mask=mask, other=0).to(tl.int32) & 0xFFFF
        G = ((G.to(tl.int32) << 16) | rest).to(tl.float32, bitcast=True)
    return G


@triton.jit
def unit_columns(x_ptr, inverse, row, first, n_anchors, D: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``[first, first + WIDTH)`` of the rows' unit features."""
    x_ptrs, mask = columns_of(x_ptr, row, first, n_anchors, D, WIDTH)
    return tl.load(x_ptrs, mask=mask, other=0.0).to(inverse.dtype) * inverse[:, None]


@triton.jit
def poison_of(coef_ptrs, n_padded, dtype: tl.constexpr):
    """0, or NaN where a row's coefficients are not finite."""
    poison = tl.load(coef_ptrs) + tl.load(coef_ptrs + n_padded) + tl.load(coef_ptrs + 2 * n_padded)
    return (poison * 0).to(dtype)


@triton.jit
def store_gradient(
    G, q_i, row, first, radial, inverse, poison, gradient_ptr, n_anchors, D: tl.constexpr
):  # fmt: skip
    """``( ∂L/∂q_i − q_i (q_i·∂L/∂q_i) ) / ‖x_i‖``, columns ``first …``."""
    ptrs, mask = columns_of(gradient_ptr, row, first, n_anchors, D, G.shape[1])
    G = (G - q_i * radial[:, None]) * inverse[:, None] + poison[:, None]
    tl.store(ptrs, G.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_sweep(
    tile, slot, n_slots, layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr,
    q_j_ptr, y_j_ptr, p_j_ptr, coef_j_ptr, n_anchors, n_keys, width, apart, unit, h, push_scale,
    NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
    PHI: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """``Σ_j H_ij q_j`` of a tile of anchors over one of n_slots equal parts of its key tiles, the
    anchors' rows, and how many rows the anchors' copies stand behind the first ones.
    """
    is_outside, order_ptr, self_ptr, _, _ = sweep_of(
        layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME
    )
    behind = tl.zeros((), tl.int64)
    if CONFUSED:
        COLUMNS: tl.constexpr = 5 if SHIFTED else 3
        q_j_ptr, y_j_ptr, p_j_ptr, behind = chosen_copies(
            q_j_ptr, y_j_ptr, p_j_ptr, n_keys, is_outside, apart, D_PAD, L
        )
        coef_j_ptr += behind * COLUMNS
        q_i_ptr, y_i_ptr, p_i_ptr, behind = chosen_copies(
            q_i_ptr, y_i_ptr, p_i_ptr, n_anchors, is_outside, apart, D_PAD, L
        )
        coef_i_ptr += behind * COLUMNS
    _, full, edges = key_tiles(
        tile, layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME, L == 1, BLOCK_I, BLOCK_J
    )
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    anchors = anchors_of(
        tile, y_i_ptr, p_i_ptr, self_ptr, n_anchors, h, push_scale, SAME, BLOCK_I, dtype
    )
    rows = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    of_anchors = coefficients_of(coef_i_ptr + rows, padded(n_anchors), NEGATIVES, SHIFTED, INSIDE)
    q_i_ptr += tile.to(tl.int64) * BLOCK_I * D_PAD
    q_i = load_tile(q_i_ptr, 0, D_PAD, BLOCK_I, BLOCK_D, PRECISION, UPCAST)
    if RESIDENT and D_PAD == BLOCK_D:
        q_i = in_registers(q_i, PRECISION)
    G = tl.zeros((BLOCK_I, D_PAD), dtype)
    n_full, n_edges = count_of(full), count_of(edges)
    for t in range(n_full * slot // n_slots, n_full * (slot + 1) // n_slots):
        G = _add_tile(
            G, tile_at(t, full), anchors, of_anchors, q_i, q_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr,
            coef_j_ptr, n_keys, width, unit, False, NEGATIVES, CONFUSED, D_PAD, L, RMSE, SHIFTED,
            INSIDE, PHI, RESCALE, PRECISION, UPCAST, BLOCK_I, BLOCK_J, BLOCK_D,
        )  # fmt: skip
    for t in range(n_edges * slot // n_slots, n_edges * (slot + 1) // n_slots):
        G = _add_tile(
            G, tile_at(t, edges), anchors, of_anchors, q_i, q_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr,
            coef_j_ptr, n_keys, width, unit, True, NEGATIVES, CONFUSED, D_PAD, L, RMSE, SHIFTED,
            INSIDE, PHI, RESCALE, PRECISION, UPCAST, BLOCK_I, BLOCK_J, BLOCK_D,
        )  # fmt: skip
    return G, tl.load(order_ptr + rows), behind


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_slots"])
def conr_backward_parts_kernel(
    layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr, q_j_ptr, y_j_ptr, p_j_ptr, coef_j_ptr, G_ptr,
    n_anchors, n_keys, n_slots, width, unit: tl.float64, h: tl.float64, push_scale: tl.float64,
    APART: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, RMSE: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr,
    PHI: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Parts of ``Σ_j H_ij q_j`` in the caller's order, G [2 sweeps · n_slots, N, D_PAD]: n_slots
    programs per tile of anchors for the positives, then as many for the negatives.
    """
    await_earlier(EARLY)
    PARTS: tl.constexpr = 4 if D_PAD > 128 else 1
    WIDTH: tl.constexpr = D_PAD // PARTS
    n_programs = tl.num_programs(0) // 2
    which, here = tl.program_id(0) // n_programs, tl.program_id(0) % n_programs
    tile, slot = here // n_slots, here % n_slots
    if which == 0:
        G, row, _ = _sum_of_sweep(
            tile, slot, n_slots, layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr, q_j_ptr,
            y_j_ptr, p_j_ptr, coef_j_ptr, n_anchors, n_keys, width, APART, unit, h, push_scale,
            False, False, SAME, D_PAD, L, RMSE, SHIFTED, INSIDE, "one", RESCALE, PRECISION, UPCAST,
            BLOCK_I, BLOCK_J, BLOCK_D, RESIDENT,
        )  # fmt: skip
    else:
        G, row, _ = _sum_of_sweep(
            tile, slot, n_slots, layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr, q_j_ptr,
            y_j_ptr, p_j_ptr, coef_j_ptr, n_anchors, n_keys, width, APART, unit, h, push_scale,
            True, CONFUSED, SAME, D_PAD, L, RMSE, SHIFTED, False, PHI, RESCALE, PRECISION,
            UPCAST, BLOCK_I, BLOCK_J, BLOCK_D, RESIDENT,
        )  # fmt: skip
    G_ptr += (which * n_slots + slot).to(tl.int64) * n_anchors * D_PAD
    parts = in_parts(G, PARTS)
    for c in tl.static_range(PARTS):
        G_ptrs, mask = columns_of(G_ptr, row, c * WIDTH, n_anchors, D_PAD, WIDTH)
        tl.store(G_ptrs, parts[c], mask=mask)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_parts"])
def conr_gradient_kernel(
    layout_ptr, coef_i_ptr, inverse_i_ptr, x_ptr, G_ptr, upstream_ptr, gradient_ptr,
    n_anchors, n_keys, n_parts, kappa: tl.float64,
    SAME: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS rows from G [n_parts, N, D_PAD], times the upstream gradient where the
    coefficients are without; a program each.
    """
    await_earlier(EARLY)
    _, order_ptr, _, _, _ = sweep_of(layout_ptr, n_anchors, n_keys, False, False, SAME)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, inverse = tl.load(order_ptr + rows), tl.load(inverse_i_ptr + rows)
    dtype: tl.constexpr = inverse.dtype
    G_ptrs, mask = columns_of(G_ptr, row, 0, n_anchors, D_PAD, D_PAD)
    G = tl.zeros((ROWS, D_PAD), dtype)
    for _ in range(n_parts):
        G += tl.load(G_ptrs, mask=mask, other=0.0)
        G_ptrs += n_anchors.to(tl.int64) * D_PAD
    G *= factor_of(kappa, upstream_ptr).to(dtype)
    q_i = unit_columns(x_ptr, inverse, row, 0, n_anchors, D, D_PAD)
    poison = poison_of(coef_i_ptr + rows, padded(n_anchors), dtype)
    radial = tl.sum(q_i * G, axis=1)
    store_gradient(G, q_i, row, 0, radial, inverse, poison, gradient_ptr, n_anchors, D)


@triton.jit
def factor_of(kappa, upstream_ptr):
    """kappa, times the upstream gradient if there is one, in float64."""
    factor = tl.full((), kappa, tl.float64)
    if upstream_ptr is not None:
        factor *= tl.load(upstream_ptr).to(tl.float64)
    return factor


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "apart"])
def conr_backward_kernel(
    layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr, inverse_i_ptr,
    q_j_ptr, y_j_ptr, p_j_ptr, coef_j_ptr, x_ptr, G_ptr, G_rest_ptr, upstream_ptr, gradient_ptr,
    n_anchors, n_keys, width, apart, unit: tl.float64, h: tl.float64, push_scale: tl.float64,
    kappa: tl.float64,
    NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, L: tl.constexpr, RMSE: tl.constexpr,
    SHIFTED: tl.constexpr, INSIDE: tl.constexpr, PHI: tl.constexpr, RESCALE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    EARLY: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """``Σ_P H_ij q_j`` in the caller's order; then, with ``Σ_M H_ij q_j``, the gradient of x, times
    the upstream gradient where the coefficients are without. A program per tile of anchors.

    G and the gradient may share their memory: a program reads and writes its own rows only.

    ``LATE``: the launch before is the positives', which waited for all before it and has written G
    alone. So only G's readers, and what overwrites it, await it.
    """
    if not LATE:
        await_earlier(EARLY)
    PARTS: tl.constexpr = 4 if D_PAD > 128 else 1
    WIDTH: tl.constexpr = D_PAD // PARTS
    tile = tl.program_id(0)
    dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
    G, row, behind = _sum_of_sweep(
        tile, 0, 1, layout_ptr, q_i_ptr, y_i_ptr, p_i_ptr, coef_i_ptr,
        q_j_ptr, y_j_ptr, p_j_ptr, coef_j_ptr, n_anchors, n_keys, width, apart, unit, h, push_scale,
        NEGATIVES, CONFUSED, SAME, D_PAD, L, RMSE, SHIFTED, INSIDE, PHI, RESCALE, PRECISION,
        UPCAST, BLOCK_I, BLOCK_J, BLOCK_D, RESIDENT,
    )  # fmt: skip
    parts = in_parts(G, PARTS)
    if not NEGATIVES:
        for c in tl.static_range(PARTS):
            store_sum(parts[c], row, c * WIDTH, G_ptr, G_rest_ptr, n_anchors, D)
    else:
        if LATE:
            await_earlier(EARLY)
        rows = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        inverse = tl.load(inverse_i_ptr + behind + rows)
        coef_i_ptr += behind * (5 if SHIFTED else 3)
        poison = poison_of(coef_i_ptr + rows, padded(n_anchors), dtype)
        radial = tl.zeros((BLOCK_I,), dtype)
        factor = factor_of(kappa, upstream_ptr)
        done = ()
        for c in tl.static_range(PARTS):
            part = parts[c] + load_sum(row, c * WIDTH, G_ptr, G_rest_ptr, n_anchors, D, WIDTH)
            part *= factor.to(dtype)
            q = unit_columns(x_ptr, inverse, row, c * WIDTH, n_anchors, D, WIDTH)
            radial += tl.sum(q * part, axis=1)
            done = done + (part,)
            if PARTS > 1:
                tl.debug_barrier()
        for c in tl.static_range(PARTS):
            if PARTS > 1:
                q = unit_columns(x_ptr, inverse, row, c * WIDTH, n_anchors, D, WIDTH)
            store_gradient(
                done[c], q, row, c * WIDTH, radial, inverse, poison, gradient_ptr, n_anchors, D
            )
            if PARTS > 1:
                tl.debug_barrier()
