"""Rows of a union of ranks, and what a check of them asserts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

UNEVEN = {1: [37], 2: [25, 12], 4: [20, 0, 5, 12]}
EVEN = {1: [36], 2: [18, 18], 4: [9, 9, 9, 9]}


def make_rows(n_rows: int, seed: int, dtype: torch.dtype, n_labels: int = 1) -> list[Tensor]:
    """Features, labels on a grid with ties, predictions and weights."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 12, (n_rows, n_labels), generator=g).to(dtype)
    p = y + 2 * torch.randn(n_rows, n_labels, generator=g).to(dtype)
    w = 0.5 + torch.rand(n_rows, generator=g).to(dtype)
    return [torch.randn(n_rows, 6, generator=g).to(dtype), y, p, w]


def part(rows: list[Tensor], sizes: list[int], rank: int) -> list[Tensor]:
    start = sum(sizes[:rank])
    return [t[start : start + sizes[rank]] for t in rows]


def tiny_distances(n: int) -> tuple[Tensor, Tensor]:
    """Features and labels [6n] with label distances near the smallest float32 number."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
    y = torch.tensor([0.0, 0.0, 0.0, 1e-38, 1e-38, 1e-38])
    return torch.cat([x, -x]).repeat(n, 1), y.repeat(n)


def expect(error: type[Exception], call: Callable[[], object]) -> str:
    start = time.perf_counter()
    try:
        call()
    except error as raised:
        took = time.perf_counter() - start
        assert took < 5, f"raised after {took:.1f} s"
        return str(raised)
    raise AssertionError(f"no {error.__name__}")
