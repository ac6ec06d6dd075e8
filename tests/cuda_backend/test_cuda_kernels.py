"""The CUDA kernels, executed on the host shim, against the float64 reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conr_kernels import ops
from conr_kernels.core.inputs import Inputs
from conr_kernels.cuda_backend import backend as cuda_backend
from conr_kernels.reference import row_losses
from conr_kernels.variants import PRESETS, Settings, Variant
from tests.helpers import cuda_shim
from tests.helpers.cases import VECTOR_TIES, structured_cases, tie_cases
from tests.helpers.cuda_batches import assert_as_good_as_eager, make_batch, rms
from tests.helpers.oracle import assert_as_good_as_eager as assert_case

#: What a gradient loses, relative to its root mean square.
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SIZES = (1, 2, 3, 31, 33, 64, 65, 97, 127, 129, 200, 257, 300)


@pytest.mark.parametrize("variant", PRESETS)
def test_every_variant_at_sizes_1_to_300(shim, path, variant):
    for n, N in enumerate(SIZES):
        D = (1, 7, 33, 40, 129)[n % 5]
        assert_as_good_as_eager(make_batch(N, D), f"N={N} D={D}", variant=variant)


def test_structured_cases(shim, path):
    for case in structured_cases(n=(33, 65)):
        assert_case(cuda_backend, case)


@pytest.mark.parametrize(("L", "distance"), VECTOR_TIES)
def test_ties_beyond_the_reach_are_positives_and_negatives(shim, path, L, distance):
    for case in tie_cases(L, distance):
        assert_case(cuda_backend, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_have_no_gradient(shim, path, dtype):
    """They are positives and negatives of similarity 0, and anchors."""
    for D, variant in ((16, "paper"), (40, "released-age"), (200, "released-depth")):
        batch = make_batch(97, D, dtype=dtype)
        batch.x[::7] = 0
        loss, gradient = batch.run("cuda", variant=variant)
        expected, exact = batch.run("reference", torch.float64, variant=variant)
        assert (expected[::7] != 0).any() and not gradient[::7].any()
        assert rms(loss - expected) <= 1e-6 * rms(expected)
        assert rms(gradient - exact) <= DTYPES[dtype] * rms(exact)


@pytest.mark.parametrize("distance", ["mae", "rmse"])
@pytest.mark.parametrize("L", [2, 3])
def test_vector_labels(shim, path, L, distance):
    for N, variant in ((65, "paper"), (130, "released-age"), (97, "contrastive")):
        batch = make_batch(N, 16, L, spread=3.0)
        assert_as_good_as_eager(batch, f"N={N} L={L}", variant=variant, distance=distance)


@pytest.mark.parametrize("D", [1, 32, 64, 128, 136, 300])
def test_float32_in_registers_and_in_memory(shim, D):
    assert_as_good_as_eager(make_batch(97, D), variant="paper")


@pytest.mark.parametrize("D", [5, 32, 100])
def test_float64(shim, path, D):
    batch = make_batch(97, D, dtype=torch.float64)
    for variant in ("paper", "released-age"):
        for a, e in zip(
            batch.run("cuda", variant=variant),
            batch.run("reference", variant=variant),
            strict=True,
        ):
            assert rms(a - e) <= 1e-12 * rms(e)


@pytest.mark.parametrize(
    ("dtype", "of_gradient"), [(torch.float16, 6e-4), (torch.bfloat16, 5e-3)], ids=str
)
def test_tensor_cores(shim, path, dtype, of_gradient):
    for N, D, variant in (
        (65, 1, "paper"),
        (129, 33, "released-age"),
        (64, 64, "released-depth"),
        (130, 128, "no-pushing"),
        (97, 200, "paper"),
        (300, 24, "contrastive"),
    ):
        batch = make_batch(N, D, dtype=dtype)
        loss, gradient = batch.run("cuda", variant=variant)
        expected_loss, expected_gradient = batch.run("reference", torch.float64, variant=variant)
        assert rms(loss - expected_loss) <= 1e-6 * rms(expected_loss), (N, D, variant)
        if D > 1:  # the gradient of one column is rounding of 0
            assert rms(gradient - expected_gradient) <= of_gradient * rms(expected_gradient)


def test_bfloat16_without_tensor_cores(shim, path, monkeypatch):
    """Before sm_80 bfloat16 rows are unit rows in float32; only the gradient is rounded to 16
    bits.
    """
    monkeypatch.setattr(cuda_backend, "_widens", lambda x: x.dtype == torch.bfloat16)
    batch = make_batch(97, 40, dtype=torch.bfloat16)
    loss, gradient = batch.run("cuda", variant="released-age")
    expected_loss, expected = batch.run("reference", torch.float64, variant="released-age")
    assert rms(loss - expected_loss) <= 1e-6 * rms(expected_loss)
    assert rms(gradient - expected) <= 2.0**-9 * rms(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_spans_the_exponents_of_its_dtype(shim, dtype):
    """No upstream gradient makes H, which 16-bit products round, over- or underflow."""
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for of_x, of_upstream in ((2.0**9, 1e6), (1.0, 1.0), (2.0**-9, 1e-4)):
        batch = make_batch(97, 16, dtype=dtype)
        batch.x, batch.upstream = batch.x * of_x, batch.upstream * of_upstream
        batch.upstream[::2] = 0.0
        _, gradient = batch.run("cuda")
        _, expected = batch.run("reference", torch.float64)
        error = rms(gradient - expected)
        assert error <= tolerance * rms(expected), (of_x, of_upstream, error / rms(expected))


def test_anchors_among_more_keys(shim, path):
    """Anchors in the middle of the keys, as in a distributed batch, and their gradient alone."""
    keys = make_batch(201, 24)
    offset, N = 37, 90
    here = slice(offset, offset + N)
    for variant in ("paper", "released-age"):
        settings = Settings(1.0, 0.2, 0.01, PRESETS[variant])
        x = keys.x[here].clone().requires_grad_()
        all_keys = (keys.x, keys.y, keys.p)
        labels = keys.y[here], keys.p[here], keys.w[here]
        rows = ops.row_losses(Inputs(x, *labels, all_keys, offset, settings), "cuda")
        rows.backward(keys.upstream[here])
        anchors = keys.x[here].double().requires_grad_()
        fixed = keys.x.double()
        joined = torch.cat([fixed[:offset], anchors, fixed[offset + N :]])
        expected = row_losses(
            anchors, keys.y[here], keys.p[here], keys.w[here].double(),
            (joined, keys.y, keys.p), offset, settings,
        )  # fmt: skip
        expected.backward(keys.upstream[here].double())
        assert rms(rows.double() - expected) <= 1e-6 * rms(expected)
        assert rms(x.grad.double() - anchors.grad) <= 1e-5 * rms(anchors.grad)


def test_weights_of_zero_leave_the_anchors(shim, path):
    """Negatives of weight 0 vanish from Z, yet their anchors count."""
    batch = make_batch(97, 16)
    batch.w = torch.zeros(97)
    rows, gradient = batch.run("cuda", variant=Variant(log="inside"))
    expected, expected_gradient = batch.run(
        "reference", torch.float64, variant=Variant(log="inside")
    )
    assert (rows != 0).sum() == (expected != 0).sum() > 0
    assert rms(rows - expected) <= 1e-6 * rms(expected)
    assert rms(gradient - expected_gradient) <= 1e-5 * rms(expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes_stay_finite(shim, path, dtype):
    extremes = [
        (dict(temperature=0.005), 1.0, 1.0),
        (dict(temperature=0.005, variant="released-age", push_scale=100.0), 1.0, 1.0),
        (dict(variant="paper"), 1e30, 1.0),
        (dict(variant="released-age"), 1e30, 1.0),
        (dict(variant="paper"), 1.0, 1e-12),
        (dict(variant="paper"), 1.0, 1e15),
    ]
    for settings, weight, norm in extremes:
        batch = make_batch(66, 16, dtype=dtype)
        batch.x[::3] = batch.x[0]  # similarities of 1
        batch.x *= norm
        batch.w = batch.w * weight
        batch.upstream = batch.upstream * 1e-20
        for result in batch.run("cuda", **settings):
            assert result.isfinite().all(), (settings, weight, norm)


def test_small_temperature_agrees_with_the_reference(shim, path):
    batch = make_batch(97, 16)
    batch.x[::3] = batch.x[0]
    for settings in (
        dict(temperature=0.005),
        dict(variant="released-age", push_scale=10.0),
        dict(variant="released-age", push_scale=-10.0, temperature=0.02),
    ):
        assert_as_good_as_eager(batch, **settings)


@pytest.mark.parametrize("where", ["x", "y", "p", "w", "upstream"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_input_shows(shim, path, where, value):
    batch = make_batch(66, 16)
    getattr(batch, where)[7] = value
    rows, gradient = batch.run("cuda")
    assert where == "upstream" or not rows.isfinite().any()
    assert not gradient[7].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_without_a_pair_write_their_rows(shim, path, dtype):
    """NaN labels and predictions, as of a model that diverged, are in nobody's band."""
    batch = make_batch(130, 16, dtype=dtype)
    for order in (0, 1):
        shim.configure(order)
        batch.y[:], batch.p[:] = torch.nan, torch.nan
        rows, gradient = batch.run("cuda")
        assert rows.isnan().all() and gradient.isnan().all()


