"""Batches with structure for tests of any backend: ties, empty sets, rare labels, odd sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conr_kernels.variants import PRESETS, Settings

ODD_SIZES = (1, 2, 3, 31, 33, 64, 65, 127, 129, 257)
TEMPERATURES = (0.07, 0.2, 0.5, 0.02)


@dataclass(frozen=True)
class Case:
    """One batch in float64 with float32 labels, and the settings of one call."""

    name: str
    x: Tensor
    y: Tensor
    p: Tensor
    w: Tensor
    settings: Settings

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.y, self.p, self.w


def labels(kind: str, n: int, n_components: int, generator: torch.Generator) -> Tensor:
    """[N, L] float32: a kind of label distribution in units of a window of about 1."""
    shape = (n, n_components)
    if kind == "ages":  # integers with many ties
        return torch.randint(0, 40, shape, generator=generator).float()
    if kind == "grid":  # decimal grid: differences that binary fractions do not hold
        return torch.randint(0, 30, shape, generator=generator).float() / 10
    if kind == "real":
        return 5 * torch.randn(shape, generator=generator)
    if kind == "rare":  # one value almost everywhere, far ones seldom
        is_rare = torch.rand(shape, generator=generator) < 0.1
        return torch.where(is_rare, 20 * torch.rand(shape, generator=generator), 3.0)
    if kind == "constant":
        return torch.full(shape, 7.0)
    assert kind == "distinct"  # no positives
    return 3 * torch.arange(n * n_components).view(shape).float()


LABEL_KINDS = ("ages", "grid", "real", "rare", "constant", "distinct")
PREDICTION_KINDS = ("near", "collapsed", "far", "same")


def predictions(kind: str, y: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "near":
        return y + torch.randn(y.shape, generator=generator).mul(20).round().div(10)
    if kind == "collapsed":
        return torch.full_like(y, 5.0)
    if kind == "far":  # no negatives
        return 100 * torch.arange(y.numel()).view(y.shape).float()
    return y.clone()


def structured_cases(count: int, max_size: int = 257, seed: int = 0) -> Iterator[Case]:
    """``count`` different combinations, every preset and every kind of labels in turn."""
    kinds = itertools.cycle(itertools.product(LABEL_KINDS, PREDICTION_KINDS))
    sizes = itertools.cycle([n for n in ODD_SIZES if n <= max_size])
    for number, (preset, (y_kind, p_kind), n) in enumerate(
        zip(itertools.cycle(PRESETS), kinds, sizes, strict=False)
    ):
        if number == count:
            return
        generator = torch.Generator().manual_seed(seed + number)
        d = (1, 2, 7, 16, 33)[number % 5]
        n_components = (1, 1, 1, 2, 3)[number // 3 % 5]
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        if number % 4 == 1:
            x[:: max(n // 3, 1)] = 0  # zero rows
        y = labels(y_kind, n, n_components, generator)
        p = predictions(p_kind, y, generator)
        w = torch.rand(n, generator=generator, dtype=torch.float64) * 3
        if number % 3 == 0:
            w[torch.rand(n, generator=generator) < 0.3] = 0
        settings = Settings(
            window=(1.0, 0.2, 0.5, 2.0)[number // 2 % 4],
            temperature=TEMPERATURES[number % 4],
            push_scale=(0.01, 0.2, 1.0)[number % 3],
            variant=PRESETS[preset],
            distance=("mae", "rmse")[number // 7 % 2],
        )
        name = f"{number}: {preset}, N={n}, D={d}, L={n_components}, {y_kind}, {p_kind}"
        yield Case(name, x, y, p, w, settings)
