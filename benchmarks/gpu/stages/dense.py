"""The dense fused comparator: ConR's row losses with every pair visited once in each direction.

What Inf-CL, memeff-style and cross-entropy kernels do for their losses, in the least work that a
dense pass can do: one product forward and, by the row-owner sum, two backward, no atomics. Such
kernels need five or more products, so that a ratio to this one is a lower bound of theirs. For
rows that fit the registers: D up to 256.
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


def tuned(*tiles: tuple[int, int, int, int]):
    """Times tiles of rows × columns, warps and stages where a number of rows is new and keeps the
    fastest; the interpreter, which has no clock, takes the first.
    """
    configs = [
        triton.Config({"BLOCK_I": i, "BLOCK_J": j}, num_warps=warps, num_stages=stages)
        for i, j, warps, stages in tiles
    ]
    return triton.autotune(configs[:1] if call.interpreted() else configs, key=["n_rows"])


@triton.jit
def _load(q_ptr, rows, D: tl.constexpr, UPCAST: tl.constexpr):
    q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :])
    return q.to(tl.float32) if UPCAST else q


@triton.jit
def _masks(rows, columns, y_i, p_i, y_ptr, p_ptr, h):
    """``d_ij`` and both masks; labels of padding are NaN: in no mask."""
    d_ij = tl.abs(y_i[:, None] - tl.load(y_ptr + columns)[None, :])
    delta_ij = tl.abs(p_i[:, None] - tl.load(p_ptr + columns)[None, :])
    is_other = rows[:, None] != columns[None, :]
    return d_ij, (d_ij <= h) & is_other, (d_ij > h) & (delta_ij <= h)


@tuned((128, 128, 8, 2), (128, 64, 8, 3), (128, 128, 8, 3))
@triton.jit(do_not_specialize=["n_rows"])
def dense_forward_kernel(
    q_ptr, y_ptr, p_ptr, E_ptr, B_ptr, n_rows, h: tl.float32,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``Σ_P exp(s_ij)`` and ``Σ_M d_ij exp(s_ij)`` of BLOCK_I rows a program."""
    rows = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    y_i, p_i = tl.load(y_ptr + rows), tl.load(p_ptr + rows)
    q_i = _load(q_ptr, rows, D, UPCAST)
    E = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    B = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for j0 in range(0, n_rows, BLOCK_J):
        columns = j0 + tl.arange(0, BLOCK_J)
        q_j = _load(q_ptr, columns, D, UPCAST)
        exp_s = tl.exp2(tl.dot(q_i, tl.trans(q_j), input_precision=PRECISION))
        d_ij, is_positive, is_negative = _masks(rows, columns, y_i, p_i, y_ptr, p_ptr, h)
        E += tl.where(is_positive, exp_s, 0.0)
        B += tl.where(is_negative, d_ij, 0.0) * exp_s
    tl.store(E_ptr + rows, tl.sum(E, axis=1))
    tl.store(B_ptr + rows, tl.sum(B, axis=1))


@tuned((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2))
@triton.jit(do_not_specialize=["n_rows"])
def dense_backward_kernel(
    q_ptr, y_ptr, p_ptr, alpha_ptr, gamma_ptr, G_ptr, n_rows, h: tl.float32,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``Σ_j H_ij q_j`` of BLOCK_I rows a program."""
    rows = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    y_i, p_i = tl.load(y_ptr + rows), tl.load(p_ptr + rows)
    alpha_i, gamma_i = tl.load(alpha_ptr + rows), tl.load(gamma_ptr + rows)
    q_i = _load(q_ptr, rows, D, UPCAST)
    G = tl.zeros((BLOCK_I, D), tl.float32)
    for j0 in range(0, n_rows, BLOCK_J):
        columns = j0 + tl.arange(0, BLOCK_J)
        q_j = _load(q_ptr, columns, D, UPCAST)
        exp_s = tl.exp2(tl.dot(q_i, tl.trans(q_j), input_precision=PRECISION))
        d_ij, is_positive, is_negative = _masks(rows, columns, y_i, p_i, y_ptr, p_ptr, h)
        alpha = alpha_i[:, None] + tl.load(alpha_ptr + columns)[None, :]
        gamma = gamma_i[:, None] + tl.load(gamma_ptr + columns)[None, :]
        H = tl.where(is_positive, alpha, 0.0) + tl.where(is_negative, d_ij, 0.0) * gamma
        G = tl.dot((exp_s * H).to(q_j.dtype), q_j, G, input_precision=PRECISION)
    tl.store(G_ptr + rows.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :], G)


def launch(kernel: Any, q: Tensor, *arguments: Tensor) -> None:
    """A program for each tile of rows."""
    kernel[lambda tile: (len(q) // tile["BLOCK_I"],)](
        q, *arguments, len(q), WINDOW, D=q.shape[1],
        PRECISION=call.precision(call.arithmetic(q.dtype)),
        UPCAST=call.interpreted() and q.dtype.itemsize == 2,
    )  # fmt: skip


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, y: Tensor, p: Tensor, w: Tensor) -> Tensor:
        N, D = q.shape
        n_padded, width = -(-N // ROW_PAD) * ROW_PAD, max(16, 1 << (D - 1).bit_length())
        rows = F.pad(q * SCALE, (0, width - D, 0, n_padded - N))
        y_pad, p_pad = (F.pad(t, (0, n_padded - N), value=math.nan) for t in (y, p))
        E, B = w.new_empty(n_padded), w.new_empty(n_padded)
        launch(dense_forward_kernel, rows, y_pad, p_pad, E, B)
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
        q, y, p, alpha, gamma = ctx.saved_tensors
        alpha, gamma = (F.pad(g * t, (0, len(q) - ctx.N)) for t in (alpha, gamma))
        G = torch.empty_like(q, dtype=torch.float32)
        launch(dense_backward_kernel, q, y, p, alpha, gamma, G)
        return (G[: ctx.N, : ctx.D] / (TEMPERATURE * SCALE)).to(ctx.dtype), None, None, None


def dense_losses(batch: Batch, reduction: str) -> Tensor:
    q = F.normalize(batch.x.float(), dim=1).to(batch.x.dtype)
    rows = _RowLosses.apply(q, batch.y, batch.p, batch.w)
    return rows if reduction == "none" else rows.mean()
