"""A step's cost on the host does not grow back."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.host.__main__ import COUNTS, ROOT, Host


@pytest.fixture(scope="module")
def host():
    found = Host(ROOT)
    yield found
    found.close()


#: Kernels of a step, PyTorch's own included, and calls of functions.
LIMITS = {128: (5, 185), 1024: (5, 185), 4096: (5, 185), 16_384: (10, 222)}


@pytest.mark.parametrize("N", LIMITS)
def test_kernels_and_calls_of_a_step_are_few(host: Host, N: int) -> None:
    kernels, calls = LIMITS[N]
    found = host.ask(N, 128)
    assert 0 < found["launches"] + found["torch_ops"] <= kernels, found["names"]
    assert 0 < found["calls"] <= calls


@pytest.mark.parametrize(
    ("N", "D", "windows"), [(16_384, 2048, 3), (65_536, 512, 18), (65_536, 2048, 10)]
)
def test_wide_features_take_as_few_windows_as_their_memory_allows(
    host: Host, N: int, D: int, windows: int
) -> None:
    """Two launches each, before which a list of their pairs of tiles is made, and one behind."""
    names = Counter(host.ask(N, D)["names"])
    assert names["conr_wide_scores_kernel"] == names["conr_wide_product_kernel"] == windows
    assert names["conr_wide_list_kernel"] == names["conr_wide_gradient_kernel"] == 1
    assert sum(n for name, n in names.items() if "wide" in name) == 2 * windows + 2


def test_a_step_without_a_kernel_would_show(host: Host) -> None:
    """Every count of a step is one of this step: kernels by their names."""
    found = host.ask(128, 128)
    assert set(COUNTS) <= set(found) and found["microseconds"] > 0
    names = found["names"]
    assert [n for n in names if n.startswith("conr_")] == [
        "conr_dense_sums_kernel", "conr_dense_rows_kernel", "conr_dense_gradient_kernel",
        "conr_dense_finish_kernel",
    ]  # fmt: skip
    assert names[4:] == ["ones_like"]  # the upstream gradient of backward()


def test_a_step_of_many_rows_orders_them_once(host: Host) -> None:
    names = host.ask(16_384, 128)["names"]
    assert [n.removeprefix("conr_").removesuffix("_kernel") for n in names] == [
        "sort", "merge", "merge", "order", "forward", "finish", "total", "backward_parts",
        "gradient", "ones_like",
    ]  # fmt: skip
