"""The two registered operators: schemas, fakes, derivatives, and the choice of backend.

``conr_kernels::forward`` and ``conr_kernels::backward`` are opaque to compilers: each dispatches
once to a backend module. Every backend module provides

- ``unavailable(device, dtype) -> str | None``: why it cannot run there and what to do;
- ``layout_size(n_anchors, n_keys, dtype, settings) -> int``: length of the int32 layout that it
  keeps for backward; dtype is the accumulation dtype;
- ``forward(x, y, p, w, keys, self_offset, settings, n_absent) -> (loss [N], stats [N, 3 or 5],
  layout)``;
- ``backward(coef_i, coef_j, layout, x, y, p, keys, self_offset, settings) -> gradient of x``.

Anchors are the rows of x [N, D] with labels and predictions [N, L]; ``keys = (key_x, key_y,
key_p)`` are all rows that can be positives or negatives, anchor i being key ``self_offset + i``,
or None where the anchors are the keys; ``n_absent``, a scalar tensor or None for 0, says how many
of them ``unit_terms`` does not count. ``stats`` is rows.py's; ``coef`` is stats times the
upstream gradient.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .core.rows import no_statistics, scale_statistics
from .variants import Settings, Variant

BACKENDS = ("triton", "cuda", "torch")
NO_SECOND_DERIVATIVE = (
    "conr_loss has no second derivative and no vmap rule in its fused backends; "
    'use backend="reference", which supports both'
)

Keys = tuple[Tensor, Tensor, Tensor]

_SETTINGS = (
    "int self_offset, float window, float temperature, float push_scale, "
    "str variant, str distance, str backend"
)
_ROWS = "Tensor x, Tensor y, Tensor p"
_KEYS = "Tensor? key_x, Tensor? key_y, Tensor? key_p"
_library = torch.library.Library("conr_kernels", "DEF")
_library.define(
    f"forward({_ROWS}, Tensor? w, {_KEYS}, Tensor? n_absent, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "backward(Tensor coef_i, Tensor? coef_j, Tensor layout, "
    f"{_ROWS}, {_KEYS}, {_SETTINGS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


@functools.cache
def backend_module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}_backend", __package__)


@functools.lru_cache(maxsize=64)  # a schedule's temperature is another one at every step
def _settings(*scalars: Any) -> Settings:
    window, temperature, push_scale, variant, distance = scalars
    return Settings(window, temperature, push_scale, Variant.from_code(variant), distance)


def _keys(key_x: Tensor | None, key_y: Tensor | None, key_p: Tensor | None) -> Keys | None:
    return None if key_x is None else (key_x, key_y, key_p)


def without_autocast(function, device: torch.device, *args):
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return function(*args)
    with torch.autocast(device.type, enabled=False):
        return function(*args)


def _forward(x, y, p, w, key_x, key_y, key_p, n_absent, self_offset, *scalars):
    *scalars, backend = scalars
    function = backend_module(backend).forward
    rows = (x, y, p, w, _keys(key_x, key_y, key_p), self_offset)
    return without_autocast(function, x.device, *rows, _settings(*scalars), n_absent)


def _backward(coef_i, coef_j, layout, x, y, p, key_x, key_y, key_p, self_offset, *scalars):
    *scalars, backend = scalars
    function = backend_module(backend).backward
    rows = (coef_i, coef_j, layout, x, y, p, _keys(key_x, key_y, key_p), self_offset)
    return without_autocast(function, x.device, *rows, _settings(*scalars))


def _forward_fake(x, y, p, w, key_x, key_y, key_p, n_absent, self_offset, *scalars):
    *scalars, backend = scalars
    settings = _settings(*scalars)
    N, K = x.shape[0], (x if key_x is None else key_x).shape[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = backend_module(backend).layout_size(N, K, dtype, settings)
    return (
        x.new_empty((N,), dtype=dtype),
        x.new_empty((N, 3 if settings.exponent_is_small else 5), dtype=dtype),
        x.new_empty((size,), dtype=torch.int32),
    )


def _backward_fake(coef_i, coef_j, layout, x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("conr_kernels::forward", _forward_fake, lib=_library)
torch.library.register_fake("conr_kernels::backward", _backward_fake, lib=_library)


def row_losses(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
    backend: str,
    n_absent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ℓ_i`` [N] of the anchors, differentiable once in x; row statistics; layout."""
    if is_plain(x):
        function = _EagerForward.apply
    elif not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        function = _TransformedForward.apply
    else:
        function = torch.ops.conr_kernels.forward
    scalars = (self_offset, *settings.scalars, backend)
    return function(x, y, p, w, *(keys or (None,) * 3), n_absent, *scalars)


