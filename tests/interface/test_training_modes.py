"""Autocast, gradient scaling, graph modes and determinism leave the loss what it is."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from conr_kernels import ConRLoss, conr_loss

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
)
DEVICES = ["cpu", CUDA]


def make_rows(n_rows: int = 65, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """Features, labels, predictions; the labels differ by less than 16-bit formats resolve."""
    g = torch.Generator().manual_seed(seed)
    y = 1000 + torch.randint(0, 30, (n_rows,), generator=g) / 4
    p = y + torch.randn(n_rows, generator=g)
    x = torch.randn(n_rows, 9, generator=g)
    return x.to(device), y.to(device), p.to(device)


def value_and_gradient(
    x: Tensor, *rest: Tensor, cast: torch.dtype | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Loss, under autocast to ``cast`` if given, and gradient; backward runs outside, as usual."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=cast, enabled=cast is not None):
        loss = conr_loss(x, *rest, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_nothing(device: str, dtype: torch.dtype, backend: str) -> None:
    x, y, p = make_rows(device=device)
    x = x.to(dtype)
    plain = value_and_gradient(x, y, p, backend=backend)
    for cast in (torch.bfloat16, torch.float16):
        cast_too = value_and_gradient(x, y, p, backend=backend, cast=cast)
        assert cast_too[0].dtype == torch.float32
        assert cast_too[1].dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(plain, cast_too, strict=True))


def test_labels_are_not_cast_down_with_the_features() -> None:
    x, y, p = make_rows()
    x = x.bfloat16()
    in_16_bits = conr_loss(x, y.bfloat16(), p.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = conr_loss(x, y, p)
    torch.testing.assert_close(kept, conr_loss(x.float(), y, p), rtol=1e-5, atol=1e-6)
    assert abs(kept - in_16_bits) > 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_model_under_autocast_trains_on_16_bit_features(device: str) -> None:
    x, y, p = make_rows(device=device)
    layer = torch.nn.Linear(9, 6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        features = layer(x)
        assert features.dtype == torch.bfloat16
        loss = ConRLoss()(features, y, p)
    loss.backward()
    assert loss.dtype == torch.float32
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["features", "upstream"])
def test_grad_scaler_sees_what_is_not_finite(bad: float, which: str) -> None:
    x, y, p = make_rows()
    weight = torch.ones(9, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, is_bad in enumerate((False, True)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        features = (x.clone().index_fill_(0, torch.tensor([3]), bad) if is_bad else x) * weight
        if which == "upstream":
            features = x * weight
        loss = conr_loss(features, y, p) * (bad if is_bad and which == "upstream" else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight) == is_bad, step
        assert scaler.get_scale() == (512.0 if is_bad else 1024.0)


def test_gradient_is_linear_in_the_scale() -> None:
    x, y, p = make_rows()
    x = x.requires_grad_()
    plain, scaled = (
        torch.autograd.grad(conr_loss(x, y, p, temperature=0.01) * scale, x)[0]
        for scale in (1.0, 2.0**16)
    )
    torch.testing.assert_close(scaled / 2.0**16, plain)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_values_without_gradient_are_those_with(backend: str) -> None:
    for n_rows in (0, 1, 65, 700):
        x, y, p = make_rows(n_rows)
        with_grad, _ = value_and_gradient(x, y, p, backend=backend)
        with torch.no_grad():
            assert torch.equal(
                conr_loss(x.clone().requires_grad_(), y, p, backend=backend), with_grad
            )
        with torch.inference_mode():
            value = conr_loss(x, y, p, backend=backend)
            assert value.is_inference() and torch.equal(value, with_grad)
        assert not conr_loss(x, y, p, backend=backend).requires_grad


@pytest.mark.parametrize("n_rows", [65, 700])
def test_retained_graph_gives_the_same_bits_twice(n_rows: int) -> None:
    x, y, p = make_rows(n_rows)
    x.requires_grad_()
    loss = conr_loss(x, y, p, reduction="none")
    g = torch.linspace(-1, 1, n_rows)
    first, second = (torch.autograd.grad(loss, x, g, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_changed_input_is_noticed_in_backward() -> None:
    x, y, p = make_rows()
    x = x.requires_grad_() * 1.0
    loss = conr_loss(x, y, p)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, dict(variant="released-age", temperature=0.01)])
def test_deterministic_mode_raises_nothing_and_reads_no_unwritten_memory(options: dict) -> None:
    # PyTorch fills empty tensors with NaN in this mode.
    for n_rows in (0, 1, 65, 700):
        rows = make_rows(n_rows)
        keys = make_rows(900, seed=1)
        plain = [value_and_gradient(*rows, keys=k, **options) for k in (None, keys)]
        torch.use_deterministic_algorithms(True)
        try:
            strict = [value_and_gradient(*rows, keys=k, **options) for k in (None, keys)]
        finally:
            torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(strict, plain)


def test_subclass_of_tensor_and_parameter() -> None:
    class Features(Tensor):
        pass

    x, y, p = make_rows()
    expected = value_and_gradient(x, y, p)
    parameter = torch.nn.Parameter(x.clone())
    loss = conr_loss(parameter, y, p)
    loss.backward()
    assert torch.equal(loss, expected[0]) and torch.equal(parameter.grad, expected[1])
    features = x.clone().as_subclass(Features).requires_grad_()
    loss = conr_loss(features, y, p)
    loss.backward()
    assert float(loss) == float(expected[0])
    assert torch.equal(features.grad.as_subclass(Tensor), expected[1])


def test_import_neither_compiles_nor_starts_anything() -> None:
    code = """
        import sys
        import conr_kernels
        for name in ("torch._dynamo", "torch._inductor", "triton", "sympy"):
            assert name not in sys.modules, name
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)


@pytest.mark.parametrize("n_rows, n_keys", [(700, 0), (65, 900)])
@pytest.mark.parametrize("variant", ["paper", "released-age"])
def test_rows_without_loss_add_nothing_where_exponents_are_large(
    n_rows: int, n_keys: int, variant: str
) -> None:
    """``exp(s_ij)`` of a row that is no anchor may overflow; it meets a coefficient of nothing."""
    x, *rest = make_rows(n_rows)
    key_x, *key_rest = make_rows(n_keys, seed=1)
    options = dict(variant=variant, temperature=0.01)
    _, gradient = value_and_gradient(x, *rest, keys=(key_x, *key_rest), **options)
    wide_keys = (key_x.double(), *key_rest)
    _, expected = value_and_gradient(
        x.double(), *rest, keys=wide_keys, backend="reference", **options
    )
    assert gradient.isfinite().all()
    bound = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=bound)
