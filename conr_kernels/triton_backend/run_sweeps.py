"""The two sweeps over exact bands: plans, workspaces, sorts, and launch_sweeps.py's launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Keys
from ..variants import Settings
from .call import form_of
from .launch import Place, place_of
from .launch_sweeps import Plan, limits

#: By the identity of their settings, which an entry keeps alive, and the form.
_plans: dict[tuple[Any, ...], tuple[Settings, Plan]] = {}
PLANS = 64


def plan_of(
    x: Tensor, y: Tensor, keys: Keys | None, self_offset: int, s: Settings, reduction: str
) -> Plan:
    key = (id(s), form_of(x, y, keys, self_offset, reduction), *limits())
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= PLANS:
            _plans.clear()
        found = _plans[key] = (s, Plan(key[1], s))
    return found[1]


def _sort(
    plan: Plan, place: Place | None, work: Tensor, y: Tensor, p: Tensor, keys: Keys | None
) -> list[Tensor]:
    """Values and order of the keys' labels and predictions, and of the anchors'."""
    sides = [(y, p)] if keys is None else [keys[1:], (y, p)]
    if plan.sort_keys is not None:
        pairs = [of_y.new_empty((2, of_y.shape[0])) for of_y, _ in sides]
        plan.sort_keys(place, [work], y, p, *sides[0], pairs[0], pairs[-1])
    else:
        pairs = [torch.stack(side).view(2, -1) for side in sides]
    found = [_sorted(plan, pair) for pair in pairs]
    return [*found[0], *found[-1]]


def _sorted(plan: Plan, pair: Tensor) -> tuple[Tensor, Tensor]:
    return pair[: 1 + plan.call.is_confused].sort(stable=True)


def forward(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    keys: Keys | None, n_absent: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor,
) -> None:  # fmt: skip
    """Losses, statistics and layout."""
    work = plan.work.new(x)
    rows, sorts = (x, y, p, *(keys or (x, y, p))), _sort(plan, place, work, y, p, keys)
    plan.forward(place, [work], *rows, w, n_absent, *sorts, loss, stats, layout)


def backward(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, keys: Keys | None,
    coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    """The gradient of x from coefficients in which the upstream gradient is."""
    rows = x, y, p, *(keys or (x, y, p)), coef_i, coef_j, layout
    work = plan.work_of_gradient.new(x)
    plan.backward(place, [work], *rows, _sum_in(gradient), gradient)


def _sum_in(gradient: Tensor) -> Tensor:
    """Where the positives' part of a gradient waits: the upper half of numbers of 32 bits."""
    return gradient.view(torch.int16) if gradient.dtype.itemsize == 2 else gradient


def reduced(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    wants_gradient: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    """The reduced loss; what is kept for its gradient, also of labels and predictions: the caller
    may change his own.
    """
    loss, kept, work = x.new_empty((), dtype=plan.call.dtype), plan.kept.new(x), plan.work.new(x)
    pair = torch.stack((y, p))
    if plan.sort_keys is None:
        sorts = _sorted(plan, pair.view(2, -1))
    else:
        sorts = _sort(plan, place, work, y, p, None)[2:]
    plan.forward(place, [kept, work], x, y, p, w, *sorts, loss)
    return loss, (kept, None if plan.is_kept else pair)


def reduced_gradient(
    x: Tensor, kept: Tensor, pair: Tensor | None, plan: Plan, upstream: Tensor
) -> Tensor:
    """The gradient of x for an upstream gradient of the reduced loss."""
    x = x.contiguous()
    gradient, work = torch.empty_like(x), plan.work_of_gradient.new(x)
    rows = (x,) if pair is None else (x, *pair)
    plan.backward(place_of(x), [kept, work], *rows, upstream, _sum_in(gradient), gradient)
    return gradient
