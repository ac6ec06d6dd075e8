"""The operators are what PyTorch's compiler, tracers and function transforms expect."""

from __future__ import annotations

import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from conr_kernels import ConRLoss, Variant, conr_loss
from conr_kernels.ops import BACKENDS, backend_module
from conr_kernels.variants import Settings, resolve_variant

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIZES = (5, 33, 64, 257, 700)


def fused_backends(device: str) -> list[str]:
    where = torch.device(device)
    return [b for b in BACKENDS if backend_module(b).unavailable(where, torch.float32) is None]


ON_DEVICES = [pytest.param(d, b, id=f"{d}-{b}") for d in DEVICES for b in fused_backends(d)]


def make_rows(n_rows: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 20, (n_rows,), generator=g).float()
    p = y + 2 * torch.randn(n_rows, generator=g)
    return torch.randn(n_rows, 7, generator=g).to(device), y.to(device), p.to(device)


@pytest.mark.parametrize("device, backend", ON_DEVICES)
@pytest.mark.parametrize(
    "preset, temperature, dtype",
    [("paper", 0.2, torch.float64), ("released-age", 0.07, torch.float32)],
)
@pytest.mark.parametrize("n_keys", [0, 6])
def test_opcheck_of_both_operators(
    device: str, backend: str, preset: str, temperature: float, dtype: torch.dtype, n_keys: int
) -> None:
    x, y, p = make_rows(9, device=device)
    x, y, p = x.to(dtype), y[:, None], p[:, None]
    w = torch.linspace(0.5, 2.0, 9, dtype=dtype, device=device)
    settings = Settings(1.0, temperature, 0.01, resolve_variant(preset))
    keys: tuple[Tensor | None, ...] = (None, None, None)
    if n_keys:
        key_x, key_y, key_p = make_rows(n_keys, 1, device)
        keys = tuple(
            torch.cat(pair)
            for pair in ((x, key_x.to(dtype)), (y, key_y[:, None]), (p, key_p[:, None]))
        )
    scalars = (0, *settings.scalars, backend)
    for features in (x, x.clone().requires_grad_()):
        torch.library.opcheck(
            torch.ops.conr_kernels.forward.default, (features, y, p, w, *keys, None, *scalars)
        )
    _, stats, layout = torch.ops.conr_kernels.forward(x, y, p, w, *keys, None, *scalars)
    coef_j = None
    if n_keys:
        coef_j = torch.cat([stats, stats.new_zeros(n_keys, stats.shape[1])])
    torch.library.opcheck(
        torch.ops.conr_kernels.backward.default,
        (stats, coef_j, layout, x, y, p, *keys, *scalars),
    )


@pytest.mark.parametrize("n_rows", [0, 1])
@pytest.mark.parametrize("device, backend", ON_DEVICES)
def test_outputs_of_few_rows_are_no_views_of_each_other(
    device: str, backend: str, n_rows: int
) -> None:
    x, y, p = make_rows(n_rows, device=device)
    settings = Settings(1.0, 0.2, 0.01, resolve_variant("paper"))
    given = x, y[:, None], p[:, None], *[None] * 5, 0, *settings.scalars, backend
    outputs = torch.ops.conr_kernels.forward(*given)
    storages = [t.untyped_storage()._cdata for t in outputs]
    assert len(set(storages)) == len(storages)
    torch.library.opcheck(torch.ops.conr_kernels.forward.default, given)


