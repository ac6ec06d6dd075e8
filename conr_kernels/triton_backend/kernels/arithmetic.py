"""Device functions shared by the Triton kernels: products, sums of exponentials, the end of a row.

Exponents are in units of log 2 throughout: features carry the factor ``√(log₂e/τ)``, so that
``exp(s_ij) = exp2(q_i·q_j)`` costs one instruction.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
#: Columns to which sums of a tile are folded in a loop; the rest is added behind it.
FOLD = tl.constexpr(8)


@triton.jit
def await_earlier(EARLY: tl.constexpr):
    """Returns when the kernel launched before has completed; then the programs of the next one may
    start, which wait here themselves. ``EARLY``: launched so that there is something to await.

    Every program of every kernel comes by here before it ends: so that what has completed says
    that all before it has. It is a kernel's first statement, unless it says why not: its programs
    may start while the kernel before still runs, which writes what this one reads and reads what
    it writes, for workspaces are used again.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start_next(EARLY: tl.constexpr):
    """The programs of the next kernel may start at once: for kernels that wait later, and before
    which others have waited for all that the next one reads before its own wait.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_tile(
    ptr, k, D_PAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows ``ptr[0:ROWS]``, columns ``k:k+COLS`` of a padded row-major matrix, or of one in halves:
    both.
    """
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    if PRECISION == "fp16x3":
        ptrs = halves_of(ptr) + k + (rows * (2 * D_PAD) + columns)
        tile = tl.load(ptrs), tl.load(ptrs + D_PAD)
        if UPCAST:
            tile = tile[0].to(tl.float32), tile[1].to(tl.float32)
    else:
        tile = tl.load(ptr + k + (rows * D_PAD + columns))
        if UPCAST:
            tile = tile.to(tl.float32)
    return tile


@triton.jit
def halves_of(ptr):
    """Where rows of float32 hold as many numbers in float16, then what these lack of them."""
    return ptr.to(tl.pointer_type(tl.float16), bitcast=True)


@triton.jit
def to_halves(tile):
    """A float32 tile within float16's range as the sum of two float16 tiles."""
    large = tile.to(tl.float16)
    return large, (tile - large.to(tl.float32)).to(tl.float16)


@triton.jit
def store_tile(tile, row_ptrs, columns, mask, D_PAD: tl.constexpr, IN_HALVES: tl.constexpr):
    """Stores columns of rows of D_PAD numbers as ``load_tile`` reads them."""
    if IN_HALVES:
        large, small = to_halves(tile)
        tl.store(halves_of(row_ptrs) + columns, large, mask=mask)
        tl.store(halves_of(row_ptrs) + D_PAD + columns, small, mask=mask)
    else:
        tl.store(row_ptrs + columns, tile.to(row_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def store_part(ptr, tile, first, COLS: tl.constexpr, IN_HALVES: tl.constexpr):
    """Columns ``first …`` of a tile of ROWS rows, to [columns / COLS, ROWS, COLS]."""
    rows, columns = tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1]) + first
    rows = columns[None, :] // COLS * tile.shape[0] + rows[:, None]
    store_tile(tile, ptr + rows * COLS, columns[None, :] % COLS, None, COLS, IN_HALVES)


