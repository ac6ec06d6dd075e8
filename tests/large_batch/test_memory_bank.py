"""Never phantom rows, never rounded labels, whichever way they take into a bank or out of it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from conr_kernels import MemoryBank, conr_loss


def rows(n: int, dtype=torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    y = (torch.randint(1, 9, (n,), generator=g).double() / 10).to(dtype)
    return torch.randn(n, 4, generator=g), y, y + 0.1


def filled(size: int = 8, n: int = 6) -> MemoryBank:
    bank = MemoryBank(size, 4)
    bank.push(*rows(n))
    return bank


def copies(bank: MemoryBank) -> list[torch.Tensor]:
    held = bank.keys()
    return [t.clone() for t in held]


def fitting(state: dict, module: nn.Module) -> dict:
    """The usual filter of a state before strict=False."""
    own = module.state_dict()
    return {k: t for k, t in state.items() if k in own and t.shape == own[k].shape}


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_filtered_state_of_another_size_loads_nothing(is_filled):
    other = nn.ModuleDict(dict(bank=filled(16, 12)))
    model = nn.ModuleDict(dict(bank=filled() if is_filled else MemoryBank(8, 4)))
    before = copies(model["bank"])
    missing, unexpected = model.load_state_dict(fitting(other.state_dict(), model), strict=False)
    names = ("features", "targets", "predictions", "mask")
    assert set(missing) == {f"bank.{name}" for name in names}
    assert all(torch.equal(a, b) for a, b in zip(model["bank"].keys(), before, strict=True))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_size_raises_and_changes_nothing(strict):
    bank = filled()
    before = copies(bank)
    with pytest.raises(RuntimeError, match=r"size mismatch for features.*\(16, 4\).*\(8, 4\)"):
        bank.load_state_dict(filled(16, 12).state_dict(), strict=strict)
    assert all(torch.equal(a, b) for a, b in zip(bank.keys(), before, strict=True))


@pytest.mark.parametrize("name", ["features", "targets", "mask", "_extra_state"])
def test_a_state_with_a_part_missing_loads_nothing(name):
    state = filled().state_dict()
    del state[name]
    bank = MemoryBank(8, 4)
    bank.push(*rows(3, seed=1))
    before = copies(bank)
    with pytest.raises(RuntimeError, match=name):
        bank.load_state_dict(state)
    assert bank.load_state_dict(state, strict=False).missing_keys == [name]
    assert all(torch.equal(a, b) for a, b in zip(bank.keys(), before, strict=True))


def test_cleared_banks_have_no_rows_and_fill_again():
    bank = filled()
    bank.clear()
    assert len(bank) == 0 and len(bank.keys()[0]) == 0
    bank.push(*rows(3, seed=1))
    assert torch.equal(bank.keys()[0], rows(3, seed=1)[0])


WAYS = {
    "push": lambda bank: bank,
    "state dict": lambda bank: loaded(MemoryBank(8, 4), bank),
    "assigned state dict": lambda bank: loaded(MemoryBank(8, 4), bank, assign=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
    "half": lambda bank: bank.half(),
    "to": lambda bank: bank.to("cpu", torch.bfloat16),
}


def loaded(bank: MemoryBank, other: MemoryBank, **options) -> MemoryBank:
    bank.load_state_dict(other.state_dict(), **options)
    return bank


@pytest.mark.parametrize("label_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_labels_come_out_as_they_went_in(way, dtype, label_dtype):
    x, y, p = rows(6, dtype)
    bank = MemoryBank(8, 4, label_dtype=label_dtype)
    bank.push(x, y, p)
    bank = WAYS[way](bank)
    assert len(bank) == 6
    assert torch.equal(bank.keys()[1][:, 0], y) and torch.equal(bank.keys()[2][:, 0], p)
    bank.push(x, y, p)
    assert torch.equal(bank.keys()[1][-2:, 0], y[:2])


@pytest.mark.parametrize("window", [0.0, 0.1, 0.2])
def test_float64_labels_of_a_default_bank_serve_as_the_same_rows_do(window):
    own, rest = rows(40, torch.float64), rows(30, torch.float64, 1)
    bank = MemoryBank(64, 4)
    bank.push(*rest)
    options = dict(window=window, variant="contrastive")
    assert torch.equal(conr_loss(*own, keys=bank, **options), conr_loss(*own, keys=rest, **options))


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
@pytest.mark.parametrize("pushed", [torch.int64, torch.int16, torch.float16])
def test_integers_and_16_bits_meet_without_rounding_what_float32_holds(held, pushed):
    """257 is none of bfloat16's numbers, 2049 none of float16's; both are in this batch's."""
    x, more = torch.randn(4, 4), torch.tensor([256, 257, 2048, 2049])
    first = more.to(held)
    bank = MemoryBank(8, 4, label_dtype=held)
    bank.push(x, first, first)
    bank.push(x, more.to(pushed), more.to(pushed))
    for labels in bank.keys()[1:]:
        assert torch.equal(labels[:4, 0].double(), first.double())
        assert torch.equal(labels[4:, 0].double(), more.to(pushed).double())


