"""Exact bands and the choice of sweep; where they lie, and orders and copies; and the tiles of keys
that a tile of anchors visits.
"""

import triton
import triton.language as tl

#: Of the forward pass that takes each pair once: strips of rows that a row may meet, and programs
#: that share a strip, at most: so many parts there are of a row's sums. Where the head of the
#: layout has a strip's size in blocks of 128 rows, the positives' and the negatives'.
STRIPS, SLICES = tl.constexpr(32), tl.constexpr(16)
PARTS_OF_SUMS = tl.constexpr(STRIPS + SLICES)
POSITIVE_STRIPS, NEGATIVE_STRIPS = tl.constexpr(64), tl.constexpr(96)

#: What sorted rows are padded to, and numbers of the layout's head.
ROW_PAD = tl.constexpr(128)


@triton.jit
def padded(n):
    """Sorted arrays have zero features and NaN labels, which no set contains, up to there."""
    return tl.cdiv(n, ROW_PAD) * ROW_PAD


@triton.jit
def parts_of(layout_ptr, n_anchors, n_keys, SAME: tl.constexpr):
    """Behind a head of 128 numbers, the choice of sweep (1: negatives outside the label bands; 2:
    there, and all predictions within one window) and sizes of strips: the anchors' places among the
    keys, unless they are the keys (SAME). Then for the order of the labels, and ``step`` further on
    for that of the predictions: the order of the keys, the first keys of the anchors' bands, the
    first beyond and, unless SAME, the order of the anchors; the ranks of both (``ranks_of``).
    """
    keys, anchors = padded(n_keys), padded(n_anchors)
    self_ptr = layout_ptr + ROW_PAD
    order_j_ptr = self_ptr if SAME else self_ptr + anchors
    lo_ptr = order_j_ptr + keys
    hi_ptr = lo_ptr + anchors
    order_i_ptr = order_j_ptr if SAME else hi_ptr + anchors
    step = 2 * keys + (2 if SAME else 4) * anchors
    return order_j_ptr, order_i_ptr, self_ptr, lo_ptr, hi_ptr, step


@triton.jit
def ranks_of(layout_ptr, n_anchors, n_keys, SAME: tl.constexpr):
    """Where the rows of keys and, unless SAME, of anchors stand in the order of the labels; and how
    much further on those in the order of the predictions are.
    """
    keys, anchors = padded(n_keys), padded(n_anchors)
    order_j_ptr, _, _, _, _, step = parts_of(layout_ptr, n_anchors, n_keys, SAME)
    rank_j_ptr = order_j_ptr + keys + (2 if SAME else 3) * anchors
    return rank_j_ptr, rank_j_ptr + keys, step


@triton.jit
def _ends(y_i, is_lo, key_values_ptr, n_keys, n_steps, reach):
    """``min { j : y_i − y_j ≤ reach }``, where a band begins, or ``min { j : not y_j − y_i ≤ reach
    }``, where it ends, by binary search on the very comparison.
    """
    reach = tl.full((), reach, y_i.dtype)
    found = tl.zeros(y_i.shape, tl.int32)
    end = found + n_keys
    for _ in range(n_steps):
        mid = (found + end) // 2
        y_j = tl.load(key_values_ptr + tl.minimum(mid, n_keys - 1))
        is_near = tl.where(is_lo, y_i - y_j, y_j - y_i) <= reach
        is_found = (is_near == is_lo) | (mid >= n_keys)
        found, end = tl.where(is_found, found, mid + 1), tl.where(is_found, mid, end)
        found = tl.minimum(found, end)
    return end


