"""What the host shim catches in kernels with planted faults; and parts of csrc/ at sizes that no
batch of a test has.
"""

from __future__ import annotations

import ctypes
import re

import pytest

from tests.helpers import cuda_shim

if (MISSING := cuda_shim.missing_tool()) is not None:
    pytest.skip(MISSING, allow_module_level=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> ctypes.CDLL:
    sources = [cuda_shim.SIMT / "parts.cu", cuda_shim.SIMT / "simt.cpp"]
    library = ctypes.CDLL(
        str(cuda_shim.compile_for_host(tmp_path_factory.mktemp("parts"), "parts", sources))
    )
    library.load_far_row.restype = library.sum_of_equal_terms.restype = ctypes.c_float
    library.sum_of_equal_terms.argtypes = [ctypes.c_float, ctypes.c_int]
    return library


def test_a_row_beyond_4_gib_of_features_is_found(parts):
    assert parts.load_far_row() == 1.0


def test_a_sum_of_ten_million_terms_is_exact_to_its_last_places(parts):
    term, n = ctypes.c_float(0.1).value, 10_000_000
    assert abs(parts.sum_of_equal_terms(term, n) - n * term) <= 2**-22 * n * term


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
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
