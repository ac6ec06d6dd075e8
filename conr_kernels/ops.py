"""The two registered operators: schemas, fakes, derivatives, and the choice of backend.

``conr_kernels::forward`` and ``conr_kernels::backward`` are opaque to compilers: each dispatches
once to a backend module. Every backend module provides

- ``unavailable(device, dtype) -> str | None``: why it cannot run there and what to do;
- ``layout_size(inputs) -> int``: length of the int32 layout that it keeps for backward, of which
  it writes every number;
- ``forward(inputs) -> (loss [N], stats [N, 3 or 5], layout)``;
- ``backward(inputs, coef_i, coef_j, layout) -> gradient of x``; ``coef`` is stats times the
  upstream gradient, coef_j None where the anchors are the keys;

and, if one call can compute the reduced loss and prepare its gradient,

- ``reduces(x, y, further, settings, wants_gradient) -> bool``: whether it does so for these rows
  and further keys;
- ``reduced(inputs, further, reduction, wants_gradient) -> (loss, saved tensors, plan)``; the keys
  are the rows and then the further keys;
- ``reduced_gradient(x, saved, plan, upstream) -> gradient of x``;
- optionally ``takes_any_labels(x) -> bool``: whether ``reduced`` takes labels of any real dtype,
  [N] or [N, L].

``inputs`` is core/inputs.py's, ``stats`` are core/rows.py's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .core.inputs import Inputs, Keys
from .core.rows import no_statistics, scale_statistics
from .variants import Settings, Variant

BACKENDS = ("triton", "cuda", "torch")
NO_SECOND_DERIVATIVE = (
    "conr_loss has no second derivative, forward derivative or vmap rule in its fused backends; "
    'use backend="reference", which supports them all'
)
NO_TRANSFORM_COMPILED = (
    'torch.compile of a torch.func transform of conr_loss is supported by backend="reference" '
    "alone; leave the transform uncompiled"
)

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


@functools.cache
def _optional(backend: str, function: str) -> Callable[..., bool] | None:
    return getattr(backend_module(backend), function, None)


@functools.lru_cache(maxsize=64)  # bounded: a schedule sets a new temperature at every step
def _settings(*scalars: Any) -> Settings:
    window, temperature, push_scale, variant, distance = scalars
    return Settings(window, temperature, push_scale, Variant.from_code(variant), distance)


def without_autocast(function, device: torch.device, *args):
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return function(*args)
    with torch.autocast(device.type, enabled=False):
        return function(*args)


def forward(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics and layout."""
    return without_autocast(backend_module(backend).forward, inputs.x.device, inputs)


