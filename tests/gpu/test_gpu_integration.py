"""The loss inside PyTorch on a GPU: compilers, autocast, streams, graphs, banks, caches, NCCL.

With ``CONR_REHEARSE=1`` the tests run on the CPU, so that they themselves are tried.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.gpu import device
from conr_kernels import ConRLoss, MemoryBank, available_backends, conr_loss, gradient_cache
from conr_kernels.variants import Settings, resolve_variant

WHY_NOT = device.reason_against()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"not run: {WHY_NOT}")

DEVICE = device.DEVICE
BACKENDS = [device.TRITON]
if not device.REHEARSAL and WHY_NOT is None and available_backends()["cuda"] is None:
    BACKENDS.append("cuda")
#: Without and with large exponents.
PRESETS = [("paper", 0.2), ("released-age", 0.07)][: 1 if device.REHEARSAL else 2]
#: A batch without a sort, and one in sweeps.
SIZES = (65, 700) if device.REHEARSAL else (257, 3000)


def make_rows(n: int, seed: int = 0, d: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 40, (n,), generator=g).float()
    p = y + 3 * torch.randn(n, generator=g)
    return tuple(t.to(DEVICE) for t in (torch.randn(n, d, generator=g), y, p))


def value_and_gradient(x: Tensor, *rest: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    loss = conr_loss(x, *rest, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


class Model(nn.Module):
    def __init__(self, backend: str = "auto", d: int = 33) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(d, 32), nn.Linear(32, 1)
        self.conr = ConRLoss(temperature=0.1, backend=backend)

    def features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(inputs).relu()
        return x, 20 + 10 * self.head(x)[:, 0].float()

    def forward(self, inputs: Tensor, y: Tensor) -> Tensor:
        x, p = self.features(inputs)
        return nn.functional.l1_loss(p, y) + 0.5 * self.conr(x, y, p)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("preset", "temperature"), PRESETS)
def test_opcheck_of_both_operators(backend: str, preset: str, temperature: float) -> None:
    x, y, p = make_rows(SIZES[0])
    y, p, w = y[:, None], p[:, None], torch.rand_like(y) + 0.5
    settings = Settings(1.0, temperature, 0.01, resolve_variant(preset))
    tail = (None, None, None, 0, *settings.scalars, backend)
    forward = torch.ops.conr_kernels.forward
    torch.library.opcheck(forward.default, (x.clone().requires_grad_(), y, p, w, None, *tail))
    _, stats, layout = forward(x, y, p, w, None, *tail)
    rows = (stats, None, layout, x, y, p, *tail)
    torch.library.opcheck(torch.ops.conr_kernels.backward.default, rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor_compiles_the_whole_step_for_any_batch_size(backend: str) -> None:
    torch.manual_seed(0)
    model = Model(backend).to(DEVICE)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager" if device.REHEARSAL else "inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for n in SIZES if device.REHEARSAL else (*SIZES, SIZES[0] + 64):
        inputs, y, _ = make_rows(n, n)
        found = []
        for step in (model, compiled):
            model.zero_grad()
            loss = step(inputs, y)
            loss.backward()
            found.append([loss.detach(), *(t.clone() for t in gradients(model))])
        for eager, got in zip(*found, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-3, atol=1e-4)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_hands_on_16_bit_features_and_changes_nothing(backend: str, dtype) -> None:
    for n in SIZES:
        x, y, p = make_rows(n)
        plain = value_and_gradient(x.to(dtype), y, p, backend=backend)
        with torch.autocast(DEVICE, dtype=dtype):
            loss = conr_loss(x.to(dtype), y, p, backend=backend)
        assert loss.dtype == torch.float32 and torch.equal(loss, plain[0])
        model = Model(backend).to(DEVICE)
        with torch.autocast(DEVICE, dtype=dtype):
            assert model.features(x)[0].dtype == dtype
            model(x, y).backward()
        assert all(t.isfinite().all() and t.abs().max() > 0 for t in gradients(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_scaler_skips_the_step_with_a_bad_batch_alone(backend: str) -> None:
    torch.manual_seed(0)
    model = Model(backend).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0)
    inputs, y, _ = make_rows(SIZES[1])
    for is_bad in (False, True, False):
        before = model.body.weight.detach().clone()
        given = inputs.clone()
        if is_bad:
            given[3] = torch.inf
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = model(given, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.body.weight) == is_bad
    assert scaler.get_scale() == 32.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", SIZES)
def test_work_stays_on_the_current_stream(backend: str, n: int) -> None:
    """Behind a long product on a side stream: work on another one would read too early."""
    x, y, p = make_rows(n)
    expected = value_and_gradient(2 * x, y, p, backend=backend)
    big = torch.randn(64 if device.REHEARSAL else 8192, 64, device=DEVICE)
    scaled = torch.zeros_like(x)
    with device.side_stream():
        for _ in range(4):
            big = (big @ big.T @ big).clamp(-1, 1)
        scaled.copy_(2 * x)
        got = value_and_gradient(scaled, y, p, backend=backend)
    device.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_the_whole_training_step_trains_alike(backend: str) -> None:
    inputs, y, _ = make_rows(SIZES[1])
    torch.manual_seed(0)
    model = Model(backend).to(DEVICE)
    twin = copy.deepcopy(model)
    for parameter in (*model.parameters(), *twin.parameters()):
        parameter.grad = torch.zeros_like(parameter)

    def step(model: nn.Module) -> Tensor:
        for parameter in model.parameters():
            parameter.grad.zero_()
        loss = model(inputs, y)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        return loss.detach()

    start = copy.deepcopy(model.state_dict())
    replay, _ = device.graph(lambda: step(model))
    model.load_state_dict(start)
    for _ in range(3):
        replay()
        step(twin)
    device.synchronize()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_and_vmap_name_the_reference(backend: str) -> None:
    x, y, p = make_rows(SIZES[0])
    x.requires_grad_()
    (grad,) = torch.autograd.grad(conr_loss(x, y, p, backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.vmap(lambda x: conr_loss(x, y, p, backend=backend))(torch.stack([x, x]).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", SIZES)
def test_func_grad_equals_autograd(backend: str, n: int) -> None:
    """In every bit where the row losses are differentiated; for the reduced loss, which has a path
    of its own in eager mode that multiplies by the upstream gradient last, to rounding.
    """
    x, y, p = make_rows(n)

    def loss(x: Tensor, reduction: str) -> Tensor:
        return conr_loss(x, y, p, backend=backend, reduction=reduction).sum()

    for reduction in ("none", "mean"):
        got = torch.func.grad(loss)(x, reduction)
        expected = value_and_gradient(x, y, p, backend=backend, reduction=reduction)[1]
        if reduction == "none":
            assert torch.equal(got, expected)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_mode_reads_no_unwritten_memory(backend: str) -> None:
    """PyTorch fills empty tensors with NaN in this mode."""
    for n in (0, 1, *SIZES):
        rows, keys = make_rows(n), make_rows(900, seed=1)
        plain = [value_and_gradient(*rows, keys=k, backend=backend) for k in (None, keys)]
        torch.use_deterministic_algorithms(True)
        try:
            strict = [value_and_gradient(*rows, keys=k, backend=backend) for k in (None, keys)]
        finally:
            torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(strict, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_bank_serves_further_keys(backend: str) -> None:
    bank = MemoryBank(2000, n_features=33, device=DEVICE)
    for step in range(3):
        x, y, p = make_rows(SIZES[1], step)
        got, expected = (
            value_and_gradient(t, y, p, keys=bank.keys(t.dtype), backend=of)
            for t, of in ((x, backend), (x.double(), "reference"))
        )
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
        bank.push(x, y, p)
    assert len(bank) > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["paper", "released-depth", "contrastive"])
def test_a_masked_bank_equals_the_filtered_one_without_synchronisation(
    backend: str, variant: str
) -> None:
    """Also where a graph repeats the push and the loss."""
    options = dict(variant=variant, backend=backend)
    (x, y, p), own = make_rows(SIZES[1], 1), make_rows(SIZES[1])
    mask = y % 3 > 0
    bank = MemoryBank(2 * SIZES[1], n_features=33, device=DEVICE)
    holes = [t.masked_fill(~mask.view(-1, *(1,) * (t.dim() - 1)), torch.nan) for t in (x, y, p)]

    def step() -> tuple[Tensor, Tensor]:
        bank.clear()
        bank.push(*holes, mask)
        return value_and_gradient(*own, keys=bank, **options)

    step()  # may compile
    with device.no_synchronisation():
        got = step()
    replay, of_graph = device.graph(step)
    replay()
    device.synchronize()
    filtered = [t[mask] for t in (x, y, p)]
    expected = value_and_gradient(*own, keys=filtered, **options)
    for found in (got, of_graph()):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_cache_equals_one_shot(backend: str) -> None:
    torch.manual_seed(0)
    model = Model(backend).to(DEVICE)
    inputs, y, _ = make_rows(SIZES[1])

    def loss(x: Tensor, p: Tensor) -> Tensor:
        return nn.functional.l1_loss(p, y) + 0.5 * model.conr(x, y, p)

    whole = loss(*model.features(inputs))
    whole.backward()
    expected = [t.clone() for t in gradients(model)]
    model.zero_grad()
    value = gradient_cache(model.features, inputs, loss, chunk_size=100)
    torch.testing.assert_close(value, whole.detach(), rtol=1e-4, atol=1e-5)
    for got, one_shot in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, one_shot, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_one_rank_is_the_batch_itself(backend: str) -> None:
    kind = "gloo" if device.REHEARSAL else "nccl"
    if not getattr(dist, f"is_{kind}_available")():
        pytest.skip(f"not run: PyTorch is built without {kind}")
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for n in SIZES:
            rows = make_rows(n)
            got = value_and_gradient(*rows, backend=backend, group=dist.group.WORLD)
            expected = value_and_gradient(*rows, backend=backend)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    finally:
        dist.destroy_process_group()
