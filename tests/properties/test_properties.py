"""What is true of the loss for every batch, on every backend that runs here."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, note
from torch import Tensor

from conr_kernels.triton_backend.availability import interpreted
from tests.helpers.backends import NAMES, Backend, Batch, running
from tests.helpers.bounds import gradient_bound, largest_rate, row_bound, unit
from tests.properties.strategies import ONLY_CASE, Case, cases


@pytest.fixture(scope="module", params=NAMES)
def backend(request, tmp_path_factory) -> Iterator[Backend]:
    with running(request.param, tmp_path_factory.mktemp("backend")) as backend:
        yield backend


def for_all(**fixed) -> Callable:
    """Draws the test's case; a failure prints the line that runs this case again."""

    def decorate(test: Callable[[Backend, Case], None]) -> Callable:
        @given(case=cases(**fixed))
        @functools.wraps(test)
        def checked(backend: Backend, case: Case) -> None:
            test_id = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
            process = "TRITON_INTERPRET=1 " if interpreted() else ""
            note(f"again: {process}{ONLY_CASE}='{case}' python -m pytest '{test_id}'")
            test(backend, case)

        return checked

    return decorate


def in_unit_rows(batch: Batch, gradient: Tensor) -> Tensor:
    """The gradient times ``‖x_i‖``: every row in one scale."""
    return gradient * batch.x.double().norm(dim=1, keepdim=True)


def assert_rows(batch: Batch, actual: Tensor, expected: Tensor, times: float = 2) -> None:
    """Equal up to the rounding of both: twice what one is good to."""
    u = unit(batch.x.dtype)
    bound = times * row_bound(u, expected, batch.y, batch.weights, batch.settings)
    error = (actual - expected).abs()
    assert (error <= bound).all(), f"row losses differ: {error}, allowed {bound}"


def gradient_tolerance(batch: Batch) -> float:
    u = unit(batch.x.dtype)
    return 2 * gradient_bound(u, batch.y, batch.g, batch.weights, batch.settings)


def assert_gradients(
    batch: Batch, actual: Tensor, expected: Tensor, bound: float | None = None
) -> None:
    bound = gradient_tolerance(batch) if bound is None else bound
    error = in_unit_rows(batch, actual - expected).abs().max().item()
    assert error <= bound, f"gradients differ by {error:.3g}, allowed {bound:.3g}"


@for_all()
def test_it_agrees_with_the_float64_reference(backend: Backend, case: Case) -> None:
    """Row losses are good to 8u (1/τ + |ℓ| + e·max d), gradients to three times eager's error and
    10⁻⁶ of the largest term; in float64 to the rounding of exponents.
    """
    # PyTorch's float32 root on a CPU is a last place off for one number in six, unlike a kernel's.
    takes_other_roots = backend.paths is not None and case.distance == "rmse" and case.L > 1
    assume(not (takes_other_roots and (case.is_wide or case.step == 0.1)))
    batch = case.batch()
    reference = Backend("reference")
    wide = batch._replace(x=batch.x.double(), g=batch.g.double())
    exact_rows, exact_gradient = reference(wide)
    rows, gradient = backend(batch)
    assert_rows(batch, rows, exact_rows, times=1)
    bound = gradient_tolerance(batch)
    if not case.is_wide:
        _, eager_gradient = reference(batch)
        error = in_unit_rows(batch, eager_gradient - exact_gradient).abs().max().item()
        bound = 3 * error + 1e-6 * largest_rate(batch.g, batch.weights, batch.settings)
    assert_gradients(batch, gradient, exact_gradient, bound)


@for_all()
def test_permuted_rows_have_permuted_losses_and_gradients(backend: Backend, case: Case) -> None:
    batch = case.batch()
    order = torch.randperm(case.N, generator=torch.Generator().manual_seed(case.seed))
    rows, gradient = backend(batch)
    permuted_rows, permuted_gradient = backend(batch.take(order))
    assert_rows(batch.take(order), permuted_rows, rows[order])
    assert_gradients(batch.take(order), permuted_gradient, gradient[order])


@for_all()
def test_the_length_of_a_feature_divides_its_gradient_alone(backend: Backend, case: Case) -> None:
    """For powers of two no bit of the loss changes."""
    batch = case.batch()
    g = torch.Generator().manual_seed(case.seed)
    scale = 2.0 ** torch.randint(-8, 9, (case.N, 1), generator=g).double()
    rows, gradient = backend(batch)
    scaled = batch._replace(x=batch.x * scale.to(batch.x.dtype))
    scaled_rows, scaled_gradient = backend(scaled)
    assert torch.equal(scaled_rows, rows)
    assert_gradients(batch, scaled_gradient * scale, gradient)

    scale = 1.7 * scale
    scaled = batch._replace(x=(batch.x * scale).to(batch.x.dtype))
    scaled_rows, scaled_gradient = backend(scaled)
    assert_rows(batch, scaled_rows, rows)
    assert_gradients(batch, scaled_gradient * scale, gradient)