def compiled_sizes(step, compiler: str, sizes: tuple[int, ...]) -> int:
    """Compiles a step, compares value and gradient with eager for each size; number of
    compilations.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for n_rows in sizes:
        gradients = []
        for function in (step, compiled):
            x, y, p = make_rows(n_rows, seed=n_rows)
            x.requires_grad_()
            loss = function(x, y, p)
            loss.backward()
            gradients.append((loss.detach(), x.grad))
        for eager, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-7)
    return counter.frame_count


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(variant="released-age", temperature=0.05, reduction="sum", window=2.0),
        dict(variant=Variant(pushing="distance"), backend="torch"),
    ],
    ids=lambda options: str(options.get("variant", "default"))[:12],
)
def test_compiles_whole_with_at_most_two_recompilations(options: dict) -> None:
    def step(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return conr_loss(x, y, p, **options)

    assert compiled_sizes(step, "aot_eager", SIZES) <= 3


def test_compiles_with_weights_and_keys() -> None:
    key_x, key_y, key_p = make_rows(40, seed=77)

    def step(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return conr_loss(x, y, p, y + 1, keys=(key_x, key_y, key_p), reduction="none").sum()

    assert compiled_sizes(step, "aot_eager", (33, 64, 700)) <= 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(7, 12), nn.Linear(12, 1)
        self.conr = ConRLoss(temperature=0.1)

    def forward(self, x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        features = self.body(x).relu()
        predictions = self.head(features)[:, 0]
        regression = nn.functional.l1_loss(predictions, y)
        return regression + 0.5 * self.conr(features, y, predictions)


def test_compiles_inside_a_model_with_a_regression_loss() -> None:
    torch.manual_seed(0)
    assert compiled_sizes(Model(), "aot_eager", SIZES) <= 3


def test_inductor() -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler for the CPU: no g++ here")
    torch.manual_seed(0)
    assert compiled_sizes(Model(), "inductor", (33, 64)) <= 2


def test_compiled_group_says_why_it_is_not_traced() -> None:
    torch._dynamo.reset()
    x, y, p = make_rows(5)
    loss = ConRLoss(group="world")
    step = torch.compile(lambda: loss(x, y, p), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="exchanges sizes between processes"):
        step()


def test_func_grad_equals_autograd() -> None:
    x, y, p = make_rows(33)
    got = torch.func.grad(lambda x: conr_loss(x, y, p))(x)
    x.requires_grad_()
    conr_loss(x, y, p).backward()
    assert torch.equal(got, x.grad)


def test_func_grad_takes_what_is_compiled_but_is_no_part_of_a_full_graph() -> None:
    x, y, p = make_rows(33)

    def loss(x: Tensor) -> Tensor:
        return conr_loss(x, y, p)

    expected = torch.func.grad(loss)(x)
    torch._dynamo.reset()
    assert torch.equal(torch.func.grad(torch.compile(loss, backend="eager"))(x), expected)
    if torch.__version__ >= "2.13":  # 2.11's compiler trips over its own retreat
        torch._dynamo.reset()
        assert torch.equal(torch.compile(torch.func.grad(loss), backend="eager")(x), expected)
    torch._dynamo.reset()
    step = torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave the transform uncompiled"):
        step(x)


def test_second_derivative_names_the_reference_which_has_one() -> None:
    x, y, p = make_rows(12)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(conr_loss(x, y, p), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(lambda x: torch.func.grad(lambda x: conr_loss(x, y, p))(x).sum())(
            x.detach()
        )
    loss = conr_loss(x.double(), y, p, backend="reference")
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.abs().max() > 0


def test_vmap_names_the_reference_which_supports_it() -> None:
    x, y, p = make_rows(12)
    stacked = torch.stack([x, 2 * x + 1])
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.vmap(lambda x: conr_loss(x, y, p))(stacked)
    got = torch.vmap(lambda x: conr_loss(x, y, p, backend="reference"))(stacked)
    expected = torch.stack([conr_loss(x, y, p) for x in stacked])
    torch.testing.assert_close(got, expected)


def test_make_fx_and_export_see_one_operator() -> None:
    x, y, p = make_rows(9)

    class Loss(nn.Module):
        def forward(self, x: Tensor, y: Tensor, p: Tensor) -> Tensor:
            return conr_loss(x, y, p)

    program = torch.export.export(Loss(), (x, y, p))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum(name.startswith("conr_kernels.forward") for name in names) == 1
    torch.testing.assert_close(program.module()(x, y, p), conr_loss(x, y, p))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n", [33, 700])
def test_a_traced_loss_has_the_value_and_the_gradient(n: int, reduction: str, backend: str) -> None:
    def step(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return conr_loss(x, y, p, backend=backend, reduction=reduction)

    x, y, p = make_rows(n, 1)
    traced = torch.jit.trace(step, (x.requires_grad_(), y, p))
    results = []
    for each in (traced, step):
        x, y, p = make_rows(n)
        loss = each(x.requires_grad_(), y, p)
        results.append((loss, *torch.autograd.grad(loss.sum(), x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["weights", "mask"])
def test_weights_and_masks_may_come_when_sizes_are_symbolic(name: str) -> None:
    step = torch.compile(ConRLoss(), backend="eager", fullgraph=True)
    torch._dynamo.reset()
    for n in (33, 40, 41):
        rows = make_rows(n)
        further = {name: rows[1] > 3 if name == "mask" else rows[1]} if n > 33 else {}
        assert torch.equal(step(*rows, **further), ConRLoss()(*rows, **further))


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, Fraction])
def test_a_module_takes_any_numbers_whole(number: type) -> None:
    """Set at once or later, in one graph; weights are an argument, which compilers see as it is."""
    x, y, p = make_rows(33)
    expected = conr_loss(x, y, p, window=2, temperature=1, push_scale=3)
    conr = ConRLoss(window=number(2), temperature=number(1))
    step = torch.compile(conr, backend="eager", fullgraph=True)
    conr.push_scale = number(3)
    assert torch.equal(step(x, y, p), expected)
    assert all(type(getattr(conr, n)) is float for n in ("window", "temperature", "push_scale"))


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, Fraction])
@pytest.mark.parametrize("is_argument", [False, True])
def test_the_function_takes_any_numbers_where_the_graph_may_break(number, is_argument) -> None:
    x, y, p = make_rows(33)
    expected = conr_loss(x, y, p, 2, window=2, temperature=1, push_scale=3)

    numbers = [number(2), number(1), number(3)]

    @torch.compile(backend="eager")
    def step(x: Tensor, *of_call) -> Tensor:
        h, tau, e = of_call or numbers
        return conr_loss(x, y, p, h, window=h, temperature=tau, push_scale=e)

    assert torch.equal(step(x, *numbers) if is_argument else step(x), expected)


def test_what_is_no_number_is_named_in_a_compiled_function() -> None:
    x, y, p = make_rows(33)
    step = torch.compile(lambda h: conr_loss(x, y, p, window=h), backend="eager")
    with pytest.raises(TypeError, match="window must be a Python number, got Tensor"):
        step(torch.tensor(1.0))