@triton.jit
def load_transposed(ptr, ROWS: tl.constexpr, COLS: tl.constexpr, UPCAST: tl.constexpr):
    """The first COLS rows of such a tile, of ROWS columns too, as columns."""
    i, j = tl.arange(0, COLS)[:, None], tl.arange(0, ROWS)[None, :]
    tile = tl.load(ptr + (j // COLS * ROWS + i) * COLS + j % COLS)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tl.trans(tile)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a·b + acc``, accumulated in float32, or in float64 for float64. Of factors in halves: all
    products but the smallest, the largest last.
    """
    if PRECISION == "fp16x3":
        acc = tl.dot(a[0], b[1], acc, input_precision="ieee")
        acc = tl.dot(a[1], b[0], acc, input_precision="ieee")
        return tl.dot(a[0], b[0], acc, input_precision="ieee")
    else:
        OUT: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=OUT)


@triton.jit
def transposed(tile, PRECISION: tl.constexpr):
    if PRECISION == "fp16x3":
        return tl.trans(tile[0]), tl.trans(tile[1])
    else:
        return tl.trans(tile)


@triton.jit
def in_registers(tile, PRECISION: tl.constexpr):
    """A loaded tile as the left factor of many products: these would read it from shared memory
    each time, whose ports are what loops of tiles of 64 rows wait for.
    """
    if PRECISION == "fp16x3":
        return _as_result(tile[0]), _as_result(tile[1])
    else:
        return _as_result(tile)


@triton.jit
def _as_result(tile):
    """A tile where a product leaves its result: there a factor stays in the registers."""
    zeros_i = tl.zeros((tile.shape[0], 16), tile.dtype)
    zeros_j = tl.zeros((16, tile.shape[1]), tile.dtype)
    return tl.dot(zeros_i, zeros_j, tile.to(tl.float32)).to(tile.dtype)


@triton.jit
def sum_of_products(a, b):
    """``Σ_k a_ik b_ik`` [rows], the same bits in every thread that holds a row's.

    A plain product that a thread has one of is fused, unrounded, into the sum with another
    thread's rounded one, and the other thread's the other way round: the two sums differ.
    """
    return tl.sum(tl.fma(a, b, 0.0), axis=1)


@triton.jit
def similarity(
    q_i, q_i_ptr, q_j, q_j_ptr, width, unit, D_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``log₂e·s_ij`` of a tile: of the loaded tiles, or over chunks of D where they do not fit.

    ``width`` is D_PAD at run time: a loop over a constant would be unrolled. Of halves the
    product counts ``unit`` times.
    """
    if D_PAD == BLOCK_D:
        s_ij = dot(q_i, transposed(q_j, PRECISION), None, PRECISION)
    else:
        dtype: tl.constexpr = tl.float64 if q_j_ptr.dtype.element_ty == tl.float64 else tl.float32
        s_ij = tl.zeros((BLOCK_I, BLOCK_J), dtype)
        for k in range(0, width, BLOCK_D):
            a = load_tile(q_i_ptr, k, D_PAD, BLOCK_I, BLOCK_D, PRECISION, UPCAST)
            b = load_tile(q_j_ptr, k, D_PAD, BLOCK_J, BLOCK_D, PRECISION, UPCAST)
            if PRECISION == "fp16x3":
                # Tensor cores cut off what they add to a sum: a chunk's is rounded.
                s_ij += dot(a, transposed(b, PRECISION), None, PRECISION)
            else:
                s_ij = dot(a, transposed(b, PRECISION), s_ij, PRECISION)
    if PRECISION == "fp16x3":
        s_ij *= tl.full((), unit, tl.float32)
    return s_ij


@triton.jit
def fold(tile):
    """Sums over every FOLD-th column: additions within a thread, no exchange with others."""
    return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // FOLD, FOLD)), axis=1)


@triton.jit
def add_exponentials(total, top, t_ij, phi_ij, is_in, SHIFTED: tl.constexpr, MASKED: tl.constexpr):
    """Adds ``φ_ij·exp2(t_ij)`` of a tile's pairs to ``total·exp2(top)``.

    Unshifted, ``total`` is a tile, as wide as the pairs' or folded, that is reduced after the loop,
    and ``top`` is not used; shifted, both are one number a row. ``phi_ij`` is 0 outside the mask
    ``is_in``.
    """
    if SHIFTED:
        if MASKED:
            t_ij = tl.where(is_in, t_ij, float("-inf"))
        new_top = tl.maximum(top, tl.max(t_ij, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        terms = tl.exp2(t_ij - shift[:, None]) * phi_ij
        total = total * tl.exp2(top - shift) + tl.sum(terms, axis=1)
        top = new_top
    elif total.shape[1] == t_ij.shape[1]:
        total += tl.exp2(t_ij) * phi_ij
    else:
        total += fold(tl.exp2(t_ij) * phi_ij)
    return total, top


@triton.jit
def join_parts(totals, tops, axis: tl.constexpr):
    """Parts ``totals·exp2(tops)`` of sums as one total and one top."""
    top = tl.max(tops, axis=axis)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return tl.sum(totals * tl.exp2(tops - tl.expand_dims(shift, axis)), axis=axis), top


@triton.jit
def sum_of(total, top, SHIFTED: tl.constexpr):
    """A row's sum in float64, or its natural logarithm where it was shifted."""
    if SHIFTED:
        result = (top.to(tl.float64) + tl.log2(total.to(tl.float64))) * LN2
        return tl.where(top == float("-inf"), float("-inf"), result)
    else:
        return tl.sum(total, axis=1).to(tl.float64)


@triton.jit
def scale_pair(t_ij, of_i, of_j, log_i, log_j, SHIFTED: tl.constexpr):
    """``exp2(t_ij)·(c_i + c_j)``, the coefficients as they are or as sign and log₂."""
    if SHIFTED:
        part_i = of_i[:, None] * tl.exp2(t_ij + log_i[:, None])
        return part_i + of_j[None, :] * tl.exp2(t_ij + log_j[None, :])
    else:
        return tl.exp2(t_ij) * (of_i[:, None] + of_j[None, :])


@triton.jit
def to_base_2(of, log):
    """Sign and log₂ of a coefficient from sign and logarithm; the sign takes the rounding of the
    log₂.
    """
    exact = log.to(tl.float64) * LOG2E
    rounded = exact.to(log.dtype)
    return of * (1 + lost_in(rounded, exact) * LN2).to(of.dtype), rounded


@triton.jit
def lost_in(rounded, exact):
    """What rounding took from a float64 logarithm; 0 for −inf."""
    rest = exact - rounded.to(tl.float64)
    return tl.where(exact == float("-inf"), 0.0, rest)


@triton.jit
def log1p(u):
    v = 1 + u
    is_lost = v == 1
    return tl.where(is_lost, u, tl.log(v) * (u / tl.where(is_lost, 1.0, v - 1)))


@triton.jit
def log_add(a, b):
    """``log(exp(a) + exp(b))`` where not both are −inf."""
    top = tl.maximum(a, b)
    return top + log1p(tl.exp(tl.minimum(a, b) - top))


@triton.jit
def counted_keys(n_keys, n_absent_ptr, n):
    """How many keys UNIT_TERMS counts, for rows with n positives."""
    n_counted = n_keys.to(tl.float64)
    if n_absent_ptr is not None:  # more than there are others for rows that take no part
        n_counted = tl.maximum(n_counted - tl.load(n_absent_ptr).to(tl.float64), n)
    return n_counted


@triton.jit
def finish_rows(
    E, B, s_sum, n, has_negative, w, n_keys, push_scale,
    SHIFTED: tl.constexpr, INSIDE: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
    UNIT_TERMS: tl.constexpr, COUNT_SELF: tl.constexpr, WEIGHTED_ROWS: tl.constexpr,
):  # fmt: skip
    """Losses and statistics (core/rows.py) in float64: ``(ℓ, α or sign, β, γ or sign, log|α|,
    log|γ|)``; SCALED, WEIGHTED: ``e`` and ``w_i`` are factors of ``r_i``.
    """
    is_anchor = (n > 0) & has_negative
    one = tl.full(E.shape, 1.0, tl.float64)
    n = tl.where(is_anchor, n, 1.0)
    E = tl.where(is_anchor, E, 0.0 if SHIFTED else 1.0)
    B = tl.where(is_anchor, B, 0.0)
    r = w if WEIGHTED else one
    if SCALED:
        r *= push_scale
    count = n + 1 if COUNT_SELF else n
    log_alpha, log_gamma = tl.zeros_like(E), tl.zeros_like(E)
    if SHIFTED:
        log_r = tl.where(r == 0, float("-inf"), tl.log(tl.where(r == 0, 1.0, r)))
        log_T = log_r + B
        if UNIT_TERMS:
            log_T = log_add(tl.log(n_keys - n), log_T)
        excess = log_add(tl.zeros_like(E), log_T - E)
        log_Z = E + excess
        gamma = one
        if INSIDE:
            loss = (n * log_Z - s_sum) / count
            alpha, beta = one, 1 / count
            log_alpha = tl.log(n / count) - log_Z
            log_gamma = log_alpha + log_r
        else:
            loss = tl.log(n) + excess
            alpha, beta = -one, tl.zeros_like(E)
            log_alpha, log_gamma = log_T - log_Z - E, log_r - log_Z
    else:
        other = B * r
        if UNIT_TERMS:
            other += n_keys - n
        Z = E + other
        excess = log1p(other / E)
        if INSIDE:
            loss = (n * (tl.log(E) + excess) - s_sum) / count
            alpha, beta = n / (count * Z), 1 / count
            gamma = alpha * r
        else:
            loss = tl.log(n) + excess
            alpha, beta, gamma = -other / (Z * E), tl.zeros_like(E), r / Z
    factor = tl.where(is_anchor, w if WEIGHTED_ROWS else one, 0.0)
    loss = tl.where(is_anchor, loss * factor, 0.0)
    alpha = tl.where(is_anchor, alpha * factor, 0.0)
    beta = tl.where(is_anchor, beta * factor, 0.0)
    gamma = tl.where(is_anchor, gamma * factor, 0.0)
    log_alpha = tl.where(is_anchor, log_alpha, float("-inf"))
    log_gamma = tl.where(is_anchor, log_gamma, float("-inf"))
    return loss, alpha, beta, gamma, log_alpha, log_gamma


@triton.jit
def rounded_statistics(
    alpha, beta, gamma, log_alpha, log_gamma, poison, dtype: tl.constexpr, SHIFTED: tl.constexpr
):  # fmt: skip
    """A row's statistics as they are stored, NaN where the poison is."""
    if SHIFTED:
        # The sign takes what the logarithm loses: near exp(±200) that is what limits the gradient.
        rounded_alpha, rounded_gamma = log_alpha.to(dtype), log_gamma.to(dtype)
        alpha *= 1 + lost_in(rounded_alpha, log_alpha)
        gamma *= 1 + lost_in(rounded_gamma, log_gamma)
    return (
        (alpha + poison).to(dtype), (beta + poison).to(dtype), (gamma + poison).to(dtype),
        (log_alpha + poison).to(dtype), (log_gamma + poison).to(dtype),
    )  # fmt: skip


@triton.jit
def store_columns(ptrs, step, mask, columns, SHIFTED: tl.constexpr):
    """Stores three columns of rows, or all five."""
    for c in tl.static_range(5 if SHIFTED else 3):
        tl.store(ptrs + c * step, columns[c], mask=mask)
