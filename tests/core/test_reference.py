"""The reference against the definition of the loss, evaluated pair by pair with no tensor."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conr_kernels import conr_loss, reference
from conr_kernels.variants import PRESETS, Settings
from tests.helpers.cases import VARIANTS, structured_cases


def distance(a, b, kind):
    gaps = [abs(u - v) for u, v in zip(a, b, strict=True)]
    if kind == "mae":
        return sum(gaps) / len(gaps)
    return math.sqrt(sum(gap * gap for gap in gaps) / len(gaps))


def pair_loop_losses(x, y, p, w, settings):
    """``ℓ_i`` of conr_kernels/MATHEMATICS.md, pair by pair in Python floats."""
    v, h, tau, e = settings.variant, settings.window, settings.temperature, settings.push_scale
    x, y, p, w = x.tolist(), y.double().tolist(), p.double().tolist(), w.tolist()
    norms = [math.sqrt(sum(c * c for c in row)) for row in x]
    q = [[c / norm if norm else 0.0 for c in row] for row, norm in zip(x, norms, strict=True)]
    losses, n_pairs = [], []
    for i in range(len(x)):
        positives, negatives = [], []
        for j in range(len(x)):
            d = distance(y[i], y[j], settings.distance)
            s = sum(a * b for a, b in zip(q[i], q[j], strict=True)) / tau
            if d <= h:
                if j != i:
                    positives.append(s)
            elif v.negatives == "all" or distance(p[i], p[j], settings.distance) <= h:
                pushing = {
                    "linear": e * w[i] * d,
                    "exponential": w[i] * math.exp(e * d),
                    "weight": e * w[i],
                    "distance": e * d,
                    "none": 1.0,
                }[v.pushing]
                negatives.append((s, pushing))
        n, m = len(positives), len(negatives)
        n_pairs.append((n, m))
        if n == 0 or m == 0:
            losses.append(0.0)
            continue
        Z = sum(map(math.exp, positives)) + sum(S * math.exp(s) for s, S in negatives)
        Z += len(x) - n if v.unit_terms else 0
        if v.log == "outside":
            loss = -math.log(sum(map(math.exp, positives)) / n / Z)
        else:
            loss = sum(math.log(Z) - s for s in positives) / (n + v.count_self)
        losses.append(loss * w[i] if v.weighted_rows else loss)
    return torch.tensor(losses, dtype=torch.float64), n_pairs


@pytest.mark.parametrize("variant", VARIANTS)
def test_row_losses_equal_the_definition_evaluated_pair_by_pair(variant):
    for case in structured_cases(n=(17, 33)):
        if case.choice["variant"] != variant:
            continue
        # Float64 labels on a binary grid, where it and Python's arithmetic decide alike.
        y, p = (t.double().mul(4).round().div(4) for t in (case.y, case.p))
        w = torch.ones(len(y)) if case.w is None else case.w
        expected, n_pairs = pair_loop_losses(case.x, y, p, w, case.settings)
        losses = reference.row_losses(case.x, y, p, case.w, None, 0, case.settings)
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10, msg=str(case))
        _, positive, negative = reference.masks(y, p, y, p, 0, case.settings)
        assert positive.sum(1).tolist() == [n for n, _ in n_pairs]
        assert negative.sum(1).tolist() == [m for _, m in n_pairs]


def test_a_batch_computed_by_hand():
    """Three rows in the plane: rows 0 and 1 are alike, row 2 is their negative."""
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[20.0], [20.5], [30.0]])
    p = torch.tensor([[24.0], [29.0], [24.5]])
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    settings = Settings(1.0, 0.5, 0.1, PRESETS["paper"])
    s_02 = math.sqrt(0.5) / 0.5
    # Row 0: positive 1 at s = 0, negative 2 with S = 0.1·1·10 = 1. Row 1: no similar prediction.
    # Row 2: no positive.
    expected = -math.log(1 / (1 + 1 * math.exp(s_02)))
    losses = reference.row_losses(x, y, p, w, None, 0, settings)
    torch.testing.assert_close(losses, torch.tensor([expected, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_and_second_derivative_of_every_preset(preset):
    torch.manual_seed(1)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1.0], [1.0], [2.0], [5.0], [5.0], [9.0], [1.5]])
    p = torch.tensor([[1.0], [5.0], [4.5], [1.2], [5.0], [5.0], [0.5]])
    w = torch.rand(7, dtype=torch.float64)
    w[2] = 0
    settings = Settings(1.0, 0.2, 0.1, PRESETS[preset])

    def loss(x):
        return reference.row_losses(x, y, p, w, None, 0, settings)

    assert (loss(x) != 0).sum() >= 4
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_further_keys_equal_the_rows_of_one_batch():
    for case in structured_cases(500, n=(31, 65)):
        x, y, p, w = case.inputs
        whole = reference.row_losses(x, y, p, w, None, 0, case.settings)
        rows = slice(len(x) // 3, len(x) - len(x) // 4)
        of_rows = (x[rows], y[rows], p[rows], None if w is None else w[rows])
        part = reference.row_losses(*of_rows, (x, y, p), rows.start, case.settings)
        torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=1e-12, msg=str(case))


@pytest.mark.parametrize("preset", ["paper", "no-similarity", "released-depth"])
def test_the_gradient_is_as_good_where_negatives_weigh_next_to_nothing(preset):
    """Of ``log Z − log E`` nothing would be left in float32."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 8, generator=g), torch.randint(0, 10, (40,), generator=g).float()
    p, found = y + 2 * torch.randn(40, generator=g), []
    for dtype in (torch.float32, torch.float64):
        features = x.clone().to(dtype).requires_grad_()
        loss = conr_loss(features, y, p, push_scale=1e-10, variant=preset, backend="reference")
        found += torch.autograd.grad(loss, features)
    error = (found[0].double() - found[1]).norm() / found[1].norm()
    assert error <= 1e-5


def test_large_weights_and_push_scales_are_finite_together():
    y = torch.tensor([0.0, 0, 0, 5, 5, 5]) * 1e-6
    x, w = torch.eye(6), torch.full((6,), 1e30)
    loss = conr_loss(x, y, 0 * y, w, window=1e-7, push_scale=1e9, backend="reference")
    torch.testing.assert_close(loss, conr_loss(x, y, 0 * y, w, window=1e-7, push_scale=1e9))
    assert loss.isfinite()


class DividesAsGPUs(TorchDispatchMode):
    """PyTorch's CUDA kernels multiply with the reciprocal of a number."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * (1 / args[0].new_tensor(args[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("distance", ["mae", "rmse"])
@pytest.mark.parametrize("n_components", [3, 7])
def test_ties_are_decided_alike_on_every_device(n_components: int, distance: str) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 20, (100, n_components), generator=g) / 10
    expected = reference.pair_distance(y, y, distance)
    on_cpu = y / n_components
    with DividesAsGPUs():
        assert not torch.equal(y / n_components, on_cpu)
        found = reference.pair_distance(y, y, distance)
    assert torch.equal(found, expected)
