"""What must not pass in silence is told, once a process."""

import warnings

import pytest
import torch

from conr_kernels import ConRLoss, conr_loss, notices
from tests.helpers.regimes import REGIMES, force


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(notices, "_told", set())


BATCHES = {
    "no row has a positive": (torch.arange(8.0) * 2, torch.zeros(8)),
    "no row has a negative": (torch.zeros(8), torch.arange(8.0)),
    "both a positive and a negative": (
        torch.tensor([0.0, 0, 5, 9]),
        torch.tensor([0.0, 50, 100, 100]),
    ),
}


def loss(y, p, **options):
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = conr_loss(x, y, p, **options)
    value.sum().backward()
    return value


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("text", BATCHES)
def test_a_batch_in_which_nothing_can_happen_is_told_once(monkeypatch, regime, reduction, text):
    backend = force(monkeypatch, regime)
    y, p = BATCHES[text]
    options = dict(backend=backend, reduction=reduction)
    with pytest.warns(UserWarning, match=rf"{text}.*window=1, labels from 0 to {y.max():g}"):
        loss(y, p, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(y, p, **options)


@pytest.mark.parametrize(
    ("variant", "text"),
    [("paper", r"the window and predictions within it \("), ("contrastive", r"the window \(")],
)
def test_what_no_row_has_is_said_in_full(variant, text):
    y, p = BATCHES["no row has a negative"]
    with pytest.warns(UserWarning, match="no two rows have labels farther apart than " + text):
        loss(y, p, variant=variant)


def test_batches_that_train_or_are_too_small_are_silent():
    y, p = BATCHES["no row has a positive"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(torch.tensor([0.0, 0, 5]), torch.zeros(3))
        loss(torch.tensor([0.0, 0, 5]), torch.zeros(3), weights=0, variant="released-age")
        loss(y[:1], p[:1]), loss(y[:0], p[:0])
        x = torch.ones(8, 3)
        torch.func.grad(lambda x: conr_loss(x, y, p))(x)
        torch.compile(ConRLoss(), backend="eager", fullgraph=True)(x, y, p)
    assert not notices._told


def test_keys_count():
    y, p = BATCHES["no row has a positive"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(y, p, keys=(torch.ones(8, 3), y, p))


def test_rows_that_take_no_part_do_not_count():
    y, mask = torch.tensor([0.0, 9, 20, 0, 9]), torch.tensor([True, True, True, False, False])
    text = "batch of 3 rows .* no row has a positive.*labels from 0 to 20"
    with pytest.warns(UserWarning, match=text):
        loss(y, 0 * y, mask=mask)


@pytest.mark.parametrize("n_present", [0, 1])
def test_a_batch_of_missing_labels_is_silent(n_present):
    y, p = BATCHES["no row has a positive"]
    mask = torch.arange(len(y)) < n_present
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(y.masked_fill(~mask, torch.nan), p, mask=mask)
    assert not notices._told
