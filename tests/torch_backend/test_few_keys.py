"""Few rows against many keys: the loss and gradient of the equation, whichever way is taken."""

import pytest
import torch

from conr_kernels import conr_loss
from conr_kernels.torch_backend import backend, small
from conr_kernels.variants import PRESETS
from tests.helpers.regimes import make_batch, same_bits, value_and_gradient


@pytest.fixture(params=["tiles", "one tile", "sweeps"])
def way(request, monkeypatch):
    """Tiles of few keys; all keys in one; and what serves more pairs."""
    monkeypatch.setattr(small, "TILE_PAIRS", {"tiles": 100}.get(request.param, 2**18))
    if request.param == "sweeps":
        monkeypatch.setattr(small, "FEW_ROWS", 0)
        monkeypatch.setattr(small, "FEW_PAIRS", 0)
    return request.param


def rows_and_keys(n: int, n_keys: int, L: int = 1, dtype=torch.float32) -> tuple[list, tuple]:
    own, more = make_batch(n, dtype=dtype, L=L), make_batch(n_keys, dtype=dtype, seed=1, L=L)
    names = ("features", "targets", "predictions")
    return list(own.values()), tuple(more[name] for name in names)


@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_are_the_equations(way, variant, reduction):
    for n, n_keys, L in ((1, 1, 1), (2, 31, 2), (33, 65, 1), (65, 7, 3)):
        own, keys = rows_and_keys(n, n_keys, L)
        wide = [own[0].double(), *own[1:]]
        wide_keys = (keys[0].double(), *keys[1:])
        options = dict(variant=variant, reduction=reduction, push_scale=0.3)
        found = value_and_gradient(*own, keys=keys, **options)
        exact = value_and_gradient(*wide, keys=wide_keys, backend="reference", **options)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


def test_large_exponents_and_no_keys_are_served_too(way):
    for n_keys, options in ((40, dict(temperature=0.01)), (0, {}), (40, dict(window=0.0))):
        own, keys = rows_and_keys(33, n_keys)
        found = value_and_gradient(*own, keys=keys, **options)
        expected = value_and_gradient(*own, keys=keys, backend="reference", **options)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_negatives_among_the_keys_alone_make_an_anchor_where_they_are_counted(way):
    """With a window of 0 a sum of 0 is no proof that there is none."""
    x, y = torch.eye(2, 3), torch.zeros(2)
    options = dict(window=0.0, keys=(torch.ones(2, 3), y + 1, y))
    loss = conr_loss(x, y, y, **options)
    assert loss > 0
    torch.testing.assert_close(loss, conr_loss(x, y, y, backend="reference", **options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_bits_with_and_without_a_graph_and_upstream(way, reduction):
    own, keys = rows_and_keys(33, 65)
    loss, gradient = value_and_gradient(*own, keys=keys, reduction=reduction)
    assert same_bits((loss, gradient), value_and_gradient(*own, keys=keys, reduction=reduction))
    with torch.no_grad():
        assert torch.equal(loss, conr_loss(*own, keys=keys, reduction=reduction))


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_key_that_is_not_finite_shows(way, column, reduction):
    own, keys = rows_and_keys(33, 65)
    keys[column][40] = torch.nan
    loss, gradient = value_and_gradient(*own, keys=keys, reduction=reduction)
    assert loss.isnan().all() and gradient.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(way, dtype):
    own, keys = rows_and_keys(33, 65, dtype=dtype)
    found = value_and_gradient(*own, keys=keys)
    wide_keys = (keys[0].double(), *keys[1:])
    exact = value_and_gradient(own[0].double(), *own[1:], keys=wide_keys, backend="reference")
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=0)
    rtol = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[1].double(), exact[1], rtol=rtol, atol=1e-5)


def test_the_way_is_as_named(way, monkeypatch):
    tiles, all_at_once = [], small.add_sums
    monkeypatch.setattr(small, "add_sums", lambda *a: tiles.append(a[1]) or all_at_once(*a))
    monkeypatch.setattr(backend, "row_sums", lambda *_: 1 / 0)
    own, keys = rows_and_keys(33, 65)
    try:
        conr_loss(*own, keys=keys)
    except ZeroDivisionError:
        assert way == "sweeps"
    assert len(tiles) == {"tiles": 1 + 22, "one tile": 2, "sweeps": 0}[way]
