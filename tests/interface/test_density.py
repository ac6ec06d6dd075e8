"""density_weights: frequencies of bins, label distribution smoothing, scale and bad input."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from conr_kernels import density_weights

AGES = Path(__file__).parents[2] / "benchmarks" / "agedb_dir_train_ages.csv"


def density_by_hand(labels: list[float], bin_width: float, kernel) -> list[float]:
    """Dictionary counts and a double loop over bins: the definition."""
    bins = [math.floor(y / bin_width) for y in labels]
    return [sum(kernel(b - other) for other in bins) for b in bins]


def test_inverse_frequency_of_a_case_computed_by_hand():
    # Counts 1, 3, 2: 1/c = 1, 1/3, 1/3, 1/3, 1/2, 1/2; their mean is 3/6.
    y = torch.tensor([-7.0, 2.0, 2.2, 2.9, 5.0, 5.5], dtype=torch.float64)
    expected = torch.tensor([2.0, 2 / 3, 2 / 3, 2 / 3, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(density_weights(y), expected, rtol=1e-14, atol=0)
    root = torch.tensor([1.0, 3**-0.5, 3**-0.5, 3**-0.5, 2**-0.5, 2**-0.5], dtype=torch.float64)
    expected = root / root.mean()
    w = density_weights(y, "sqrt_inverse")
    torch.testing.assert_close(w, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("smoothing", "kernel"),
    [
        ("gaussian", lambda o: math.exp(-(o**2) / (2 * 1.5**2)) if abs(o) <= 2 else 0),
        ("laplace", lambda o: math.exp(-abs(o) / 1.5) if abs(o) <= 2 else 0),
        ("triangular", lambda o: max(0, 1 - abs(o) / 3)),
    ],
)
@pytest.mark.parametrize("method", ["inverse", "sqrt_inverse"])
def test_smoothing_equals_a_sum_over_all_pairs_of_labels(smoothing, kernel, method):
    y = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
    density = torch.tensor(density_by_hand(y.tolist(), 0.5, kernel), dtype=torch.float64)
    expected = density ** (-1.0 if method == "inverse" else -0.5)
    expected /= expected.mean()
    w = density_weights(y, method, 0.5, smoothing, kernel_size=5, sigma=1.5)
    torch.testing.assert_close(w, expected, rtol=1e-12, atol=0)


def test_agedb_training_labels_weigh_by_the_counts_in_the_file():
    counts = {int(row["age"]): int(row["count"]) for row in csv.DictReader(AGES.open())}
    ages = torch.tensor([age for age, count in counts.items() for _ in range(count)])
    w = density_weights(ages)
    assert len(ages) == 12208
    assert w.dtype == torch.float32 and abs(w.double().mean() - 1) < 1e-6
    # Σ_j 1/c(b_j) = number of bins, so w_j = N / (bins · c): exact for every age.
    expected = [12208 / (len(counts) * counts[age]) for age in ages.tolist()]
    torch.testing.assert_close(w, torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_kernel_of_one_bin_changes_nothing():
    y = torch.arange(17.0) % 5
    for smoothing in ("gaussian", "laplace", "triangular"):
        assert torch.equal(
            density_weights(y, smoothing=smoothing, kernel_size=1), density_weights(y)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_labels_on_a_decimal_grid_fall_into_their_own_bins(dtype):
    tenths = torch.arange(-20, 21)
    y = (tenths.repeat_interleave(tenths.abs() + 1).double() / 10).to(dtype)
    counts = (tenths.abs() + 1).repeat_interleave(tenths.abs() + 1)
    expected = counts.double().reciprocal()
    expected = (expected / expected.mean()).float()
    torch.testing.assert_close(
        density_weights(y, bin_width=0.1).float(), expected, rtol=1e-6, atol=0
    )


def test_negative_labels_are_counted_as_their_shifted_copies():
    y = torch.tensor([-3.5, -3.1, -0.2, 0.2, 8.0])
    assert torch.equal(density_weights(y), density_weights(y + 16))
    assert torch.equal(density_weights(y), density_weights(y[:, None]))
    integers = torch.tensor([-4, -4, -1, 0, 8])
    assert torch.equal(density_weights(y), density_weights(integers))


def test_components_of_vector_labels_are_averaged():
    y = torch.tensor([[0.0, 5.0], [0.0, 6.0], [0.0, 6.0], [1.0, 6.0]], dtype=torch.float64)
    expected = (density_weights(y[:, 0]) + density_weights(y[:, 1])) / 2
    torch.testing.assert_close(density_weights(y), expected, rtol=1e-14, atol=0)
    # (1/3, 1/3, 1/3, 1) and (1, 1/3, 1/3, 1/3), both of mean 1/2.
    by_hand = torch.tensor([4 / 3, 2 / 3, 2 / 3, 4 / 3], dtype=torch.float64)
    torch.testing.assert_close(density_weights(y), by_hand, rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_label_weighs_nan_and_counts_nowhere(value):
    y = torch.tensor([1.0, value, 1.0, 2.0])
    w = density_weights(y, smoothing="gaussian")
    assert w.isnan().tolist() == [False, True, False, False]
    finite = density_weights(y[[0, 2, 3]], smoothing="gaussian")
    assert torch.equal(w[[0, 2, 3]], finite)
    vector = torch.stack([torch.ones(4), y], dim=1)
    assert density_weights(vector).isnan().tolist() == [False, True, False, False]


def test_a_huge_range_of_labels_stores_occupied_bins_only():
    y = torch.tensor([-1e30, 0.0, 0.0, 1.0, 1e30, 3e38])
    w = density_weights(y, bin_width=1e-3, smoothing="gaussian", kernel_size=9)
    assert torch.equal(w, density_weights(torch.tensor([0.0, 100.0, 100.0, 200.0, 300.0, 400.0])))


@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 3)])
def test_no_labels_have_no_weights(shape):
    assert density_weights(torch.zeros(shape), smoothing="laplace").shape == (0,)


def test_arrays_columns_and_lists_are_labels_as_tensors_are():
    class Column:  # as of pandas
        def __init__(self, values):
            self.values = values

        def to_numpy(self):
            return self.values

    ages = [3, 1, 1, 2, 1]
    expected = density_weights(torch.tensor(ages))
    array = np.array(ages)
    array.flags.writeable = False
    for given in (
        ages,
        array,
        array[::-1][::-1],
        Column(array[::-1].copy()[::-1]),
        Column(array.astype(object)),
        array.astype(">f4"),
        array.astype("<i2"),
    ):
        assert torch.equal(density_weights(given).float(), expected)
    tenths = [0.7, 0.1, 0.1]
    assert torch.equal(
        density_weights(tenths, bin_width=0.1),
        density_weights(torch.tensor(tenths, dtype=torch.float64), bin_width=0.1),
    )


@pytest.mark.parametrize("kind", [list, tuple, lambda given: np.array(given, dtype=object)])
def test_none_is_a_missing_label(kind):
    w = density_weights(kind([3.0, None, 1.0, 3.0]))
    expected = density_weights(torch.tensor([3.0, math.nan, 1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(w, expected, equal_nan=True)
    assert w.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", ["int64", "float32", "float64", "object"])
@pytest.mark.parametrize("shape", [(8,), (4, 2)])
def test_what_a_masked_array_masks_is_missing(dtype, shape):
    values, masked = [3, 1, 3, 2, 1, 2, 9, 1], [0, 0, 0, 0, 0, 0, 1, 0]
    given = np.ma.array(values, mask=masked, dtype=dtype).reshape(shape)
    expected = torch.tensor(values, dtype=torch.float64)
    expected[6] = math.nan
    w = density_weights(given)
    torch.testing.assert_close(
        w, density_weights(expected.reshape(shape)).to(w.dtype), equal_nan=True
    )
    assert w.isnan().sum() == 1


def test_any_shape_whose_first_axis_is_the_rows():
    y = torch.randint(0, 4, (20, 2, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(density_weights(y), density_weights(y.flatten(1)))


@pytest.mark.parametrize("bin_width", [1e-3, 100.0])
def test_weights_that_are_all_equal_are_told(bin_width):
    y = torch.tensor([1.0, 2.0, 2.5, 7.0])
    with pytest.warns(UserWarning, match=f"all density weights are equal .*bin_width={bin_width}"):
        density_weights(y, bin_width=bin_width)


def test_equal_labels_and_different_weights_are_silent(recwarn):
    density_weights(torch.ones(5))
    density_weights(torch.tensor([1.0, 1.0, 2.0]))
    density_weights(torch.zeros(0))
    assert not recwarn.list


def test_labels_are_not_written_and_carry_no_gradient():
    y = torch.tensor([3.0, 1.0, 1.0], requires_grad=True)
    assert not density_weights(y).requires_grad
    assert y.tolist() == [3.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(targets=3.0), TypeError, "targets must be a Tensor, an array, .* got float"),
        (dict(targets=["a", "b"]), TypeError, "targets must hold numbers only, got a list"),
        (dict(targets=torch.ones(3, dtype=torch.bool)), TypeError, "torch.bool"),
        (dict(targets=torch.ones(3, dtype=torch.complex64)), TypeError, "torch.complex64"),
        (dict(targets=torch.ones(())), ValueError, r"got \(\)"),
        (dict(targets=torch.ones(2, 0)), ValueError, r"\(2, 0\)"),
        (dict(method="inv"), ValueError, "'inverse', 'sqrt_inverse', got 'inv'"),
        (dict(smoothing="box"), ValueError, "'gaussian', 'triangular', 'laplace', got 'box'"),
        (dict(bin_width=0.0), ValueError, "bin_width must be finite and > 0, got 0.0"),
        (
            dict(targets=torch.ones(3, device="meta")),
            ValueError,
            "targets must hold .* on the meta",
        ),
        (dict(targets=[1e308, 1.0], bin_width=1e-5), ValueError, "bin_width .*1e-05 .* 1e.308"),
        (dict(targets=[[0.0, 5.0]], bin_width=1e-310), ValueError, "bin_width .* 1e-310 .* 5"),
        (dict(targets=np.ma.array([True, False])), TypeError, "torch.bool"),
        (dict(bin_width=math.nan), ValueError, "bin_width"),
        (dict(sigma=-1.0), ValueError, "sigma must be finite and > 0, got -1.0"),
        (dict(sigma="2"), TypeError, "sigma must be a Python number, got str"),
        (dict(kernel_size=4), ValueError, "kernel_size must be odd and ≥ 1, got 4"),
        (dict(kernel_size=-1), ValueError, "got -1"),
        (dict(kernel_size=5.0), TypeError, "kernel_size must be an int, got float"),
    ],
)
def test_bad_input_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        density_weights(**{"targets": torch.ones(3), **arguments})