def gradient(
    inputs: Inputs, backend: str, coef_i: Tensor, coef_j: Tensor | None, layout: Tensor,
    operator: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of x from the scaled statistics of anchors and keys.

    ``operator``: one with the schema of ``backward`` to call instead of the backend itself.
    """
    if operator is not None:
        rows, keys, scalars = _operands(inputs, backend)
        return operator(coef_i, coef_j, layout, *rows, *keys, *scalars)
    function = backend_module(backend).backward
    return without_autocast(function, inputs.x.device, inputs, coef_i, coef_j, layout)


def _operands(inputs: Inputs, backend: str) -> tuple[tuple[Any, ...], ...]:
    """Rows, keys and scalars as the operators take them."""
    keys = inputs.keys or (None,) * 3
    return inputs[:3], keys, (inputs.self_offset, *inputs.settings.scalars, backend)


def _inputs(
    x: Tensor, y: Tensor, p: Tensor, w: Tensor | None, key_x: Tensor | None, key_y: Tensor | None,
    key_p: Tensor | None, n_absent: Tensor | None, self_offset: int, *scalars: Any,
) -> tuple[Inputs, str]:  # fmt: skip
    """The inputs and the backend's name from the forward operator's operands."""
    keys = None if key_x is None else (key_x, key_y, key_p)
    *scalars, backend = scalars
    return Inputs(x, y, p, w, keys, self_offset, _settings(*scalars), n_absent), backend


def _forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward(*_inputs(*operands))


def _backward(coef_i, coef_j, layout, x, y, p, key_x, key_y, key_p, *scalars):
    of_call = _inputs(x, y, p, None, key_x, key_y, key_p, None, *scalars)
    return gradient(*of_call, coef_i, coef_j, layout)


def _forward_fake(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, backend = _inputs(*operands)
    N, dtype = inputs.x.shape[0], inputs.dtype
    size = backend_module(backend).layout_size(inputs)
    return (
        inputs.x.new_empty((N,), dtype=dtype),
        inputs.x.new_empty((N, inputs.settings.n_statistics), dtype=dtype),
        inputs.x.new_empty((size,), dtype=torch.int32),
    )


def _backward_fake(coef_i, coef_j, layout, x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("conr_kernels::forward", _forward_fake, lib=_library)
torch.library.register_fake("conr_kernels::backward", _backward_fake, lib=_library)


def row_losses(inputs: Inputs, backend: str) -> Tensor:
    """``ℓ_i`` [N] of the anchors, differentiable once in x."""
    if is_plain(inputs.x):
        return _EagerForward.apply(inputs.x, inputs, backend)
    rows, keys, scalars = _operands(inputs, backend)
    operands = (*rows, inputs.w, *keys, inputs.n_absent, *scalars)
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            raise RuntimeError(NO_TRANSFORM_COMPILED)
        return _TransformedForward.apply(*operands)[0]
    return torch.ops.conr_kernels.forward(*operands)[0]


#: The types of plain tensors: a subclass may override what an operation does.
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def reduces(
    x: Tensor, y: Tensor, further: Keys | None, settings: Settings, reduction: str, backend: str
) -> bool:
    """Whether one call of the backend computes the reduced loss of these rows and prepares its
    gradient; for eager mode. ``further``: keys beside the batch's own rows.
    """
    if reduction == "none" or backend == "reference" or not is_untransformed(x):
        return False
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    of_backend = _optional(backend, "reduces")
    return of_backend is not None and of_backend(x, y, further, settings, wants_gradient)


def takes_any_labels(x: Tensor, backend: str) -> bool:
    """Whether ``reduced_loss`` takes labels of any real dtype, [N] or [N, L]."""
    takes = None if backend == "reference" else _optional(backend, "takes_any_labels")
    return takes is not None and takes(x)


def reduced_loss(inputs: Inputs, further: Keys | None, reduction: str, backend: str) -> Tensor:
    """The mean or sum of ``ℓ_i``, if ``reduces`` is true for this call."""
    x, module = inputs.x, backend_module(backend)
    if x.requires_grad and torch.is_grad_enabled():
        return _EagerReduced.apply(x, module, inputs, further, reduction)
    return without_autocast(module.reduced, x.device, inputs, further, reduction, False)[0]


def is_plain(x: Tensor) -> bool:
    """Whether x is a plain tensor in plain eager mode: no compiler, function transform, subclass or
    tracer.
    """
    return not torch.compiler.is_compiling() and is_untransformed(x)


def is_untransformed(x: Tensor) -> bool:
    """``is_plain`` for a caller that knows that nothing is being compiled."""
    return (
        type(x) in PLAIN
        and not x.is_meta
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def refuse(*_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


class _EagerReduced(torch.autograd.Function):
    """Mean or sum of the row losses, prepared for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: ModuleType, *call: Any) -> Tensor:
        loss, saved, plan = without_autocast(module.reduced, x.device, *call, True)
        ctx.save_for_backward(x, *saved)
        ctx.gradient, ctx.plan = module.reduced_gradient, plan
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(g)
        x, *saved = ctx.saved_tensors
        return once(ctx.gradient, x, saved, ctx.plan, g), None, None, None, None

    jvp = staticmethod(refuse)


def once(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """The gradient ``function(*args)``; under ``create_graph=True`` it refuses to be differentiated
    again.
    """
    return _Once.apply(function, *args) if torch.is_grad_enabled() else function(*args)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *args: Any) -> Tensor:
        return function(*args)

    backward = staticmethod(refuse)


