"""The dense fused comparator: ConR's row losses with every pair visited once in each direction.

What Inf-CL, memeff-style and cross-entropy kernels do for their losses, in the least work that a
dense pass can do: one product forward and, by the row-owner sum, two backward, no atomics. Such
kernels need five or more products, so that a ratio to this one is a lower bound of theirs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from conr_kernels.triton_backend import call

from ...batches import Batch
from ...providers import PUSH_SCALE, TEMPERATURE, WINDOW

ROW_PAD = 128
#: √(log₂e/τ), the factor of both unit rows of a product.
SCALE = math.sqrt(math.log2(math.e) / TEMPERATURE)
#: Above this D a row's gradient does not fit the registers: H_ij goes through memory instead, in
#: blocks of rows, and cuBLAS multiplies it.
REGISTER_D = 256
H_NUMBERS = 2**28
#: Whether D is at most 128, 256 or more: tiles, columns at a time and launch options, tried in turn
#: by the benchmark, the fastest kept.
CANDIDATES = {
    "forward": {
        128: [(128, 128, 128, 8, 2), (128, 64, 128, 8, 3), (128, 128, 128, 8, 3)],
        256: [(128, 64, 256, 8, 2), (128, 64, 64, 8, 3)],
        512: [(128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 128, 64, 16, 3)],
    },
    "backward": {
        128: [(128, 64, 128, 8, 2), (128, 64, 128, 8, 3), (128, 128, 128, 8, 2)],
        256: [(64, 64, 256, 8, 2), (64, 64, 256, 4, 2)],
    },
    "pairs": {512: [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4)]},
}
#: What has been chosen, by kind and padded D.
chosen: dict[tuple[str, int], tuple[int, ...]] = {}


def kinds(width: int) -> tuple[str, str]:
    return ("forward", "pairs" if width > REGISTER_D else "backward")


def candidates(kind: str, width: int) -> list[tuple[int, ...]]:
    bucket = 128 if width <= 128 else 256 if width <= REGISTER_D else 512
    return [(i, j, min(d, width), *rest) for i, j, d, *rest in CANDIDATES[kind][bucket]]


@triton.jit
def _load(q_ptr, rows, k, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * D + k + tl.arange(0, BLOCK_D)[None, :])
    return q.to(tl.float32) if UPCAST else q


@triton.jit
def _exponential(
    q_i, q_j, q_ptr, rows, columns, width, D: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``exp(s_ij)``; over chunks of D (``width`` at run time) where a row is not read at once."""
    if BLOCK_D == D:
        return tl.exp2(tl.dot(q_i, tl.trans(q_j), input_precision=PRECISION))
    else:
        s_ij = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        for k in range(0, width, BLOCK_D):
            a = _load(q_ptr, rows, k, D, BLOCK_D, UPCAST)
            b = _load(q_ptr, columns, k, D, BLOCK_D, UPCAST)
            s_ij = tl.dot(a, tl.trans(b), s_ij, input_precision=PRECISION)
        return tl.exp2(s_ij)


@triton.jit
def _masks(rows, columns, y_i, p_i, y_ptr, p_ptr, h):
    """``d_ij`` and both masks; labels of padding are NaN: in no mask."""
    d_ij = tl.abs(y_i[:, None] - tl.load(y_ptr + columns)[None, :])
    delta_ij = tl.abs(p_i[:, None] - tl.load(p_ptr + columns)[None, :])
    is_other = rows[:, None] != columns[None, :]
    return d_ij, (d_ij <= h) & is_other, (d_ij > h) & (delta_ij <= h)


