"""The list of the tiles that the sweeps of wide features visit, which the kernels of wide.py share
among their programs.
"""

import triton
import triton.language as tl

from .arithmetic import await_earlier
from .layout import count_of, key_tiles, lower_tiles, padded, upper_tiles

#: Numbers of the head of a list of pairs of tiles, and of each tile of anchors.
HEAD = tl.constexpr(8)
PER_TILE = tl.constexpr(7)


@triton.jit
def sizes_of(n_anchors, n_keys, piece, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many tiles of anchors there are, and the length of a sweep's part of the list."""
    n_tiles = tl.cdiv(n_anchors, BLOCK_I)
    n_pieces = tl.cdiv(padded(n_keys) // BLOCK_J, piece)
    return n_tiles, (PER_TILE + n_pieces) * n_tiles + 1


@triton.jit
def _list_sweep(
    list_ptr, windows_ptr, start, n_tiles, layout_ptr, n_anchors, n_keys, window, piece,
    NEGATIVES: tl.constexpr, CONFUSED: tl.constexpr, SAME: tl.constexpr, L: tl.constexpr,
    MIRRORED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a sweep's part; the number behind its last pair, and how many entries it has."""
    n_entries, before = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    longest = before + 1
    while before < longest:
        for t in range(0, n_tiles, BLOCK):
            tile = t + tl.arange(0, BLOCK)
            is_tile = tile < n_tiles
            here = tl.minimum(tile, n_tiles - 1)
            if MIRRORED:
                a, b, c, d = upper_tiles(here, layout_ptr, n_anchors, NEGATIVES, BLOCK_I, BLOCK_J)
                n = b - a
            else:
                every, full, _ = key_tiles(
                    here, layout_ptr, n_anchors, n_keys, NEGATIVES, CONFUSED, SAME, L == 1,
                    BLOCK_I, BLOCK_J,
                )  # fmt: skip
                a0, a1, b0, _, _, _ = every
                n = count_of(every)
            n = tl.where(is_tile, n, 0)
            longest = tl.maximum(longest, tl.max(n, axis=0))
            if before == 0:
                if MIRRORED:
                    lower, reached = lower_tiles(here, layout_ptr, n_anchors, NEGATIVES, BLOCK_I)
                    numbers = (b - a, a, reached, c, d, lower, lower)
                else:
                    c0, c1, d0, d1, _, _ = full
                    numbers = (a1 - a0, a0, b0 - (a1 - a0), c0, c1, d0, d1)
                for row in tl.static_range(PER_TILE):
                    tl.store(list_ptr + row * n_tiles + tile, numbers[row], mask=is_tile)
            n = tl.minimum(tl.maximum(n - before, 0), piece).to(start.dtype)
            begin = start + tl.cumsum(n, axis=0) - n
            entry = n_entries + tile
            tl.store(list_ptr + PER_TILE * n_tiles + entry, begin, mask=is_tile)
            at = tl.cdiv(begin, window)
            tl.store(windows_ptr + at, entry, mask=is_tile & (at * window < begin + n))
            start += tl.sum(n, axis=0)
        n_entries += n_tiles
        before += piece
    tl.store(list_ptr + PER_TILE * n_tiles + n_entries, start)
    return start, n_entries


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "window", "piece", "second"])
def conr_wide_list_kernel(
    layout_ptr, list_ptr, windows_ptr, n_anchors, n_keys, window, piece, second,
    CONFUSED: tl.constexpr, SAME: tl.constexpr, L: tl.constexpr, MIRRORED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The list: a head (the number of the negatives' first pair; those behind each sweep's last
    pair; both sweeps' numbers of entries), and each sweep's part: of each tile of anchors how many
    tiles of keys its first run has, where that begins, and where the second would if it counted
    from the first's begin, and the two runs of full tiles; of each entry the number of its first
    pair. Entries are the first ``piece`` tiles of keys, no more than a window, of every tile of
    anchors, then the next ones of every tile, …

    ``MIRRORED``: each pair of tiles once, of ``upper_tiles``. Instead of the second run's begin the
    list has how many tiles' runs begin not behind this tile, and the second run of full tiles is
    empty and begins where the tiles do that have a pair with it (``lower_tiles``).

    The negatives' numbers begin with a window, not before ``second``. Windows: the entry that each
    begins in. One program.
    """
    await_earlier(EARLY)
    n_tiles, size = sizes_of(n_anchors, n_keys, piece, BLOCK_I, BLOCK_J)
    end, n_entries = _list_sweep(
        list_ptr + HEAD, windows_ptr, tl.zeros((), list_ptr.dtype.element_ty), n_tiles,
        layout_ptr, n_anchors, n_keys, window, piece,
        False, CONFUSED, SAME, L, MIRRORED, BLOCK_I, BLOCK_J, BLOCK,
    )  # fmt: skip
    start = tl.maximum(tl.cdiv(end, window) * window, second)
    tl.store(list_ptr, start)
    tl.store(list_ptr + 1, end)
    tl.store(list_ptr + 3, n_entries)
    end, n_entries = _list_sweep(
        list_ptr + HEAD + size, windows_ptr, start, n_tiles,
        layout_ptr, n_anchors, n_keys, window, piece,
        True, CONFUSED, SAME, L, MIRRORED, BLOCK_I, BLOCK_J, BLOCK,
    )  # fmt: skip
    tl.store(list_ptr + 2, end)
    tl.store(list_ptr + 4, n_entries)
