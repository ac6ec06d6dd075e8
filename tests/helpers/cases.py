"""Batches with structure for tests of any backend: ties, empty sets, rare labels, odd sizes; drawn
so that any two settings meet.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conr_kernels.reference import pair_distance
from conr_kernels.variants import PRESETS, PUSHINGS, Settings, Variant

#: The presets, variants with which any two of the flags meet, and pushing weights of neither.
VARIANTS = {
    **PRESETS,
    "outside-exponential": Variant("outside", "exponential", "all", True, False, True),
    "outside-weight": Variant("outside", "weight", "all", True, False, False),
    "inside-weight": Variant("inside", "weight", "all", False, True, True),
    "inside-distance": Variant("inside", "distance", "confused", False, False, False),
}
VARIANTS |= {
    name: Variant(pushing=name)
    for name in PUSHINGS
    if all(name != variant.pushing for variant in VARIANTS.values())
}
LABEL_KINDS = ("ages", "grid", "real", "rare")
PREDICTION_KINDS = ("near", "collapsed", "shuffled")
KINDS = tuple(itertools.product(LABEL_KINDS, PREDICTION_KINDS))
#: Kinds of labels and predictions that leave sets empty: no negatives, no positives, hardly a row.
EMPTY_KINDS = (
    ("constant", "near"), ("distinct", "collapsed"), ("ages", "far"), ("ages", "same"),
    ("few", "collapsed"),
)  # fmt: skip
FACTORS: dict[str, Sequence[Any]] = dict(
    variant=tuple(VARIANTS),
    kind=KINDS,
    n=(31, 33, 64, 65, 127, 129, 257),
    d=(1, 2, 7, 16, 33),
    n_components=(1, 2, 3),
    distance=("mae", "rmse"),
    window=(1.0, 0.2, 0.5, 2.0),
    temperature=(0.2, 0.07, 0.5, 0.02),
    push_scale=(0.01, 0.2, 1.0),
    weights=("random", "zeros", "none"),
    zero_rows=(False, True),
)


def cover(
    factors: Mapping[str, Sequence[Any]], seed: int = 0, only: str | None = None
) -> Iterator[dict[str, Any]]:
    """Few choices of one value for each factor, among which any two values of two factors meet;
    ``only``: any value of this one factor and of another.
    """
    draw = random.Random(seed)
    unmet = {
        frozenset(pair)
        for (a, of_a), (b, of_b) in itertools.combinations(factors.items(), 2)
        if only in (None, a, b)
        for pair in itertools.product(((a, u) for u in of_a), ((b, v) for v in of_b))
    }
    for first in draw.sample(sorted(unmet, key=lambda pair: sorted(map(repr, pair))), len(unmet)):
        if first not in unmet:
            continue
        chosen = dict(first)
        others = [name for name in factors if name not in chosen]
        for name in draw.sample(others, len(others)):
            values = draw.sample(list(factors[name]), len(factors[name]))
            gains = [
                sum(frozenset(((name, value), other)) in unmet for other in chosen.items())
                for value in values
            ]
            chosen[name] = values[gains.index(max(gains))]
        unmet -= set(map(frozenset, itertools.combinations(chosen.items(), 2)))
        yield {name: chosen[name] for name in factors}


@dataclass(frozen=True)
class Case:
    """One batch in float64 with float32 labels, and the settings of one call."""

    choice: dict[str, Any]
    x: Tensor
    y: Tensor
    p: Tensor
    w: Tensor | None
    settings: Settings

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.x, self.y, self.p, self.w

    def weights(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.w is None else self.w.to(dtype)

    def __str__(self) -> str:
        return "-".join(map(str, self.choice.values()))


def labels(kind: str, n: int, n_components: int, generator: torch.Generator) -> Tensor:
    """[N, L] float32: a kind of label distribution in units of a window of about 1. Components
    beyond the first are equal to it or a step above, so that there are positives.
    """

    def step(of: Tensor, size: float) -> Tensor:
        shape = (n, n_components - 1)
        above = torch.randint(0, 2, shape, generator=generator) * size
        return torch.cat([of, of + above], dim=1)

    shape = (n, 1)
    if kind == "ages":  # integers with many ties
        return step(torch.randint(0, 40, shape, generator=generator).float(), 1.0)
    if kind == "grid":  # decimal grid: differences that binary fractions do not hold
        whole = torch.randint(0, 30, shape, generator=generator)
        return step(whole.float(), 1.0) / 10
    if kind == "real":
        return step(5 * torch.randn(shape, generator=generator), 0.25)
    if kind == "rare":  # one value almost everywhere, far ones seldom
        is_rare = torch.rand(shape, generator=generator) < 0.1
        far = 20 * torch.rand(shape, generator=generator)
        return step(torch.where(is_rare, far, 3.0), 0.25)
    if kind == "constant":
        return torch.full((n, n_components), 7.0)
    if kind == "few":
        return torch.tensor([0.0, 0.0, 5.0])[:n, None].expand(n, n_components).contiguous()
    assert kind == "distinct"  # no positives
    return 3 * torch.arange(n * n_components).view(n, n_components).float()


def predictions(kind: str, y: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "near":
        return y + torch.randn(len(y), 1, generator=generator).mul(20).round().div(10)
    if kind == "collapsed":
        return torch.full_like(y, 5.0)
    if kind == "shuffled":
        return y[torch.randperm(len(y), generator=generator)]
    if kind == "far":  # no negatives
        return 100 * torch.arange(y.numel()).view(y.shape).float()
    assert kind == "same"
    return y.clone()


def weights(kind: str, n: int, generator: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    w = torch.rand(n, generator=generator, dtype=torch.float64) * 3
    return w if kind == "random" else w * (torch.rand(n, generator=generator) > 0.3)


def make_case(choice: dict[str, Any], seed: int) -> Case:
    """The batch and settings of one choice; of ``KINDS`` with an anchor at least."""
    generator = torch.Generator().manual_seed(seed)
    (y_kind, p_kind), n, d = choice["kind"], choice["n"], choice["d"]
    if y_kind == "few":
        n = 1 + n % 3
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if choice["zero_rows"]:
        x[:: max(n // 3, 1)] = 0
    y = labels(y_kind, n, choice["n_components"], generator)
    p = predictions(p_kind, y, generator)
    if choice["kind"] in KINDS:  # row 0 has row 1 as a positive, row 2 as a negative
        y[1], y[2], p[:3] = y[0], y[0] + 9, p[0].clone()
    settings = Settings(
        variant=VARIANTS[choice["variant"]],
        **{name: choice[name] for name in ("window", "temperature", "push_scale", "distance")},
    )
    return Case(choice, x, y, p, weights(choice["weights"], n, generator), settings)


@functools.cache
def _structured_cases(
    seed: int, empty_kinds: tuple[Any, ...], changed: tuple[tuple[str, tuple[Any, ...]], ...]
) -> list[Case]:
    factors = FACTORS | dict(changed)
    choices = [*cover(factors, seed), *cover(factors | dict(kind=empty_kinds), seed, only="kind")]
    return [make_case(choice, seed + k) for k, choice in enumerate(choices)]


def structured_cases(
    seed: int = 0, empty_kinds: Sequence[Any] = EMPTY_KINDS, **changed: Sequence[Any]
) -> list[Case]:
    """Batches of ``KINDS`` in which any two settings meet, and of ``EMPTY_KINDS`` with any setting.

    ``changed``: other values than those of ``FACTORS``.
    """
    values = tuple((name, tuple(of)) for name, of in changed.items())
    return _structured_cases(seed, tuple(empty_kinds), values)


#: Components and distances for which ``ties_beyond_the_reach`` exist.
VECTOR_TIES = ((3, "mae"), (5, "mae"), (2, "rmse"), (3, "rmse"))


def ties_beyond_the_reach(n_components: int, distance: str) -> tuple[Tensor, float]:
    """Labels [160, L] and a window ``h``: 64 rows at 0, 64 whose distance to them rounds to h
    although their first component is above ``L·h`` (mae) or ``√L·h`` (rmse), and 32 far away.
    """
    y = torch.zeros(160, n_components)
    for k in range(1, 1000):
        h = torch.tensor(k / 16 + 1 / 10).item()
        reach = torch.tensor(h * (n_components if distance == "mae" else n_components**0.5))
        y[64:128, 0] = reach.nextafter(torch.tensor(torch.inf))
        if pair_distance(y[:1], y[64:65], distance) <= h:
            y[128:] = 1e4
            return y, h
    raise AssertionError("no window has such ties")


def tie_cases(n_components: int, distance: str) -> Iterator[Case]:
    """Such ties of labels, and of predictions."""
    ties, h = ties_beyond_the_reach(n_components, distance)
    x = torch.randn(160, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constant = torch.zeros_like(ties)
    # Rows i and i + 80 have one label.
    pairs = 1e4 * torch.arange(160)[:, None].remainder(80).expand_as(ties).contiguous()
    for variant in ("paper", "released-depth"):
        settings = Settings(h, 0.2, 0.1, VARIANTS[variant], distance)
        choice = dict(variant=variant, n_components=n_components, distance=distance)
        yield Case(choice | dict(ties="labels"), x, ties, constant, None, settings)
        yield Case(choice | dict(ties="predictions"), x, pairs, ties, None, settings)
