"""What is not finite shows, whatever the masks hide; finite extremes stay finite."""

import math

import pytest
import torch

from conr_kernels import conr_loss
from conr_kernels.variants import PRESETS as VARIANTS
from tests.helpers.regimes import PRESETS, REGIMES, force, make_batch, value_and_gradient

NON_FINITE = (math.nan, math.inf, -math.inf)


def is_hidden(loss: torch.Tensor, gradient: torch.Tensor) -> bool:
    return bool(loss.isfinite().all() or gradient.isfinite().all())


def spoiled(batch: dict, name: str, row: int, value: float) -> dict:
    t = batch[name].clone()
    t[row] = value
    return batch | {name: t}


@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_non_finite_number_in_any_input_row_shows(monkeypatch, variant, regime):
    backend = force(monkeypatch, regime)
    hidden = []
    for n in (2, 33):
        batch = make_batch(n, D=3)
        for name in batch:
            for row in (0, n - 1):  # the last row has no pairs
                for value in NON_FINITE:
                    loss, gradient = value_and_gradient(
                        **spoiled(batch, name, row, value), variant=variant, backend=backend
                    )
                    if is_hidden(loss, gradient):
                        hidden.append((n, name, row, value, loss.item()))
    assert not hidden


@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_non_finite_upstream_gradient_shows(monkeypatch, variant, regime):
    backend = force(monkeypatch, regime)
    hidden = []
    for n in (2, 33):
        batch = make_batch(n, D=3)
        for value in NON_FINITE:
            for reduction in ("mean", "sum"):
                g = torch.tensor(value)
                _, gradient = value_and_gradient(
                    **batch, g=g, variant=variant, reduction=reduction, backend=backend
                )
                if gradient.isfinite().all():
                    hidden.append((n, reduction, value))
            for row in (0, n - 1):
                g = torch.ones(n).index_fill_(0, torch.tensor(row), value)
                _, gradient = value_and_gradient(
                    **batch, g=g, variant=variant, reduction="none", backend=backend
                )
                if gradient.isfinite().all():
                    hidden.append((n, "none", row, value))
    assert not hidden


@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("n", [600, 1200])
def test_a_non_finite_number_shows_at_sizes_of_several_tiles(variant, n):
    batch = make_batch(n)
    for c, name in enumerate(batch):
        for row in (1, n - 1):
            value = NON_FINITE[(c + row) % 3]
            assert not is_hidden(
                *value_and_gradient(**spoiled(batch, name, row, value), variant=variant)
            )
    g = torch.ones(n).index_fill_(0, torch.tensor(n - 1), math.nan)
    _, gradient = value_and_gradient(**batch, g=g, variant=variant, reduction="none")
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("variant", ["paper", "released-age", "contrastive"])
def test_a_non_finite_number_in_the_keys_shows(monkeypatch, variant, regime):
    backend = force(monkeypatch, regime)
    batch, bank = make_batch(33), make_batch(20, seed=1)
    hidden = []
    for name in ("features", "targets", "predictions"):
        for row in (0, 19):
            for value in NON_FINITE:
                rows = spoiled(bank, name, row, value)
                keys = tuple(rows[key] for key in ("features", "targets", "predictions"))
                loss, gradient = value_and_gradient(
                    **batch, keys=keys, variant=variant, backend=backend
                )
                if is_hidden(loss, gradient):
                    hidden.append((name, row, value))
    assert not hidden


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("value", NON_FINITE)
def test_one_non_finite_component_of_several_shows(monkeypatch, regime, value):
    backend = force(monkeypatch, regime)
    for distance in ("mae", "rmse"):
        for name in ("targets", "predictions"):
            batch = make_batch(33, L=3)
            batch[name][32, 1] = value
            assert not is_hidden(*value_and_gradient(**batch, distance=distance, backend=backend))


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_non_finite_scalar_weight_shows(backend, value):
    batch = make_batch(33) | dict(weights=value)
    for variant in PRESETS:
        assert not is_hidden(*value_and_gradient(**batch, variant=variant, backend=backend))


def extreme(case: str, batch: dict) -> tuple[dict, dict]:
    """The batch and the settings of one extreme."""
    x, y, w = batch["features"], batch["targets"], batch["weights"]
    one_row = torch.arange(len(x)) == 3
    if case == "parallel features":
        return batch | dict(features=x[:1].expand_as(x)), {}
    if case == "opposite features":
        return batch | dict(features=x[:1] * (-1.0) ** torch.arange(len(x))[:, None]), {}
    if case == "e·d = 1e4":
        return batch, dict(push_scale=1e4 / y.max().item())
    if case == "e·d = −1e4":
        return batch, dict(push_scale=-1e4 / y.max().item())
    if case == "large labels, e·d = 1e4":
        scaled = dict(targets=y * 2.0**60, predictions=batch["predictions"] * 2.0**60)
        return batch | scaled, dict(window=2.0**60, push_scale=100 * 2.0**-60)
    if case == "small labels, e·d = 1e4":
        scaled = dict(targets=y * 2.0**-60, predictions=batch["predictions"] * 2.0**-60)
        return batch | scaled, dict(window=2.0**-60, push_scale=100 * 2.0**60)
    if case == "weights 0":
        return batch | dict(weights=w * 0), {}
    if case == "weights 1e30":
        return batch | dict(weights=torch.full_like(w, 1e30)), {}
    if case == "weights 0 and 1e30":
        return batch | dict(weights=torch.where(one_row, 1e30, 0.0)), {}
    if case == "norms 1e-12":
        return batch | dict(features=torch.nn.functional.normalize(x) * 1e-12), {}
    if case == "norms 1e18":
        return batch | dict(features=torch.nn.functional.normalize(x) * 1e18), {}
    if case == "norms 1e-12 and 1e18":
        scale = torch.where(one_row, 1e-12, 1e18)[:, None]
        return batch | dict(features=torch.nn.functional.normalize(x) * scale), {}
    if case == "a zero row":
        return batch | dict(features=x.masked_fill(one_row[:, None], 0.0)), {}
    assert case == "zero features"
    return batch | dict(features=torch.zeros_like(x)), {}


