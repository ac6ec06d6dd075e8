"""Device functions for the pairs of a tile: distances of labels and the negatives' weights."""

import triton
import triton.language as tl

#: Components of labels up to which ``unrolled_total`` has no loop.
UNROLLED = tl.constexpr(7)


@triton.jit
def pair_total(y_i, y_i_ptrs, step_i, y_j_ptrs, step_j, L: tl.constexpr, RMSE: tl.constexpr):
    """The sum over components of ``|y_i − y_j|``, or of its square: ``d_ij`` where L = 1.

    The window is given as the largest total whose distance, rounded as the reference rounds it, is
    within it. ``y_i`` holds the anchors' first components; ``step_*`` leads from a row's component
    to its next. Compiled with ``enable_fp_fusion=False`` where squares are added.
    """
    total = tl.abs(y_i[:, None] - tl.load(y_j_ptrs)[None, :])
    if L > 1:
        if RMSE:
            total = total * total
        for c in range(1, L):
            offset = tl.full((), c, tl.int64)
            y_ic = tl.load(y_i_ptrs + offset * step_i)
            y_jc = tl.load(y_j_ptrs + offset * step_j)
            difference = tl.abs(y_ic[:, None] - y_jc[None, :])
            if RMSE:
                difference = difference * difference
            total += difference
    return total


@triton.jit
def load_labels(y_ptr, rows, c, L: tl.constexpr, WIDE: tl.constexpr):
    """Component c of rows, in the dtype in which labels are compared."""
    return tl.load(y_ptr + rows.to(tl.int64) * L + c).to(tl.float64 if WIDE else tl.float32)


@triton.jit
def _component(
    y_ptr, i, key_y_ptr, j, c, L: tl.constexpr, RMSE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """What component c adds to ``pair_total``."""
    y_ic, y_jc = load_labels(y_ptr, i, c, L, WIDE), load_labels(key_y_ptr, j, c, L, WIDE)
    difference = tl.abs(y_ic[:, None] - y_jc[None, :])
    return difference * difference if RMSE else difference


@triton.jit
def unrolled_total(
    y_i, y_ptr, i, key_y_ptr, j, L: tl.constexpr, RMSE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """``pair_total`` of rows in the caller's order, for dense.py: its kernels would spill with a
    loop over few components.
    """
    total = tl.abs(y_i[:, None] - load_labels(key_y_ptr, j, 0, L, WIDE)[None, :])
    if RMSE:
        total = total * total
    if L <= UNROLLED:
        for c in tl.static_range(1, L):
            total += _component(y_ptr, i, key_y_ptr, j, c, L, RMSE, WIDE)
    else:
        for c in range(1, L):
            total += _component(y_ptr, i, key_y_ptr, j, c, L, RMSE, WIDE)
    return total


@triton.jit
def distance_of(total, L: tl.constexpr, RMSE: tl.constexpr):
    """``d_ij`` to rounding: a factor of the pair's weight, which decides nothing."""
    if L > 1:
        total = total * tl.full((), 1.0 / L, total.dtype)
        if RMSE:
            total = tl.sqrt(total)
    return total


@triton.jit
def weigh_negatives(
    total, is_negative, exponent, s_ij, L: tl.constexpr, RMSE: tl.constexpr, PHI: tl.constexpr
):  # fmt: skip
    """``φ_ij`` (0 outside ``M_i``) and the exponents of a tile; ``exponent`` is ``e·log₂e``."""
    t_ij = s_ij
    if PHI == "exponential":
        d_ij = distance_of(total, L, RMSE).to(s_ij.dtype)
        t_ij += tl.where(is_negative, d_ij * exponent, 0.0)
    if PHI == "distance":
        phi_ij = tl.where(is_negative, distance_of(total, L, RMSE), 0.0).to(s_ij.dtype)
    else:
        tl.static_assert(PHI == "one" or PHI == "exponential")
        phi_ij = tl.where(is_negative, 1.0, 0.0).to(s_ij.dtype)
    return phi_ij, t_ij
