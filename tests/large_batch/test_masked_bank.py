"""``push(mask=)``: the loss with the bank is that with a bank of the rows that take part alone."""

import copy
import pickle

import pytest
import torch

from conr_kernels import MemoryBank, Variant, conr_loss, conr_statistics, notices
from tests.helpers.regimes import (
    PRESETS,
    REGIMES,
    force,
    make_batch,
    same_bits,
    value_and_gradient,
)

VARIANTS = (
    *PRESETS,
    Variant(unit_terms=True),
    Variant(negatives="all", unit_terms=True),
    Variant(negatives="all", pushing="exponential"),
)
SIZES = (20, 13, 16)


def pushes(L: int = 1, dtype=torch.float64) -> list[tuple[torch.Tensor, ...]]:
    """Rows and their masks: the second push has none."""
    found = []
    for step, n in enumerate(SIZES):
        x, y, p, _ = make_batch(n, dtype=dtype, seed=step + 5, L=L).values()
        mask = torch.rand(n, generator=torch.Generator().manual_seed(step)) < 0.6
        found.append((x, y, p, mask if step != 1 else None))
    return found


def with_holes(rows: tuple, values=(torch.nan, torch.inf, torch.nan)) -> tuple:
    """The same with other values in the rows that take no part."""
    *rows, mask = rows
    if mask is None:
        return (*rows, None)
    filled = (
        torch.where(mask.view(-1, *(1,) * (t.dim() - 1)), t, torch.full_like(t, value))
        for t, value in zip(rows, values, strict=True)
    )
    return (*filled, mask)


def bank_of(rows: list[tuple], size: int = 80) -> MemoryBank:
    x, y = rows[0][:2]
    bank = MemoryBank(size, x.shape[1], 1 if y.dim() == 1 else y.shape[1], dtype=x.dtype)
    for each in rows:
        bank.push(*each)
    return bank


def filtered(rows: list[tuple]) -> list[tuple]:
    return [
        (*of_push, None) if mask is None else tuple(t[mask] for t in of_push)
        for *of_push, mask in rows
    ]


def loss_with(bank: MemoryBank, dtype=torch.float32, **options) -> tuple:
    return value_and_gradient(**make_batch(17, dtype=dtype), keys=bank, **options)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_masked_bank_equals_the_filtered_bank(monkeypatch, regime, variant):
    backend = force(monkeypatch, regime)
    for L, distance in ((1, "mae"), (2, "rmse")):
        rows = pushes(L)
        masked, expected = bank_of([with_holes(each) for each in rows]), bank_of(filtered(rows))
        assert len(masked) == sum(SIZES) > len(expected)
        batch = make_batch(33, dtype=torch.float64, L=L)
        for mask in (None, torch.arange(33)[:, None] % 3 > 0):
            for reduction in ("none", "mean"):
                options = dict(
                    variant=variant, backend=backend, distance=distance, reduction=reduction,
                    mask=mask,
                )  # fmt: skip
                found = value_and_gradient(**batch, **options, keys=masked)
                right = value_and_gradient(**batch, **options, keys=expected)
                assert right[0].any()
                torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("L", [1, 2])
def test_statistics_are_those_of_the_filtered_bank(variant, L):
    rows = pushes(L)
    _, y, p, w = make_batch(33, L=L).values()
    found, expected = (
        conr_statistics(y, p, keys=bank_of(each), variant=variant, weights=w)
        for each in ([with_holes(each) for each in rows], filtered(rows))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("variant", ["paper", "released-depth", "contrastive"])
@pytest.mark.parametrize("regime", REGIMES)
def test_what_masked_rows_hold_changes_no_bit(monkeypatch, regime, variant):
    options = dict(backend=force(monkeypatch, regime), variant=variant)
    rows = pushes(dtype=torch.float32)
    plain = loss_with(bank_of(rows), **options)
    for values in ((torch.nan,) * 3, (torch.inf, 1e30, -1e30), (0, 0, 0)):
        bank = bank_of([with_holes(each, values) for each in rows])
        assert same_bits(loss_with(bank, **options), plain)


def test_what_is_not_finite_among_the_rows_that_take_part_still_shows():
    for held in range(3):
        rows = pushes(dtype=torch.float32)
        x, _, _, mask = rows[0]
        rows[0][held][mask.nonzero()[2]] = torch.nan
        for backend in ("torch", "reference"):
            assert loss_with(bank_of(rows), backend=backend)[0].isnan()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_pushes_without_a_mask_change_no_bit(backend):
    rows = [each[:3] for each in pushes(dtype=torch.float32)]
    joined = tuple(torch.cat(columns) for columns in zip(*rows, strict=True))
    bank = bank_of(rows)
    assert len(bank.keys()) == 3
    batch = make_batch(17)
    expected = value_and_gradient(**batch, keys=joined, backend=backend)
    assert same_bits(loss_with(bank, backend=backend), expected)
    bank.push(*rows[0], torch.zeros(SIZES[0]) > 0)
    assert len(bank.keys()) == 4
    torch.testing.assert_close(loss_with(bank, backend=backend), expected)
    bank.clear()
    for each in rows:
        bank.push(*each)
    assert same_bits(loss_with(bank, backend=backend), expected)


def test_masked_rows_take_places():
    x, y, p, _ = pushes()[0]
    bank = MemoryBank(8, 7, dtype=x.dtype)
    bank.push(x[:6], y[:6], p[:6])
    bank.push(x[6:10], y[6:10], p[6:10], torch.tensor([True, False, False, True]))
    assert len(bank) == 8
    key_x, *_, mask = bank.keys()
    assert sorted(key_x[mask].tolist()) == sorted(x[[2, 3, 4, 5, 6, 9]].tolist())
    bank.push(x, y, p, y > 3)
    key_x, *_, mask = bank.keys()
    assert sorted(key_x[mask].tolist()) == sorted(x[-8:][y[-8:] > 3].tolist())
    bank.push(x[:7], y[:7], p[:7])
    key_x, *_, mask = bank.keys()
    assert mask.sum() == 7 + (y[-1] > 3)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        ([True] * 20, TypeError, "mask must be a Tensor of dtype torch.bool, got list"),
        (torch.ones(20), TypeError, "mask must be .*torch.bool, got torch.float32"),
        (torch.ones(19) > 0, ValueError, r"mask must have .* N = 20 as in features \(20, 7\), got"),
        (torch.ones(20, 2) > 0, ValueError, "mask must have shape"),
        (torch.ones(20, device="meta") > 0, ValueError, "one device, got .* mask on meta"),
    ],
)
def test_bad_masks_are_refused_as_by_the_loss_and_change_nothing(mask, error, text):
    rows = pushes()[0][:3]
    bank = MemoryBank(64, 7)
    with pytest.raises(error, match=text) as refused:
        bank.push(*rows, mask)
    with pytest.raises(error) as by_loss:
        conr_loss(*rows, mask=mask)
    assert str(refused.value) == str(by_loss.value)
    assert len(bank) == 0 and len(bank.keys()) == 3