@triton.jit(do_not_specialize=["n_rows"])
def dense_forward_kernel(
    q_ptr, y_ptr, p_ptr, E_ptr, B_ptr, n_rows, width, h: tl.float32,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``Σ_P exp(s_ij)`` and ``Σ_M d_ij exp(s_ij)`` of BLOCK_I rows a program."""
    rows = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    y_i, p_i = tl.load(y_ptr + rows), tl.load(p_ptr + rows)
    q_i = _load(q_ptr, rows, 0, D, BLOCK_D, UPCAST)
    E = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    B = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for j0 in range(0, n_rows, BLOCK_J):
        columns = j0 + tl.arange(0, BLOCK_J)
        q_j = _load(q_ptr, columns, 0, D, BLOCK_D, UPCAST)
        exp_s = _exponential(
            q_i, q_j, q_ptr, rows, columns, width, D, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST
        )
        d_ij, is_positive, is_negative = _masks(rows, columns, y_i, p_i, y_ptr, p_ptr, h)
        E += tl.where(is_positive, exp_s, 0.0)
        B += tl.where(is_negative, d_ij, 0.0) * exp_s
    tl.store(E_ptr + rows, tl.sum(E, axis=1))
    tl.store(B_ptr + rows, tl.sum(B, axis=1))


@triton.jit
def _gradient_of_pairs(
    exp_s, rows, columns, y_i, p_i, alpha_i, gamma_i, y_ptr, p_ptr, alpha_ptr, gamma_ptr, h
):
    d_ij, is_positive, is_negative = _masks(rows, columns, y_i, p_i, y_ptr, p_ptr, h)
    alpha = alpha_i[:, None] + tl.load(alpha_ptr + columns)[None, :]
    gamma = gamma_i[:, None] + tl.load(gamma_ptr + columns)[None, :]
    return exp_s * (tl.where(is_positive, alpha, 0.0) + tl.where(is_negative, d_ij, 0.0) * gamma)


@triton.jit(do_not_specialize=["n_rows"])
def dense_backward_kernel(
    q_ptr, y_ptr, p_ptr, alpha_ptr, gamma_ptr, G_ptr, n_rows, width, h: tl.float32,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``Σ_j H_ij q_j`` of BLOCK_I rows a program."""
    rows = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    y_i, p_i = tl.load(y_ptr + rows), tl.load(p_ptr + rows)
    alpha_i, gamma_i = tl.load(alpha_ptr + rows), tl.load(gamma_ptr + rows)
    q_i = _load(q_ptr, rows, 0, D, D, UPCAST)
    G = tl.zeros((BLOCK_I, D), tl.float32)
    for j0 in range(0, n_rows, BLOCK_J):
        columns = j0 + tl.arange(0, BLOCK_J)
        q_j = _load(q_ptr, columns, 0, D, D, UPCAST)
        exp_s = tl.exp2(tl.dot(q_i, tl.trans(q_j), input_precision=PRECISION))
        H = _gradient_of_pairs(
            exp_s, rows, columns, y_i, p_i, alpha_i, gamma_i, y_ptr, p_ptr, alpha_ptr, gamma_ptr, h
        )
        G = tl.dot(H.to(q_j.dtype), q_j, G, input_precision=PRECISION)
    tl.store(G_ptr + rows.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :], G)


