"""A pushing weight that is added to the table: every backend computes it or refuses it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from conr_kernels.variants import PUSHINGS, Pushing, Settings, Variant
from tests.helpers.backends import NAMES, Backend, Batch, running
from tests.helpers.bounds import row_bound, unit

PHIS = sorted({pushing.phi for pushing in PUSHINGS.values()})
RATES = tuple(itertools.product((False, True), repeat=2))


@pytest.fixture(scope="module", params=("reference", *NAMES))
def backend(request, tmp_path_factory) -> Iterator[Backend]:
    if request.param == "reference":
        yield Backend("reference")
        return
    with running(request.param, tmp_path_factory.mktemp("backend")) as backend:
        yield backend


def make_batch(name: str, is_dense: bool) -> Batch:
    g, N = torch.Generator().manual_seed(0), 24
    y = torch.randint(0, 6, (N, 1), generator=g).float()
    p = y + torch.randint(-2, 3, (N, 1), generator=g)
    settings = Settings(1.0, 0.5, 0.2, Variant(pushing=name))
    return Batch(
        torch.randn(N, 5, generator=g), y, p, torch.rand(N, generator=g) + 0.5, torch.ones(N),
        settings, is_dense,
    )  # fmt: skip


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "bands"])
@pytest.mark.parametrize(("is_scaled", "is_weighted"), RATES)
@pytest.mark.parametrize("phi", PHIS)
def test_any_rate_agrees_with_the_equation_for_any_known_phi(
    backend: Backend, phi: str, is_scaled: bool, is_weighted: bool, is_dense: bool, monkeypatch
) -> None:
    name = f"{phi} {is_scaled} {is_weighted}"
    monkeypatch.setitem(PUSHINGS, name, Pushing(is_scaled, is_weighted, phi))
    batch = make_batch(name, is_dense)
    d_ij, positive, negative = batch.sets()
    q, e = torch.nn.functional.normalize(batch.x.double()), batch.settings.push_scale
    s_ij = q @ q.T / batch.settings.temperature
    S_ij = {"one": torch.ones_like(d_ij), "distance": d_ij, "exponential": (e * d_ij).exp()}[phi]
    S_ij = S_ij * (e if is_scaled else 1.0)
    S_ij = S_ij * (batch.w.double()[:, None] if is_weighted else 1.0)
    E = (s_ij.exp() * positive).sum(dim=1)
    n, Z = positive.sum(dim=1), E + (S_ij * s_ij.exp() * negative).sum(dim=1)
    is_anchor = (n > 0) & negative.any(dim=1)
    assert is_anchor.sum() > 10
    expected = torch.where(is_anchor, -(E / n.clamp(min=1) / Z).log(), 0.0)
    rows, _ = backend(batch)
    bound = row_bound(unit(batch.x.dtype), expected, batch.y, batch.weights, batch.settings)
    assert ((rows - expected).abs() <= bound).all()


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "bands"])
def test_an_unknown_phi_is_refused(backend: Backend, is_dense: bool, monkeypatch) -> None:
    monkeypatch.setitem(PUSHINGS, "squared", Pushing(True, True, "squared"))
    with pytest.raises(Exception, match="squared|AssertionError") as found:
        backend(make_batch("squared", is_dense))
    assert found.type.__name__ in ("KeyError", "NotImplementedError", "InterpreterError")
