"""The torch backend against the float64 reference, in each of its regimes."""

import itertools

import pytest
import torch

from conr_kernels import conr_loss, ops, reference
from conr_kernels import torch_backend as torch_room
from conr_kernels.core import sweep
from conr_kernels.core.inputs import Inputs
from conr_kernels.core.rows import scale_statistics
from conr_kernels.torch_backend import backend as torch_backend
from conr_kernels.torch_backend import small
from conr_kernels.torch_backend import source as torch_source
from conr_kernels.torch_backend import sweeps as torch_sweeps
from conr_kernels.torch_backend import tiles as torch_tiles
from conr_kernels.torch_backend.pairs import How
from conr_kernels.variants import PRESETS, Settings
from tests.helpers.cases import VECTOR_TIES, structured_cases, tie_cases
from tests.helpers.oracle import assert_as_good_as_eager, fused
from tests.helpers.ranks.rows import tiny_distances


@pytest.fixture(params=["one tile", "bands", "all pairs", "small tiles"])
def regime(request, monkeypatch):
    """Forces a regime at any size; small tiles cut the bands and the chunks everywhere."""
    if request.param != "one tile":
        monkeypatch.setattr(small, "KEPT_ROWS", 0)
        monkeypatch.setattr(
            torch_sweeps, "DENSE_SHARE", -1.0 if request.param == "all pairs" else 9.0
        )
    if request.param in ("all pairs", "small tiles"):
        monkeypatch.setattr(torch_tiles, "BLOCK_I", 8)
        monkeypatch.setattr(torch_tiles, "TILE_PAIRS", 1000)
    return request.param


def test_float32_is_as_good_as_eager_on_structured_cases(regime):
    for case in structured_cases():
        assert_as_good_as_eager(torch_backend, case)


def test_float64_equals_the_reference_to_rounding(regime):
    for case in structured_cases(1000):
        g = torch.randn(len(case.x), generator=torch.Generator().manual_seed(3)).double()
        x = case.x.clone().requires_grad_()
        exact = reference.row_losses(x, case.y, case.p, case.w, None, 0, case.settings)
        (exact_gradient,) = torch.autograd.grad(exact, x, g)
        loss, gradient = fused(torch_backend, case, torch.float64, g)
        torch.testing.assert_close(loss, exact, rtol=1e-11, atol=1e-11, msg=str(case))
        scale = max(exact_gradient.abs().max().item(), 1.0)
        assert (gradient - exact_gradient).abs().max().item() <= 1e-9 * scale, str(case)


def test_anchors_among_further_keys_equal_rows_of_one_batch(regime):
    for case in structured_cases(2000):
        x, y, p, w = case.inputs
        g = torch.rand(len(x), generator=torch.Generator().manual_seed(3)).double()
        inputs = Inputs(x, y, p, w, None, 0, case.settings)
        loss, stats, layout = torch_backend.forward(inputs)
        coef = scale_statistics(stats, g)
        gradient = torch_backend.backward(inputs, coef, None, layout)
        rows = slice(len(x) // 3, len(x) - len(x) // 4)
        anchors = (x[rows], y[rows], p[rows], None if w is None else w[rows])
        inputs = Inputs(*anchors, (x, y, p), rows.start, case.settings)
        part, part_stats, layout = torch_backend.forward(inputs)
        torch.testing.assert_close(part, loss[rows], rtol=1e-11, atol=1e-11, msg=str(case))
        torch.testing.assert_close(part_stats, stats[rows], rtol=1e-9, atol=1e-9, msg=str(case))
        part_gradient = torch_backend.backward(inputs, coef[rows], coef, layout)
        scale = max(gradient.abs().max().item(), 1.0)
        assert (part_gradient - gradient[rows]).abs().max() <= 1e-9 * scale, str(case)


@pytest.mark.parametrize(("n_components", "distance"), VECTOR_TIES)
def test_ties_beyond_the_reach_are_positives_and_negatives(n_components, distance, regime):
    for case in tie_cases(n_components, distance):
        assert_as_good_as_eager(torch_backend, case)


def counts(x, y, p, settings):
    anchors = torch_source.Source(x, torch_source.row_norms(x), y, p)
    how = How.of(settings, y)._replace(counts_negatives=True)
    if small.is_small(len(x), 0, how):
        sums, *_ = small.row_sums(anchors.as_given(), None, how)
    else:
        sums = torch_sweeps.row_sums(anchors, None, how)
    return sums["n"].tolist(), sums["m"].tolist()


def test_counts_equal_the_reference_as_integers_on_decimal_grids_with_ties(regime):
    """``n_i`` and ``m_i`` decide what is an anchor: 320 batches full of ties at the window."""
    for seed in range(320):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 160, (), generator=generator))
        n_components = 1 + (seed % 4 == 3)
        step, h = [(0.1, 0.2), (0.1, 0.3), (0.01, 0.07), (0.7, 1.4), (1.0, 1.0)][seed % 5]
        offset = [0.0, -2.0, 100.0][seed % 3]
        shape = (n, n_components)
        y = torch.randint(0, 25, shape, generator=generator).float() * step + offset
        p = torch.randint(0, 25, shape, generator=generator).float() * step + offset
        settings = Settings(h, 0.2, 0.01, PRESETS["paper"], ("mae", "rmse")[seed % 2])
        x = torch.randn(n, 3, generator=generator)
        _, positive, negative = reference.masks(y, p, y, p, 0, settings)
        n_i, m_i = counts(x, y, p, settings)
        assert n_i == positive.sum(1).tolist(), f"seed {seed}"
        assert m_i == negative.sum(1).tolist(), f"seed {seed}"


