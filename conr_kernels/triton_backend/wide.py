"""The Triton kernel of the backward pass where a row's gradient does not fit the registers (D >
256).
"""

import triton
import triton.language as tl

from .arithmetic import LOG2E, dot, load_tile, pair_total, scale_pair, similarity
from .gradient import load_coefficients, unit_columns
from .layout import segments, tile_at
from .sweeps import negative_segments, negative_weights


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_programs"])
def conr_backward_wide_kernel(
    layout_ptr,
    q_i_ptr,
    y_i_ptr,
    p_i_ptr,
    coef_i_ptr,
    inverse_i_ptr,
    q_j_ptr,
    y_j_ptr,
    p_j_ptr,
    coef_j_ptr,
    x_ptr,
    H_ptr,
    H_scale_ptr,
    G_ptr,
    gradient_ptr,
    n_anchors,
    n_keys,
    n_programs,
    width,
    stride_n,
    stride_d,
    h: tl.float64,
    push_scale: tl.float64,
    kappa: tl.float64,
    NEGATIVES: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    L: tl.constexpr,
    RMSE: tl.constexpr,
    SAME: tl.constexpr,
    SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr,
    PUSHING: tl.constexpr,
    CONFUSED: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Adds one sweep's ``Σ_j H_ij q_j`` to G [N, D_PAD]; the negatives' sweep, the second, ends
    with the gradient.

    A program walks over anchor tiles. For GROUP key tiles at a time it puts H_ij into its own part
    of the workspace H [programs, BLOCK_I, GROUP·BLOCK_J], then multiplies it by the keys: BLOCK_K
    keys a step into BLOCK_G columns of G, one chunk of columns after another. In float16, H_ij is
    divided by its row's largest magnitude in the tile, which H_scale [programs, GROUP, BLOCK_I]
    keeps.
    """
    PAD: tl.constexpr = 128
    EXACT: tl.constexpr = L == 1
    ROW: tl.constexpr = GROUP * BLOCK_J
    STEPS: tl.constexpr = BLOCK_J // BLOCK_K
    TAIL: tl.constexpr = 64  # columns of the gradient at a time
    pid = tl.program_id(0)
    keys, anchors = tl.cdiv(n_keys, PAD) * PAD, tl.cdiv(n_anchors, PAD) * PAD
    order_ptr = layout_ptr + PAD + (0 if SAME else 2 * keys)
    self_ptr = layout_ptr + PAD + 2 * keys + 2 * anchors
    lo_ptr = self_ptr + anchors
    if NEGATIVES and CONFUSED:
        order_ptr += tl.where(tl.load(layout_ptr) == 0, keys if SAME else anchors, 0)
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    H_ptr += pid.to(tl.int64) * BLOCK_I * ROW
    if RESCALE:
        H_scale_ptr += pid.to(tl.int64) * GROUP * BLOCK_I
    H_rows = H_ptr + rows[:, None] * ROW
    dtype: tl.constexpr = G_ptr.dtype.element_ty

    for tile in range(pid, tl.cdiv(n_anchors, BLOCK_I), n_programs):
        i0 = tl.full((), tile, tl.int64) * BLOCK_I
        # The key tiles [a0, a1) ∪ [b0, b1); no mask in [f0, f1) but for [s0, s1).
        if NEGATIVES:
            f0, f1, g0, g1, e0, e1, e2, e3 = negative_segments(
                tile, layout_ptr, n_anchors, n_keys, EXACT, CONFUSED, BLOCK_I, BLOCK_J
            )
            if CONFUSED:
                a0, a1, b0, b1 = e0, e1, f0, e3
            else:
                a0, a1, b0, b1 = f0, f1, g0, g1
        else:
            a0, a1, f0, f1, s0, s1 = segments(
                tile, lo_ptr, lo_ptr + 2 * anchors, self_ptr, n_anchors,
                True, SAME, EXACT, BLOCK_I, BLOCK_J,
            )  # fmt: skip
            b0, b1 = a1, a1
        n_tiles = a1 - a0 + b1 - b0

        radial = tl.zeros((BLOCK_I,), dtype)
        # One group at least: it writes G, and last the gradient, of a tile without pairs too.
        n_groups = tl.maximum(tl.cdiv(n_tiles, GROUP), 1)
        for group in range(n_groups):
            u0 = group * GROUP
            n_here = tl.minimum(n_tiles - u0, GROUP)
            # What belongs to the rows is loaded where it is used, not kept in registers in between.
            y_i_ptrs, p_i_ptrs = y_i_ptr + i0 + rows, p_i_ptr + i0 + rows
            y_i = tl.load(y_i_ptrs)
            window = tl.full((), h, y_i.dtype)
            coef_ptrs = coef_i_ptr + i0 + rows
            if NEGATIVES:
                p_i = tl.load(p_i_ptrs)
                exponent = tl.full((), push_scale * LOG2E, dtype)
                gamma_i, log_gamma_i = load_coefficients(coef_ptrs, anchors, 2, SHIFTED)
            else:
                alpha_i, log_alpha_i = load_coefficients(coef_ptrs, anchors, 0, SHIFTED)
                if INSIDE:
                    beta_i = tl.load(coef_ptrs + anchors)
            for u in range(n_here):
                t = tile_at(u0 + u, a0, a1, b0, b1, b1)
                j0 = tl.full((), t, tl.int64) * BLOCK_J
                s_ij = similarity(
                    0, q_i_ptr + i0 * D_PAD, 0, q_j_ptr + j0 * D_PAD, width,
                    D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
                )  # fmt: skip
                coef_j_ptrs = coef_j_ptr + j0 + columns
                y_j_ptrs = y_j_ptr + j0 + columns
                if NEGATIVES:
                    is_in, phi_ij, t_ij = negative_weights(
                        y_i, y_i_ptrs, y_j_ptrs, p_i, p_i_ptrs, p_j_ptr + j0 + columns,
                        anchors, keys, window, exponent, s_ij, CONFUSED, L, RMSE, PUSHING,
                    )  # fmt: skip
                    gamma_j, log_gamma_j = load_coefficients(coef_j_ptrs, keys, 2, SHIFTED)
                    H_ij = scale_pair(t_ij, gamma_i, gamma_j, log_gamma_i, log_gamma_j, SHIFTED)
                    if SHIFTED:
                        H_ij = tl.where(is_in, H_ij, 0.0)
                    H_ij *= phi_ij
                else:
                    alpha_j, log_alpha_j = load_coefficients(coef_j_ptrs, keys, 0, SHIFTED)
                    H_ij = scale_pair(s_ij, alpha_i, alpha_j, log_alpha_i, log_alpha_j, SHIFTED)
                    if INSIDE:
                        H_ij -= beta_i[:, None] + tl.load(coef_j_ptrs + keys)[None, :]
                    is_full = (t >= f0) & (t < f1) & ((t < s0) | (t >= s1))
                    if is_full == 0:
                        if SAME:
                            self_i = tile * BLOCK_I + rows
                        else:
                            self_i = tl.load(self_ptr + i0 + rows)
                        total = pair_total(y_i, y_i_ptrs, anchors, y_j_ptrs, keys, L, RMSE)
                        is_other = self_i[:, None] != (j0.to(tl.int32) + columns)[None, :]
                        H_ij = tl.where((total <= window) & is_other, H_ij, 0.0)
                if RESCALE:
                    largest = tl.max(tl.abs(H_ij), axis=1)
                    scale = tl.where(largest > 1e-30, largest, 1.0)
                    H_ij *= (1.0 / scale)[:, None]
                    tl.store(H_scale_ptr + u * BLOCK_I + rows, scale)
                H_ptrs = H_rows + u * BLOCK_J + columns[None, :]
                tl.store(H_ptrs, H_ij.to(H_ptr.dtype.element_ty))
            tl.debug_barrier()  # the stores of the whole program before its loads

            for k in range(0, width, BLOCK_G):
                row = tl.load(order_ptr + i0 + rows).to(tl.int64)
                is_row = row < n_anchors
                d = k + tl.arange(0, BLOCK_G)
                G = tl.zeros((BLOCK_I, BLOCK_G), dtype)
                G_ptrs = G_ptr + row[:, None] * D_PAD + d[None, :]
                if NEGATIVES or group > 0:
                    G = tl.load(G_ptrs, mask=is_row[:, None], other=0.0)
                for v in range(n_here * STEPS):
                    t = tile_at(u0 + v // STEPS, a0, a1, b0, b1, b1)
                    j0 = tl.full((), t, tl.int64) * BLOCK_J + v % STEPS * BLOCK_K
                    H_ij = tl.load(H_rows + v * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])
                    q_j = load_tile(q_j_ptr + j0 * D_PAD, k, D_PAD, BLOCK_K, BLOCK_G, UPCAST)
                    if UPCAST:
                        H_ij = H_ij.to(tl.float32)
                    if RESCALE:
                        scale = tl.load(H_scale_ptr + v // STEPS * BLOCK_I + rows)
                        G += dot(H_ij, q_j, None, PRECISION) * scale[:, None]
                    else:
                        G = dot(H_ij, q_j, G, PRECISION)
                if not NEGATIVES:  # kept through the products, these addresses would be spilled
                    row = tl.load(order_ptr + i0 + rows, volatile=True).to(tl.int64)
                    is_row = row < n_anchors
                    G_ptrs = G_ptr + row[:, None] * D_PAD + d[None, :]
                if NEGATIVES and group == n_groups - 1:
                    # Of G, from H_ij as it was rounded: nearly parallel features leave little else.
                    inverse = tl.load(inverse_i_ptr + i0 + rows)
                    offsets = row[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
                    mask = is_row[:, None] & (d < D)[None, :]
                    x_i = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(dtype)
                    radial += tl.sum(x_i * inverse[:, None] * G, axis=1)
                tl.store(G_ptrs, G, mask=is_row[:, None])
            tl.debug_barrier()

        if NEGATIVES:
            row = tl.load(order_ptr + i0 + rows).to(tl.int64)
            inverse = tl.load(inverse_i_ptr + i0 + rows)
            for k in range(0, width, TAIL):
                d = k + tl.arange(0, TAIL)
                is_row = row < n_anchors
                G_ptrs = G_ptr + row[:, None] * D_PAD + d[None, :]
                G = tl.load(G_ptrs, mask=is_row[:, None], other=0.0)
                q_i = unit_columns(row, k, inverse, x_ptr, n_anchors, stride_n, stride_d, D, TAIL)
                poison = tl.zeros((BLOCK_I,), dtype)
                for c in tl.static_range(3):
                    poison += tl.load(coef_i_ptr + c * anchors + i0 + rows) * 0
                G = (G - q_i * radial[:, None]) * tl.full((), kappa, dtype)
                G = G * inverse[:, None] + poison[:, None]
                gradient_ptrs = gradient_ptr + row[:, None] * D + d[None, :]
                mask = is_row[:, None] & (d < D)[None, :]
                tl.store(gradient_ptrs, G.to(gradient_ptr.dtype.element_ty), mask=mask)
