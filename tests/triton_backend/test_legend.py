"""The legend of the kernels names all of them, and what their signatures have in common."""

from __future__ import annotations

import re
from collections import Counter

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from conr_kernels.triton_backend import kernels
from tests.helpers.triton_kernels import kernels_of

KERNELS = kernels_of()


def missing(legend: str) -> set[str]:
    """Kernels, and arguments of at least two of them, that a text does not name."""
    counts = Counter(name for kernel in KERNELS.values() for name in kernel.arg_names)
    shared = {name for name, n in counts.items() if n > 1}
    shared = {re.sub(r"^(key|merged)_|(_[ij])?_ptr$", "", name) for name in shared}
    named = set(re.findall(r"\w+", legend + re.sub(r"_[ij]\b", "", legend)))
    return {*KERNELS, *shared} - named


def test_the_legend_names_every_kernel_and_what_they_share():
    assert missing(kernels.__doc__) == set()


@pytest.mark.parametrize("name", ["conr_rank_kernel", "apart", "RESCALE", "layout"])
def test_what_the_legend_lacks_is_found(name):
    assert missing(re.sub(rf"\b{name}\b", "", kernels.__doc__)) == {name}