@for_all()
def test_the_gradient_is_orthogonal_to_its_feature(backend: Backend, case: Case) -> None:
    """And exactly 0 for a zero row."""
    batch = case.batch()
    _, gradient = backend(batch)
    x = batch.x.double()
    norm = x.norm(dim=1)
    radial = (gradient * x).sum(dim=1)
    assert radial.abs().max() <= gradient_tolerance(batch)
    assert (gradient[norm == 0] == 0).all()


@for_all()
def test_rotated_features_have_the_same_loss_and_rotated_gradients(
    backend: Backend, case: Case
) -> None:
    batch = case.batch()
    g = torch.Generator().manual_seed(case.seed)
    rotation, _ = torch.linalg.qr(torch.randn(case.D, case.D, generator=g, dtype=torch.float64))
    rows, gradient = backend(batch)
    rotated = batch._replace(x=(batch.x.double() @ rotation).to(batch.x.dtype))
    rotated_rows, rotated_gradient = backend(rotated)
    assert_rows(batch, rotated_rows, rows)
    assert_gradients(batch, rotated_gradient, gradient @ rotation)


@for_all(step=0.25)
def test_shifted_labels_and_predictions_change_no_bit(backend: Backend, case: Case) -> None:
    batch = case.batch()
    rows, gradient = backend(batch)
    shifted_rows, shifted_gradient = backend(batch._replace(y=batch.y + 37.25, p=batch.p - 11.5))
    assert torch.equal(shifted_rows, rows)
    assert torch.equal(shifted_gradient, gradient)


@for_all()
def test_the_unit_of_the_labels_does_not_matter(backend: Backend, case: Case) -> None:
    """Labels, predictions and window times c, and the push scale so that S stays: bit for bit for
    powers of two, where no logarithm of a distance is taken.
    """
    batch = case.batch()
    settings = batch.settings
    takes_log = backend.name != "torch" or not settings.exponent_is_small
    rows, gradient = backend(batch)
    for c in (8.0, 0.25):
        e = settings.push_scale
        if settings.pushing.phi != "one":
            e = e / c
        scaled = batch._replace(y=batch.y * c, p=batch.p * c)
        scaled = scaled.asks(window=settings.window * c, push_scale=e)
        scaled_rows, scaled_gradient = backend(scaled)
        if not (takes_log and settings.pushing.phi == "distance"):
            assert torch.equal(scaled_rows, rows)
            assert torch.equal(scaled_gradient, gradient)
        assert_rows(batch, scaled_rows, rows)
        assert_gradients(batch, scaled_gradient, gradient)


@for_all()
def test_rows_that_are_no_anchors_have_no_loss(backend: Backend, case: Case) -> None:
    """And where there is no anchor at all no gradient: both exactly 0."""
    batch = case.batch()
    _, positive, negative = batch.sets()
    is_anchor = positive.any(dim=1) & negative.any(dim=1)
    assert (backend(batch)[0][~is_anchor] == 0).all()

    alone = batch._replace(g=torch.where(is_anchor, 0, batch.g))
    assert (backend(alone)[1] == 0).all()
    without_negatives = batch.asks(window=math.inf)
    without_positives = batch._replace(y=1e3 * torch.arange(case.N)[:, None].expand_as(batch.y))
    for no_anchor in (without_negatives, without_positives):
        rows, gradient = backend(no_anchor)
        assert (rows == 0).all() and (gradient == 0).all()


@for_all()
def test_a_row_loss_is_at_least_the_logarithm_of_its_positives(
    backend: Backend, case: Case
) -> None:
    """``ℓ_i ≥ log n_i`` while no S_ij is negative; with the rate of an inner mean, and weights."""
    batch = case.batch()
    variant = batch.settings.variant
    _, positive, negative = batch.sets()
    n_i = positive.sum(dim=1).double()
    floor = torch.where(negative.any(dim=1), n_i.clamp(min=1).log(), 0.0)
    if variant.count_self:
        floor = floor * n_i / (n_i + 1)
    if variant.weighted_rows:
        floor = floor * batch.weights
    rows, _ = backend(batch)
    bound = row_bound(unit(batch.x.dtype), rows, batch.y, batch.weights, batch.settings)
    assert (rows >= floor - bound).all()


@for_all()
def test_pushing_harder_lowers_no_row_loss(backend: Backend, case: Case) -> None:
    """In the push scale, and in the anchor's own weight; others' weights do not matter to a bit."""
    batch = case.batch()
    rows, _ = backend(batch)
    harder = batch.asks(push_scale=2 * batch.settings.push_scale + 0.1)
    harder_rows, _ = backend(harder)
    bound = row_bound(unit(batch.x.dtype), harder_rows, batch.y, batch.weights, harder.settings)
    assert (harder_rows >= rows - bound).all()

    is_heavier = torch.arange(case.N) % 2 == 0
    w = torch.where(is_heavier, 2 * batch.weights + 0.5, batch.weights)
    heavier_rows, _ = backend(batch._replace(w=w))
    bound = row_bound(unit(batch.x.dtype), heavier_rows, batch.y, w, batch.settings)
    assert (heavier_rows >= rows - bound).all()
    if batch.w is not None:
        assert torch.equal(heavier_rows[~is_heavier], rows[~is_heavier])


