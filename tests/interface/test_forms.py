"""Inputs of any memory layout, dtype and shape that mean the same give the same bits, unwritten."""

import pytest
import torch
from torch import Tensor

from tests.helpers.regimes import PRESETS, REGIMES, force, make_batch, same_bits, value_and_gradient


def layouts(t: Tensor) -> dict[str, Tensor]:
    """Tensors of the same values in other memory; negation may be lazy too."""
    padded = torch.full([2 * n + 3 for n in t.shape], 77).to(t)
    inner = tuple(slice(3, 3 + n) for n in t.shape)
    steps = tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)
    sliced, stepped = padded.clone(), padded.clone()
    sliced[inner], stepped[steps] = t, t
    forms = dict(
        sliced=sliced[inner],
        stepped=stepped[steps],
        offset=torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        transposed=t.mT.contiguous().mT if t.dim() == 2 else torch.stack([t, t], dim=1)[:, 1],
        negated=torch._neg_view(-t),
    )
    for form in forms.values():
        assert torch.equal(form, t)
    return forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("regime", REGIMES)
def test_any_layout_gives_the_bits_of_its_contiguous_copy(monkeypatch, regime, dtype):
    backend = force(monkeypatch, regime)
    for L in (1, 3):
        batch = make_batch(70, dtype=dtype, L=L)
        expected = value_and_gradient(**batch, backend=backend)
        for name, t in batch.items():
            for layout, form in layouts(t).items():
                values = value_and_gradient(**batch | {name: form}, backend=backend)
                assert same_bits(values, expected), (name, layout, L)
        bank = make_batch(20, dtype=dtype, L=L, seed=1)
        keys = [bank[name] for name in ("features", "targets", "predictions")]
        expected = value_and_gradient(**batch, keys=tuple(keys), backend=backend)
        for layout in layouts(keys[0]):
            others = tuple(layouts(t)[layout] for t in keys)
            values = value_and_gradient(**batch, keys=others, backend=backend)
            assert same_bits(values, expected), ("keys", layout, L)


@pytest.mark.parametrize("regime", REGIMES)
def test_expanded_inputs_give_the_bits_of_their_contiguous_copies(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch = make_batch(70, L=3)
    expanded = dict(
        features=batch["features"][:1].expand(70, -1),
        targets=batch["targets"][:, :1].expand(-1, 3),
        predictions=batch["predictions"][:1].expand(70, -1),
        weights=batch["weights"][:1].expand(70),
    )
    for name, t in expanded.items():
        value = value_and_gradient(**batch | {name: t}, backend=backend)
        copy = value_and_gradient(**batch | {name: t.contiguous()}, backend=backend)
        assert same_bits(value, copy), name


@pytest.mark.parametrize("regime", REGIMES)
def test_inputs_are_never_written(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch, bank = make_batch(70, L=2), make_batch(20, L=2, seed=1)
    keys = tuple(bank[name] for name in ("features", "targets", "predictions"))
    g = torch.ones(70)
    given = [*batch.values(), *keys, g]
    copies = [(t.clone(), t._version) for t in given]
    for variant in PRESETS:
        for further in (None, keys):
            value_and_gradient(
                **batch, g=g, keys=further, variant=variant, reduction="none", backend=backend
            )
    for t, (copy, version) in zip(given, copies, strict=True):
        assert torch.equal(t, copy) and t._version == version


@pytest.mark.parametrize("regime", REGIMES)
def test_forms_of_labels_and_weights_that_mean_the_same(monkeypatch, regime):
    backend = force(monkeypatch, regime)
    batch = make_batch(65)
    x, y, p, w = batch.values()
    p = p.round()
    expected = value_and_gradient(x, y, p, w, backend=backend)
    for labels in (
        (y[:, None], p[:, None]), (y[:, None], p), (y, p[:, None]), (y.long(), p.int()),
        (y.double(), p), (y.half(), p.bfloat16()), (y.to(torch.uint8), p.to(torch.int16)),
    ):  # fmt: skip
        assert same_bits(value_and_gradient(x, *labels, w, backend=backend), expected)
    assert same_bits(value_and_gradient(x, y, p, w[:, None], backend=backend), expected)
    for one in (None, 1, 1.0, torch.tensor(1.0), torch.tensor(1), torch.ones(65)):
        values = value_and_gradient(x, y, p, one, backend=backend)
        assert same_bits(values, value_and_gradient(x, y, p, backend=backend))
    assert not same_bits(values, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regime", REGIMES)
def test_labels_of_16_bits_are_compared_in_32(monkeypatch, regime, dtype):
    """Fractions of which some differences round to the window in 16 bits, from above it."""
    backend = force(monkeypatch, regime)
    x, _, _, w = make_batch(65).values()
    g = torch.Generator().manual_seed(0)
    y, p = ((torch.rand(65, generator=g) / 64 + torch.arange(65) % 2 / 4).to(dtype) for _ in "yp")
    p[::5] += 9
    y[::3] += 9
    keys = (x[:20], y[:20], p[:20])
    wide = tuple(t.float() for t in keys)
    decided = [(t[:, None] - t).abs() <= 0.25 for t in (y, y.float())]
    assert not torch.equal(*decided), "no pair is decided otherwise"
    options = dict(window=0.25, backend=backend)
    expected = value_and_gradient(x, y.float(), p.float(), w, keys=wide, **options)
    for of_y, of_p, of_keys in ((y, p, keys), (y.float(), p, keys), (y, p.float(), wide)):
        assert same_bits(value_and_gradient(x, of_y, of_p, w, keys=of_keys, **options), expected)