EXTREMES = (
    "parallel features", "opposite features", "e·d = 1e4", "e·d = −1e4",
    "large labels, e·d = 1e4", "small labels, e·d = 1e4", "weights 0", "weights 1e30",
    "weights 0 and 1e30", "norms 1e-12", "norms 1e18", "norms 1e-12 and 1e18", "a zero row",
    "zero features",
)  # fmt: skip


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("regime", REGIMES)
def test_finite_inputs_give_finite_outputs_at_the_extremes(monkeypatch, regime, case):
    """The values are those of the reference in float64, where float32 can hold them."""
    backend = force(monkeypatch, regime)
    batch, settings = extreme(case, make_batch(33))
    wide = {name: t.double() for name, t in batch.items()}
    failures = []
    for variant in PRESETS:
        if "−" in case and variant != "released-age":
            continue  # a negative S_ij makes log Z undefined
        for tau in (0.005, 0.2):
            options = dict(variant=variant, temperature=tau, **settings)
            loss, gradient = value_and_gradient(**batch, **options, backend=backend)
            expected, exact = value_and_gradient(**wide, **options, backend="reference")
            finite = bool(loss.isfinite() & gradient.isfinite().all())
            error = (loss - expected).abs() / expected.abs().clamp(min=1)
            # In units of one row's largest possible gradient: 1/(τ N ‖x_i‖), times its weight.
            unit = tau * len(gradient) * wide["features"].norm(dim=1, keepdim=True)
            if VARIANTS[variant].weighted_rows:
                unit = unit / wide["weights"].max().clamp(min=1e-30)
            gradient_error = ((gradient - exact) * unit).abs().max()
            if not finite or error > 1e-4 or gradient_error > 1e-3:
                failures.append(
                    f"{variant} τ={tau}: {loss:.6g} for {expected:.6g}, {gradient_error:.1e}"
                )
    assert not failures


@pytest.mark.parametrize("regime", REGIMES)
def test_all_extremes_at_once_stay_finite(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch = make_batch(33)
    scale = torch.where(torch.arange(33) % 2 == 0, 1e-12, 1e18)[:, None]
    batch["features"] = torch.nn.functional.normalize(batch["features"]) * scale
    batch["weights"] = torch.where(torch.arange(33) % 3 == 0, 0.0, 1e30)
    for variant in ("paper", "released-depth", "no-similarity", "no-weight"):
        options = dict(variant=variant, temperature=0.005, push_scale=100.0)
        loss, gradient = value_and_gradient(**batch, **options, backend=backend)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("variant", ["paper", "released-age"])
@pytest.mark.parametrize("regime", REGIMES)
def test_only_the_gradient_itself_has_to_be_in_range(monkeypatch, regime, variant, reduction):
    """Not that of the loss before it meets a small upstream gradient."""
    backend = force(monkeypatch, regime)
    batch = make_batch(33)
    batch["features"] = torch.nn.functional.normalize(batch["features"]) * 1e-12
    batch["weights"] = torch.full((33,), 1e30)
    options = dict(variant=variant, reduction=reduction, g=torch.tensor(1e-20))
    _, gradient = value_and_gradient(**batch, **options, backend=backend)
    wide = {name: t.double() for name, t in batch.items()}
    _, exact = value_and_gradient(**wide, **options, backend="reference")
    assert exact.any()
    torch.testing.assert_close(
        gradient.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max())
    )


@pytest.mark.parametrize("regime", REGIMES)
def test_predictions_at_the_ends_of_float32_are_finite(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    for L in (1, 2):
        batch = make_batch(33, L=L)
        batch["predictions"] = batch["predictions"].sign() * 3e38
        batch["targets"] = batch["targets"] + 1e3
        loss, gradient = value_and_gradient(**batch, backend=backend)
        assert loss.isfinite() and loss > 0 and gradient.isfinite().all()


def test_a_zero_row_has_no_gradient():
    batch = make_batch(33)
    batch["features"][3] = 0
    for backend in ("torch", "reference"):
        _, gradient = value_and_gradient(**batch, backend=backend)
        assert not gradient[3].any() and gradient.any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_weight_of_0_leaves_the_anchor_in(backend):
    """Its pushing weights vanish, its positives stay: ``ℓ_i = log n_i``; N counts the row."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    y, p = torch.tensor([0.0, 0.5, 9.0]), torch.zeros(3)
    rows = conr_loss(x, y, p, 0.0, reduction="none", backend=backend)
    assert torch.equal(rows, torch.zeros(3))
    y = torch.tensor([0.0, 0.1, 0.2, 9.0])
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    rows = conr_loss(x, y, torch.zeros(4), 0, reduction="none", backend=backend)
    torch.testing.assert_close(rows, torch.tensor([2.0, 2.0, 2.0, 1.0]).log())
