"""``conr_statistics``: exactly the sets of the loss, and a floor that no features go below."""

import pytest
import torch

from conr_kernels import MemoryBank, Variant, conr_loss, conr_statistics
from conr_kernels.core import counts
from conr_kernels.reference import masks
from conr_kernels.variants import PRESETS, Settings

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def grid(n: int, n_components: int, seed: int, device: str = "cpu"):
    """Labels and predictions on a decimal grid, where differences tie with windows."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 12, (n, n_components), generator=g) / 10
    p = y + torch.randint(-4, 5, (n, n_components), generator=g) / 10
    return y.to(device), p.to(device)


def by_pairs(y, p, window, distance="mae", variant="paper", y_j=None, p_j=None):
    settings = Settings(window, 1.0, 1.0, PRESETS[variant], distance)
    y_j, p_j = (y, p) if y_j is None else (y_j, p_j)
    return [mask.sum(1) for mask in masks(y, p, y_j, p_j, 0, settings)[1:]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [0, 1, 2, 33, 129])
@pytest.mark.parametrize(("n_components", "distance"), [(1, "mae"), (3, "mae"), (2, "rmse")])
@pytest.mark.parametrize("variant", ["paper", "contrastive"])
def test_counts_are_those_of_all_pairs(monkeypatch, device, n, n_components, distance, variant):
    monkeypatch.setattr(counts, "BLOCK_PAIRS", 300)
    for seed, window in enumerate((0.0, 0.1, 0.2, 0.5, float("inf"))):
        y, p = grid(n, n_components, seed, device)
        if seed in (1, 4):
            y[::5], p[::7] = torch.nan, torch.nan
        y_j, p_j = (
            torch.cat(t) for t in zip((y, p), grid(50, n_components, 9, device), strict=True)
        )
        keys = (torch.ones(50, 4, device=device), y_j[n:], p_j[n:])
        options = dict(window=window, distance=distance, variant=variant)
        for found, expected in (
            (conr_statistics(y, p, **options), by_pairs(y, p, **options)),
            (
                conr_statistics(y, p, keys=keys, **options),
                by_pairs(y, p, **options, y_j=y_j, p_j=p_j),
            ),
        ):
            assert found.n_positives.dtype == torch.int64
            assert torch.equal(found.n_positives, expected[0])
            assert torch.equal(found.n_negatives, expected[1])
            assert torch.equal(found.is_anchor, (expected[0] > 0) & (expected[1] > 0))


@pytest.mark.parametrize("window", [0.0, 0.5, float("inf")])
@pytest.mark.parametrize(("n_components", "distance"), [(1, "mae"), (2, "mae"), (2, "rmse")])
@pytest.mark.parametrize("variant", ["paper", "contrastive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_of_infinities_are_those_of_all_pairs(
    window, n_components, distance, variant, dtype
):
    """The distance of an infinity to itself is NaN: in no set, and no row to take off a count."""
    g = torch.Generator().manual_seed(n_components)
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 0.25, 1.0, 3e38], dtype=dtype)
    for share in (0, 3):  # of all values alike, or mostly numbers
        draw = torch.randint(-share, 7, (4, 40, n_components), generator=g)
        y, p, key_y, key_p = values[torch.where(draw < 0, 3 + draw % 4, draw)]
        mask = torch.rand(40, generator=g) < 0.7
        y_j, p_j = torch.cat([y, key_y]), torch.cat([p, key_p])
        keys = (torch.ones(40, 4), key_y, key_p)
        options = dict(window=window, distance=distance, variant=variant)
        for found, expected in (
            (conr_statistics(y, p, **options), by_pairs(y, p, **options)),
            (
                conr_statistics(y, p, keys=keys, **options),
                by_pairs(y, p, **options, y_j=y_j, p_j=p_j),
            ),
        ):
            assert torch.equal(found.n_positives, expected[0])
            assert torch.equal(found.n_negatives, expected[1])
        found = conr_statistics(y, p, mask=mask, **options)
        n_i, m_i = by_pairs(y[mask], p[mask], **options)
        assert torch.equal(found.n_positives[mask], n_i) and not found.n_positives[~mask].any()
        assert torch.equal(found.n_negatives[mask], m_i) and not found.n_negatives[~mask].any()


def test_an_infinite_label_has_no_set_of_its_own():
    found = conr_statistics(torch.tensor([1.0, 2.0, 1.0, torch.inf]), torch.ones(4), window=0.5)
    assert found.n_positives.tolist() == [1, 0, 1, 0]
    assert found.n_negatives.tolist() == [2, 3, 2, 3]


@pytest.mark.parametrize("n_components", [1, 2])
def test_masked_rows_are_as_if_absent(n_components):
    y, p = grid(60, n_components, 3)
    mask = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.6
    y[~mask], p[~mask] = torch.nan, torch.inf
    found = conr_statistics(y, p, window=0.2, mask=mask)
    expected = conr_statistics(y[mask], p[mask], window=0.2)
    assert torch.equal(found.n_positives[mask], expected.n_positives)
    assert torch.equal(found.n_negatives[mask], expected.n_negatives)
    assert not found.is_anchor[~mask].any() and found.n_negatives[~mask].sum() == 0
    assert found.summary() == expected.summary()
    nobody = conr_statistics(y, p, mask=torch.zeros(60, 1, dtype=torch.bool)).summary()
    assert set(nobody.values()) == {0.0}


@pytest.mark.parametrize("variant", PRESETS)
def test_no_features_bring_the_loss_below_the_floor(variant):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 6, (60,), generator=g).float()
    p, w = y + 2 * torch.randn(60, generator=g), torch.rand(60, generator=g)
    floor = conr_statistics(y, p, variant=variant, weights=w).floor
    apart = torch.nn.functional.one_hot(y.long(), 6).float() - 0.5  # one direction a label
    for x in (torch.randn(60, 5, generator=g), apart):
        loss = conr_loss(x, y, p, w, variant=variant, temperature=0.05)
        assert loss >= floor * (1 - 1e-6)
    if not PRESETS[variant].unit_terms:  # which keep Z above E
        apart = torch.nn.functional.one_hot(y.long() // 2, 3).float() - 1 / 3
        pairs = dict(window=1.0, variant=variant)
        even = 2 * (y // 2)
        best = conr_loss(apart, even, p, w, temperature=0.01, push_scale=1.0, **pairs)
        floor = conr_statistics(even, p, weights=w, **pairs).floor
        torch.testing.assert_close(best, floor, rtol=1e-5, atol=1e-6)


def test_the_summary_is_of_plain_floats():
    y, p = torch.tensor([0.0, 0, 1, 5]), torch.tensor([0.0, 0, 0, 9])
    summary = conr_statistics(y, p, window=0.5).summary()
    assert summary == dict(
        rows=4, anchors=0.5, without_positives=0.5, without_negatives=0.25,
        mean_positives=0.5, mean_negatives=1.0, floor=0.0,
    )  # fmt: skip
    assert all(type(value) is float for value in summary.values())


def test_a_memory_bank_serves_as_keys():
    y, p = grid(40, 1, 0)
    more = grid(30, 1, 1)
    bank = MemoryBank(64, 3)
    bank.push(torch.ones(30, 3), *more)
    keys = (torch.ones(30, 3), *more)
    for a, b in zip(
        conr_statistics(y, p, keys=bank), conr_statistics(y, p, keys=keys), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_mask", [False, True])
def test_traces_whole(with_mask):
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(y, p, mask):
        return conr_statistics(y, p, window=0.2, mask=mask, weights=2.0, variant="released-age")

    for n in (33, 50):
        y, p = grid(n, 1, 0)
        mask = (y > 0.2)[:, 0] if with_mask else None
        expected = conr_statistics(y, p, window=0.2, mask=mask, weights=2.0, variant="released-age")
        for a, b in zip(step(y, p, mask), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(targets=[1.0]), TypeError, "targets must be a Tensor"),
        (dict(predictions=torch.ones(5)), ValueError, "predictions must have .* N = 4"),
        (dict(mask=torch.ones(4)), TypeError, "mask must .* torch.bool, got torch.float32"),
        (dict(mask=torch.ones(3).bool()), ValueError, r"mask must have .* N = 4 .*\(3,\)"),
        (dict(window=-1), ValueError, "window must be ≥ 0"),
        (dict(variant="papers"), ValueError, "variant must be one of"),
        (dict(keys=(1, 2)), TypeError, "keys must be"),
        (dict(weights=torch.ones(3)), ValueError, "weights must have .* as in targets"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error, match=text):
        conr_statistics(**{**dict(targets=torch.ones(4), predictions=torch.ones(4)), **change})


def test_count_self_lowers_the_floor():
    y, p = torch.tensor([0.0, 0, 0, 9]), torch.zeros(4)
    plain, counted = (
        conr_statistics(y, p, variant=Variant("inside", count_self=c)).floor for c in (False, True)
    )
    torch.testing.assert_close(counted, plain * 2 / 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_nothing_is_synchronised_on_a_gpu():
    y, p = grid(500, 1, 0, "cuda")
    mask = y[:, 0] > 0.2
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = conr_statistics(y, p, window=0.2, mask=mask, weights=2.0, variant="released-age")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.n_positives[mask], by_pairs(y[mask], p[mask], 0.2)[0])


def test_a_group_by_another_name_is_refused():
    with pytest.raises(ValueError, match="group must be a process group, 'world' or None"):
        conr_statistics(torch.ones(4), torch.ones(4), group="worlds")
    with pytest.raises(TypeError, match="group must be .* a ProcessGroup or None, got int"):
        conr_statistics(torch.ones(4), torch.ones(4), group=3)


def test_keys_that_are_no_bank_are_named():
    with pytest.raises(TypeError, match="keys must be .* or a MemoryBank, got Linear"):
        conr_statistics(torch.ones(4), torch.ones(4), keys=torch.nn.Linear(2, 2))
