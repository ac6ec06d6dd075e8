"""Rows are addressed in 64 bits in the intermediate representation of every Triton kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from benchmarks.static import compiled
from tests.helpers.addresses import check_row_offsets

#: Pointers to matrices with a row for every row of the batch.
MATRICES = {"q_i_ptr", "q_j_ptr", "x_ptr", "key_x_ptr", "G_rest_ptr", "gradient_ptr"}


@pytest.mark.parametrize(
    ("name", "N", "D"),
    [("order_kernel", 1500, 1984), ("forward_kernel", 1500, 1984), ("forward_kernel", 4200, 64),
     ("backward_parts", 4200, 248), ("conr_gradient", 4200, 248), ("backward_kernel", 70_000, 248),
     ("wide_scores", 1500, 1984), ("wide_product", 1500, 1984), ("wide_gradient", 1500, 1984),
     ("gram", 500, 4032), ("sums", 500, 124), ("sums", 3000, 248), ("dense_finish", 500, 1984)],
)  # fmt: skip
def test_rows_are_addressed_in_64_bits(name: str, N: int, D: int) -> None:
    """A row's number is multiplied by the length of a row in 64 bits, so that N·D and strides
    beyond 2³¹ are safe.
    """
    launches = compiled.recorded_launches(N, D, torch.bfloat16, 90)
    launch = [launch for launch in launches if name in launch.name][-1]
    unsafe, advances = check_row_offsets(ttir_of(launch), MATRICES)
    assert unsafe == []
    pointers = {p.name for p in launch.kernel.params} & MATRICES
    used = {p for p in pointers if launch.arguments[p] is not None}
    # Without further keys the anchors' copies are the keys'.
    expected = used - ({"x_ptr", "q_i_ptr"} if name == "order_kernel" else set())
    assert set(advances) == expected


def ttir_of(launch: compiled.Launch) -> str:
    return compiled.compile_launch(launch, 90).asm["ttir"]


@triton.jit
def _copy_rows(x_ptr, gradient_ptr, n_rows, WIDE: triton.language.constexpr):
    row = triton.language.program_id(0)
    if WIDE:
        row = row.to(triton.language.int64)
    columns = triton.language.arange(0, 64)
    x = triton.language.load(x_ptr + row * 1984 + columns, mask=row < n_rows)
    triton.language.store(gradient_ptr + (row * 1984).to(triton.language.int64) + columns, x)


@triton.jit
def _copy_tiles(x_ptr, gradient_ptr, n_rows, stride_n, WIDE: triton.language.constexpr):
    rows = triton.language.program_id(0) * 16 + triton.language.arange(0, 16)
    if WIDE:
        rows = rows.to(triton.language.int64)
    columns = triton.language.arange(0, 64)
    mask = (rows < n_rows)[:, None]
    offsets = rows[:, None] * stride_n
    x = triton.language.load(x_ptr + (offsets + columns[None, :]), mask=mask)
    offsets = offsets.to(triton.language.int64)
    triton.language.store(gradient_ptr + (offsets + columns[None, :]), x, mask=mask)


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [(_copy_rows, dict(n_rows=4)), (_copy_tiles, dict(n_rows=4, stride_n=1984))],
    ids=["a row", "a tile"],
)
def test_the_check_of_addresses_finds_32_bit_products(kernel, sizes, is_wide: bool) -> None:
    """Both as they are, and widened when it is too late; of a stride in all rows of a tile too."""
    x = torch.empty(4, 1984, device="meta")
    arguments = dict(x_ptr=x, gradient_ptr=x, **sizes, WIDE=is_wide)
    launch = compiled.Launch(kernel, (4,), arguments, {})
    unsafe, advances = check_row_offsets(ttir_of(launch), MATRICES)
    assert len(unsafe) == (0 if is_wide else 2) and bool(advances)
