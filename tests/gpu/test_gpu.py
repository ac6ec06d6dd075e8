"""What only a GPU can show: every dtype and regime, equal bits, no synchronisation, CUDA graphs.

With ``CONR_REHEARSE=1`` small cases run on the CPU with the torch backend in Triton's place, so
that the tests themselves are tried (test_benchmarks.py).
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import device
from conr_kernels import conr_loss
from conr_kernels.backends import choose_backend
from conr_kernels.triton_backend import launch_sweeps

WHY_NOT = device.reason_against()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"not run: {WHY_NOT}")

#: Rows of a batch, features, and ``device.path``: sorted rows by the kernels that take each pair
#: once, with D in chunks; every pair, with D split, with s_ij recomputed; other sorted rows.
REGIMES = [
    (1537, 128, "once"), (1100, 300, "once"),
    (31, 33, ""), (1000, 512, ""), (32, 100_000, ""), (1537, 128, ""),
    (1537, 128, "sorted"), (4097, 65, ""), (3001, 256, "sorted"), (1500, 2048, ""),
]  # fmt: skip
#: As of large features: a sweep after the other.
IN_TURNS = [(1537, 128, "once, in turns"), (1100, 300, "once, in turns"),
            (1537, 128, "sorted, in turns")]  # fmt: skip
VARIANTS = ["paper", "released-age", "released-depth", "contrastive"]
#: Largest errors of loss and gradient, relative to their largest entry.
LIMITS = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 2e-5),
    torch.float16: (3e-4, 3e-3),
    torch.bfloat16: (3e-3, 2e-2),
}
PRECISION_SIZES = [(257, 128, ""), (2049, 64, "sorted"), (1537, 300, ""), (2049, 128, "once"),
                   (900, 300, "")]  # fmt: skip
REPEATS = 250
#: The size whose bits once differed on an H200; few rows whose columns are read in chunks, in the
#: sums' kernel and in one before.
CHUNKED = [(4096, 256, ""), (900, 512, ""), (900, 8192, "")]
SMALL_AND_LARGE = [(200, ""), (1800, "sorted")]
#: Elements between two rows, so that offsets exceed 2³¹.
FAR = 40_000_000
if device.REHEARSAL:
    REGIMES = [(31, 33, ""), (700, 17, "sorted"), (40, 300, "once")]
    IN_TURNS = [(40, 17, "once, in turns")]
    PRECISION_SIZES = [(24, 17, "once")]
    CHUNKED = [(40, 300, "")]
    REPEATS, FAR, SMALL_AND_LARGE = 2, 400, [(200, ""), (700, "sorted")]


def batch(N: int, D: int, dtype: torch.dtype, L: int = 1) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(N + D)
    x = torch.randn(N, D, generator=g).to(dtype)
    x[::29] = 0
    y = torch.randint(0, 60, (N, L), generator=g).float()
    p = y + 8 * torch.randn(N, L, generator=g)
    w = torch.rand(N, generator=g) + 0.1
    # As a GradScaler does: gradients of many columns are among float16's subnormal numbers.
    upstream = torch.rand(N, generator=g) * (2**12 if dtype == torch.float16 else 1)
    return tuple(t.to(device.DEVICE) for t in (x, y, p, w, upstream))


def loss_and_gradient(
    rows: tuple[Tensor, ...],
    backend: str,
    path: str = "",
    *,
    wide: bool = False,
    reduction: str = "none",
    **options,
):
    x, y, p, w, upstream = rows
    x = (x.double() if wide else x).detach().requires_grad_()
    with device.path(path):
        loss = conr_loss(x, y, p, w, backend=backend, reduction=reduction, **options)
        (loss * upstream).sum().backward()
    return loss.detach(), x.grad


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request):
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(saved)


def assert_close(
    rows: tuple[Tensor, ...], limits: tuple[float, float], path: str, **options
) -> None:
    got = loss_and_gradient(rows, device.TRITON, path, **options)
    exact = loss_and_gradient(rows, "reference", wide=True, **options)
    for name, ours, truth, limit in zip(("loss", "gradient"), got, exact, limits, strict=True):
        error = (ours.double() - truth).abs().max() / truth.abs().max()
        assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.0e}"
    assert not got[1][(rows[0] == 0).all(1)].any(), "a zero row has a gradient"


@pytest.mark.skipif(device.REHEARSAL, reason="a rehearsal has CPU tensors")
def test_auto_picks_triton() -> None:
    assert choose_backend("auto", torch.device("cuda"), torch.float32) == "triton"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize(("N", "D", "path"), REGIMES)
def test_agrees_with_the_float64_reference(N: int, D: int, path: str, dtype, variant: str) -> None:
    assert_close(batch(N, D, dtype), LIMITS[dtype], path, variant=variant)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("N", "D", "path"), IN_TURNS)
def test_sweeps_in_turns(N: int, D: int, path: str, dtype, reduction: str) -> None:
    rows = batch(N, D, dtype)
    assert_close(rows, LIMITS[dtype], path, reduction=reduction)
    first, *others = (
        loss_and_gradient(rows, device.TRITON, path, reduction=reduction) for _ in range(16)
    )
    assert all(map(torch.equal, first, again) for again in others)


def assert_same_bits(rows: tuple[Tensor, ...], path: str) -> None:
    first = loss_and_gradient(rows, device.TRITON, path)
    for _ in range(REPEATS):
        again = loss_and_gradient(rows, device.TRITON, path)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize(("N", "D", "path"), PRECISION_SIZES)
def test_float32_follows_the_matmul_precision(
    N: int, D: int, path: str, matmul_precision: str
) -> None:
    limits = LIMITS[torch.float32] if matmul_precision == "highest" else (2e-3, 5e-3)
    assert_close(batch(N, D, torch.float32), limits, path)
    assert_same_bits(batch(N, D, torch.float32), path)


@pytest.mark.parametrize("distance", ["mae", "rmse"])
@pytest.mark.parametrize(("N", "path"), SMALL_AND_LARGE)
def test_vector_labels(N: int, path: str, distance: str) -> None:
    rows = batch(N, 64, torch.float32, L=3)
    assert_close(rows, LIMITS[torch.float32], path, distance=distance, window=9.0)


#: Numbers of components by which a division rounds, and the distance.
TIES = [(3, "mae"), (7, "rmse")]


@pytest.mark.parametrize(("L", "distance"), TIES)
@pytest.mark.parametrize(("N", "path"), SMALL_AND_LARGE)
def test_ties_of_vector_labels(N: int, path: str, L: int, distance: str) -> None:
    """Means of tenths, many of which round to the window or just beyond it."""
    x, y, p, *rest = batch(N, 64, torch.float32, L)
    rows = (x, y % 3 / 10, p.round() % 3 / 10, *rest)
    assert_close(rows, LIMITS[torch.float32], path, distance=distance, window=0.1)


@pytest.mark.parametrize(("N", "path"), SMALL_AND_LARGE)
def test_small_temperature(N: int, path: str) -> None:
    assert_close(batch(N, 64, torch.float32), (1e-5, 2e-3), path, temperature=0.005)


@pytest.mark.parametrize("variant", ["paper", "released-depth"])
@pytest.mark.parametrize("path", ["sorted", "once"])
def test_constant_predictions(path: str, variant: str) -> None:
    """Every pair counts: the negatives outside the label bands."""
    rows = batch(SMALL_AND_LARGE[1][0], 128, torch.bfloat16)
    rows[2].fill_(20.0)
    assert_close(rows, LIMITS[torch.bfloat16], path, variant=variant)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize(("N", "D", "path"), REGIMES + CHUNKED)
def test_repeats_have_the_same_bits(N: int, D: int, path: str, dtype) -> None:
    assert_same_bits(batch(N, D, dtype), path)


@pytest.mark.parametrize(("N", "D", "path"), REGIMES)
def test_no_host_synchronisation(N: int, D: int, path: str) -> None:
    rows = batch(N, D, torch.bfloat16)
    loss_and_gradient(rows, device.TRITON, path)
    with device.no_synchronisation():
        loss_and_gradient(rows, device.TRITON, path)


@pytest.mark.skipif(device.REHEARSAL, reason="the CPU waits for nothing")
def test_a_synchronisation_would_show() -> None:
    with pytest.raises(RuntimeError), device.no_synchronisation():
        torch.ones(1, device=device.DEVICE).item()


@pytest.mark.parametrize(("N", "D", "path"), REGIMES)
def test_cuda_graph_replays_with_new_data(N: int, D: int, path: str) -> None:
    rows = batch(N, D, torch.bfloat16)
    x = rows[0].detach().requires_grad_()
    y, p, w, upstream = rows[1:]

    def step() -> tuple[Tensor, Tensor]:
        with device.path(path):
            loss = conr_loss(x, y, p, w, backend=device.TRITON, reduction="none")
            return loss, torch.autograd.grad((loss * upstream).sum(), x)[0]

    replay, captured = device.graph(step)
    with torch.no_grad():
        x.copy_(x.flip(0))
        p.copy_(y)  # from wide negative bands to none
    replay()
    got, expected = captured(), step()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_row_strides_beyond_two_to_the_31() -> None:
    """64 rows, 40,000,000 elements apart."""
    if device.bytes_free() < 8 * 2**30:
        pytest.skip("not run: needs 8 GiB of GPU memory")
    rows = batch(64, 33, torch.bfloat16)
    far = torch.empty(64 * FAR, dtype=torch.bfloat16, device=device.DEVICE)
    x = far.as_strided((64, 33), (FAR, 1))
    x.copy_(rows[0])
    near, spread = (loss_and_gradient((t, *rows[1:]), device.TRITON) for t in (rows[0], x))
    assert torch.equal(near[0], spread[0]) and torch.equal(near[1], spread[1])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("N", "most", "parts"),
    [
        # The copies in both orders, the gradient, and its parts that one launch leaves.
        (16_384, 3, launch_sweeps.PARTS_BYTES),
        # Instead of the parts, the lower halves of 16-bit sums: as large as the features.
        (65_536, 4, 0),
        # Features beyond BOTH_ORDERS: one order's copy at a time.
        (2**19, 3, 0),
    ],
)
def test_memory_grows_with_the_features_alone(
    N: int, most: int, parts: int, reduction: str
) -> None:
    """At most so many times the features, beside 256 bytes a row: labels and statistics in both
    orders, bands, sums over keys.
    """
    rows = batch(device.small(N), device.narrow(128), torch.bfloat16)
    run = functools.partial(loss_and_gradient, rows, device.TRITON, reduction=reduction)
    run()
    features = rows[0].nbytes
    if not device.REHEARSAL:
        assert (features <= launch_sweeps.BOTH_ORDERS) == (N < 2**19)
    extra = device.extra_bytes(run)
    assert extra < most * features + parts + 256 * N
    if not device.REHEARSAL:
        assert extra > features, "the gradient at least: or nothing was measured"


@pytest.mark.parametrize("name", range(4))
@pytest.mark.parametrize(("N", "path"), [*SMALL_AND_LARGE, (SMALL_AND_LARGE[1][0], "once")])
def test_non_finite_input_shows(N: int, path: str, name: int) -> None:
    rows = batch(N, 64, torch.bfloat16)
    rows[name].view(-1)[7] = float("nan")
    loss, gradient = loss_and_gradient(rows, device.TRITON, path)
    assert not loss.isfinite().all() and not gradient.isfinite().all()
