"""Checks of ``group=``: values and gradients are the union's, in every way of computing them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from conr_kernels import conr_loss
from conr_kernels.large_batch import union
from conr_kernels.torch_backend import shared as torch_shared
from conr_kernels.torch_backend import sweeps as torch_sweeps
from conr_kernels.torch_backend import tiles as torch_tiles

from .rows import EVEN, UNEVEN, expect, make_rows, part, tiny_distances


def check_union(group: dist.ProcessGroup) -> str:
    """Values and gradients are the union's, whatever the sizes, reduction, keys, backend and
    variant.
    """
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    cases = [
        (sizes, keys, reduction, backend, options)
        for sizes in (UNEVEN[n_ranks], EVEN[n_ranks], [0] * n_ranks)
        for keys in (None, [3 * r for r in range(n_ranks)])
        for reduction, backend, options in (
            ("mean", "torch", {}),
            ("sum", "reference", dict(variant="released-depth")),
            ("none", "torch", dict(variant="released-age", distance="rmse")),
            ("none", "reference", dict(variant="contrastive", temperature=0.02)),
            ("sum", "torch", dict(temperature=0.01, push_scale=0.5)),
            ("mean", "torch", dict(variant="contrastive")),
        )
    ]
    for number, (sizes, key_sizes, reduction, backend, options) in enumerate(cases):
        L = 2 if "distance" in options else 1
        rows = make_rows(sum(sizes), number, torch.float64, L)
        keys = None if key_sizes is None else make_rows(sum(key_sizes), 99, torch.float64, L)[:3]
        options = dict(options, reduction=reduction)
        g = (
            torch.linspace(0.5, 1.5, sum(sizes)).double()
            if reduction == "none"
            else torch.tensor(1.7)
        )

        x = rows[0].clone().requires_grad_()
        expected = conr_loss(x, *rows[1:], keys=keys, backend="reference", **options)
        expected.backward(g.expand_as(expected))

        mine = part(rows, sizes, rank)
        my_keys = None
        if keys is not None and key_sizes[rank] > 0:
            my_keys = tuple(part(keys, key_sizes, rank))
        x_mine = mine[0].clone().requires_grad_()
        loss = conr_loss(x_mine, *mine[1:], keys=my_keys, backend=backend, group=group, **options)
        if reduction == "none":
            expected, g = part([expected, g], sizes, rank)
        loss.backward(g.expand_as(loss))
        message = f"case {number}: {sizes} {key_sizes} {backend} {options}"
        torch.testing.assert_close(loss, expected, msg=lambda m, at=message: f"{at}: {m}")
        torch.testing.assert_close(
            x_mine.grad,
            n_ranks * part([x.grad], sizes, rank)[0],
            msg=lambda m, at=message: f"{at}: {m}",
        )
    return f"{len(cases)} cases on {n_ranks} ranks"


def check_union_of_some_ranks(group: dist.ProcessGroup) -> str:
    """The same of a group whose ranks have other numbers than in the default group."""
    if dist.get_world_size(group) < 4:
        return ""
    some, rank = dist.new_group([1, 3]), dist.get_rank(group)
    return check_union(some) + check_same_bits(some) if rank in (1, 3) else ""


def check_union_in_shares(group: dist.ProcessGroup) -> str:
    """The same where every rank takes a share of the pairs forward, down to a few rows."""
    changed = ((union, "SHARED_ROWS", 1), (torch_tiles, "BLOCK_I", 2),
               (torch_tiles, "TILE_PAIRS", 64), (torch_tiles, "TILE_COST", 4))  # fmt: skip
    saved = [getattr(module, name) for module, name, _ in changed]
    dense_share = torch_sweeps.DENSE_SHARE
    shares, layouts = [], []

    def counted(*args: object, of: Callable = torch_shared.union_sweeps) -> tuple:
        shares.append(args[-1])
        return of(*args)

    def unpacked(*args: object, of: Callable = torch_shared.unpack_sweeps, **options) -> list:
        layouts.append(args[0])
        return of(*args, **options)

    plain = torch_shared.union_sweeps, torch_shared.unpack_sweeps
    torch_shared.union_sweeps, torch_shared.unpack_sweeps = counted, unpacked
    try:
        for module, name, value in changed:
            setattr(module, name, value)
        text = check_union(group) + check_same_bits(group) + check_dtypes(group)
        for share in (-1, 9):  # one sweep over all pairs, and never
            torch_sweeps.DENSE_SHARE = share
            check_union(group)
        torch_sweeps.DENSE_SHARE = dense_share
        check_second_derivative(group)
        check_not_finite(group)
        check_dtypes_of_labels(group)
        check_smallest_window(group)
    finally:
        torch_sweeps.DENSE_SHARE = dense_share
        torch_shared.union_sweeps, torch_shared.unpack_sweeps = plain
        for (module, name, _), value in zip(changed, saved, strict=True):
            setattr(module, name, value)
    n_ranks = dist.get_world_size(group)
    assert not shares if n_ranks == 1 else set(shares) == {(dist.get_rank(group), n_ranks)}
    assert bool(layouts) == (n_ranks > 1), "backward found the pairs again"
    return text


def check_dtypes_of_labels(group: dist.ProcessGroup) -> str:
    """Labels and predictions are compared each in its own dtype: ties at the window tell."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    n = 60
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n * n_ranks, 5, generator=g)
    y, p = (torch.randint(0, 20, (n * n_ranks,), generator=g).double() / 10 for _ in range(2))
    losses = []
    for labels in ((y, p.float()), (y.float(), p), (y.float(), p.float()), (y, p)):
        rows, mine = (x, *labels), part([x, *labels], [n] * n_ranks, rank)
        results = []
        for (features, *rest), of in ((rows, None), (mine, group)):
            features = features.clone().requires_grad_()
            loss = conr_loss(features, *rest, window=0.2, backend="torch", group=of)
            loss.backward()
            results.append((loss.detach(), features.grad))
        (expected, gradient), (loss, own_gradient) = results
        torch.testing.assert_close(loss, expected)
        own = n_ranks * part([gradient], [n] * n_ranks, rank)[0]
        torch.testing.assert_close(own_gradient, own, rtol=1e-4, atol=1e-6)
        losses.append(expected.item())
    assert len(set(losses)) > 1, "no tie tells the dtypes apart"
    return ""