@triton.jit
def find_bands(
    pid, key_values_ptr, values_ptr, layout_ptr, n_anchors, n_keys, self_offset, n_steps, reach,
    HAS_KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The bands of ROWS sorted anchors, and their places among the keys; in the order of the
    labels, by further programs in that of the predictions.
    """
    n_padded = padded(n_anchors)
    which = pid // (n_padded // ROWS)
    rows = pid * ROWS + tl.arange(0, ROWS) - which * n_padded
    i = tl.minimum(rows, n_anchors - 1)
    _, order_i_ptr, self_ptr, lo_ptr, hi_ptr, step = parts_of(
        layout_ptr, n_anchors, n_keys, not HAS_KEYS
    )
    is_lo = tl.arange(0, 2)[:, None] == 0
    y_i = tl.load(values_ptr + which * n_anchors.to(tl.int64) + i)
    key_values_ptr += which * n_keys.to(tl.int64)
    ends = _ends(
        tl.broadcast_to(y_i[None, :], (2, ROWS)), is_lo, key_values_ptr, n_keys, n_steps, reach
    )
    lo, hi = tl.sum(tl.where(is_lo, ends, 0), axis=0), tl.max(ends, axis=0)
    if not HAS_KEYS:
        # A row that is not in its own band is not finite. Where it stands it has an empty one: it
        # then meets nothing far from it, and ends of finite windows' bands grow from row to row.
        is_out = (i < lo) | (hi <= i)
        lo, hi = tl.where(is_out, i, lo), tl.where(is_out, i, hi)
    tl.store(lo_ptr + which * step + rows, lo)
    tl.store(hi_ptr + which * step + rows, hi)
    if HAS_KEYS:
        # The negatives never include the anchor itself: its place in their order is not needed.
        rank_j_ptr, _, _ = ranks_of(layout_ptr, n_anchors, n_keys, False)
        own = tl.load(rank_j_ptr + self_offset + tl.load(order_i_ptr + i))
        tl.store(self_ptr + rows, own, mask=which == 0)


@triton.jit
def choose_sweep(
    key_values_ptr, values_ptr, layout_ptr, n_anchors, n_keys, n_steps, reach,
    EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes down whether the negatives of all tiles of ROWS anchors visit fewer keys outside the
    bands of the labels than in those of the predictions (1), and there no prediction is known to be
    out of the window of another (2); and how long strips of rows are (``_strip_size``), of which
    one outside the bands meets all rows behind it.
    """
    BLOCK: tl.constexpr = 128
    # Lower and upper ends of bands of predictions, then of labels.
    ends_of: tl.constexpr = 4 if EXACT else 2
    number = tl.arange(0, ends_of)[:, None]
    is_lo, is_p = number % 2 == 0, number < 2
    value_ptrs = values_ptr + tl.where(is_p, n_anchors, 0)
    key_value_ptrs = key_values_ptr + tl.where(is_p, n_keys, 0)
    sign = tl.where(is_lo, -1, 1)
    excess, reach_p = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int32)
    reach_y = reach_p
    for start in range(0, n_anchors, BLOCK * ROWS):
        first = start + tl.arange(0, BLOCK)[None, :] * ROWS
        last = tl.minimum(first + ROWS, n_anchors) - 1
        is_tile = first < n_anchors
        first = tl.minimum(first, n_anchors - 1)
        # From where the first row's band of predictions begins to where the last one's ends; all
        # anchors' label bands contain what lies between the other ends.
        row = tl.where(is_lo == is_p, first, last)
        values = tl.load(value_ptrs + row)
        ends = _ends(values, is_lo, key_value_ptrs, n_keys, n_steps, reach)
        # A band of what is not finite is empty, and ends before it begins.
        here = tl.maximum(tl.sum(tl.where(is_p, sign * ends, 0), axis=0), 0) - n_keys
        if EXACT:
            here += tl.maximum(tl.sum(tl.where(is_p, 0, sign * ends), axis=0), 0)
        is_tile = tl.reshape(is_tile, (BLOCK,))
        excess += tl.where(is_tile, here, 0)
        begin = start + tl.arange(0, BLOCK) * ROWS
        reach_p = tl.maximum(reach_p, tl.sum(tl.where(number == 1, ends, 0), axis=0) - begin)
        if EXACT:
            # The last anchor's band ends no later than the next tile's first one's.
            end_y = tl.sum(tl.where(number == 3, ends, 0), axis=0) + ROWS
            reach_y = tl.maximum(reach_y, end_y - begin)
    choice = (tl.sum(excess, axis=0) >= 0).to(tl.int32)
    if EXACT:
        p_i, p_j = values_ptr + n_anchors, key_values_ptr + n_keys
        reach = tl.full((), reach, p_i.dtype.element_ty)
        is_near = tl.load(p_i + n_anchors - 1) - tl.load(p_j) <= reach
        is_near = is_near & (tl.load(p_j + n_keys - 1) - tl.load(p_i) <= reach)
        choice += choice & is_near.to(tl.int32)
    n_blocks, at = tl.cdiv(n_anchors, ROWS), tl.arange(0, ROW_PAD)
    of_all = tl.cdiv(n_blocks, STRIPS)
    of_y = tl.minimum(_strip_size(tl.max(reach_y, axis=0), ROWS), of_all)
    of_p = tl.minimum(_strip_size(tl.max(reach_p, axis=0), ROWS), of_all)
    head = tl.where(at < NEGATIVE_STRIPS, of_y, tl.where(choice > 0, of_all, of_p))
    tl.store(layout_ptr + at, tl.where(at < POSITIVE_STRIPS, choice, head))