def test_negatives_count_where_their_pushing_weights_underflow_the_sums(regime):
    """Windows and distances near the smallest number: a sum of 0 is no proof of no negatives."""
    x, y = tiny_distances(4)
    x.requires_grad_()
    rest = dict(window=0.0, temperature=0.05)
    loss = conr_loss(x, y, 0 * y, backend="torch", **rest)
    assert loss > 1
    torch.testing.assert_close(loss, conr_loss(x, y, 0 * y, backend="reference", **rest))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("temperature", [0.2, 0.02])
def test_gradcheck_of_every_preset(preset, temperature, regime):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, 1.0, 2.0, 5.0, 5.0, 9.0, 1.5, 5.0, 1.0])
    p = torch.tensor([1.0, 5.0, 4.5, 1.2, 5.0, 5.0, 0.5, 1.0, 2.0])
    w = torch.rand(9, generator=generator, dtype=torch.float64)

    def loss(x):
        return conr_loss(
            x, y, p, w, temperature=temperature, push_scale=0.1, variant=preset,
            reduction="none", backend="torch",
        )  # fmt: skip

    assert (loss(x) != 0).sum() >= 5
    assert torch.autograd.gradcheck(loss, x)


def test_no_tile_holds_more_pairs_than_its_bound():
    """Whatever the bands: memory is O(N·D) and one tile."""
    generator = torch.Generator().manual_seed(0)
    for n, spread in ((2000, 1e-3), (3000, 100.0), (5000, 2.0)):
        y = spread * torch.rand(n, 1, generator=generator)
        for key_y in (None, torch.cat([y[:500], y])):
            banded = sweep.banded_sweep("positives", y, key_y, 1.0, "mae")
            n_keys = None if key_y is None else len(key_y)
            everything = sweep.dense_sweep(n, n_keys, y.device)
            for tiles in (torch_tiles.make_tiles(banded), torch_tiles.make_tiles(everything)):
                assert max(t.count * t.rows * t.width for t in tiles) <= torch_tiles.TILE_PAIRS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 700])
def test_the_layout_is_as_large_as_announced_where_the_keys_are_the_rows(n, dtype):
    settings = Settings(1.0, 0.2, 0.01, PRESETS["paper"], "mae")
    x, y = torch.randn(n, 4, dtype=dtype), torch.arange(float(n))[:, None] / 2
    for keys in (None, (x, y, y)):
        inputs = Inputs(x, y, y, None, keys, 0, settings)
        *_, layout = torch_backend.forward(inputs)
        assert len(layout) == torch_backend.layout_size(inputs)


def peak_bytes(run):
    """The most bytes that a call holds beyond what there was."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(n_bytes for _, n_bytes in changes))


@pytest.mark.parametrize(
    ("own", "further", "dtype", "forward", "backward"),
    [
        ("bands", None, torch.float32, 1, 2),  # q_i; q_i and the gradient
        ("bands", None, torch.bfloat16, 1.5, 2.5),  # and rows or the gradient in 16 bits
        ("all pairs", None, torch.float32, 1, 2),
        ("bands", "bands", torch.float32, 4, 3),  # and all keys, 2 N×D; q_j
        ("all pairs", "bands", torch.float32, 4, 3),
    ],
)
def test_sweeps_hold_few_copies_of_the_features(own, further, dtype, forward, backward):
    """In copies of N×D float32 numbers, beside one tile."""
    generator, n, D = torch.Generator().manual_seed(0), 2048, 2048

    def rows(regime):
        y = torch.rand(n, generator=generator) * (50 if regime == "bands" else 1)
        return torch.randn(n, D, generator=generator).to(dtype), y, y

    x, y, p = rows(own)
    x.requires_grad_()
    keys = None if further is None else rows(further)
    losses = []

    def step():
        losses.append(conr_loss(x, y, p, keys=keys, backend="torch"))

    copy, tile = 4 * n * D, 8 * 4 * torch_tiles.TILE_PAIRS
    assert peak_bytes(step) <= forward * copy + tile
    assert peak_bytes(losses[0].backward) <= backward * copy + tile


def test_four_functions_make_a_backend_that_serves_every_reduction(monkeypatch):
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = (torch.arange(64) % 7).float()

    def step(reduction: str) -> torch.Tensor:
        x.grad = None
        loss = conr_loss(x, y, y.flip(0), backend="torch", reduction=reduction)
        loss.sum().backward()
        return x.grad

    expected = {reduction: step(reduction) for reduction in ("mean", "sum", "none")}
    for name in ("reduces", "reduced", "reduced_gradient"):
        monkeypatch.delattr(torch_room, name)
    monkeypatch.setattr(ops, "_optional", ops._optional.__wrapped__)
    for reduction, gradient in expected.items():
        torch.testing.assert_close(step(reduction), gradient)
