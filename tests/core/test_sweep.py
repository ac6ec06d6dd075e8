"""Bands are exact: they hold the keys that satisfy the reference's own predicate, ties included."""

import pytest
import torch

from conr_kernels.core.sweep import banded_sweep, bands
from conr_kernels.reference import pair_distance
from tests.helpers.cases import VECTOR_TIES, ties_beyond_the_reach


def predicate(sorted_i, sorted_j, h):
    return (sorted_i[:, None] - sorted_j[None, :]).abs() <= h


def assert_bands_hold_exactly_the_predicate(sorted_i, sorted_j, h):
    lo, hi = bands(sorted_i, sorted_j, h)
    searched = bands(sorted_i, sorted_j.clone(), h)  # not by the symmetry of one set of rows
    assert torch.equal(lo, searched[0]) and torch.equal(hi, searched[1])
    j = torch.arange(len(sorted_j))
    in_band = (lo[:, None] <= j) & (j < hi[:, None])
    assert torch.equal(in_band, predicate(sorted_i, sorted_j, h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(100))
def test_bands_on_decimal_grids_with_ties(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 200, (), generator=generator))
    step, h = [(0.1, 0.2), (0.1, 0.3), (0.01, 0.07), (1 / 3, 2 / 3), (0.7, 1.4)][seed % 5]
    offset = [0.0, -3.0, 1000.0, 1e-3][seed % 4]
    y = (torch.randint(-20, 20, (n,), generator=generator).to(dtype) * step + offset).sort().values
    z = (
        torch.randint(-20, 20, (n // 2 + 1,), generator=generator).to(dtype) * step + offset
    ).sort()
    assert_bands_hold_exactly_the_predicate(y, y, h)
    assert_bands_hold_exactly_the_predicate(z.values, y, h)


def test_bands_where_many_neighbouring_numbers_round_to_the_window():
    """Differences of close numbers round to 1 from both sides: a rounded sum finds other bounds."""
    y = torch.tensor([-0.9], dtype=torch.float32)
    around = torch.tensor(0.1, dtype=torch.float32).view(torch.int32) + torch.arange(-40, 40)
    y = torch.cat([y, around.to(torch.int32).view(torch.float32)]).sort().values
    by_sum = torch.searchsorted(y, y + 1.0, right=True)
    assert_bands_hold_exactly_the_predicate(y, y, 1.0)
    assert not torch.equal(bands(y, y, 1.0)[1], by_sum), "the case does not test what it is for"


@pytest.mark.parametrize("h", [0.0, 1e-30, 1.0, float("inf")])
def test_bands_at_the_extremes_of_window_and_labels(h):
    y = torch.tensor([-3e38, -1.0, -0.0, 0.0, 1e-45, 1e-30, 1.0, 1.0, 3e38])
    assert_bands_hold_exactly_the_predicate(y, y, h)
    assert_bands_hold_exactly_the_predicate(y[3:4], y, h)
    lo, hi = bands(y[:0], y, h)
    assert lo.tolist() == hi.tolist() == []
    lo, hi = bands(y, y[:0], h)
    assert set(lo.tolist()) | set(hi.tolist()) == {0}


def test_bands_of_labels_that_are_not_finite_stay_in_range():
    nan, inf = float("nan"), float("inf")
    y = torch.tensor([-inf, 0.0, 1.0, inf, inf, nan, nan])
    for h in (1.0, inf):
        lo, hi = bands(y, y, h)
        assert ((lo >= 0) & (lo <= hi) & (hi <= len(y))).all()


@pytest.mark.parametrize("distance", ["mae", "rmse"])
@pytest.mark.parametrize("n_components", [1, 2, 5])
def test_a_sweep_holds_every_pair_in_the_window(distance, n_components):
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 80, (), generator=generator))
        y = torch.randint(0, 12, (n, n_components), generator=generator).float() / 10
        first, last = n // 4, n - n // 4
        anchors, keys = y[first:last], torch.cat([y[:first], y[last:]])
        for sweep in (
            banded_sweep("positives", anchors, None, 0.2, distance),
            banded_sweep("positives", anchors, keys, 0.2, distance),
        ):
            y_j = anchors if sweep.is_symmetric else keys
            d_ij = pair_distance(anchors[sweep.anchor_order], y_j[sweep.key_order], distance)
            j = torch.arange(len(y_j))
            in_band = (sweep.lo[:, None] <= j) & (j < sweep.hi[:, None])
            assert not ((d_ij <= 0.2) & ~in_band).any()
            if n_components == 1:
                assert torch.equal(in_band, d_ij <= 0.2)


@pytest.mark.parametrize(("n_components", "distance"), VECTOR_TIES)
def test_a_sweep_holds_ties_whose_components_lie_beyond_the_reach(n_components, distance):
    """The reach has a margin for the rounding of distances."""
    y, h = ties_beyond_the_reach(n_components, distance)
    for keys in (None, y):
        sweep = banded_sweep("positives", y, keys, h, distance)
        assert ((sweep.hi - sweep.lo)[:128] == 128).all()


def test_a_sweep_holds_pairs_whose_squares_underflow():
    y = torch.tensor([[0.0, 0.0], [1e-25, 0.0]])
    assert pair_distance(y[:1], y[1:], "rmse") == 0
    sweep = banded_sweep("positives", y, None, 0.0, "rmse")
    assert (sweep.hi - sweep.lo).tolist() == [2, 2]
