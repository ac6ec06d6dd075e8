"""``mask=``: the value and gradient are those of the batch filtered by the mask."""

import pytest
import torch

from conr_kernels import ConR_depth, ConRLoss, Variant, conr_loss
from conr_kernels.batch import Options, prepare, without_absent
from tests.helpers.regimes import PRESETS, REGIMES, force, make_batch, value_and_gradient

CASES = [
    *((preset, {}) for preset in PRESETS),
    ("released-age", dict(push_scale=0.5)),
    ("released-depth", dict(temperature=0.02)),
    ("contrastive", dict(temperature=0.02)),
    (Variant(negatives="all", unit_terms=True), {}),
    (Variant(negatives="all", pushing="exponential"), {}),
    ("paper", dict(window=0.0)),
    ("paper", dict(window=float("inf"))),
]


def masked_batch(N: int, L: int = 1, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """A batch whose absent rows hold what a loader leaves there: NaN, infinities, labels like the
    others'. Its features are float64: the sets are the filtered batch's, so that only rounding of
    another order of sums remains.
    """
    batch = make_batch(N, seed=seed, L=L, dtype=torch.float64)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.6
    absent = (~mask).nonzero()[:, 0]
    for name, value in (("features", torch.nan), ("targets", torch.inf), ("predictions", torch.nan),
                        ("weights", torch.nan)):  # fmt: skip
        batch[name][absent[::2]] = value
    return batch, mask


def filtered(batch: dict, mask: torch.Tensor) -> dict:
    return {name: t[mask] for name, t in batch.items()}


@pytest.mark.parametrize(("variant", "options"), CASES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_mask_equals_the_filtered_batch(monkeypatch, regime, variant, options):
    backend = force(monkeypatch, regime)
    for N, L, distance in ((65, 1, "mae"), (40, 2, "rmse")):
        batch, mask = masked_batch(N, L)
        options = dict(variant=variant, backend=backend, distance=distance) | options
        for reduction in ("none", "mean", "sum"):
            loss, gradient = value_and_gradient(**batch, **options, mask=mask, reduction=reduction)
            expected = value_and_gradient(**filtered(batch, mask), **options, reduction=reduction)
            if reduction == "none":
                assert loss.shape == (N,) and (loss[~mask] == 0).all()
                loss = loss[mask]
            torch.testing.assert_close(loss, expected[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradient[mask], expected[1], rtol=1e-9, atol=1e-10)
            assert (gradient[~mask] == 0).all()


#: The third is between the distances of a label and of a prediction of the last row to what is as
#: far away as squares allow, of labels of 10¹⁵ times the others'.
@pytest.mark.parametrize("window", [1e18, 1e25, 7.07e18 + 3e17, 1e35, float("inf")])
@pytest.mark.parametrize("variant", ["paper", "released-age", "released-depth"])
@pytest.mark.parametrize("regime", REGIMES)
def test_absent_rows_of_a_window_that_reaches_everything_are_finite(
    monkeypatch, regime, variant, window
):
    backend = force(monkeypatch, regime)
    for distance in ("mae", "rmse"):
        batch, mask = masked_batch(40, L=2, seed=1)
        batch["features"] = batch["features"].float()
        for name in ("targets", "predictions"):
            batch[name] *= -1e15 if 1e18 < window < 1e19 else 1.0
        options = dict(variant=variant, backend=backend, distance=distance, window=window)
        loss, gradient = value_and_gradient(**batch, **options, mask=mask)
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize(
    ("labels", "predictions", "options"),
    [
        ([-2e18, 2e18, 2e18, 0], [0, 0, 0, 0], dict(window=1e18, distance="rmse")),
        ([-2e37, 2e37, 2e37, 0], [0, 0, 0, 0], dict(window=1e37)),
        ([-5e34, -5e34, 5e34, 5e34], [5e34, 5e34, -5e34, -5e34], dict(window=1.05e35)),
    ],
    ids=["squares", "sums", "beyond the labels"],
)
@pytest.mark.parametrize("regime", REGIMES)
def test_absent_rows_of_labels_near_the_end_of_float32(
    monkeypatch, regime, labels, predictions, options
):
    n_components = 3 if options["window"] < 1e38 and max(labels) != 5e34 else 1
    y, p = (torch.tensor([*t, 0.0])[:, None].repeat(1, n_components) for t in (labels, predictions))
    x, mask = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) < 4
    options = options | dict(push_scale=1 / max(labels), backend=force(monkeypatch, regime))
    loss, gradient = value_and_gradient(x, y, p, **options, mask=mask, reduction="sum")
    expected = value_and_gradient(x[:4], y[:4], p[:4], **options, reduction="sum")
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[:4], expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("regime", REGIMES)
def test_further_keys_are_not_masked(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch, mask = masked_batch(50)
    keys = make_batch(31, seed=5, dtype=torch.float64)
    keys = (keys["features"], keys["targets"], keys["predictions"])
    for variant in ("paper", "released-depth", "contrastive"):
        options = dict(keys=keys, variant=variant, backend=backend)
        loss, gradient = value_and_gradient(**batch, **options, mask=mask[:, None])
        expected = value_and_gradient(**filtered(batch, mask), **options)
        torch.testing.assert_close(loss, expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient[mask], expected[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("regime", REGIMES)
def test_masks_that_hold_everything_or_nothing(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch = make_batch(33)
    everything = value_and_gradient(**batch, backend=backend, mask=torch.ones(33) > 0)
    for got, expected in zip(everything, value_and_gradient(**batch, backend=backend), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    for N in (0, 1, 33):
        nothing = value_and_gradient(**masked_batch(N)[0], backend=backend, mask=torch.ones(N) < 0)
        assert nothing[0] == 0 and not nothing[1].any()


@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_not_finite_among_the_rows_that_take_part_still_shows(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    for name in ("features", "targets", "predictions", "weights"):
        batch, mask = masked_batch(33)
        batch[name][mask.nonzero()[3]] = torch.nan
        loss, _ = value_and_gradient(**batch, backend=backend, mask=mask)
        assert loss.isnan(), name


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6, 1e18])
def test_absent_rows_are_out_of_reach_at_any_magnitude_of_labels(magnitude):
    batch, mask = masked_batch(60)
    for name in ("targets", "predictions"):
        batch[name] = batch[name] * magnitude
    for window in (0.0, magnitude, 30 * magnitude):
        options = dict(window=window, variant="no-pushing")
        loss = conr_loss(**batch, **options, mask=mask)
        torch.testing.assert_close(loss, conr_loss(**filtered(batch, mask), **options))


def test_masked_batches_of_one_form_share_their_settings():
    """Plans of launches are found by the settings' identity."""
    batch, mask = masked_batch(9)
    options = Options(1.0, 0.2, 0.01, "contrastive", "mae", "mean", "torch")
    found = [
        without_absent(prepare(*batch.values(), None, mask, options), torch.ones(()), ~mask.sum())
        for _ in range(2)
    ]
    assert found[0].settings is found[1].settings
    assert found[0].settings.variant.negatives == "confused"


def test_a_mask_under_torch_compile():
    batch, mask = masked_batch(40)
    conr = ConRLoss(variant="released-depth")
    step = torch.compile(conr, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(**batch, mask=mask), conr(**batch, mask=mask))


def test_a_masked_reference_has_second_derivatives():
    batch, mask = masked_batch(12)
    x = batch.pop("features").requires_grad_()
    loss = conr_loss(x, **batch, mask=mask, backend="reference")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient[mask].square().sum(), x)
    assert second[mask].isfinite().all() and (second[~mask] == 0).all()


def test_depth_rows_average_over_valid_pixels():
    g = torch.Generator().manual_seed(0)
    feature = torch.randn(12, 3, 2, generator=g)
    depth, output = 3 * torch.rand(2, 12, 1, 4, 5, generator=g)
    weights = torch.rand(12, 1, 4, 5, generator=g)
    mask = torch.rand(12, 1, 4, 5, generator=g) < 0.7
    mask[4] = False
    means = [
        torch.stack([t[i][mask[i]].mean() for i in range(12)]) for t in (depth, output, weights)
    ]
    holes = [t.masked_fill(~mask, torch.nan) for t in (depth, output, weights)]
    kept = torch.arange(12) != 4
    expected = ConR_depth(feature[kept], *(t[kept] for t in means))
    torch.testing.assert_close(ConR_depth(feature, *holes, mask=mask), expected)


def test_pixel_masks_of_no_rows():
    feature, maps = torch.randn(0, 2, 3, requires_grad=True), torch.zeros(0, 1, 4, 4)
    for t in (maps, maps[:, 0, 0, 0]):
        loss = ConR_depth(feature, t, t, t, mask=t > 0)
        loss.backward()
        assert loss == 0 and feature.grad.shape == feature.shape
