"""The two sweeps over exact bands: workspaces, sorts, and the launches of launch_sweeps.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.inputs import Keys
from .launch import NOTHING, Place, Pointer, place_of, pointer
from .launch_sweeps import Plan, Step


def _run(steps: list[Step], place: Place | None, given: dict[str, Pointer]) -> None:
    for launch, pick in steps:
        launch(place, *pick(given))


def _rows(x: Tensor, y: Tensor, p: Tensor, keys: Keys | None) -> dict[str, Pointer]:
    """Pointers to anchors and keys."""
    given = {"x": pointer(x), "y": pointer(y), "p": pointer(p), "nothing": NOTHING}
    names = ("x", "y", "p") if keys is None else map(pointer, keys)
    for name, key in zip(("key_x", "key_y", "key_p"), names, strict=True):
        given[name] = given[key] if keys is None else key
    return given


def _row(t: Tensor, which: int) -> Pointer:
    n, dtype = t.shape[1], t.dtype
    address = t.data_ptr() + which * n * dtype.itemsize
    return (t, which * n, n, dtype), address, (dtype, address % 16 == 0)


def _sort(pair: Tensor, given: dict[str, Pointer], names: tuple[str, ...]) -> None:
    """Sorts each row; the last of them is the last order too."""
    values, order = pair.sort(stable=True)
    for which in (0, 1):
        row = min(which, pair.shape[0] - 1)
        of_row = _row(values, row), _row(order, row)
        for name in names:
            given[f"{name}values{which}"], given[f"{name}order{which}"] = of_row


def _forward(
    plan: Plan, place: Place | None, pair: Tensor | None, y: Tensor, p: Tensor, keys: Keys | None,
    given: dict[str, Pointer],
) -> None:  # fmt: skip
    n_orders = 1 + plan.call.is_confused
    sides = [(("key_", ""), y, p)] if keys is None else [(("key_",), *keys[1:]), (("",), y, p)]
    pairs = [None] * len(sides)
    if plan.sort_keys:
        pairs = [of_y.new_empty((2, of_y.shape[0])) for _, of_y, _ in sides]
        given["of_keys"], given["of_anchors"] = pointer(pairs[0]), pointer(pairs[-1])
        _run(plan.sort_keys, place, given)
    elif pair is not None:
        pairs = [pair.view(2, -1)]
    for (names, of_y, of_p), found in zip(sides, pairs, strict=True):
        if found is None:
            found = (torch.stack((of_y, of_p)) if n_orders == 2 else of_y).view(n_orders, -1)
        _sort(found[:n_orders], given, names)
    _run(plan.forward, place, given)


def forward(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    keys: Keys | None, n_absent: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor,
) -> None:  # fmt: skip
    """Losses, statistics and layout."""
    given = _rows(x, y, p, keys) | plan.work.pointers(plan.work.new(x)) | {
        "w": pointer(w), "n_absent": pointer(n_absent), "loss": pointer(loss),
        "stats": pointer(stats), "layout": pointer(layout),
    }  # fmt: skip
    _forward(plan, place, None, y, p, keys, given)


def backward(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, keys: Keys | None,
    coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    """The gradient of x from coefficients in which the upstream gradient is."""
    given = {
        "coef": pointer(coef_i), "key_coef": pointer(coef_j), "upstream": NOTHING,
        "layout": pointer(layout),
    }  # fmt: skip
    _backward(plan, place, x, given | _rows(x, y, p, keys), gradient)


def _backward(
    plan: Plan, place: Place | None, x: Tensor, given: dict[str, Pointer], gradient: Tensor
) -> None:
    given["gradient"] = given["G"] = of_gradient = pointer(gradient)
    if gradient.dtype.itemsize == 2:
        whole, dtype = (gradient, 0, gradient.numel(), torch.bfloat16), torch.bfloat16
        given["G"] = (whole, of_gradient[1], (dtype, of_gradient[1] % 16 == 0))
    parts = plan.work_of_gradient
    _run(plan.backward, place, given | parts.pointers(parts.new(x)))


def reduced(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reduced loss; what is kept for its gradient, labels and predictions among it: the caller
    may change his own.
    """
    loss, kept, pair = x.new_empty((), dtype=plan.call.dtype), plan.kept.new(x), torch.stack((y, p))
    given = plan.work.pointers(plan.work.new(x)) | plan.kept.pointers(kept) | {
        "w": pointer(w), "n_absent": NOTHING, "total": pointer(loss),
    }  # fmt: skip
    _forward(plan, place, pair, y, p, None, given | _rows(x, y, p, None))
    return loss, (kept, pair)


def reduced_gradient(x: Tensor, kept: Tensor, pair: Tensor, plan: Plan, upstream: Tensor) -> Tensor:
    """The gradient of x for an upstream gradient of the reduced loss."""
    x = x.contiguous()
    gradient, given = torch.empty_like(x), plan.kept.pointers(kept)
    given["coef"] = given["key_coef"] = given["stats"]
    given["upstream"] = pointer(upstream)
    _backward(plan, place_of(x), x, given | _rows(x, *pair, None), gradient)
    return gradient
