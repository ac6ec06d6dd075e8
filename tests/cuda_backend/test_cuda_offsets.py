"""Rows beyond 2³¹ elements and 2³² bytes of every matrix that a sweep of the CUDA kernels reads.

Only the last rows of the matrices exist: the memory before them is never touched.
"""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from torch import Tensor

from conr_kernels.cuda_backend import backend as cuda_backend
from conr_kernels.variants import PRESETS, Settings
from tests.helpers.cuda_batches import make_batch

N, L, STATISTICS = 97, 5, 5
#: The number of the last rows' first, times the statistics or the labels of a row, exceeds 2³¹.
FIRST = 2**31 // 5 + 3
NO_RESERVE = 0x4000  # of Linux


def sparse_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def at_the_end(rows: Tensor) -> Tensor:
    """The rows as those from FIRST on."""
    far = sparse_memory((FIRST + len(rows), *rows.shape[1:]), rows.dtype)
    far[FIRST:] = rows
    return far


def far_layout(layout: Tensor) -> Tensor:
    """The layout of the sweeps where the keys are N of FIRST + N rows, the last."""
    far = sparse_memory((2 + 2 * (FIRST + 4 * N),), layout.dtype)
    far[:2] = layout[:2]
    for near, section in zip(layout[2:].chunk(2), far[2:].chunk(2), strict=True):
        section[:N] = near[:N] + FIRST
        section[FIRST + N : FIRST + 2 * N] = near[N : 2 * N] + FIRST
        section[FIRST + 2 * N :] = near[2 * N :]
    return far


def run(q, scale, y, p, layout, first: int, settings: Settings, g: Tensor) -> list[Tensor]:
    """Row losses, statistics and sums of the gradient: those of rows ``first …`` of the keys."""
    scalars = cuda_backend._scalars(settings)
    sums, counts = scale.new_empty(N, 5), layout.new_empty(N, 2)
    loss, stats = scale.new_empty(N), scale.new_empty(N, STATISTICS)
    operators = torch.ops.conr_kernels_cuda  # not the shim's, which copies every tensor
    rows = (q, scale, y, p)
    operators.forward(
        *rows, None, scale.new_zeros(2), layout, first, *scalars, sums, counts, loss, stats, 0
    )
    coef = torch.cat([stats[:, :3] * g[:, None], stats[:, 3:]], dim=1)
    coef = at_the_end(coef) if first else coef
    G = scale.new_zeros(N, q.shape[1])
    operators.backward(*rows, coef, layout, first, *scalars, G, 0)
    return [loss, stats, G]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n_components", [1, L])
def test_rows_far_behind_have_the_bits_of_the_same_rows_in_front(
    shim, monkeypatch, n_components, dtype
):
    monkeypatch.setattr(cuda_backend, "DENSE_PAIRS", 0)
    monkeypatch.setattr(cuda_backend, "DENSE_SHARE", 2.0)
    batch = make_batch(N, 8, n_components, dtype=dtype, spread=3.0)
    settings = Settings(1.0, 0.02, 0.1, PRESETS["paper"])
    q, scale, _ = cuda_backend._prepare(batch.x)
    rows = (q, scale, batch.y, batch.p)
    layout = cuda_backend._layout(batch.y, batch.p, batch.y, batch.p, True, 0, settings)
    near = run(*rows, layout, 0, settings, batch.upstream)
    far = [at_the_end(t) for t in rows]
    layout = far_layout(layout)
    assert all(t.any() for t in near)
    for a, b in zip(near, run(*far, layout, FIRST, settings, batch.upstream), strict=True):
        assert torch.equal(a, b)
