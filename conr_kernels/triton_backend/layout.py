"""What ordering.py leaves to the sweeps: where orders, bands and copies lie, and the tiles of keys
that a tile of anchors visits.
"""

import triton
import triton.language as tl


@triton.jit
def padded(n):
    """Sorted arrays have zero features and NaN labels, which no set contains, up to there."""
    return tl.cdiv(n, 128) * 128


@triton.jit
def parts_of(layout_ptr, n_anchors, n_keys):
    """Behind a head of 128 numbers, whose first is the choice of sweep (1: negatives outside the
    label bands; 2: there, and all predictions within one window), for the order of the labels and
    that of the predictions: the orders of keys and of anchors, the anchors' places among the keys
    (once), the first keys of their bands and the first beyond.
    """
    keys, anchors = padded(n_keys), padded(n_anchors)
    order_i_ptr = layout_ptr + 128 + 2 * keys
    self_ptr = order_i_ptr + 2 * anchors
    lo_ptr = self_ptr + anchors
    return layout_ptr + 128, order_i_ptr, self_ptr, lo_ptr, lo_ptr + 2 * anchors


@triton.jit
def chosen_copies(
    q_ptr, y_ptr, p_ptr, n, is_outside, apart, D_PAD: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """The negatives' copies of n rows, which stand ``apart`` (1) behind those in the order of the
    labels, unless this is chosen; and how many rows further on they are.
    """
    behind = tl.where(is_outside, 0, apart) * padded(n).to(tl.int64)
    return q_ptr + behind * D_PAD, y_ptr + behind * L, p_ptr + behind * L, behind


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
    is_outside = False
    if NEGATIVES and CONFUSED:
        is_outside = tl.load(layout_ptr) != 0
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
            # Outside: all but the tiles that hold positives alone. No predictions are known there,
            # unless all are near each other.
            is_near = tl.load(layout_ptr) == 2
            lo, hi = tl.where(is_outside, 0, lo), tl.where(is_outside, end, hi)
            every = _union(lo, tl.where(is_outside, f0, f1), f1, hi)
            inside = tl.where(is_outside, f1, f0)
            full = _union(
                tl.where(is_near, lo, inside), tl.where(is_near, f0, f1), f1,
                tl.where(is_near, hi, f1),
            )  # fmt: skip
            edges = _union(
                tl.where(is_near, hi, lo), tl.where(is_near, hi, f0), tl.where(is_near, hi, f1), hi
            )
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
