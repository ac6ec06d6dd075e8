"""Checks of ``group=``: what ranks tell one another, and what they refuse together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from conr_kernels import conr_loss
from conr_kernels.large_batch import agreement, ranks

from .rows import expect, make_rows


def check_disagreements(group: dist.ProcessGroup) -> str:
    """Different shapes, types and settings raise on every rank and name ranks and values."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    if n_ranks == 1:
        return ""
    is_last = rank == n_ranks - 1
    x, y, p, w = make_rows(5, rank, torch.float32)
    wide = torch.cat([x, x], dim=1)
    twice = torch.cat([y, y], dim=1)
    cases = {
        "D": (lambda: conr_loss(wide if is_last else x, y, p, group=group), "12"),
        "L": (
            lambda: conr_loss(x, *((twice, twice) if is_last else (y, p)), group=group),
            "2",
        ),
        "features' dtype": (
            lambda: conr_loss(x.bfloat16() if is_last else x, y, p, group=group),
            "torch.bfloat16",
        ),
        "labels' dtype for comparison": (
            lambda: conr_loss(x, y.double() if is_last else y, p, group=group),
            "torch.float64",
        ),
        "predictions' dtype for comparison": (
            lambda: conr_loss(x, y, p.double() if is_last else p, group=group),
            "torch.float64",
        ),
        "features require a gradient": (
            lambda: conr_loss(x.clone().requires_grad_(is_last), y, p, group=group),
            "True",
        ),
    }
    for name, ordinary, odd in (
        ("window", 1.0, 2.0),
        ("temperature", 0.2, 0.25),
        ("push_scale", 0.01, 0.5),
        ("variant", "paper", "contrastive"),
        ("distance", "mae", "rmse"),
        ("reduction", "mean", "sum"),
        ("backend", "auto", "reference"),
    ):
        options = {name: odd if is_last else ordinary}
        cases[name] = (
            lambda options=options: conr_loss(x, y, p, group=group, **options),
            "outside,none,all" if name == "variant" else str(odd),
        )
    for name, (call, value) in cases.items():
        message = expect(ValueError, call)
        assert f"{name} is " in message, message
        assert f"{value}" in message and f"on rank {n_ranks - 1}" in message, message
    conr_loss(x, y, p, w, group=group)
    return f"{len(cases)} disagreements"


def check_bad_input_on_one_rank(group: dist.ProcessGroup) -> str:
    """The rank with bad input raises its own error, every other one a ValueError: nobody waits."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    x, y, p, w = make_rows(5, rank, torch.float32)
    bad = n_ranks - 1
    for error, call in (
        (TypeError, lambda: conr_loss(x.long() if rank == bad else x, y, p, group=group)),
        (ValueError, lambda: conr_loss(x, y[:2] if rank == bad else y, p, group=group)),
        (ValueError, lambda: conr_loss(x, y, p, window=-1.0 if rank == bad else 1.0, group=group)),
        (ValueError, lambda: conr_loss(x, y, p, 10**400 if rank == bad else 1.0, group=group)),
        (ArithmeticError, lambda: conr_loss(x, y, p, Odd(1) if rank == bad else 1.0, group=group)),
        (RuntimeError, lambda: run_unavailable(x, y, p, rank == bad, group)),
    ):
        message = expect(error if rank == bad else ValueError, call)
        if rank != bad:
            assert f"rank {bad}: {error.__name__}: " in message, message
    conr_loss(x, y, p, w, group=group)
    return ""


class Odd(float):
    """A number with an error of its own, which no check foresees."""

    def __float__(self) -> float:
        raise ArithmeticError("not a number at all")


def run_unavailable(
    x: Tensor, y: Tensor, p: Tensor, is_bad: bool, group: dist.ProcessGroup
) -> Tensor:
    return conr_loss(x, y, p, backend="cuda" if is_bad else "torch", group=group)


def check_traffic(group: dist.ProcessGroup) -> str:
    """(N·D + O(N)) elements arrive at a rank; nothing is reduced."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    n, D, N = 1024, 64, 1024 * n_ranks
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(n, D, generator=g, requires_grad=True)
    y = torch.randint(0, 60, (n,), generator=g).float()
    received = {"forward": 0, "backward": 0}
    direction = "forward"

    class Counting:
        def __getattr__(self, name: str) -> object:
            function = getattr(dist, name)
            if name in ("all_reduce", "reduce_scatter_tensor"):
                raise AssertionError(f"{name} was called")
            gathers = ("all_gather_single", "all_gather_into_tensor", "broadcast")
            if name not in (*gathers, "all_to_all_single"):
                return function

            def counted(out: Tensor, *args: object, **kwargs: object) -> object:
                received[direction] += out.numel() * out.itemsize
                return function(out, *args, **kwargs)

            return counted

    agreement.dist = ranks.dist = Counting()
    try:
        loss = conr_loss(x, y, y + torch.randn(n, generator=g), group=group)
        direction = "backward"
        loss.backward()
    finally:
        agreement.dist = ranks.dist = dist
    header = 8 * agreement.HEADER_NUMBERS + agreement.TEXT_BYTES
    if n_ranks > 1:
        sums = 8 * 3 * N  # of the rows' exponentials and positives, as float64
        # Of a row its unit features, label, prediction and norm; of a rank its loss.
        assert received["forward"] == 4 * (N * D + 3 * N + n_ranks) + header * n_ranks + sums
        assert received["backward"] == 4 * 3 * N
    return (
        f"{n_ranks} ranks, N = {N}, D = {D}, float32: {received['forward']} bytes forward "
        f"(N·D is {4 * N * D}), {received['backward']} backward (3 floats a row)"
    )
