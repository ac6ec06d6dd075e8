"""What every call keeps: dtypes, bits, memory, inputs unwritten, empty batches, one derivative."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from conr_kernels import ConRLoss, Variant, conr_loss, density_weights
from tests.helpers.regimes import PRESETS, REGIMES, force, make_batch, same_bits, value_and_gradient

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-17, torch.float64: 2**-46}


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def in_new_process(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", "-c", textwrap.dedent(code)]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_dtypes_of_loss_and_gradient_and_their_accuracy(monkeypatch, regime, dtype):
    """Against the reference in float64 of the same rounded features."""
    backend = force(monkeypatch, regime)
    batch = make_batch(65, dtype=dtype)
    wide = batch | dict(features=batch["features"].double())
    for variant in PRESETS:
        options = dict(variant=variant, reduction="sum")
        loss, gradient = value_and_gradient(**batch, **options, backend=backend)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype and gradient.shape == batch["features"].shape
        expected, exact = value_and_gradient(**wide, **options, backend="reference")
        accumulation = min(EPS[dtype], EPS[torch.float32])
        assert (loss - expected).abs() <= accumulation * expected.abs()
        assert (gradient - exact).abs().max() <= EPS[dtype] * exact.abs().max() + (
            2**-24 if dtype == torch.float16 else 0
        )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_highest_matmul_precision_reaches_float32_accuracy(matmul_precision, backend):
    for n in (65, 600):
        batch = make_batch(n, D=129)
        wide = batch | dict(features=batch["features"].double())
        exact = value_and_gradient(**wide, backend="reference", temperature=0.07)
        for precision, tolerance in (("highest", 1e-5), ("high", 1e-2), ("medium", 1e-1)):
            matmul_precision(precision)
            values = value_and_gradient(**batch, backend=backend, temperature=0.07)
            for value, expected in zip(values, exact, strict=True):
                error = (value - expected).abs().max() / expected.abs().max()
                assert error < tolerance, (n, precision)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("variant", PRESETS)
def test_batches_without_anchors_lose_0_with_a_gradient_of_0(variant, backend):
    x, far = torch.randn(9, 4), 10 * torch.arange(9.0)
    same = torch.zeros(9)
    batches = {
        "N = 0": (x[:0], same[:0], same[:0]),
        "N = 1": (x[:1], same[:1], same[:1]),
        "identical labels": (x, same, far),
        "identical labels and predictions": (x, same, same),
        "all labels distinct": (x, far, same),
        "N = 2, a pair": (x[:2], same[:2], same[:2]),
    }
    for name, (x, y, p) in batches.items():
        for w in (None, torch.ones(len(x))):
            for reduction in ("mean", "sum", "none"):
                leaf = x.clone().requires_grad_()
                loss = conr_loss(
                    leaf, y, p, w, variant=variant, reduction=reduction, backend=backend
                )
                assert loss.requires_grad and loss.shape == y.shape[: reduction == "none"], name
                loss.sum().backward()
                assert not loss.any() and leaf.grad.shape == x.shape and not leaf.grad.any(), name


def test_keys_alone_do_not_make_an_empty_batch_lose():
    for backend in ("torch", "reference"):
        x = torch.zeros(0, 7, requires_grad=True)
        bank = make_batch(20)
        keys = tuple(bank[name] for name in ("features", "targets", "predictions"))
        loss = conr_loss(x, torch.zeros(0), torch.zeros(0), keys=keys, backend=backend)
        loss.backward()
        assert loss.item() == 0 and x.grad.shape == (0, 7)


@pytest.mark.parametrize("n", [33, 600, 1200])
def test_same_inputs_give_the_same_bits(n):
    batch, keys = make_batch(n), make_batch(50, seed=1)
    keys = tuple(keys[name] for name in ("features", "targets", "predictions"))
    for options in (dict(), dict(variant="released-age", temperature=0.01), dict(keys=keys)):
        first = value_and_gradient(**batch, **options)
        for _ in range(3):
            assert same_bits(value_and_gradient(**batch, **options), first)
        with torch.no_grad():
            assert torch.equal(conr_loss(**batch, **options), first[0])


@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_graph_that_is_kept_gives_the_same_bits_twice(monkeypatch, regime, variant):
    backend = force(monkeypatch, regime)
    batch = make_batch(65)
    x = batch["features"].requires_grad_()
    loss = conr_loss(**batch, variant=variant, backend=backend)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
    with torch.no_grad():
        assert torch.equal(conr_loss(**batch, variant=variant, backend=backend), loss)


@pytest.mark.parametrize("regime", REGIMES)
def test_no_memory_is_read_that_was_not_written(monkeypatch, regime):
    """Deterministic mode fills fresh memory with NaN."""
    backend = force(monkeypatch, regime)
    batch = make_batch(65, L=2)
    for variant in PRESETS:
        for temperature in (0.2, 0.01):
            options = dict(variant=variant, temperature=temperature, backend=backend)
            expected = value_and_gradient(**batch, **options)
            assert torch.utils.deterministic.fill_uninitialized_memory
            torch.use_deterministic_algorithms(True)
            try:
                values = value_and_gradient(**batch, **options)
            finally:
                torch.use_deterministic_algorithms(False)
            assert same_bits(values, expected)


@pytest.mark.parametrize("regime", REGIMES)
def test_each_row_has_its_own_upstream_gradient(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch = make_batch(65, dtype=torch.float64)
    g = torch.randn(65, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    options = dict(reduction="none", backend=backend)
    rows, gradient = value_and_gradient(**batch, g=g, **options)
    total = torch.zeros_like(gradient)
    for i in range(65):
        one = torch.zeros(65, dtype=torch.float64)
        one[i] = g[i]
        total += value_and_gradient(**batch, g=one, **options)[1]
    torch.testing.assert_close(total, gradient, rtol=1e-10, atol=1e-14)
    _, expected = value_and_gradient(**batch, g=g, reduction="none", backend="reference")
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("regime", REGIMES)
def test_reductions_and_strides_and_scale_of_the_upstream_gradient(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch = make_batch(65, dtype=torch.float64)
    rows, of_ones = value_and_gradient(**batch, reduction="none", backend=backend)
    stride_0 = torch.ones((), dtype=torch.float64).expand(65)
    assert stride_0.stride() == (0,)
    _, of_stride_0 = value_and_gradient(**batch, g=stride_0, reduction="none", backend=backend)
    assert rows.shape == (65,) and torch.equal(of_stride_0, of_ones)
    total, of_sum = value_and_gradient(**batch, reduction="sum", backend=backend)
    mean, of_mean = value_and_gradient(**batch, reduction="mean", backend=backend)
    for value, expected in (
        (total, rows.sum()), (mean, rows.sum() / 65), (of_sum, of_ones), (of_mean, of_ones / 65)
    ):  # fmt: skip
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)
    for scale in (-3.0, 2.0**16, 0.0):
        g = torch.tensor(scale, dtype=torch.float64)
        _, scaled = value_and_gradient(**batch, g=g, backend=backend)
        torch.testing.assert_close(scaled, of_mean * scale, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_scalar_weight_keeps_the_features_precision_and_range(backend):
    batch = make_batch(65, dtype=torch.float64)
    for scalar in (0.1, 10**30, 1e30):
        given = (scalar, torch.tensor(float(scalar), dtype=torch.float64))
        full = torch.full((65,), float(scalar), dtype=torch.float64)
        expected = value_and_gradient(**batch | dict(weights=full), backend=backend)
        for w in given:
            values = value_and_gradient(**batch | dict(weights=w), backend=backend)
            assert same_bits(values, expected), w


def test_gradients_flow_to_the_features_alone():
    for backend in ("torch", "reference"):
        leaves = {name: t.requires_grad_() for name, t in make_batch(33).items()}
        key_x, *labels = list(make_batch(20, seed=1).values())[:3]
        conr_loss(**leaves, keys=(key_x.requires_grad_(), *labels), backend=backend).backward()
        assert leaves.pop("features").grad.any()
        assert all(t.grad is None for t in (*leaves.values(), key_x))


@pytest.mark.parametrize("regime", ["kept", "banded", "dense"])
def test_a_second_derivative_of_a_fused_backend_names_the_reference(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch = make_batch(33)
    x = batch["features"].requires_grad_()
    (gradient,) = torch.autograd.grad(conr_loss(**batch, backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match='second derivative.*backend="reference"'):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match='vmap.*backend="reference"'):
        torch.vmap(lambda x: conr_loss(**batch | dict(features=x), backend=backend))(
            torch.stack([x.detach()] * 2)
        )


@pytest.mark.parametrize("variant", PRESETS)
def test_the_reference_has_two_derivatives_and_vmap(variant):
    _, y, p, w = make_batch(7).values()
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()

    def loss(x):
        return conr_loss(x, y, p, w, window=2.0, variant=variant, backend="reference")

    assert loss(x) > 0
    assert gradcheck(loss, x) and gradgradcheck(loss, x)
    many = torch.stack([x.detach(), x.detach().flip(0), 2 * x.detach() - 1])
    torch.testing.assert_close(torch.vmap(loss)(many), torch.stack([loss(x) for x in many]))


def test_the_module_equals_the_function_and_shows_its_settings():
    batch = make_batch(33)
    options = dict(
        window=2.0, temperature=0.1, push_scale=0.2, variant="released-age", distance="rmse",
        reduction="sum", backend="reference",
    )  # fmt: skip
    module = ConRLoss(**options)
    assert torch.equal(module(*batch.values()), conr_loss(**batch, **options))
    assert torch.equal(ConRLoss()(*batch.values()), conr_loss(**batch))
    assert torch.equal(
        ConRLoss()(*list(batch.values())[:3]), conr_loss(**batch | dict(weights=None))
    )
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)
    assert not list(module.parameters()) and not module.state_dict()
    inside = Variant(log="inside", pushing="weight")
    assert repr(inside) in repr(ConRLoss(variant=inside))
    assert torch.equal(
        ConRLoss(variant=inside)(*batch.values()), conr_loss(**batch, variant=inside)
    )


def test_importing_and_calling_on_the_cpu_starts_and_writes_nothing():
    """No process, network, file or unpickling, and no triton, matplotlib or numpy."""
    seen = in_new_process(
        """
        import sys
        import torch
        before = set(sys.modules)
        forbidden = ("subprocess", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket",
                     "pickle", "marshal.dump", "os.mkdir", "os.remove", "os.rename")
        def audit(event, arguments):
            writes = event == "open" and set(str(arguments[1])) & set("wax+")
            if writes or event.startswith(forbidden):
                print(event, arguments)
        sys.addaudithook(audit)
        import conr_kernels
        x, y = torch.randn(9, 3, requires_grad=True), torch.arange(9.0) // 3
        conr_kernels.conr_loss(x, y, torch.zeros(9)).backward()
        heavy = ("triton", "matplotlib", "torch._inductor", "torch.utils.cpp_extension")
        print(*(name for name in set(sys.modules) - before if name.startswith(heavy)))
        """
    )
    assert seen.split() == []


@pytest.mark.parametrize(("predictions", "n"), [("real", 16384), ("collapsed", 8192)])
def test_memory_grows_with_the_rows_not_with_the_pairs(predictions, n):
    """The peak stays below an eighth of one float32 for every pair: 1,024 and 256 MiB."""
    grown = in_new_process(
        f"""
        import resource
        import torch
        from conr_kernels import conr_loss
        def run(N):
            g = torch.Generator().manual_seed(0)
            x = torch.randn(N, 16, generator=g, requires_grad=True)
            y = torch.randint(0, 100, (N,), generator=g).float()
            p = y + 3 * torch.randn(N, generator=g)
            p = p if {predictions == "real"} else torch.full_like(p, 50.0)
            loss = conr_loss(x, y, p, backend="torch")
            loss.backward()
            assert loss > 0 and x.grad.any()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(-run(1024) + run({n}))
        """
    )
    assert int(grown) < n**2 * 4 / 8 / 1024  # KiB


@pytest.mark.parametrize("regime", REGIMES)
def test_the_default_dtype_and_device_of_pytorch_change_nothing(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch, bank = make_batch(33) | dict(weights=0.1), make_batch(20, seed=1)
    keys = tuple(bank[name] for name in ("features", "targets", "predictions"))
    for further in (None, keys):
        options = dict(keys=further, variant="released-age", temperature=0.01, backend=backend)
        expected = value_and_gradient(**batch, **options)
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                assert same_bits(value_and_gradient(**batch, **options), expected)
            finally:
                torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert same_bits(value_and_gradient(**batch, **options), expected)
    weights = density_weights(bank["targets"], smoothing="gaussian")
    with torch.device("meta"):
        assert torch.equal(density_weights(bank["targets"], smoothing="gaussian"), weights)
