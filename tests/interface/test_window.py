"""``suggest_window``: between the labels' steps, and the shares that the loss would see."""

import numpy as np
import pytest
import torch

from conr_kernels import conr_statistics, suggest_window


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
        (dict(predictions=torch.ones(3)), "same rows"),
        (dict(batch_size=0), "batch_size must be ≥ 1"),
        (dict(distance="l2"), "distance must be one of"),
    ],
)
def test_bad_input_is_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        suggest_window(**{"targets": ages(), **arguments})
