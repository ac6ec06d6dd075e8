"""Rows beyond 2³¹ elements and 2³² bytes of every matrix that a sweep of the CUDA kernels reads.

Only the last rows of the matrices exist: the memory before them is never touched.
"""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch
from torch import Tensor

from conr_kernels.core.inputs import Inputs
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


class Rows(ctypes.Structure):
    """csrc/conr_launch.h's, as ``Settings`` are."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "K", "dim", "L", "self_offset")),
        *((name, ctypes.c_void_p) for name in ("q", "scale", "y", "p", "layout")),
    ]


class Scalars(ctypes.Structure):
    _fields_ = [
        ("window", ctypes.c_float), ("temperature", ctypes.c_double),
        ("push_scale", ctypes.c_double), ("flags", ctypes.c_int),
    ]  # fmt: skip


def run(library, q, scale, y, p, layout, first: int, settings: Settings, g: Tensor) -> list[Tensor]:
    """Row losses, statistics and sums of the gradient: those of rows ``first …`` of the keys."""
    type_of_q = [torch.float32, torch.float64, torch.float16, torch.bfloat16].index(q.dtype)
    pointers = [t.data_ptr() for t in (q, scale, y, p, layout)]
    call = (
        type_of_q,
        Rows(N, len(q), q.shape[1], y.shape[1], first, *pointers),
        Scalars(*cuda_backend._scalars(settings, False)),
    )
    sums, counts = scale.new_empty(N, 5), layout.new_empty(N, 2)
    loss, stats = scale.new_empty(N), scale.new_empty(N, STATISTICS)
    library.simt_sweep_forward(
        *call, *(ctypes.c_void_p(t.data_ptr()) for t in (sums, counts, loss, stats))
    )
    coef = torch.cat([stats[:, :3] * g[:, None], stats[:, 3:]], dim=1)
    coef = at_the_end(coef) if first else coef
    G = scale.new_zeros(N, q.shape[1])
    library.simt_sweep_backward(*call, *(ctypes.c_void_p(t.data_ptr()) for t in (coef, G)))
    return [loss, stats, G]


def prepared(x: Tensor) -> tuple[Tensor, Tensor]:
    """``q`` and ``scale`` of ``q·scale = x/‖x‖``: unit rows but where they have 16 bits."""
    norm = x.float().norm(dim=1)
    return (x, 1 / norm) if x.dtype.itemsize == 2 else (x / norm[:, None], torch.ones_like(norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n_components", [1, L])
def test_rows_far_behind_have_the_bits_of_the_same_rows_in_front(
    shim, monkeypatch, n_components, dtype
):
    monkeypatch.setattr(cuda_backend, "DENSE_PAIRS", 0)
    monkeypatch.setattr(cuda_backend, "DENSE_SHARE", 2.0)
    batch = make_batch(N, 8, n_components, dtype=dtype, spread=3.0)
    settings = Settings(1.0, 0.02, 0.1, PRESETS["paper"])
    _, _, layout = cuda_backend.forward(Inputs(batch.x, batch.y, batch.p, None, None, 0, settings))
    rows = (*prepared(batch.x), batch.y, batch.p)
    near = run(shim.library, *rows, layout, 0, settings, batch.upstream)
    far = [at_the_end(t) for t in rows]
    layout = far_layout(layout)
    assert not any(t.isnan().any() or not t.any() for t in near)
    for a, b in zip(
        near, run(shim.library, *far, layout, FIRST, settings, batch.upstream), strict=True
    ):
        assert torch.equal(a, b)
