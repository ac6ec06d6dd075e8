"""The Triton kernels of the banded sweeps, forward, where the anchors are the keys: both sets and
``s_ij`` are symmetric, so that each pair's exponential is taken once, for the sums of both rows.

A program has a *strip* of tiles of rows and a slice of the tiles that these meet, none of them
before themselves. Its own rows' sums stay in the registers of a loop; what the rows that it meets
get of the strip, it adds up in memory that no other program touches.
"""

import triton
import triton.language as tl

from .arithmetic import FOLD, await_earlier, fold, load_tile, similarity
from .layout import (
    NEGATIVE_STRIPS,
    PARTS_OF_SUMS,
    POSITIVE_STRIPS,
    ROW_PAD,
    SLICES,
    STRIPS,
    chosen_copies,
    padded,
    sweep_of,
    upper_tiles,
)
from .sweeps import anchors_of, in_parts, pairs_of, program_of, whole

#: Of every 64 rows of a product's result each of four warps has 16, and a thread two, 8 apart.
WARPS_ROWS = tl.constexpr(64)


@triton.jit
def _strips_of(layout_ptr, n_rows, NEGATIVES: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of a strip, and how many strips there are."""
    size = tl.load(layout_ptr + (NEGATIVE_STRIPS if NEGATIVES else POSITIVE_STRIPS))
    size *= ROW_PAD // BLOCK
    return size, tl.cdiv(tl.cdiv(n_rows, BLOCK), size)


@triton.jit
def _strip_end(
    strip, size, layout_ptr, n_rows,
    NEGATIVES: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Behind the last tile that a strip of tiles of BLOCK_I rows meets."""
    last = tl.minimum((strip + 1) * size, tl.cdiv(n_rows, BLOCK_I)) - 1
    _, end, _, _ = upper_tiles(last, layout_ptr, n_rows, NEGATIVES, BLOCK_I, BLOCK_J)
    return end


@triton.jit
def _fold_rows(tile):
    """Sums over the rows that a thread has of a product's result, without an exchange with others:
    what is left is added up behind the loop.
    """
    if tile.shape[0] > WARPS_ROWS:
        tile = tl.reshape(tile, (tile.shape[0] // WARPS_ROWS, WARPS_ROWS, tile.shape[1]))
        tile = tl.sum(tile, axis=0)
    tile = tl.reshape(tile, (tile.shape[0] // 16, 2, 8, tile.shape[1]))
    tile = tl.sum(tile, axis=1)
    return tl.reshape(tile, (tile.shape[0] * 8, tile.shape[2]))


@triton.jit
def _unsigned(row):
    """A row's number in 64 bits. Of a signed one the compiler would count the loops over tiles in
    64 bits too, whose bounds would take twice the registers.
    """
    return row.to(tl.uint32).to(tl.int64)


@triton.jit
def _places_from(anchors, first):
    """The anchors where keys count from ``first``: compared with constants, these take none of the
    registers that the places of all columns would.
    """
    y_i, y_i_ptrs, p_i, p_i_ptrs, self_i, step_i, h, exponent = anchors
    return y_i, y_i_ptrs, p_i, p_i_ptrs, self_i - first, step_i, h, exponent


@triton.jit
def _add_tile(
    totals, extras, tile_i, j0, met_ptr, of_extra, q_j, q_ptr, y_ptr, p_ptr, n_rows, width,
    unit, h, push_scale, EDGE: tl.constexpr, NEGATIVES: tl.constexpr, D_PAD: tl.constexpr,
    INSIDE: tl.constexpr, PHI: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums of rows ``j`` with those of a tile of pairs added; those of rows ``i`` in memory."""
    PARTS: tl.constexpr = len(totals)
    WIDTH: tl.constexpr = BLOCK_J // PARTS
    dtype: tl.constexpr = totals[0].dtype
    i0 = tile_i * BLOCK_I
    row_i, row_j = _unsigned(i0), _unsigned(j0)
    met_ptrs = met_ptr + row_i + tl.arange(0, BLOCK_I)
    q_i_ptr = q_ptr + row_i * D_PAD
    q_i = load_tile(q_i_ptr, 0, D_PAD, BLOCK_I, BLOCK_D, PRECISION, UPCAST)
    s_ij = similarity(
        q_i, q_i_ptr, q_j, q_ptr + row_j * D_PAD, width, unit,
        D_PAD, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST,
    )  # fmt: skip
    # Asked for before the exponentials, so that they are there behind them; a product over chunks
    # of D would hold them in registers.
    met = tl.load(met_ptrs)
    if INSIDE:
        met_extra = tl.load(met_ptrs + of_extra)
    anchors = anchors_of(
        0, y_ptr + row_i, p_ptr + row_i, y_ptr, n_rows, h, push_scale, True, BLOCK_I, dtype
    )
    # Of its own rows' pairs a tile has both ways.
    is_other = i0 >= j0 + BLOCK_J
    parts = in_parts(s_ij, PARTS)
    done, done_extra = (), ()
    of_i = tl.zeros((BLOCK_I, FOLD), dtype)
    extra_of_i = of_i
    for c in tl.static_range(PARTS):
        first = c * WIDTH
        _, phi_ij, t_ij = pairs_of(
            parts[c], _places_from(anchors, j0 - i0 + first), 0, y_ptr + row_j + first,
            p_ptr + row_j + first, n_rows, NEGATIVES, EDGE, NEGATIVES, 1, False, PHI, WIDTH,
        )  # fmt: skip
        terms = tl.exp2(t_ij) * phi_ij
        done = done + (totals[c] + _fold_rows(terms),)
        of_i += fold(terms)
        if INSIDE:
            terms = parts[c] * phi_ij
            done_extra = done_extra + (extras[c] + _fold_rows(terms),)
            extra_of_i += fold(terms)
        else:
            done_extra = done_extra + (extras[c],)
    tl.store(met_ptrs, met + tl.where(is_other, tl.sum(of_i, axis=1), 0.0))
    if INSIDE:
        extra_of_i = tl.where(is_other, tl.sum(extra_of_i, axis=1), 0.0)
        tl.store(met_ptrs + of_extra, met_extra + extra_of_i)
    return done, done_extra


@triton.jit
def _parts_of(layout_ptr, n_rows, n_programs, NEGATIVES: tl.constexpr, BLOCK_J: tl.constexpr):
    """Tiles of a strip, how many strips there are, in how many slices they are; numbers of a row
    of the parts, and of all parts of one of a row's sums.
    """
    size, n_strips = _strips_of(layout_ptr, n_rows, NEGATIVES, BLOCK_J)
    n_padded = padded(n_rows).to(tl.int64)
    n_slices = tl.minimum(n_programs // n_strips, SLICES)
    return size, n_strips, n_slices, n_padded, n_padded * PARTS_OF_SUMS


@triton.jit
def _sums_of_sweep(
    here, n_programs, layout_ptr, q_ptr, y_ptr, p_ptr, parts_ptr, n_rows, width, apart, unit, h,
    push_scale, NEGATIVES: tl.constexpr, D_PAD: tl.constexpr, INSIDE: tl.constexpr,
    PHI: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One sweep's parts of the sums, of the strip and the slice of program ``here``."""
    tl.static_assert(BLOCK_J % BLOCK_I == 0)
    ROWS: tl.constexpr = min(BLOCK_I, WARPS_ROWS) // 2
    # Of all columns at once, what the pairs need would spill.
    PARTS: tl.constexpr = 4 if BLOCK_J > 64 else 1
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    if NEGATIVES:
        is_outside, _, _, _, _ = sweep_of(layout_ptr, n_rows, n_rows, True, True, True)
        q_ptr, y_ptr, p_ptr, _ = chosen_copies(
            q_ptr, y_ptr, p_ptr, n_rows, is_outside, apart, D_PAD, 1
        )
    size, n_strips, n_slices, n_padded, of_extra = _parts_of(
        layout_ptr, n_rows, n_programs, NEGATIVES, BLOCK_J
    )
    strip, part = tl.minimum(here // n_slices, n_strips - 1), here % n_slices
    first = strip * size
    last = tl.minimum(first + size, tl.cdiv(n_rows, BLOCK_J))
    begin = first * (BLOCK_J // BLOCK_I)
    n = _strip_end(strip, size, layout_ptr, n_rows, NEGATIVES, BLOCK_J, BLOCK_I) - begin
    begin, end = begin + n * part // n_slices, begin + n * (part + 1) // n_slices
    if here >= n_strips * n_slices:  # no strip is left for this program
        last, end = first, begin
    met_ptr = parts_ptr + strip % STRIPS * n_padded
    own_ptr = parts_ptr + (part + STRIPS) * n_padded
    for tile_i in range(begin, end):
        i0 = tile_i * BLOCK_I
        met_ptrs = met_ptr + _unsigned(i0) + tl.arange(0, BLOCK_I)
        tl.store(met_ptrs, tl.zeros((BLOCK_I,), dtype))
        if INSIDE:
            tl.store(met_ptrs + of_extra, tl.zeros((BLOCK_I,), dtype))
    # A row's sum may be another thread's in the next loop over the rows that are met.
    tl.debug_barrier()
    for tile_j in range(first, last):
        a, b, c, d = upper_tiles(tile_j, layout_ptr, n_rows, NEGATIVES, BLOCK_J, BLOCK_I)
        a, b = tl.maximum(a, begin), tl.minimum(b, end)
        c, d = tl.minimum(tl.maximum(c, a), b), tl.minimum(tl.maximum(d, a), b)
        j0 = tile_j * BLOCK_J
        q_j = load_tile(
            q_ptr + _unsigned(j0) * D_PAD, 0, D_PAD, BLOCK_J, BLOCK_D, PRECISION, UPCAST
        )
        totals = in_parts(tl.zeros((ROWS, BLOCK_J), dtype), PARTS)
        extras = totals
        for tile_i in range(c, d):
            totals, extras = _add_tile(
                totals, extras, tile_i, j0, met_ptr, of_extra, q_j, q_ptr, y_ptr, p_ptr, n_rows,
                width, unit, h, push_scale, False, NEGATIVES, D_PAD, INSIDE, PHI, PRECISION,
                UPCAST, BLOCK_I, BLOCK_J, BLOCK_D,
            )  # fmt: skip
        for t in range(a, b - (d - c)):
            tile_i = t + tl.where(t < c, 0, d - c)
            totals, extras = _add_tile(
                totals, extras, tile_i, j0, met_ptr, of_extra, q_j, q_ptr, y_ptr, p_ptr, n_rows,
                width, unit, h, push_scale, True, NEGATIVES, D_PAD, INSIDE, PHI, PRECISION,
                UPCAST, BLOCK_I, BLOCK_J, BLOCK_D,
            )  # fmt: skip
        own_ptrs = own_ptr + _unsigned(j0) + tl.arange(0, BLOCK_J)
        tl.store(own_ptrs, tl.sum(whole(totals), axis=0))
        if INSIDE:
            tl.store(own_ptrs + of_extra, tl.sum(whole(extras), axis=0))
        tl.debug_barrier()


@triton.jit
def _sweep_here(parts_ptr, n_rows, SWEEPS: tl.constexpr, INSIDE: tl.constexpr):
    """As ``program_of``, and where the sweep's parts are."""
    here, n_programs, negatives = program_of(SWEEPS)
    if SWEEPS == "both":
        behind = padded(n_rows).to(tl.int64) * (PARTS_OF_SUMS * (2 if INSIDE else 1))
        parts_ptr += tl.where(negatives, behind, 0)
    return here, n_programs, negatives, parts_ptr


@triton.jit(do_not_specialize=["n_anchors", "apart"])
def conr_mirrored_kernel(
    layout_ptr, q_ptr, y_ptr, p_ptr, parts_ptr, n_anchors, width, apart, unit: tl.float64,
    h: tl.float64, push_scale: tl.float64,
    SWEEPS: tl.constexpr, D_PAD: tl.constexpr, INSIDE: tl.constexpr, PHI: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Parts of the sums of every row, in the sweep's order.

    parts [n_sums, STRIPS + SLICES, N padded]: of each of a sweep's sums what the rows get of the
    strips before their own and of it (strip ``s`` in ``s % STRIPS``), and what those of the strip
    itself get in each slice. The sums: ``Σ_P exp(s_ij)`` and, INSIDE, ``Σ_P s_ij/log 2``; ``Σ_M
    φ_ij exp(s_ij)``.
    """
    await_earlier(EARLY)
    here, n_programs, negatives, parts_ptr = _sweep_here(parts_ptr, n_anchors, SWEEPS, INSIDE)
    if negatives == 0:
        _sums_of_sweep(
            here, n_programs, layout_ptr, q_ptr, y_ptr, p_ptr, parts_ptr, n_anchors, width, apart,
            unit, h, push_scale, False, D_PAD, INSIDE, "one", PRECISION, UPCAST,
            BLOCK_I, BLOCK_J, BLOCK_D,
        )  # fmt: skip
    else:
        _sums_of_sweep(
            here, n_programs, layout_ptr, q_ptr, y_ptr, p_ptr, parts_ptr, n_anchors, width, apart,
            unit, h, push_scale, True, D_PAD, False, PHI, PRECISION, UPCAST,
            BLOCK_I, BLOCK_J, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _total_of_tile(
    tile, n_programs, layout_ptr, parts_ptr, sums_ptr, n_ptr, n_rows,
    NEGATIVES: tl.constexpr, INSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of one sweep, and the numbers of positives, of a tile of rows."""
    size, _, n_slices, n_padded, of_extra = _parts_of(
        layout_ptr, n_rows, n_programs, NEGATIVES, BLOCK
    )
    strip = tile // size - tl.arange(0, STRIPS)
    is_strip, strip = strip >= 0, tl.maximum(strip, 0)
    end = _strip_end(strip, size, layout_ptr, n_rows, NEGATIVES, BLOCK, BLOCK)
    is_met = is_strip & (tile < end)
    slices = tl.arange(0, SLICES)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    _, order_ptr, _, lo_ptr, hi_ptr = sweep_of(
        layout_ptr, n_rows, n_rows, NEGATIVES, NEGATIVES, True
    )
    row = tl.load(order_ptr + rows)
    met_ptrs = parts_ptr + (strip % STRIPS)[:, None] * n_padded + rows[None, :]
    own_ptrs = parts_ptr + (slices + STRIPS)[:, None] * n_padded + rows[None, :]
    sums_ptrs = sums_ptr + (3 * n_rows.to(tl.int64) if NEGATIVES else 0) + row
    for extra in tl.static_range(2 if INSIDE else 1):
        met = tl.load(met_ptrs + extra * of_extra, mask=is_met[:, None], other=0.0)
        own = tl.load(own_ptrs + extra * of_extra, mask=(slices < n_slices)[:, None], other=0.0)
        total = tl.sum(met.to(tl.float64), axis=0) + tl.sum(own.to(tl.float64), axis=0)
        tl.store(sums_ptrs + 2 * extra * n_rows, total.to(met.dtype), mask=row < n_rows)
    if not NEGATIVES:
        in_band = tl.load(hi_ptr + rows) - tl.load(lo_ptr + rows) - 1
        tl.store(n_ptr + row, in_band, mask=row < n_rows)


@triton.jit(do_not_specialize=["n_anchors", "n_programs"])
def conr_mirrored_sums_kernel(
    layout_ptr, parts_ptr, sums_ptr, n_ptr, n_anchors, n_programs,
    SWEEPS: tl.constexpr, INSIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Adds the parts up that ``n_programs`` a sweep have left: sums [2 sweeps, 3, N] and n [N] as
    of ``conr_forward_kernel`` with one slot, in the caller's order; a program per tile and sweep.
    """
    await_earlier(EARLY)
    tile, _, negatives, parts_ptr = _sweep_here(parts_ptr, n_anchors, SWEEPS, INSIDE)
    if negatives == 0:
        _total_of_tile(
            tile, n_programs, layout_ptr, parts_ptr, sums_ptr, n_ptr, n_anchors,
            False, INSIDE, BLOCK_I,
        )  # fmt: skip
    else:
        _total_of_tile(
            tile, n_programs, layout_ptr, parts_ptr, sums_ptr, n_ptr, n_anchors,
            True, False, BLOCK_I,
        )  # fmt: skip
