"""The host shim of the CUDA kernels: it shows missing barriers and accesses outside buffers."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from torch import Tensor

from conr_kernels.cuda_backend import backend as cuda_backend
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


BUFFERS = ("x", "q", "scale", "norm", "y", "p", "w", "verdicts", "sums", "counts", "stats", "G")
OF_ROW_LOSSES = ("loss", "coef", "gradient")
OF_REDUCED_LOSS = ("labels", "subtotals")
OF_BANDS = ("layout", "sizes", "extents")


@pytest.mark.parametrize("name", [*BUFFERS, *OF_ROW_LOSSES, *OF_REDUCED_LOSS, *OF_BANDS])
def test_an_access_outside_a_buffer_is_caught(shim, monkeypatch, name):
    is_banded, is_reduced = name in OF_BANDS, name in OF_REDUCED_LOSS
    monkeypatch.setattr(cuda_backend, "DENSE_PAIRS", 0 if is_banded else 2**40)
    batch = make_batch(130, 40, L=1 + is_banded)
    batch.run("cuda")
    shim.shortened = name
    with pytest.raises(RuntimeError, match="outside a buffer"):
        batch.reduced("mean") if is_reduced else batch.run("cuda")


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
