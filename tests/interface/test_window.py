"""``suggest_window``: between the labels' steps, and the shares that the loss would see."""

import numpy as np
import pytest
import torch

from conr_kernels import conr_statistics, density_weights, suggest_window
from conr_kernels.reference import pair_distance
from conr_kernels.window import SAMPLE, _sample


def ages(n: int = 600) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return (40 + 12 * torch.randn(n, generator=g)).round()


def test_a_window_between_steps_has_the_same_sets_in_any_units():
    y = ages()
    found = suggest_window(y)
    assert found.step == 1.0 and found.window % 1 == 0.5
    expected = conr_statistics(y, y, window=found.window).n_positives
    for scale in (0.01, 12.0, 1 / 3):
        again = suggest_window(y * scale)
        assert again.window == pytest.approx(found.window * scale, rel=1e-4)
        sets = conr_statistics(y * scale, y * scale, window=again.window).n_positives
        assert torch.equal(sets, expected)


def test_a_window_of_whole_steps_loses_positives_to_rounding():
    y = ages()
    whole = conr_statistics(y, y, window=1.0).n_positives.sum()
    scaled = conr_statistics(y / 100, y / 100, window=0.01).n_positives.sum()
    assert scaled < 0.95 * whole


def test_shares_are_those_of_the_statistics():
    y = ages()
    p = y + 5
    found = suggest_window(y, p + torch.arange(600) % 7)
    assert len(found.windows) > 5 and found.windows == sorted(found.windows)
    for h, positives, negatives in zip(
        found.windows, found.positives, found.negatives, strict=True
    ):
        exact = conr_statistics(y, p + torch.arange(600) % 7, window=h)
        assert positives == pytest.approx(exact.n_positives.float().mean().item() / 599, rel=1e-5)
        assert negatives == pytest.approx(exact.n_negatives.float().mean().item() / 599, rel=1e-5)
    assert suggest_window(y).negatives is None


def test_the_proposal_is_the_smallest_that_leaves_few_rows_alone():
    found = suggest_window(ages(), batch_size=64)
    k = found.windows.index(found.window)
    assert found.alone[k] <= 0.05 and all(alone > 0.05 for alone in found.alone[:k])
    assert suggest_window(ages(), batch_size=8).window > found.window


def test_real_and_vector_labels_have_no_step_and_a_proposal():
    g = torch.Generator().manual_seed(0)
    for y in (torch.randn(300, generator=g), torch.randn(300, 3, generator=g).double()):
        found = suggest_window(y)
        assert found.step is None and 0 < found.window < 4
        assert f"proposed: {found.window:.4g}" in str(found)


def nearest(y: torch.Tensor, window: float, distance: str = "mae") -> float:
    """How far the distance nearest to the window is from it, in windows."""
    y = y.double()[:, None] if y.dim() == 1 else y.double()
    return (pair_distance(y, y, distance) / window - 1).abs().min().item()


def positives(y: torch.Tensor, window: float, distance: str = "mae") -> torch.Tensor:
    return conr_statistics(y, y, window=window, distance=distance, variant="contrastive")[0]


def grids(steps: list[float], n: int = 800) -> torch.Tensor:
    g = torch.Generator().manual_seed(len(steps))
    return torch.randint(0, 9, (n, len(steps)), generator=g) * torch.tensor(steps)


@pytest.mark.parametrize("distance", ["mae", "rmse"])
@pytest.mark.parametrize("n_components", [1, 2, 3, 4])
def test_vector_labels_have_windows_half_way_between_two_distances(n_components, distance):
    y = grids([1.0] * n_components)
    found = suggest_window(y, batch_size=24, distance=distance)
    assert found.step == 1.0
    power = 2 if distance == "rmse" and n_components > 1 else 1
    for h in found.windows:
        k = int(h**power * n_components)  # h is between the distances of k and k + 1
        low, high = ((each / n_components) ** (1 / power) for each in (k, k + 1))
        assert h == pytest.approx((low + high) / 2, rel=1e-12)
    for scale in (1.0, 0.1, 1 / 3, 12.0):
        for dtype in (torch.float16, torch.float32, torch.float64):
            scaled = (y.double() * scale).to(dtype)
            again = suggest_window(scaled, batch_size=24, distance=distance)
            assert again.window == pytest.approx(found.window * scale, rel=1e-3)
            expected = positives(y, found.window, distance)
            assert torch.equal(positives(scaled, again.window, distance), expected)


@pytest.mark.parametrize("distance", ["mae", "rmse"])
@pytest.mark.parametrize("steps", [[1.0, 0.3], [1.0, 0.5], [7.0, 2.0, 3.0]])
def test_vector_labels_of_several_steps_have_windows_between_their_distances(steps, distance):
    y = grids(steps)
    found = suggest_window(y, distance=distance)
    assert all(nearest(y, h, distance) > 1e-3 for h in found.windows)
    expected = positives(y, found.window, distance)
    assert torch.equal(positives(y / 10, found.window / 10, distance), expected)


YEARS = torch.randint(1950, 2020, (500,), generator=torch.Generator().manual_seed(0))
SECONDS = 1_700_000_000 + 8 * (YEARS - 1950)