def test_integers_beyond_float32_serve_as_the_same_rows_do():
    x, y = torch.randn(6, 4), 2**24 + torch.arange(6)
    bank = MemoryBank(8, 4)
    bank.push(x, y, y)
    for labels in (y, y.double()):
        options = dict(window=0.5, variant="contrastive", reduction="none")
        expected = conr_loss(x, labels, labels, keys=(x, y, y), **options)
        assert torch.equal(conr_loss(x, labels, labels, keys=bank, **options), expected)


MADE_IN_INFERENCE = {
    "widened": lambda bank, other: bank.push(*rows(3, torch.float64)),
    "loaded": lambda bank, other: bank.load_state_dict(other.state_dict()),
    "assigned": lambda bank, other: loaded(bank, copy.deepcopy(other), assign=True),
    "deepcopy": lambda bank, other: copy.deepcopy(bank),
    "constructed": lambda bank, other: MemoryBank(8, 4),
    "half": lambda bank, other: bank.half(),
}


@pytest.mark.parametrize("then", ["push", "load"])
@pytest.mark.parametrize("way", MADE_IN_INFERENCE)
def test_what_inference_mode_has_made_goes_on_outside_of_it(way, then):
    bank, other = filled(), MemoryBank(8, 4, label_dtype=torch.float64)
    other.push(*rows(6, torch.float64, seed=2))
    with torch.inference_mode():
        made = MADE_IN_INFERENCE[way](bank, other)
    bank = made if isinstance(made, MemoryBank) else bank
    if then == "push":
        bank.push(*rows(2, torch.float64, seed=3))
        assert torch.equal(
            bank.keys()[1][(bank.n_pushed - 1) % 8], rows(2, torch.float64, 3)[1][1:]
        )
    else:
        bank.load_state_dict(other.state_dict())
        assert torch.equal(bank.keys()[1], other.keys()[1])


@pytest.mark.parametrize("way", ["widened", "loaded"])
def test_buffers_widened_in_inference_mode_may_be_written_outside_of_it(way):
    bank, other = filled(), MemoryBank(8, 4, label_dtype=torch.float64)
    other.push(*rows(6, torch.float64, seed=2))
    with torch.inference_mode():
        MADE_IN_INFERENCE[way](bank, other)
    assert bank.targets.dtype == torch.float64
    for t in bank.buffers():
        t.copy_(t.clone())  # as an average of models and a broadcast of buffers do


def test_a_push_may_be_compiled_whole():
    bank = MemoryBank(8, 3)
    x, y = torch.ones(2, 3), torch.arange(2.0)
    torch.compile(lambda x, y: bank.push(x, y, y), backend="eager", fullgraph=True)(x, y)
    assert torch.equal(bank.features[:2], x) and torch.equal(bank.targets[:2, 0], y)


def test_the_number_of_rows_is_saved_whatever_the_default_device():
    bank = MemoryBank(4, 3)
    bank.push(torch.ones(3, 3), torch.ones(3), torch.ones(3))
    loaded = MemoryBank(4, 3)
    with torch.device("meta"):
        state = bank.state_dict()
    loaded.load_state_dict(state)
    assert len(loaded) == 3