def loaded(bank: MemoryBank, **options) -> MemoryBank:
    other = MemoryBank(80, 7)
    other.load_state_dict(bank.state_dict(), **options)
    return other


WAYS = {
    "state dict": loaded,
    "assigned state dict": lambda bank: loaded(bank, assign=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
    "dtype and back": lambda bank: bank.type(torch.float64).float(),
}


@pytest.mark.parametrize("way", WAYS)
def test_masks_are_kept_by(way):
    bank = bank_of([with_holes(each) for each in pushes(dtype=torch.float32)])
    expected = loss_with(bank, variant="released-age")
    other = WAYS[way](bank)
    assert [t.dtype for t in other.keys()[3:]] == [torch.bool]
    assert same_bits(loss_with(other, variant="released-age"), expected)


def test_a_bank_loads_states_without_a_mask():
    rows = pushes(dtype=torch.float32)
    plain = bank_of([each[:3] for each in rows])
    of_release = plain.state_dict()
    del of_release["mask"]
    of_release["_extra_state"] = torch.tensor(plain.n_pushed)  # of 0.1.0
    for state in (plain.state_dict(), of_release):
        bank = bank_of(rows)
        bank.load_state_dict(state)
        assert len(bank) == len(plain) and len(bank.keys()) == 3
        assert same_bits(loss_with(bank), loss_with(plain))
        bank.push(*rows[1][:3], torch.zeros(SIZES[1]) > 0)
        torch.testing.assert_close(loss_with(bank), loss_with(plain))


def test_no_value_is_read():
    """On the device "meta" there is none."""
    bank = MemoryBank(8, 7, device="meta")
    x = torch.empty(5, 7, device="meta", requires_grad=True)
    for _ in range(3):
        bank.push(x, x[:, 0], x[:, 1], x[:, 2] > 0)
    held = bank.keys()
    assert [len(t) for t in held] == [8] * 4 and not bank.features.requires_grad


def test_a_masked_bank_under_torch_compile():
    bank = bank_of([with_holes(each) for each in pushes(dtype=torch.float32)])
    batch = make_batch(17)
    options = dict(variant="released-depth")
    step = torch.compile(conr_loss, backend="aot_eager", fullgraph=True)
    found = step(**batch, **options, keys=bank.keys())
    torch.testing.assert_close(found, conr_loss(**batch, **options, keys=bank))


def test_an_averaged_model_has_a_bank_as_well():
    bank = bank_of(pushes(dtype=torch.float32))
    averaged = torch.optim.swa_utils.AveragedModel(bank, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(bank)
    for held, expected in zip(averaged.module.keys(), bank.keys(), strict=True):
        torch.testing.assert_close(held, expected)


def test_absent_keys_are_nobodys_positives_where_a_batch_without_is_told(monkeypatch):
    monkeypatch.setattr(notices, "_told", set())
    x, y = torch.eye(3), torch.tensor([0.0, 5.0, 10.0])
    bank = MemoryBank(8, 3)
    bank.push(x, y, y, y < 0)
    with pytest.warns(UserWarning, match="no row has a positive"):
        conr_loss(x, y, y * 0, keys=bank)