@pytest.mark.parametrize(
    ("y", "step"),
    [
        (YEARS.half(), 1.0),
        (YEARS.numpy().astype(np.float16), 1.0),
        (YEARS.bfloat16(), 8.0),
        (SECONDS.float(), 128.0),
        (SECONDS.numpy().astype(np.float32), 128.0),
        (SECONDS, 128.0),
        (SECONDS.double(), 8.0),
    ],
    ids=["half", "numpy half", "bfloat16", "float32", "numpy float32", "int64", "float64"],
)
def test_labels_that_are_neighbours_in_their_dtype_have_windows_between(y, step):
    found = suggest_window(y)
    assert found.step == step
    assert all(h / step % 1 == 0.5 for h in found.windows)
    assert found.alone[found.windows.index(found.window)] <= 0.05


@pytest.mark.parametrize("step", [None, 1.0, 0.1])
@pytest.mark.parametrize("outliers", [[1e6], [-9999.0, 1e6], [3e38]])
def test_an_outlier_does_not_widen_the_proposal(step, outliers):
    y = 20 + 60 * torch.rand(2000, generator=torch.Generator().manual_seed(0))
    y = y if step is None else (y / step).round() * step
    expected = suggest_window(y)
    found = suggest_window(torch.cat([y, torch.tensor(outliers)]))
    assert found.window == pytest.approx(expected.window, rel=0.1)
    assert found.step == (step if step is None else pytest.approx(step, rel=1e-4))


@pytest.mark.parametrize("batch_size", [8, 64, 512])
def test_the_proposal_is_nearly_the_smallest_of_real_labels_too(batch_size):
    y = torch.randn(2000, generator=torch.Generator().manual_seed(0)).exp()
    found = suggest_window(y, batch_size=batch_size)
    for scale, is_enough in ((1.0, True), (0.85, False)):
        share = positives(y, scale * found.window).double() / 1999
        assert (((1 - share) ** (batch_size - 1)).mean() <= 0.05) == is_enough


def test_integers_are_taken_as_the_loss_takes_them():
    y = 2**60 + torch.arange(100)
    with pytest.raises(ValueError, match=r"differ in torch.float32, .* torch.int64 .*: subtract"):
        suggest_window(y)
    assert suggest_window(y - 2**60).step == 1.0
    y = 2**24 + 2 * torch.arange(300)
    found = suggest_window(y)
    assert found.step == 2.0 and nearest(y.float(), found.window) > 1e-3


def test_rows_beyond_the_integers_of_float32_are_sampled():
    y = torch.zeros(2**24 + 4, 1, dtype=torch.uint8)  # the number of the last is no float32
    rows = _sample(y, torch.arange(len(y)))
    assert len(rows) == SAMPLE and rows[0] == 0 and rows[-1] == len(y) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    y, p = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    expected = suggest_window(y, p)
    torch.set_default_dtype(dtype)
    try:
        assert suggest_window(y, p) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_changes_nothing():
    labels = [float(k % 7) for k in range(50)]
    expected = suggest_window(labels), density_weights(labels)
    with torch.device("meta"):
        found = suggest_window(labels), density_weights(labels)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_a_rare_label_that_the_sample_lacks_is_one_that_differs():
    y = torch.zeros(20000)
    y[7] = 3.0
    assert suggest_window(y).window == 1.5


def test_labels_of_any_finite_size_have_a_finite_window():
    y = torch.tensor([1e308, -1e308, 1e308], dtype=torch.float64)
    assert 1e38 < suggest_window(y).window < 4e38
    y = torch.tensor([1.0, 1 + 2**-23, 1.0])
    assert suggest_window(y).window == 2**-24


def test_what_a_masked_array_masks_is_left_out():
    given = np.ma.array([1.0, 2, 2, 3, 999] * 9, mask=[0, 0, 0, 0, 1] * 9)
    assert suggest_window(given) == suggest_window(given.compressed())


def test_arrays_lists_and_long_data_sets_are_taken():
    y = ages(10000)
    assert suggest_window(y.numpy()) == suggest_window(y)
    assert suggest_window(y.numpy()[::-1]) == suggest_window(y.flip(0))
    assert suggest_window(y.tolist()) == suggest_window(np.float64(y.numpy()))


@pytest.mark.parametrize("predictions", [None, ages() + 5], ids=["without", "with"])
def test_a_table_has_negatives_where_there_are_predictions(predictions):
    found = suggest_window(ages(), predictions)
    header, *rows, proposal = str(found).splitlines()
    has_negatives = predictions is not None
    assert ("negatives" in header) == has_negatives and "nan" not in str(found)
    assert len(rows) == len(found.windows) and proposal.startswith("proposed: ")
    assert {row.count("%") for row in rows} == {2 + has_negatives}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(targets=torch.ones(5)), "labels that differ"),
        (dict(targets=torch.ones(0)), "labels that differ"),
        (dict(targets=[1.0, 2.0, None], predictions=[None, 2.0, 3.0]), "in the 1 of 3 rows"),
        (dict(predictions=torch.ones(3)), "same rows"),
        (dict(targets=torch.ones(3, device="meta")), "targets must hold values"),
        (dict(batch_size=0), "batch_size must be ≥ 1"),
        (dict(distance="l2"), "distance must be one of"),
    ],
)
def test_bad_input_is_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        suggest_window(**{"targets": ages(), **arguments})
