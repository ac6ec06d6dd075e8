"""The Triton kernel of the backward pass where a row's gradient does not fit the registers (D >
256).
"""

import triton
import triton.language as tl

from .triton_layout import segments
from .triton_math import LOG2E, load_tile, pair_distance, scale_pair, similarity
from .triton_sweeps import add_product, load_coefficients, negative_segments, negative_weights


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
    G_ptr,
    radial_ptr,
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
):
    """Adds one sweep's ``Σ_j H_ij q_j`` to G [N, D_PAD]; the negatives' sweep, the second, ends
    with the gradient.

    A program walks over anchor tiles. For GROUP key tiles at a time it puts H_ij into its own part
    of the workspace H [programs, GROUP, BLOCK_I, BLOCK_J], then multiplies it by the keys, chunk
    of D after chunk.
    """
    PAD: tl.constexpr = 128
    LN2: tl.constexpr = 0.6931471805599453
    AREA: tl.constexpr = BLOCK_I * BLOCK_J
    pid = tl.program_id(0)
    keys, anchors = tl.cdiv(n_keys, PAD) * PAD, tl.cdiv(n_anchors, PAD) * PAD
    order_ptr = layout_ptr + PAD + (0 if SAME else 2 * keys)
    self_ptr = layout_ptr + PAD + 2 * keys + 2 * anchors
    lo_ptr = self_ptr + anchors
    is_in_bands = tl.load(layout_ptr) == 0
    if NEGATIVES and CONFUSED:
        order_ptr += tl.where(is_in_bands, keys if SAME else anchors, 0)
    rows, columns = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    in_tile = rows[:, None] * BLOCK_J + columns[None, :]
    H_ptr += pid.to(tl.int64) * GROUP * AREA
    dtype: tl.constexpr = radial_ptr.dtype.element_ty

    for tile in range(pid, tl.cdiv(n_anchors, BLOCK_I), n_programs):
        i0 = tl.full((), tile, tl.int64) * BLOCK_I
        if NEGATIVES:
            f0, f1, g0, g1, e0, e1, e2, e3 = negative_segments(
                tile, layout_ptr, n_anchors, n_keys, False, CONFUSED, BLOCK_I, BLOCK_J
            )
            if CONFUSED:
                lo, hi = e0, e3
            else:
                lo, hi = 0, g1
        else:
            lo, hi, f0, f1, s0, s1 = segments(
                tile, lo_ptr, lo_ptr + 2 * anchors, self_ptr, n_anchors,
                False, SAME, False, BLOCK_I, BLOCK_J,
            )  # fmt: skip
        row = tl.load(order_ptr + i0 + rows).to(tl.int64)
        is_row = row < n_anchors
        y_i_ptrs, p_i_ptrs = y_i_ptr + i0 + rows, p_i_ptr + i0 + rows
        y_i, p_i = tl.load(y_i_ptrs), tl.load(p_i_ptrs)
        window = tl.full((), h, y_i.dtype)
        exponent = tl.full((), push_scale * LOG2E, dtype)
        if SAME:
            self_i = tile * BLOCK_I + rows
        else:
            self_i = tl.load(self_ptr + i0 + rows)
        coef_ptrs = coef_i_ptr + i0 + rows
        alpha_i, log_alpha_i = load_coefficients(coef_ptrs, anchors, 0, SHIFTED)
        gamma_i, log_gamma_i = load_coefficients(coef_ptrs, anchors, 2, SHIFTED)
        beta_i = tl.load(coef_ptrs + anchors)
        radial = tl.zeros((BLOCK_I,), dtype)
        if NEGATIVES:
            radial += tl.load(radial_ptr + row, mask=is_row, other=0.0)

        for group in range(lo, hi, GROUP):
            group_end = tl.minimum(group + GROUP, hi)
            for t in range(group, group_end):
                j0 = tl.full((), t, tl.int64) * BLOCK_J
                tile_q_i = q_i_ptr + i0 * D_PAD
                tile_q_j = q_j_ptr + j0 * D_PAD
                s_ij = similarity(
                    0, tile_q_i, 0, tile_q_j, width,
                    D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
                )  # fmt: skip
                coef_j_ptrs = coef_j_ptr + j0 + columns
                if NEGATIVES:
                    is_in, phi_ij, t_ij = negative_weights(
                        y_i, y_i_ptrs, y_j_ptr + j0 + columns, p_i, p_i_ptrs,
                        p_j_ptr + j0 + columns, anchors, keys, window, exponent, s_ij,
                        CONFUSED, L, RMSE, PUSHING,
                    )  # fmt: skip
                    gamma_j, log_gamma_j = load_coefficients(coef_j_ptrs, keys, 2, SHIFTED)
                    H_ij = scale_pair(t_ij, gamma_i, gamma_j, log_gamma_i, log_gamma_j, SHIFTED)
                    H_ij = tl.where(is_in, H_ij, 0.0) * phi_ij
                else:
                    d_ij = pair_distance(
                        y_i, y_i_ptrs, anchors, y_j_ptr + j0 + columns, keys, L, RMSE
                    )
                    is_other = self_i[:, None] != (j0.to(tl.int32) + columns)[None, :]
                    alpha_j, log_alpha_j = load_coefficients(coef_j_ptrs, keys, 0, SHIFTED)
                    H_ij = scale_pair(s_ij, alpha_i, alpha_j, log_alpha_i, log_alpha_j, SHIFTED)
                    if INSIDE:
                        H_ij -= beta_i[:, None] + tl.load(coef_j_ptrs + keys)[None, :]
                    H_ij = tl.where((d_ij <= window) & is_other, H_ij, 0.0)
                radial += tl.sum(H_ij * s_ij, axis=1) * LN2
                tl.store(H_ptr + (t - group) * AREA + in_tile, H_ij.to(H_ptr.dtype.element_ty))
            tl.debug_barrier()  # the stores of the whole program before its loads
            for k in range(0, width, BLOCK_D):
                G_ptrs = G_ptr + row[:, None] * D_PAD + k + tl.arange(0, BLOCK_D)[None, :]
                G = tl.load(G_ptrs, mask=is_row[:, None], other=0.0)
                if not NEGATIVES:
                    G = tl.where(group == lo, 0.0, G)
                for t in range(group, group_end):
                    j0 = tl.full((), t, tl.int64) * BLOCK_J
                    H_ij = tl.load(H_ptr + (t - group) * AREA + in_tile)
                    if UPCAST:
                        H_ij = H_ij.to(tl.float32)
                    q_j = load_tile(q_j_ptr + j0 * D_PAD, k, D_PAD, BLOCK_J, BLOCK_D, UPCAST)
                    G = add_product(G, H_ij, q_j, RESCALE, PRECISION, UPCAST)
                tl.store(G_ptrs, G, mask=is_row[:, None])
            tl.debug_barrier()

        if NEGATIVES:
            inverse = tl.load(inverse_i_ptr + i0 + rows)
            poison = tl.zeros((BLOCK_I,), dtype)
            for c in tl.static_range(3):
                poison += tl.load(coef_i_ptr + c * anchors + i0 + rows) * 0
            for k in range(0, width, BLOCK_D):
                d = k + tl.arange(0, BLOCK_D).to(tl.int64)
                mask = is_row[:, None] & (d < D)[None, :]
                G = tl.load(G_ptr + row[:, None] * D_PAD + d[None, :], mask=mask, other=0.0)
                x_ptrs = x_ptr + row[:, None] * stride_n + d[None, :] * stride_d
                q_i = tl.load(x_ptrs, mask=mask, other=0.0).to(dtype) * inverse[:, None]
                G = G * tl.full((), kappa, dtype) - q_i * radial[:, None]
                G = G * inverse[:, None] + poison[:, None]
                gradient_ptrs = gradient_ptr + row[:, None] * D + d[None, :]
                tl.store(gradient_ptrs, G.to(gradient_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(radial_ptr + row, radial, mask=is_row)