def test_dense_and_banded_are_chosen_on_the_device(shim, monkeypatch):
    monkeypatch.setattr(cuda_backend, "DENSE_PAIRS", 0)
    batch = make_batch(130, 16)
    settings = Settings(1.0, 0.2, 0.01, PRESETS["paper"])

    def served(p):
        inputs = Inputs(batch.x, batch.y, p, None, None, 0, settings)
        return cuda_backend.forward(inputs)[2][:2].tolist()

    assert served(batch.p) == [1, 2]
    assert served(torch.zeros_like(batch.p)) == [3, 0]
    batch.p = torch.zeros_like(batch.p)
    assert_as_good_as_eager(batch)


class HostReads(TorchDispatchMode):
    """Notes operators that make the host wait for a GPU, or whose result's size depends on data."""

    NAMES = {"_local_scalar_dense", "equal", "lift_fresh", "masked_select", "nonzero"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen |= {function._schema.name.removeprefix("aten::")} & self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_keys", [False, True], ids=["batch", "more keys"])
@pytest.mark.parametrize("L", [1, 2])
def test_the_host_never_waits_for_the_device(shim, path, L, has_keys):
    """Neither forward nor backward asks a tensor for a number."""
    batch = make_batch(66, 16, L)
    settings = Settings(1.0, 0.2, 0.01, PRESETS["paper"])
    keys = (batch.x, batch.y, batch.p) if has_keys else None
    x, y, p, w = (t[:50] if has_keys else t for t in (batch.x, batch.y, batch.p, batch.w))
    with HostReads() as reads:
        inputs = Inputs(x, y, p, w, keys, 0, settings)
        _, stats, layout = cuda_backend.forward(inputs)
        coef_j = torch.zeros(66, 3) if has_keys else None
        cuda_backend.backward(inputs, stats, coef_j, layout)
        if not has_keys:
            _, saved, plan = cuda_backend.reduced(inputs, None, "mean", True)
            cuda_backend.reduced_gradient(x, saved, plan, torch.ones(()))
        assert not reads.seen
        x.sum().item()
        assert reads.seen == {"_local_scalar_dense"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tiles_of_positives_only(shim, monkeypatch, dtype):
    """Wide bands hold tiles in which no pair needs to be decided."""
    monkeypatch.setattr(cuda_backend, "DENSE_PAIRS", 0)
    monkeypatch.setattr(cuda_backend, "DENSE_SHARE", 2.0)
    batch = make_batch(300, 24, dtype=dtype, spread=2.5)
    settings = Settings(1.0, 0.2, 0.01, PRESETS["paper"])
    inputs = Inputs(batch.x, batch.y, batch.p, None, None, 0, settings)
    layout = cuda_backend.forward(inputs)[2]
    lo, hi = layout[2 + 600 : 2 + 1200].view(2, 300)
    assert (hi[64] - lo[127] > 2 * 64) and lo[127] < 64 and hi[64] >= 192
    for variant in ("paper", "released-age", "released-depth"):
        actual = batch.run("cuda", variant=variant)
        expected = batch.run("reference", torch.float64, variant=variant)
        tolerance = 1e-12 if dtype == torch.float64 else 5e-3
        assert rms(actual[0] - expected[0]) <= min(tolerance, 1e-6) * rms(expected[0])
        assert rms(actual[1] - expected[1]) <= tolerance * rms(expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bits_in_any_order_of_threads(shim, path, dtype):
    results = []
    for order in (0, 1, 5):
        shim.configure(order)
        results.append(make_batch(130, 40, dtype=dtype).run("cuda", variant="released-age"))
    for rows, gradient in results[1:]:
        assert torch.equal(rows, results[0][0]) and torch.equal(gradient, results[0][1])


def test_a_sum_of_ten_million_terms_is_exact_to_its_last_places(tmp_path):
    if (reason := cuda_shim.missing_tool()) is not None:
        pytest.skip(reason)
    sources = [cuda_shim.SIMT / "sums.cu", cuda_shim.SIMT / "simt.cpp"]
    library = ctypes.CDLL(str(cuda_shim.compile_for_host(tmp_path, "sums", sources)))
    library.sum_of_equal_terms.restype = ctypes.c_float
    library.sum_of_equal_terms.argtypes = [ctypes.c_float, ctypes.c_int]
    term, n = ctypes.c_float(0.1).value, 10_000_000
    assert abs(library.sum_of_equal_terms(term, n) - n * term) <= 2**-22 * n * term


def test_a_buffer_of_a_wrong_length_or_dtype_is_refused_by_name(shim):
    x, y, layout = torch.ones(4, 8), torch.zeros(4, 1), torch.zeros(0, dtype=torch.int32)
    stats, loss, total = torch.zeros(4, 3), torch.zeros(4), torch.zeros(())
    scalars = cuda_backend._scalars(Settings(1.0, 0.2, 0.01, PRESETS["paper"]), False)
    given = dict(
        x=x, y=y, p=y, w=None, n_absent=None, layout=layout, stats=stats, labels=None, loss=loss,
        total=total,
    )  # fmt: skip
    for name, wrong, gist in (
        ("loss", loss[:3], "loss has 3 elements, not 4"),
        ("loss", loss.double(), "loss has a wrong dtype"),
        ("stats", torch.zeros(4, 5), "stats has 20 elements, not 12"),
        ("layout", torch.zeros(33, dtype=torch.int32), "layout has 33 elements, not 34"),
        ("p", torch.zeros(4, 2), "p has 8 elements, not 4"),
        ("w", torch.ones(8)[::2], "w must be contiguous"),
        ("n_absent", total, "n_absent has a wrong dtype"),
    ):
        x, y, p, w, n_absent, *written = (given | {name: wrong}).values()
        with pytest.raises(RuntimeError, match=gist):
            torch.ops.conr_kernels_cuda.forward(
                x, y, p, w, n_absent, 0, *scalars, 0.7, 1.0, *written, 0
            )
