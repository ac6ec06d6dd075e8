"""The Triton kernels that finish rows: losses and statistics of few rows, totals."""

import triton
import triton.language as tl

from .arithmetic import LN2, finish_rows, store_rows
from .dense import padded


@triton.jit
def _load_sums(sums_ptr, field, parts, n_parts, rows, n_rows, other):
    offsets = parts.to(tl.int64)[:, None] * padded(n_rows) + rows[None, :]
    mask = (parts < n_parts)[:, None] & (rows < n_rows)[None, :]
    return tl.load(sums_ptr + field + offsets, mask=mask, other=other)


@triton.jit
def _row_sum(
    sums_ptr, which: tl.constexpr, top_at: tl.constexpr, parts, n_parts, rows, n_rows,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """A sum over the parts in float64, or its natural logarithm where it was shifted."""
    field = n_parts.to(tl.int64) * padded(n_rows)
    total = _load_sums(sums_ptr, which * field, parts, n_parts, rows, n_rows, 0.0).to(tl.float64)
    if SHIFTED:
        top = _load_sums(sums_ptr, top_at * field, parts, n_parts, rows, n_rows, float("-inf"))
        top = top.to(tl.float64)
        largest = tl.max(top, axis=0)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.sum(total * tl.exp2(top - shift[None, :]), axis=0)
        result = (largest + tl.log2(total)) * LN2
        return tl.where(largest == float("-inf"), float("-inf"), result)
    else:
        return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n_anchors", "n_keys", "n_parts"])
def conr_dense_rows_kernel(
    w_ptr, n_absent_ptr, sums_ptr, loss_ptr, stats_ptr,
    n_anchors, n_keys, n_parts, push_scale: tl.float64,
    SHIFTED: tl.constexpr, INSIDE: tl.constexpr, PUSHING: tl.constexpr, UNIT_TERMS: tl.constexpr,
    COUNT_SELF: tl.constexpr, WEIGHTED_ROWS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Losses and statistics of ROWS rows from their sums over at most PARTS parts.

    ``n_absent``: how many keys ``unit_terms`` does not count.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n_anchors
    parts = tl.arange(0, PARTS)
    n = _row_sum(sums_ptr, 2, 0, parts, n_parts, rows, n_anchors, False)
    m = _row_sum(sums_ptr, 3, 0, parts, n_parts, rows, n_anchors, False)
    s_sum = tl.zeros((ROWS,), tl.float64)
    if INSIDE:
        s_sum = _row_sum(sums_ptr, 4, 0, parts, n_parts, rows, n_anchors, False) * LN2
    w = tl.full((ROWS,), 1.0, tl.float64)
    if w_ptr is not None:
        w = tl.load(w_ptr + rows, mask=is_row, other=1.0).to(tl.float64)
    n_counted = n_keys.to(tl.float64)
    if n_absent_ptr is not None:  # more than there are others for rows that take no part
        n_counted = tl.maximum(n_counted - tl.load(n_absent_ptr).to(tl.float64), n)
    loss, alpha, beta, gamma, log_alpha, log_gamma = finish_rows(
        _row_sum(sums_ptr, 0, 5, parts, n_parts, rows, n_anchors, SHIFTED),
        _row_sum(sums_ptr, 1, 6, parts, n_parts, rows, n_anchors, SHIFTED),
        s_sum, n, m != 0, w, n_counted, push_scale,
        SHIFTED, INSIDE, PUSHING, UNIT_TERMS, COUNT_SELF, WEIGHTED_ROWS,
    )  # fmt: skip
    store_rows(
        loss_ptr, stats_ptr, rows.to(tl.int64), is_row, (n + w) * 0,
        loss, alpha, beta, gamma, log_alpha, log_gamma, SHIFTED,
    )  # fmt: skip


@triton.jit
def store_total(pid, loss_ptr, out_ptr, n_rows, factor, BLOCK: tl.constexpr):
    """``factor·Σ_i ℓ_i``, added in a fixed order by the first program."""
    if pid == 0:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, n_rows, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            total += tl.load(loss_ptr + rows, mask=rows < n_rows, other=0.0).to(tl.float64)
        tl.store(out_ptr, (tl.sum(total, axis=0) * factor).to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n_rows"])
def conr_total_kernel(loss_ptr, out_ptr, n_rows, factor: tl.float64, BLOCK: tl.constexpr):
    """The sum of the row losses times a factor; one program."""
    store_total(tl.program_id(0), loss_ptr, out_ptr, n_rows, factor, BLOCK)