def reduced_loss(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    further: Keys | None,
    settings: Settings,
    reduction: str,
    backend: str,
) -> Tensor | None:
    """The mean or sum of ``ℓ_i``, where one pass can give it with its gradient; else None.

    ``further``: keys beside the batch's own rows.
    """
    is_served = backend == "torch" and reduction != "none" and is_plain(x)
    if not is_served or not torch.is_grad_enabled() or not x.requires_grad:
        return None
    if not backend_module(backend).finds_gradient(y, further, settings):
        return None
    return _EagerReduced.apply(x, y, p, w, further, settings, reduction == "mean", backend)


def is_plain(x: Tensor) -> bool:
    """A plain tensor in plain eager mode: no compiler, function transform, subclass or tracer."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


class _EagerReduced(torch.autograd.Function):
    """Mean or sum of the row losses of a small batch, with the gradient found on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        *rows, backend = args
        function = backend_module(backend).loss_with_gradient
        loss, gradient = without_autocast(function, x.device, x, *rows)
        ctx.save_for_backward(x, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(g)
        x, gradient = ctx.saved_tensors
        return once(_scale, x, gradient, g), *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        refuse()


def _scale(x: Tensor, gradient: Tensor, g: Tensor) -> Tensor:
    return (gradient * g).to(x.dtype)


def once(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A gradient's function of these; where a graph of it is asked for, one that refuses to be
    differentiated.
    """
    return _Once.apply(function, *args) if torch.is_grad_enabled() else function(*args)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *args: Any) -> Tensor:
        return function(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        refuse()


class _EagerForward(torch.autograd.Function):
    """The forward operator for plain tensors in plain eager mode: the backend is called directly.

    Signature binding and two operator boundaries would take as long as the work on a small batch.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*args)
        _save(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_batched(g)
        # A graph of the gradient goes through the operator, which refuses to be differentiated.
        operator = torch.ops.conr_kernels.backward if torch.is_grad_enabled() else _backward
        return _differentiate(ctx, g, operator)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        refuse()


class _TransformedForward(torch.autograd.Function):
    """The forward operator under ``torch.func``, which takes derivatives from a Function only."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.conr_kernels.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, g, _TransformedBackward.apply)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        refuse()

    @staticmethod
    def vmap(*_: Any) -> None:
        refuse()


class _TransformedBackward(torch.autograd.Function):
    """The backward operator under ``torch.func``: it has no derivative of its own."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.conr_kernels.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        refuse()

    @staticmethod
    def vmap(*_: Any) -> None:
        refuse()


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, y, p, _, key_x, key_y, key_p, _, *ctx.scalars = inputs
    _, stats, layout = output
    ctx.mark_non_differentiable(stats, layout)
    ctx.set_materialize_grads(False)
    if ctx.needs_input_grad[0]:
        y, p = own_copies(y, p)
    ctx.save_for_backward(stats, layout, x, y, p, key_x, key_y, key_p)


def own_copies(y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and predictions for the backward pass: the caller may change his own before."""
    return torch.stack((y, p)).unbind() if y.dtype == p.dtype else (y.clone(), p.clone())


def _differentiate(
    ctx: Any, g: Tensor | None, backward_operator: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    no_grads = (None,) * (7 + len(ctx.scalars))
    if g is None:
        return None, *no_grads
    stats, layout, x, y, p, key_x, key_y, key_p = ctx.saved_tensors
    coef_i = scale_statistics(stats, g)
    coef_j = None
    if key_x is not None:  # keys that are no anchors have no row loss
        offset = ctx.scalars[0]
        coef_j = no_statistics(key_x.shape[0], coef_i)
        coef_j[offset : offset + x.shape[0]] = coef_i
    gradient = backward_operator(coef_i, coef_j, layout, x, y, p, key_x, key_y, key_p, *ctx.scalars)
    return gradient, *no_grads


def _differentiate_operator(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _differentiate(ctx, g, torch.ops.conr_kernels.backward)


def refuse(*_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def refuse_batched(g: Tensor | None) -> None:
    """For the backward pass of a graph made in plain eager mode: what transforms it is vmap."""
    is_legacy = g is not None and torch._C._functorch.is_legacy_batchedtensor(g)
    if is_legacy or torch._C._are_functorch_transforms_active():
        refuse()


torch.library.register_autograd(
    "conr_kernels::forward", _differentiate_operator, setup_context=_save, lib=_library
)
torch.library.register_autograd("conr_kernels::backward", refuse, lib=_library)
for _name in ("forward", "backward"):
    torch.library.register_vmap(f"conr_kernels::{_name}", refuse, lib=_library)