@for_all()
def test_further_keys_are_rows_without_loss_and_gradient(backend: Backend, case: Case) -> None:
    """A part with the others as keys has the part of the whole's losses, and of its gradient where
    the others have no upstream gradient.
    """
    batch = case.batch()
    part, others = slice(0, (case.N + 1) // 2), slice((case.N + 1) // 2, None)
    g = batch.g.clone()
    g[others] = 0
    whole = batch._replace(g=g)
    rows, gradient = backend(whole)
    part_rows, part_gradient = backend(batch.take(part), batch.take(others))
    u = unit(batch.x.dtype)
    bound = 2 * row_bound(u, rows, batch.y, batch.weights, batch.settings)
    assert ((part_rows - rows[part]).abs() <= bound[part]).all()
    assert_gradients(batch.take(part), part_gradient, gradient[part], gradient_tolerance(whole))


@for_all()
def test_masked_rows_take_no_part_whatever_they_hold(backend: Backend, case: Case) -> None:
    batch = case.batch()
    mask = torch.arange(case.N) % 3 != 1
    for t in batch[:4]:
        if t is not None:
            t[~mask] = torch.nan
    for unit_terms in (False, True):  # which count the rows that take part
        batch = batch.asks(variant=replace(batch.settings.variant, unit_terms=unit_terms))
        present = batch.take(mask)
        rows, gradient = backend(batch, mask=mask)
        present_rows, present_gradient = backend(present)
        assert_rows(present, rows[mask], present_rows)
        assert_gradients(present, gradient[mask], present_gradient)
        assert not rows[~mask].any() and not gradient[~mask].any()


@for_all()
def test_a_row_given_twice_has_two_equal_losses_and_gradients(backend: Backend, case: Case) -> None:
    batch = case.batch()
    twice = batch.take(torch.arange(case.N).repeat_interleave(2))
    rows, gradient = backend(twice)
    assert_rows(batch, rows[::2], rows[1::2])
    assert_gradients(batch, gradient[::2], gradient[1::2], gradient_tolerance(twice))


@for_all(zero_rows=0)
def test_equal_features_have_the_loss_that_their_counts_give(backend: Backend, case: Case) -> None:
    """All ``s_ij = 1/τ``: with ``R_i = Σ_M S_ij + e^(−1/τ)·(N − n_i if unit_terms)``
    ``ℓ_i = log(n_i + R_i)``, with the log inside times ``n_i/c_i``; and no gradient.
    """
    batch = case.batch()
    batch = batch._replace(x=batch.x[:1].repeat(case.N, 1))
    settings, variant = batch.settings, batch.settings.variant
    d_ij, positive, negative = batch.sets()
    n_i, e, w_i = positive.sum(dim=1).double(), settings.push_scale, batch.weights.double()
    S_ij = {
        "linear": e * w_i[:, None] * d_ij,
        "exponential": w_i[:, None] * (e * d_ij).exp(),
        "weight": e * w_i[:, None].expand_as(d_ij),
        "distance": e * d_ij,
        "none": torch.ones_like(d_ij),
    }[variant.pushing]
    rest = (S_ij * negative).sum(dim=1)
    if variant.unit_terms:
        rest += math.exp(-1 / settings.temperature) * (case.N - n_i)
    expected = (n_i + rest).log()
    if variant.count_self:
        expected = expected * n_i / (n_i + 1)
    if variant.weighted_rows:
        expected = expected * w_i
    is_anchor = (n_i > 0) & negative.any(dim=1)
    rows, gradient = backend(batch)
    assert_rows(batch, rows, torch.where(is_anchor, expected, 0.0))
    assert_gradients(batch, gradient, torch.zeros_like(gradient))


@for_all()
def test_the_gradient_is_linear_in_the_upstream_gradient(backend: Backend, case: Case) -> None:
    batch = case.batch()
    other = torch.roll(batch.g, 1) * 3
    combined = batch._replace(g=batch.g + 2 * other)
    _, gradient = backend(batch)
    _, other_gradient = backend(batch._replace(g=other))
    _, combined_gradient = backend(combined)
    bound = gradient_tolerance(batch) + 2 * gradient_tolerance(batch._replace(g=other))
    assert_gradients(batch, combined_gradient, gradient + 2 * other_gradient, 2 * bound)


@for_all()
def test_mean_and_sum_are_those_of_the_row_losses(backend: Backend, case: Case) -> None:
    batch = case.batch()
    for reduction, g in (("sum", 1.0), ("mean", 1 / case.N)):
        even = batch._replace(g=torch.full_like(batch.g, g))
        rows, gradient = backend(even)
        loss, reduced_gradient = backend.reduced(batch, reduction)
        u = unit(batch.x.dtype)
        bounds = 2 * g * row_bound(u, rows, batch.y, batch.weights, batch.settings)
        assert (loss - g * rows.sum()).abs() <= bounds.sum()
        assert_gradients(even, reduced_gradient, gradient)
