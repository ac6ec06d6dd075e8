"""The host shim of the CUDA kernels: it shows missing barriers and accesses outside buffers."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from torch import Tensor

from tests.helpers import cuda_shim
from tests.helpers.cuda_batches import Batch, make_batch


def test_no_barrier_can_be_missing(shim):
    """Leaving out any one barrier of the kernels is caught: by NaN, other bits, or a fault."""
    met: set[int] = set()
    needed: set[int] = set()
    for dtype in (torch.float32, torch.float16):
        for D in (16, 100, 200):
            batch = make_batch(130, D, dtype=dtype)
            shim.configure()
            clean = batch.run("cuda")
            lines = set(shim.barrier_lines())
            met |= lines
            needed |= {line for line in lines - needed if is_missed(shim, batch, clean, line)}
    assert len(met) >= 5
    assert met == needed, f"lines whose barrier was not missed: {sorted(met - needed)}"


def is_missed(shim, batch: Batch, clean: tuple[Tensor, Tensor], line: int) -> bool:
    for order in (0, 1):
        shim.configure(order, line)
        try:
            if not all(map(torch.equal, clean, batch.run("cuda"))):
                return True
        except RuntimeError:
            return True
    return False


@pytest.mark.parametrize("name", ["x", "q", "scale", "y", "p", "w", "sums", "loss", "stats", "G"])
def test_an_access_outside_a_buffer_is_caught(shim, name):
    batch = make_batch(130, 40)
    shim.shortened = {name: 8 if name in ("q", "G") else 1}
    with pytest.raises(RuntimeError, match="outside a buffer"):
        batch.run("cuda")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    if (reason := cuda_shim.missing_tool()) is not None:
        pytest.skip(reason)
    sources = [cuda_shim.SIMT / "planted.cu", cuda_shim.SIMT / "simt.cpp"]
    library = ctypes.CDLL(
        str(cuda_shim.compile_for_host(tmp_path_factory.mktemp("planted"), "planted", sources))
    )
    library.run_planted.restype = ctypes.c_char_p
    library.simt_allocate.restype = ctypes.c_void_p
    library.simt_allocate.argtypes = [ctypes.c_size_t]

    def run(fault: int) -> tuple[str, list[float]]:
        n = 100
        x = (ctypes.c_float * n).from_address(library.simt_allocate(4 * n))
        x[:] = range(n)
        reversed_x = (ctypes.c_float * 128)()
        return library.run_planted(x, reversed_x, n, fault).decode(), reversed_x[:64]

    return run


def test_the_shim_runs_a_sound_kernel(planted):
    assert planted(0) == ("", [float(n) for n in reversed(range(64))])


def test_the_shim_shows_a_missing_barrier(planted):
    message, reversed_x = planted(1)
    assert message == "" and any(x != x for x in reversed_x)


@pytest.mark.parametrize(
    ("fault", "gist"),
    [
        (2, "access outside a buffer"),
        (3, "a barrier is not reached by all threads"),
        (4, "a barrier is not reached by all threads|different barriers"),
        (5, "a barrier is not reached by all threads|different barriers"),
        (6, "write below shared memory|access outside"),
    ],
    ids=["read out of bounds", "early return", "extra barrier", "missing lane", "write below"],
)
def test_the_shim_names_a_planted_fault(planted, fault, gist):
    message, _ = planted(fault)
    assert re.search(gist, message), message
