"""Every backend that runs here against references of 50 digits, and these against the equation."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from conr_kernels.triton_backend.availability import interpreted
from conr_kernels.variants import PRESETS, Settings
from tests.golden import make_golden
from tests.helpers.backends import NAMES, Backend, Batch, running
from tests.helpers.bounds import gradient_bound, largest_rate, row_bound, unit

CASES = json.loads(make_golden.PATH.read_text())
#: Those whose labels are compared in float64 too.
WIDE = tuple(name for name in NAMES if name not in ("cuda", "triton"))


@pytest.fixture(scope="module", params=NAMES)
def backend(request, tmp_path_factory) -> Iterator[Backend]:
    with running(request.param, tmp_path_factory.mktemp("backend")) as backend:
        yield backend


def make_batch(number: int, preset: str, dtype: torch.dtype) -> Batch:
    b = make_golden.from_hex(CASES[number]["batch"], number=float)
    x, y, p, w, g = (torch.tensor(b[name], dtype=dtype) for name in ("x", "y", "p", "w", "g"))
    scalars = (b["window"], b["temperature"], b["push_scale"])
    settings = Settings(*scalars, PRESETS[preset], b["distance"])
    return Batch(x, y, p, w, g, settings, is_dense=number % 2 == 0)


def exact(number: int, preset: str) -> tuple[torch.Tensor, torch.Tensor]:
    result = make_golden.from_hex(CASES[number][preset], number=float)
    rows, gradient = (torch.tensor(result[k], dtype=torch.float64) for k in ("rows", "gradient"))
    return rows, gradient


def numbers(preset: str) -> range:
    """Triton's interpreter takes a second for a few: one of each preset."""
    k = list(make_golden.PRESETS).index(preset) + 1
    return range(k, k + 1) if interpreted() else range(len(CASES))


def assert_golden(backend: Backend, batch: Batch, number: int, preset: str, bound: float) -> None:
    """Row losses as good as promised, and ``‖x_i‖`` times the gradient to within the bound."""
    rows, gradient = backend(batch)
    exact_rows, exact_gradient = exact(number, preset)
    promised = row_bound(unit(batch.x.dtype), exact_rows, batch.y, batch.weights, batch.settings)
    assert ((rows - exact_rows).abs() <= promised).all(), f"batch {number}"
    error = (gradient - exact_gradient) * batch.x.double().norm(dim=1, keepdim=True)
    assert error.abs().max() <= bound, f"batch {number}"
    assert (gradient[(batch.x == 0).all(dim=1)] == 0).all(), f"batch {number}"


@pytest.mark.parametrize("preset", make_golden.PRESETS)
def test_float32_is_as_good_as_promised(backend: Backend, preset: str) -> None:
    """Gradients: three times eager's error and 10⁻⁶ of the largest term, which below τ = 0.06 is
    what rounding an exponent of 1/τ costs.
    """
    for number in numbers(preset):
        batch = make_batch(number, preset, torch.float32)
        _, eager = Backend("reference")(batch)
        error = (eager - exact(number, preset)[1]) * batch.x.double().norm(dim=1, keepdim=True)
        share = max(1e-6, unit(torch.float32) / batch.settings.temperature)
        term = largest_rate(batch.g, batch.weights, batch.settings)
        bound = 3 * error.abs().max().item() + share * term
        assert_golden(backend, batch, number, preset, bound)


@pytest.mark.parametrize("backend", WIDE, indirect=True)
@pytest.mark.parametrize("preset", make_golden.PRESETS)
def test_float64_is_good_to_the_rounding_of_exponents(backend: Backend, preset: str) -> None:
    u = unit(torch.float64)
    for number in numbers(preset):
        batch = make_batch(number, preset, torch.float64)
        bound = gradient_bound(u, batch.y, batch.g, batch.weights, batch.settings)
        assert_golden(backend, batch, number, preset, bound)


@pytest.mark.parametrize(("number", "preset"), list(enumerate(make_golden.PRESETS, start=1)))
def test_the_equation_still_gives_the_stored_bits(number: int, preset: str) -> None:
    batch = make_golden.make_batch(number)
    assert batch == CASES[number]["batch"]
    assert make_golden.golden(batch, preset) == CASES[number][preset]


def test_the_batches_have_ties_empty_sets_zero_rows_and_weights_of_zero() -> None:
    seen = set()
    for number in range(len(CASES)):
        batch = make_batch(number, "paper", torch.float32)
        d_ij, positive, negative = batch.sets()
        has_positives, has_negatives = positive.any(dim=1), negative.any(dim=1)
        seen |= {"anchor"} if (has_positives & has_negatives).any() else set()
        seen |= {"tie"} if (d_ij == batch.settings.window).fill_diagonal_(False).any() else set()
        seen |= {"no positives"} if not has_positives.all() else set()
        seen |= {"no negatives"} if not has_negatives.all() else set()
        seen |= {"zero row"} if (batch.x == 0).all(dim=1).any() else set()
        seen |= {"weight of zero"} if (batch.weights == 0).any() else set()
    expected = {"anchor", "tie", "no positives", "no negatives", "zero row", "weight of zero"}
    assert seen == expected
