"""The drop-ins: loss and gradient of the published formulas, written here as loops over pairs."""

import inspect
import math

import pytest
import torch

from conr_kernels import ConR, ConR_depth


def two_view_batch(n: int, d: int, seed: int, step: float = 1.0):
    """Features of two views, labels and predictions repeated: [2n, D], [2n, 1], in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, d, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 9, (n, 1), generator=generator).double() * step
    p = y + 2 * step * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    w = torch.rand(n, 1, generator=generator, dtype=torch.float64) + 0.1
    return x.requires_grad_(), y.repeat(2, 1), p.repeat(2, 1), w.repeat(2, 1)


def pair_sets(y, p, i, h):
    n = len(y)
    positives = [j for j in range(n) if j != i and abs(y[i] - y[j]) <= h]
    negatives = [j for j in range(n) if abs(y[i] - y[j]) > h and abs(p[i] - p[j]) <= h]
    return positives, negatives


def published_age_loss(x, y, p, h, w, tau, e):
    q = x / x.norm(dim=1, keepdim=True)
    y, p, w = y.flatten().tolist(), p.flatten().tolist(), w.flatten().tolist()
    total, n_anchors = x.sum() * 0, 0
    for i in range(len(x)):
        positives, negatives = pair_sets(y, p, i, h)
        if not positives or not negatives:
            continue
        n_anchors += 1
        s = {j: q[i] @ q[j] / tau for j in positives + negatives}
        Z = len(x) - len(positives)
        Z = Z + sum(s[j].exp() for j in positives)
        Z = Z + sum(w[i] * math.exp(e * abs(y[i] - y[j])) * s[j].exp() for j in negatives)
        rows = sum(-(s[j].exp() / Z).log() for j in positives)
        total = total + w[i] * rows / len(positives)
    assert n_anchors > len(x) // 4
    return total / len(x)


def published_depth_loss(x, y, p, h, w, tau, e):
    q = x / x.norm(dim=1, keepdim=True)
    y, p, w = y.flatten().tolist(), p.flatten().tolist(), w.flatten().tolist()
    total, n_anchors = x.sum() * 0, 0
    for i in range(len(x)):
        positives, negatives = pair_sets(y, p, i, h)
        if not positives or not negatives:
            continue
        n_anchors += 1
        s = {j: q[i] @ q[j] / tau for j in positives + negatives}
        Z = len(x) - len(positives)
        Z = Z + sum(s[j].exp() for j in positives)
        Z = Z + sum(e * w[i] * abs(y[i] - y[j]) * s[j].exp() for j in negatives)
        rows = sum(-(s[j].exp() / Z).log() for j in positives)
        total = total + rows / (len(positives) + 1)
    assert n_anchors > len(x) // 4
    return total / len(x)


def assert_equal_to_float64_rounding(loss, expected, x):
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    assert loss.dtype == torch.float64 and gradient.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    scale = expected_gradient.abs().max()
    assert scale > 0
    assert (gradient - expected_gradient).abs().max() <= 2e-13 * scale


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [9, 31])
def test_age_drop_in_equals_the_published_formula(n, seed):
    x, y, p, w = two_view_batch(n, 7, seed)
    expected = published_age_loss(x, y, p, 1, w, 0.07, 0.01)
    assert_equal_to_float64_rounding(ConR(x, y, p, 1, w), expected, x)


@pytest.mark.parametrize(("h", "tau", "e"), [(2.0, 0.2, 0.3), (0.5, 0.05, 0.0), (1.0, 1.0, -0.1)])
def test_age_drop_in_honours_its_arguments_in_the_published_order(h, tau, e):
    x, y, p, w = two_view_batch(21, 5, 1)
    expected = published_age_loss(x, y, p, h, w, tau, e)
    assert_equal_to_float64_rounding(ConR(x, y, p, h, w, tau, e), expected, x)


def test_age_drop_in_has_the_published_defaults():
    x, y, p, _ = two_view_batch(17, 5, 2)
    expected = published_age_loss(x, y, p, 1, torch.ones(34), 0.07, 0.01)
    assert_equal_to_float64_rounding(ConR(x, y, p), expected, x)
    assert list(inspect.signature(ConR).parameters) == [
        "features",
        "targets",
        "preds",
        "w",
        "weights",
        "t",
        "e",
    ]


@pytest.mark.parametrize("seed", range(4))
def test_depth_drop_in_equals_the_published_formula_on_row_means(seed):
    x, y, p, w = two_view_batch(15, 2 * 3 * 4, seed, step=0.2)
    generator = torch.Generator().manual_seed(seed)
    # Pixels of a power of two that average to the row's label, prediction and weight.
    pixels = torch.randn(30, 1, 4, 4, generator=generator, dtype=torch.float64)
    depth, output, weights = (t[:, :, None, None] + pixels for t in (y, p, w))
    y, p, w = (t.flatten(1).mean(1) for t in (depth, output, weights))
    feature = x.view(30, 2, 3, 4)
    expected = published_depth_loss(x, y, p, 0.2, w, 0.07, 0.2)
    assert_equal_to_float64_rounding(ConR_depth(feature, depth, output, weights), expected, x)
    expected = published_depth_loss(x, y, p, 0.4, w, 0.1, 0.5)
    loss = ConR_depth(feature, depth, output, weights, 0.4, 0.1, 0.5)
    assert_equal_to_float64_rounding(loss, expected, x)


def test_depth_drop_in_takes_any_rank_and_dtype():
    names = ["feature", "depth", "output", "weights", "w", "t", "e"]
    assert list(inspect.signature(ConR_depth).parameters) == [*names, "mask"]  # that by name alone
    x, y, p, w = (t.detach().float() for t in two_view_batch(15, 6, 0, step=0.2))
    expected = ConR_depth(x, y, p, w)
    assert expected > 0 and expected.dtype == torch.float32
    for shape in ((30,), (30, 1), (30, 1, 1, 1)):
        labels = (t.reshape(shape) for t in (y, p, w))
        assert torch.equal(ConR_depth(x.view(30, 1, 2, 3), *labels), expected)
    assert torch.equal(ConR_depth(x, y, p, 0.5), ConR_depth(x, y, p, torch.full((30,), 0.5)))
    assert torch.equal(ConR_depth(x, y, p, torch.tensor(0.5)), ConR_depth(x, y, p, 0.5))
    # 16-bit maps are averaged in float32: 64 × 64 pixels of 2.001 stay distinguishable.
    maps = y.half()[:, :, None, None].expand(30, 1, 64, 64)
    assert torch.equal(ConR_depth(x, maps, p, w), ConR_depth(x, y.half(), p, w))
    whole = torch.arange(30).view(30, 1) % 4
    assert torch.equal(
        ConR_depth(x, whole, whole, w), ConR_depth(x, whole.float(), whole.float(), w)
    )
    assert ConR_depth(x[:0], y[:0], p[:0], w[:0]) == 0


def test_labels_of_one_column_and_of_none_mean_the_same():
    # The published function returned 0.0 for labels of shape (N,).
    x, y, p, w = two_view_batch(15, 6, 3)
    column, flat = ConR(x, y, p, 1, w), ConR(x, y[:, 0], p[:, 0], 1, w[:, 0])
    assert column > 0 and torch.equal(column, flat)


def test_an_anchor_without_positives_contributes_nothing():
    # The published function returned NaN for the whole batch.
    x, y, p, w = two_view_batch(15, 6, 3)
    alone = torch.full((1, 1), 100.0, dtype=torch.float64)
    x_more = torch.cat([x, torch.ones(1, 6, dtype=torch.float64)])
    y_more, p_more = torch.cat([y, alone]), torch.cat([p, p[:1]])
    w_more = torch.cat([w, alone])
    expected = published_age_loss(x_more, y_more, p_more, 1, w_more, 0.07, 0.01)
    assert_equal_to_float64_rounding(ConR(x_more, y_more, p_more, 1, w_more), expected, x)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(depth=[1.0]), TypeError, "depth must be a Tensor, got list"),
        (dict(output=torch.ones(8, dtype=torch.bool)), TypeError, "output must .* torch.bool"),
        (dict(output=torch.ones(7, 2)), ValueError, r"output must have N = 8 .*\(7, 2\)"),
        (dict(weights=torch.ones(4)), ValueError, r"weights must have N = 8 .*\(4,\)"),
        (dict(weights="1"), TypeError, "weights"),
        (dict(depth=torch.ones(8, 0)), ValueError, r"depth must have .*\(8, 0\)"),
        (
            dict(mask=torch.ones(8, 4, dtype=torch.bool)),
            ValueError,
            r"mask must have the shape of depth \(8,\), got \(8, 4\)",
        ),
        (dict(feature=torch.ones(8, 2).to_sparse()), TypeError, "feature must be a dense"),
        (dict(t=0.0), ValueError, "t must be finite and > 0, got 0.0"),
    ],
)
def test_depth_drop_in_names_bad_input(change, error, text):
    good = dict(
        feature=torch.ones(8, 2), depth=torch.ones(8), output=torch.ones(8), weights=torch.ones(8)
    )
    with pytest.raises(error, match=text):
        ConR_depth(**{**good, **change})
