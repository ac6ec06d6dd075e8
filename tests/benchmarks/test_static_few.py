"""The machine code of the kernels for few rows: what a GPU would be given, compiled without one."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.static import compiled
from benchmarks.static.machine import MachineCode, machine_code, tensor_core_names
from conr_kernels.triton_backend import launch_dense
from tests.helpers.addresses import check_row_offsets

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
#: Rows, D, dtype, variant: s_ij kept in tiles of 16, 32 and 64 anchors, and found again.
CALLS = [
    (128, 128, BF16, "paper"),
    (512, 128, BF16, "paper"),
    (1024, 128, BF16, "released-age"),
    (4096, 128, BF16, "paper"),
    (4096, 128, BF16, "released-age"),
    (4096, 256, F16, "paper"),
    (4096, 128, F32, "paper"),
]
#: Pointers to matrices with a row for every row of the batch.
MATRICES = {"x_ptr", "key_x_ptr", "gradient_ptr"}


@functools.cache
def launches(N: int, D: int, dtype: torch.dtype, variant: str) -> tuple[compiled.Launch, ...]:
    return tuple(compiled.recorded_launches(N, D, dtype, 90, variant=variant))


@functools.cache
def code_of(call: tuple, name: str) -> MachineCode:
    launch = next(launch for launch in launches(*call) if name in launch.name)
    return machine_code(compiled.compile_launch(launch, 90))


@pytest.mark.parametrize("name", ["sums", "gradient"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_no_kernel_spills_or_uses_atomics(call: tuple, name: str) -> None:
    code = code_of(call, name)
    assert code.spill_bytes == 0
    assert not any(op.startswith(("ATOMG", "ATOM.", "RED.")) for op in code.counts)


@pytest.mark.parametrize("name", ["sums", "gradient"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_tensor_cores_do_every_product(call: tuple, name: str) -> None:
    """wgmma wherever a tile has the 64 anchors that it needs."""
    names = tensor_core_names(code_of(call, name))
    launch = next(launch for launch in launches(*call) if name in launch.name)
    assert ("HGMMA" if launch.arguments["BLOCK_I"] >= 64 else "HMMA") in names


def test_every_processor_works_from_few_rows_on() -> None:
    """Tiles of rows and keys: programs of the launches over pairs, on a GPU of 132 processors."""
    for N, least in ((128, 64), (256, 132), (512, 132), (1024, 132), (2048, 132), (4096, 132)):
        for launch in launches(N, 128, BF16, "paper"):
            if "sums" in launch.name or "gradient" in launch.name:
                assert launch.grid[0] >= least, (N, launch.name)


@pytest.mark.parametrize(("name", "D"), [("sums", 248), ("gradient", 248), ("finish", 248)])
def test_rows_are_addressed_in_64_bits(name: str, D: int) -> None:
    launch = next(launch for launch in launches(3000, D, BF16, "paper") if name in launch.name)
    unsafe, advances = check_row_offsets(compiled.compile_launch(launch, 90).asm["ttir"], MATRICES)
    assert unsafe == [] and advances


def test_memory_of_pairs_ends_at_a_million() -> None:
    assert launch_dense.kept_size(1024, 1024) > 1024 * 1024
    assert launch_dense.kept_size(1025, 1024) < 4 * 1025
    assert launch_dense.kept_size(4096, 4096) < 4 * 4096
