"""``mask=`` with ``group=``: rows that take no part on any rank, and ranks without a mask."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from conr_kernels import MemoryBank, conr_loss
from conr_kernels.large_batch import union

from .rows import UNEVEN, make_rows, part


def check_mask(group: dist.ProcessGroup) -> str:
    """The union's value and gradient are those of the union filtered by all ranks' masks, also
    where the first rank has labels at which the others' absent rows would be out of reach of
    their own rank's.
    """
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    sizes = UNEVEN[n_ranks]
    rows, keys = make_rows(sum(sizes), 3, torch.float64), make_rows(9, 4, torch.float64)[:3]
    rows[1][: sizes[0], 0] = rows[2][: sizes[0], 0] = 85.0 + 2 * (torch.arange(sizes[0]) // 2)
    mask = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(1)) < 0.6
    mask[: sizes[0]] = True  # the first rank brings none
    holes = [t.masked_fill(~mask.view(-1, *(1,) * (t.dim() - 1)), torch.nan) for t in rows]
    variants = ("paper", "released-depth", "contrastive")
    shared_rows = union.SHARED_ROWS
    for variant, backend, with_keys in itertools.product(
        variants, ("shared", "torch", "reference"), (False, True)
    ):
        union.SHARED_ROWS = 1 if backend == "shared" else 10**9
        options = dict(variant=variant, backend=backend.replace("shared", "torch"))
        own = [t.clone() for t in part(holes, sizes, rank)]
        own[0].requires_grad_()
        own_keys = [t[rank::n_ranks] for t in keys] if with_keys else None
        own_mask = None if rank == 0 and n_ranks > 1 else part([mask], sizes, rank)[0]
        try:
            loss = conr_loss(*own, **options, keys=own_keys, mask=own_mask, group=group)
            (gradient,) = torch.autograd.grad(loss, own[0])
        finally:
            union.SHARED_ROWS = shared_rows

        whole = [t[mask].clone() for t in rows]
        whole[0].requires_grad_()
        all_keys = [torch.cat([t[r::n_ranks] for r in range(n_ranks)]) for t in keys]
        options["backend"] = "reference"
        expected = conr_loss(*whole, **options, keys=all_keys if with_keys else None)
        (of_present,) = torch.autograd.grad(expected, whole[0])
        of_rows = torch.zeros_like(rows[0])
        of_rows[mask] = of_present * n_ranks
        message = f"{variant}, {backend}, {'with' if with_keys else 'no'} keys"
        for got, right in ((loss, expected), (gradient, part([of_rows], sizes, rank)[0])):
            torch.testing.assert_close(
                got, right, rtol=1e-9, atol=1e-11, msg=lambda text, m=message: f"{m}: {text}"
            )
    return ""


def check_masked_banks(group: dist.ProcessGroup) -> str:
    """The union's value and gradient are those with a bank of the rows of all ranks' banks that
    take part; the first of several has no mask.
    """
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    sizes = UNEVEN[n_ranks]
    rows, keys = make_rows(sum(sizes), 3, torch.float64), make_rows(24, 4, torch.float64)[:3]
    of_rank = torch.arange(24) % n_ranks
    mask = torch.rand(24, generator=torch.Generator().manual_seed(1)) < 0.6
    if n_ranks > 1:
        mask |= of_rank == 0
    holes = [t.masked_fill(~mask[:, None], torch.nan) for t in keys]
    shared_rows = union.SHARED_ROWS
    for variant, backend in itertools.product(
        ("paper", "released-depth", "contrastive"), ("shared", "torch", "reference")
    ):
        union.SHARED_ROWS = 1 if backend == "shared" else 10**9
        options = dict(variant=variant, backend=backend.replace("shared", "torch"))
        bank = MemoryBank(30, 6, dtype=torch.float64)
        own_mask = None if rank == 0 and n_ranks > 1 else mask[of_rank == rank]
        bank.push(*(t[of_rank == rank] for t in holes), own_mask)
        own = [t.clone() for t in part(rows, sizes, rank)]
        own[0].requires_grad_()
        try:
            loss = conr_loss(*own, **options, keys=bank, group=group)
            (gradient,) = torch.autograd.grad(loss, own[0])
        finally:
            union.SHARED_ROWS = shared_rows

        whole = [t.clone() for t in rows]
        whole[0].requires_grad_()
        options["backend"] = "reference"
        expected = conr_loss(*whole, **options, keys=[t[mask] for t in keys])
        (of_rows,) = torch.autograd.grad(expected, whole[0])
        right = part([of_rows * n_ranks], sizes, rank)[0]
        for got, wanted in ((loss, expected), (gradient, right)):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    return ""
