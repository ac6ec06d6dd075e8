"""The two registered operators: schemas, fakes, derivatives, and the choice of backend.

``conr_kernels::forward`` and ``conr_kernels::backward`` are opaque to compilers: each dispatches
once to a backend module. Every backend module provides

- ``unavailable(device, dtype) -> str | None``: why it cannot run there and what to do;
- ``layout_size(n_anchors, n_keys, dtype, settings) -> int``: length of the int32 layout that it
  keeps for backward; dtype is the accumulation dtype;
- ``forward(x, y, p, w, keys, self_offset, settings, n_absent) -> (loss [N], stats [N, 3 or 5],
  layout)``;
- ``backward(coef_i, coef_j, layout, x, y, p, keys, self_offset, settings) -> gradient of x``;

and, where one call finds the reduced loss and prepares its gradient,

- ``reduces(x, y, further, settings, wants_gradient) -> bool``: whether it does so for these rows
  and further keys;
- ``reduced(x, y, p, w, further, settings, reduction, wants_gradient) -> (loss, saved
  tensors, plan)``;
- ``reduced_gradient(x, saved, plan, upstream) -> gradient of x``.

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
from typing import Any, NamedTuple

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


class Call(NamedTuple):
    """What a call gives its backend beside the features; one argument for autograd's machinery."""

    y: Tensor
    p: Tensor
    w: Tensor | None
    keys: Keys | None
    self_offset: int
    settings: Settings
    backend: str
    n_absent: Tensor | None = None

    def operands(self) -> tuple[Any, ...]:
        """As the forward operator takes them, after the features."""
        keys = self.keys or (None,) * 3
        scalars = (self.self_offset, *self.settings.scalars, self.backend)
        return self.y, self.p, self.w, *keys, self.n_absent, *scalars


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
    call = Call(y, p, w, keys, self_offset, settings, backend, n_absent)
    if is_plain(x):
        return _EagerForward.apply(x, call)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _TransformedForward.apply(x, *call.operands())
    return torch.ops.conr_kernels.forward(x, *call.operands())


#: Types of tensors without a behaviour of their own.
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def reduces(
    x: Tensor, y: Tensor, further: Keys | None, settings: Settings, reduction: str, backend: str
) -> bool:
    """Whether one call of the backend gives the reduced loss of these rows, prepared for its
    gradient; in eager mode. ``further``: keys beside the batch's own rows.
    """
    if reduction == "none" or backend == "reference" or not is_untransformed(x):
        return False
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    return backend_module(backend).reduces(x, y, further, settings, wants_gradient)


def takes_any_labels(x: Tensor, backend: str) -> bool:
    """Whether ``reduced_loss`` takes labels of any real dtype, [N] or [N, L]."""
    return backend == "triton" and not x.is_cpu and backend_module(backend).takes_any_labels(x)


def reduced_loss(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    further: Keys | None,
    settings: Settings,
    reduction: str,
    backend: str,
) -> Tensor:
    """The mean or sum of ``ℓ_i``, where ``reduces`` says so."""
    call = Reduction(backend_module(backend), y, p, w, further, settings, reduction)
    if x.requires_grad and torch.is_grad_enabled():
        return _EagerReduced.apply(x, call)
    return call.forward(x, False)[0]


def is_plain(x: Tensor) -> bool:
    """A plain tensor in plain eager mode: no compiler, function transform, subclass or tracer."""
    return not torch.compiler.is_compiling() and is_untransformed(x)


def is_untransformed(x: Tensor) -> bool:
    """The same where no compiler is at work."""
    return (
        type(x) in PLAIN
        and not x.is_meta
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


class Reduction(NamedTuple):
    """The call of a reduced loss, beside the features."""

    module: ModuleType
    y: Tensor
    p: Tensor
    w: Tensor | None
    further: Keys | None
    settings: Settings
    reduction: str

    def forward(self, x: Tensor, wants_gradient: bool) -> tuple[Tensor, tuple, Any]:
        module, *rows = self
        return without_autocast(module.reduced, x.device, x, *rows, wants_gradient)


class _EagerReduced(torch.autograd.Function):
    """Mean or sum of the row losses of a small batch, with the gradient found on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Reduction) -> Tensor:
        loss, saved, plan = call.forward(x, True)
        ctx.save_for_backward(x, *saved)
        ctx.gradient, ctx.plan = call.module.reduced_gradient, plan
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        refuse_batched(g)
        x, *saved = ctx.saved_tensors
        return once(ctx.gradient, x, saved, ctx.plan, g), None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        refuse()


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
    def forward(ctx: Any, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        y, p, w, keys, self_offset, settings, backend, n_absent = call
        rows = (x, y, p, w, keys, self_offset, settings, n_absent)
        output = without_autocast(backend_module(backend).forward, x.device, *rows)
        _, stats, layout = output
        ctx.mark_non_differentiable(stats, layout)
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            y, p = own_copies(y, p)
        ctx.save_for_backward(stats, layout, x, y, p, *(keys or (None,) * 3))
        ctx.call = (self_offset, settings, backend)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        refuse_batched(g)
        if g is None:
            return None, None
        self_offset, settings, backend = ctx.call
        coefficients, layout, x, y, p, *keys = _scaled(ctx.saved_tensors, g, self_offset)
        if torch.is_grad_enabled():
            # A graph of the gradient goes through the operator, which refuses to be differentiated.
            operands = (*coefficients, layout, x, y, p, *keys, self_offset, *settings.scalars)
            return torch.ops.conr_kernels.backward(*operands, backend), None
        rows = (*coefficients, layout, x, y, p, _keys(*keys), self_offset, settings)
        return without_autocast(backend_module(backend).backward, x.device, *rows), None

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
    coefficients, *saved = _scaled(ctx.saved_tensors, g, ctx.scalars[0])
    return backward_operator(*coefficients, *saved, *ctx.scalars), *no_grads


def _scaled(saved: tuple[Tensor, ...], g: Tensor, self_offset: int) -> tuple[Any, ...]:
    """What the backward operator takes before the scalars, the coefficients as a pair."""
    stats, layout, x, y, p, key_x, key_y, key_p = saved
    coef_i, coef_j = scale_statistics(stats, g), None
    if key_x is not None:  # keys that are no anchors have no row loss
        coef_j = no_statistics(key_x.shape[0], coef_i)
        coef_j[self_offset : self_offset + x.shape[0]] = coef_i
    return (coef_i, coef_j), layout, x, y, p, key_x, key_y, key_p


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