@triton.jit(do_not_specialize=["n_rows", "first_row"])
def dense_pairs_kernel(
    q_ptr, y_ptr, p_ptr, alpha_ptr, gamma_ptr, H_ptr, first_row, n_rows, width, h: tl.float32,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of ``H_ij`` [rows from ``first_row`` on, all rows] a program."""
    n_tiles_j = n_rows // BLOCK_J
    tile_i, tile_j = tl.program_id(0) // n_tiles_j, tl.program_id(0) % n_tiles_j
    at = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    rows, columns = first_row + at, tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    exp_s = _exponential(
        0, 0, q_ptr, rows, columns, width, D, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, UPCAST
    )
    H = _gradient_of_pairs(
        exp_s, rows, columns, tl.load(y_ptr + rows), tl.load(p_ptr + rows),
        tl.load(alpha_ptr + rows), tl.load(gamma_ptr + rows),
        y_ptr, p_ptr, alpha_ptr, gamma_ptr, h,
    )  # fmt: skip
    offsets = at.to(tl.int64)[:, None] * n_rows + columns[None, :]
    tl.store(H_ptr + offsets, H.to(H_ptr.dtype.element_ty))


KERNELS = {
    "forward": dense_forward_kernel,
    "backward": dense_backward_kernel,
    "pairs": dense_pairs_kernel,
}


def launch(kind: str, q: Tensor, *arguments: Any, rows: int = 0) -> None:
    """Of ``rows`` rows (0: all): a program for each tile of them; for pairs also of the columns."""
    width = q.shape[1]
    block_i, block_j, block_d, num_warps, num_stages = chosen.get(
        (kind, width), candidates(kind, width)[0]
    )
    n_programs = (rows or len(q)) // block_i * (len(q) // block_j if kind == "pairs" else 1)
    KERNELS[kind][(n_programs,)](
        q, *arguments, len(q), width, WINDOW,
        D=width, BLOCK_I=block_i, BLOCK_J=block_j, BLOCK_D=block_d,
        PRECISION=call.precision(call.arithmetic(q.dtype)),
        UPCAST=call.interpreted() and q.dtype.itemsize == 2,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def gradient_sums(q: Tensor, y: Tensor, p: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
    """``Σ_j H_ij q_j`` in float32, or where H_ij goes through memory in q's dtype."""
    n, width = q.shape
    if width <= REGISTER_D:
        G = torch.empty_like(q, dtype=torch.float32)
        launch("backward", q, y, p, alpha, gamma, G)
        return G
    G = torch.empty_like(q)
    step = max(H_NUMBERS // n // ROW_PAD, 1) * ROW_PAD
    H = q.new_empty(min(step, n), n)
    for first in range(0, n, step):
        rows = min(step, n - first)
        launch("pairs", q, y, p, alpha, gamma, H, first, rows=rows)
        torch.mm(H[:rows], q, out=G[first : first + rows])
    return G


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, y: Tensor, p: Tensor, w: Tensor) -> Tensor:
        N, D = q.shape
        n_padded, width = -(-N // ROW_PAD) * ROW_PAD, max(16, 1 << (D - 1).bit_length())
        rows = F.pad(q * SCALE, (0, width - D, 0, n_padded - N))
        y_pad, p_pad = (F.pad(t, (0, n_padded - N), value=math.nan) for t in (y, p))
        E, B = w.new_empty(n_padded), w.new_empty(n_padded)
        launch("forward", rows, y_pad, p_pad, E, B)
        E, B = E[:N], B[:N]
        ordered = y.sort().values
        n = torch.searchsorted(ordered, y + WINDOW, right=True)
        n = n - torch.searchsorted(ordered, y - WINDOW) - 1
        is_anchor = (n > 0) & (B > 0)
        E, excess = torch.where(is_anchor, E, 1.0), PUSH_SCALE * w * B
        Z = E + excess
        ctx.save_for_backward(
            rows, y_pad, p_pad, -excess / (Z * E) * is_anchor, PUSH_SCALE * w / Z * is_anchor
        )
        ctx.N, ctx.D, ctx.dtype = N, D, q.dtype
        return torch.where(is_anchor, torch.log(n.clamp(min=1) * Z / E), 0.0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, y, p, alpha, gamma = ctx.saved_tensors
        alpha, gamma = (F.pad(g * t, (0, len(rows) - ctx.N)) for t in (alpha, gamma))
        G = gradient_sums(rows, y, p, alpha, gamma)
        return (G[: ctx.N, : ctx.D] / (TEMPERATURE * SCALE)).to(ctx.dtype), None, None, None


def dense_losses(batch: Batch, reduction: str) -> Tensor:
    q = F.normalize(batch.x.float(), dim=1).to(batch.x.dtype)
    rows = _RowLosses.apply(q, batch.y, batch.p, batch.w)
    return rows if reduction == "none" else rows.mean()