class _EagerForward(torch.autograd.Function):
    """The forward operator for plain tensors in plain eager mode: the backend is called directly.

    Signature binding and two operator boundaries would take as long as the work on a small batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: Inputs, backend: str) -> Tensor:
        loss, stats, layout = forward(inputs, backend)
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, backend, stats, layout)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        refuse_batched(g)
        # A graph of the gradient goes through the operator, which refuses to be differentiated.
        operator = torch.ops.conr_kernels.backward if torch.is_grad_enabled() else None
        return _differentiate(ctx, g, operator), None, None

    jvp = staticmethod(refuse)


class _TransformedForward(torch.autograd.Function):
    """The forward operator under ``torch.func``, which takes derivatives from a Function only."""

    @staticmethod
    def forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.conr_kernels.forward(*operands)

    @staticmethod
    def setup_context(ctx: Any, operands: tuple, output: tuple) -> None:
        _keep_operands(ctx, operands, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, g, _TransformedBackward.apply), *(None,) * ctx.n_constant

    jvp = vmap = staticmethod(refuse)


class _TransformedBackward(torch.autograd.Function):
    """The backward operator under ``torch.func``: it has no derivative of its own."""

    @staticmethod
    def forward(*operands: Any) -> Tensor:
        return torch.ops.conr_kernels.backward(*operands)

    @staticmethod
    def setup_context(ctx: Any, operands: tuple, output: Tensor) -> None:
        pass

    backward = vmap = staticmethod(refuse)


def keep(ctx: Any, inputs: Inputs, backend: str, stats: Tensor, layout: Tensor) -> None:
    """Saves what ``kept`` returns, with copies of the labels and predictions."""
    x, y, p, _, keys, *_ = inputs
    if ctx.needs_input_grad[0]:  # the caller may overwrite labels and predictions before backward
        y, p = torch.stack((y, p)).unbind() if y.dtype == p.dtype else (y.clone(), p.clone())
    ctx.save_for_backward(stats, layout, x, y, p, *(keys or (None,) * 3))
    ctx.call = (inputs.self_offset, inputs.settings, backend)


def kept(ctx: Any) -> tuple[Tensor, Tensor, Inputs, str]:
    """Statistics, layout, inputs without weights, and the backend's name."""
    stats, layout, x, y, p, *keys = ctx.saved_tensors
    self_offset, settings, backend = ctx.call
    keys = None if keys[0] is None else tuple(keys)
    return stats, layout, Inputs(x, y, p, None, keys, self_offset, settings), backend


def _keep_operands(ctx: Any, inputs: tuple, output: tuple) -> None:
    """``keep`` for the forward operator. torch.library passes ``inputs`` and ``output`` by name."""
    _, stats, layout = output
    ctx.mark_non_differentiable(stats, layout)
    ctx.set_materialize_grads(False)
    ctx.n_constant = len(inputs) - 1
    keep(ctx, *_inputs(*inputs), stats, layout)


def _differentiate(
    ctx: Any, g: Tensor | None, operator: Callable[..., Tensor] | None
) -> Tensor | None:
    """The gradient of x; ``operator`` as in ``gradient``."""
    if g is None:
        return None
    stats, layout, inputs, backend = kept(ctx)
    coef_i, coef_j = scale_statistics(stats, g), None
    if inputs.keys is not None:  # keys that are no anchors have no row loss
        coef_j = no_statistics(inputs.n_keys, coef_i)
        coef_j[inputs.self_offset : inputs.self_offset + g.shape[0]] = coef_i
    return gradient(inputs, backend, coef_i, coef_j, layout, operator)


def _differentiate_operator(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    operator = torch.ops.conr_kernels.backward
    return _differentiate(ctx, g, operator), *(None,) * ctx.n_constant


def refuse_batched(g: Tensor | None) -> None:
    """Refuses vmap over the backward pass of a graph that was made in plain eager mode."""
    is_legacy = g is not None and torch._C._functorch.is_legacy_batchedtensor(g)
    if is_legacy or torch._C._are_functorch_transforms_active():
        refuse()


torch.library.register_autograd(
    "conr_kernels::forward", _differentiate_operator, setup_context=_keep_operands, lib=_library
)
torch.library.register_autograd("conr_kernels::backward", refuse, lib=_library)
for _name in ("forward", "backward"):
    torch.library.register_vmap(f"conr_kernels::{_name}", refuse, lib=_library)
