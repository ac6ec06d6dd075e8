"""The reference against the definition of the loss, evaluated pair by pair with no tensor."""

import math

import pytest
import torch

from conr_kernels import reference
from conr_kernels.variants import PRESETS, Settings, Variant
from tests.helpers.cases import structured_cases


def distance(a, b, kind):
    gaps = [abs(u - v) for u, v in zip(a, b, strict=True)]
    if kind == "mae":
        return sum(gaps) / len(gaps)
    return math.sqrt(sum(gap * gap for gap in gaps) / len(gaps))


def pair_loop_losses(x, y, p, w, settings):
    """``ℓ_i`` of spec.md sections 2 and 3, pair by pair in Python floats."""
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


@pytest.mark.parametrize(
    "case", list(structured_cases(70, max_size=33)), ids=lambda case: case.name
)
def test_row_losses_equal_the_definition_evaluated_pair_by_pair(case):
    x, y, p, w = case.inputs
    # Float64 labels on a binary grid, where it and Python's arithmetic decide alike.
    y, p = y.double().mul(4).round().div(4), p.double().mul(4).round().div(4)
    settings = Settings(
        0.5,
        max(case.settings.temperature, 0.07),
        case.settings.push_scale,
        case.settings.variant,
        case.settings.distance,
    )
    expected, n_pairs = pair_loop_losses(x, y, p, w, settings)
    torch.testing.assert_close(
        reference.row_losses(x, y, p, w, None, 0, settings), expected, rtol=1e-10, atol=1e-10
    )
    _, positive, negative = reference.masks(y, p, y, p, 0, settings)
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


@pytest.mark.parametrize(
    ("preset", "S", "needs_confusion"),
    [
        ("paper", lambda w, d: 0.1 * w * d, True),
        ("no-pushing", lambda w, d: 1.0, True),
        ("no-weight", lambda w, d: 0.1 * d, True),
        ("no-similarity", lambda w, d: 0.1 * w, True),
        ("contrastive", lambda w, d: 1.0, False),
    ],
)
def test_presets_of_the_paper_have_its_pushing_weights_and_negatives(preset, S, needs_confusion):
    """Equation 1, A.4 and the ablations, from their formulas; test_compat.py has the others."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    y, p = torch.tensor([[0, 0, 1, 1, 5, 5, 6, 9, 9], [0, 5, 1, 6, 5, 1, 0, 9, 2]]).double()
    w = torch.rand(9, dtype=torch.float64, generator=generator) + 0.1
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T / 0.5
    expected = []
    for i in range(9):
        P = [j for j in range(9) if j != i and abs(y[i] - y[j]) <= 1]
        M = [j for j in range(9) if abs(y[i] - y[j]) > 1]
        if needs_confusion:
            M = [j for j in M if abs(p[i] - p[j]) <= 1]
        E = sum(s[i, j].exp() for j in P)
        Z = E + sum(S(w[i], abs(y[i] - y[j])) * s[i, j].exp() for j in M)
        expected.append(-(E / len(P) / Z).log() if P and M else x.new_zeros(()))
    assert sum(loss != 0 for loss in expected) >= 4
    settings = Settings(1.0, 0.5, 0.1, PRESETS[preset])
    losses = reference.row_losses(x, y[:, None], p[:, None], w, None, 0, settings)
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_and_second_derivative_of_every_preset(preset):
    torch.manual_seed(1)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1.0], [1.0], [2.0], [5.0], [5.0], [9.0], [1.5]])
    p = torch.tensor([[1.0], [5.0], [4.5], [1.2], [5.0], [5.0], [0.5]])
    w = torch.rand(7, dtype=torch.float64)
    settings = Settings(1.0, 0.2, 0.1, PRESETS[preset])

    def loss(x):
        return reference.row_losses(x, y, p, w, None, 0, settings)

    assert (loss(x) != 0).sum() >= 4
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("pushing", ["linear", "weight", "distance"])
def test_a_negative_push_scale_subtracts_from_the_denominator(pushing):
    torch.manual_seed(2)
    x = torch.randn(12, 4, dtype=torch.float64)
    y = torch.randint(0, 4, (12, 1)).float()
    p = torch.zeros(12, 1)
    w = torch.rand(12, dtype=torch.float64)
    settings = Settings(0.5, 0.5, -0.02, Variant(pushing=pushing))
    expected, _ = pair_loop_losses(x, y, p, w, settings)
    torch.testing.assert_close(reference.row_losses(x, y, p, w, None, 0, settings), expected)


def test_further_keys_equal_the_rows_of_one_batch():
    for case in structured_cases(20, seed=500):
        x, y, p, w = case.inputs
        whole = reference.row_losses(x, y, p, w, None, 0, case.settings)
        first, last = len(x) // 3, len(x) - len(x) // 4
        rows = slice(first, last)
        part = reference.row_losses(
            x[rows], y[rows], p[rows], w[rows], (x, y, p), first, case.settings
        )
        torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=1e-12, msg=case.name)