def check_smallest_window(group: dist.ProcessGroup) -> str:
    """Negatives count also where their pushing weights underflow the sums."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    x, y = tiny_distances(n_ranks)
    expected = conr_loss(x, y, 0 * y, window=0.0, temperature=0.05, backend="reference")
    x, y = part([x, y], [6] * n_ranks, rank)
    loss = conr_loss(x, y, 0 * y, window=0.0, temperature=0.05, group=group)
    torch.testing.assert_close(loss, expected)
    return ""


def check_same_bits(group: dist.ProcessGroup) -> str:
    """Every rank has the same bits of the loss, and every run of it."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    rows = make_rows(sum(UNEVEN[n_ranks]), 5, torch.float32)
    runs = []
    for _ in range(2):
        x, *rest = part(rows, UNEVEN[n_ranks], rank)
        x.requires_grad_()
        loss = conr_loss(x, *rest, group=group)
        loss.backward(retain_graph=True)
        first = x.grad.clone()
        x.grad = None
        loss.backward()
        assert torch.equal(first, x.grad)
        runs.append((loss.detach(), first))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    losses = [torch.empty(()) for _ in range(n_ranks)]
    dist.all_gather(losses, runs[0][0], group=group)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    return ""


def check_dtypes(group: dist.ProcessGroup) -> str:
    """16-bit features travel in 16 bits; the union's value is the one process's, no_grad too."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    for dtype in (torch.bfloat16, torch.float16):
        rows = make_rows(sum(UNEVEN[n_ranks]), 6, torch.float32)
        rows[0] = rows[0].to(dtype)
        x = rows[0].clone().requires_grad_()
        expected = conr_loss(x, *rows[1:])
        expected.backward()
        mine = part(rows, UNEVEN[n_ranks], rank)
        with torch.no_grad():
            torch.testing.assert_close(conr_loss(*mine, group=group), expected)
        x_mine = mine[0].clone().requires_grad_()
        conr_loss(x_mine, *mine[1:], group=group).backward()
        own = n_ranks * part([x.grad], UNEVEN[n_ranks], rank)[0]
        assert own.numel() == 0 or own.abs().max() > 1e-3
        torch.testing.assert_close(x_mine.grad, own, rtol=0.02, atol=1e-4)
    return ""


def check_second_derivative(group: dist.ProcessGroup) -> str:
    """The fused backends refuse it; the reference gives the union's."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    rows = make_rows(sum(EVEN[n_ranks]), 7, torch.float64)
    second = {}
    for of in ("union", "mine"):
        x, *rest = rows if of == "union" else part(rows, EVEN[n_ranks], rank)
        x = x.clone().requires_grad_()
        loss = conr_loss(x, *rest, backend="reference", group=None if of == "union" else group)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (second[of],) = torch.autograd.grad((grad**2).sum(), x)
    mine = part([second["union"]], EVEN[n_ranks], rank)[0]
    # Twice times the ranks from the first derivative, once from the second.
    torch.testing.assert_close(second["mine"], n_ranks**3 * mine)

    x, *rest = part(rows, EVEN[n_ranks], rank)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(conr_loss(x, *rest, group=group), x, create_graph=True)
    raised = expect(RuntimeError, lambda: torch.autograd.grad(grad.sum(), x))
    assert 'backend="reference"' in raised
    return ""


def check_not_finite(group: dist.ProcessGroup) -> str:
    """A NaN on one rank shows on all of them."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    for column in range(4):
        rows = make_rows(8, rank, torch.float32)
        if rank == n_ranks - 1:
            rows[column].view(-1)[3] = torch.nan
        x = rows[0].requires_grad_()
        loss = conr_loss(*rows, group=group)
        assert loss.isnan(), column
        loss.backward()
        if rank == n_ranks - 1:
            assert not x.grad.isfinite().all(), column
    for column in range(3):
        rows, keys = (make_rows(8, rank + seed, torch.float32) for seed in (0, 9))
        if rank == n_ranks - 1:
            keys[column].view(-1)[3] = torch.nan
        assert conr_loss(*rows, keys=tuple(keys[:3]), group=group).isnan(), f"key {column}"
    rows = make_rows(8, rank, torch.float32)
    rows[1][5], rows[2][5] = 1000.0, -1000.0  # without pairs
    x = rows[0].requires_grad_()
    g = torch.ones(8)
    g[5] = torch.inf
    conr_loss(*rows, reduction="none", group=group).backward(g)
    assert not x.grad[5].isfinite().any(), "upstream"
    return ""