@triton.jit
def _strip_size(reach, ROWS: tl.constexpr):
    """Blocks of ROWS rows of a strip, so that no row is in or met by more than STRIPS of them, each
    of which has memory of its own: no row is more than ``reach``, rounded up to R blocks, behind
    the begin of a block that meets it. At most ``(R − 1) // size + 2`` strips of ``size`` blocks
    have one of R blocks that end with that row's.
    """
    return tl.cdiv(tl.cdiv(reach, ROWS) + 1, STRIPS - 2)


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
    _, order_ptr, self_ptr, lo_ptr, hi_ptr, step = parts_of(layout_ptr, n_anchors, n_keys, SAME)
    is_outside = False
    if NEGATIVES and CONFUSED:
        is_outside = tl.load(layout_ptr) != 0
        behind = tl.where(is_outside, 0, step)
        order_ptr += behind
        lo_ptr += behind
        hi_ptr += behind
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
def upper_tiles(
    tile, layout_ptr, n_rows, NEGATIVES: tl.constexpr, OWN: tl.constexpr, MET: tl.constexpr
):
    """Of the tiles of MET keys that a tile of OWN anchors visits those not before its own rows,
    ``[a, b)``, where the anchors are the keys, labels are scalars and predictions decide of
    negatives; the other pairs are these the other way round. Within them ``[c, d)``, all of whose
    pairs lie in the anchors' bands, but for tiles that hold an anchor's pair with itself. MET
    divides OWN.

    ``b`` grows with the tile, and ``a`` where the sides are equal: a row between two others is
    within the window of both.
    """
    is_outside, _, _, _, hi_ptr = sweep_of(layout_ptr, n_rows, n_rows, NEGATIVES, True, True)
    first = tile * OWN
    last = tl.minimum(first + OWN, n_rows) - 1
    a = tile * (OWN // MET)
    own_end = a + OWN // MET
    # What the first anchor reaches all of them do: behind their own rows, or if it reaches these.
    reached = tl.load(hi_ptr + first) // MET
    b = tl.maximum(tl.cdiv(tl.load(hi_ptr + last), MET), a)
    c, d = own_end, tl.minimum(reached, b)
    if NEGATIVES:
        c = tl.where(reached >= own_end, a, own_end)
        # Outside: all but the tiles that hold positives alone; predictions as in ``key_tiles``.
        end, is_near = tl.cdiv(n_rows, MET), tl.load(layout_ptr) == 2
        a = tl.where(is_outside & (reached >= own_end), tl.minimum(reached, end), a)
        b = tl.where(is_outside, end, b)
        c = tl.where(is_outside, a, c)
        d = tl.where(is_outside, tl.where(is_near, b, a), d)
    return a, b, c, tl.maximum(c, d)


@triton.jit
def lower_tiles(tile, layout_ptr, n_rows, NEGATIVES: tl.constexpr, BLOCK: tl.constexpr):
    """The same pairs from their later tile: no tile before ``begin`` visits it; and of how many
    tiles the ``a`` is not behind it.
    """
    is_outside, _, _, lo_ptr, _ = sweep_of(layout_ptr, n_rows, n_rows, NEGATIVES, True, True)
    begin, n = tl.minimum(tl.load(lo_ptr + tile * BLOCK) // BLOCK, tile), tile + 1
    if NEGATIVES:
        # Outside: rows whose band ends in this tile are in the band of its last row.
        last = tile * BLOCK + BLOCK - 1
        before = tl.cdiv(tl.load(lo_ptr + tl.minimum(last, n_rows - 1)), BLOCK)
        n = tl.where(is_outside & (last < n_rows), tl.minimum(before, n), n)
        begin = tl.where(is_outside, 0, begin)
    return begin, n


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
