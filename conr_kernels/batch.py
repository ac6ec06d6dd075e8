"""One call's input, checked and in the form the backends take; and its row losses, fused or in
reference.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference, validation
from .plan import make_plan
from .variants import DISTANCES, Settings, Variant, resolve_variant

Keys = tuple[Tensor, Tensor, Tensor]


class Batch(NamedTuple):
    """Features x [N, D] as given; y, p [N, L] in the dtype in which labels are compared; w [N] or
    None.

    ``keys`` are the caller's further rows [K, …] in the same form, or None.
    """

    x: Tensor
    y: Tensor
    p: Tensor
    w: Tensor | None
    keys: Keys | None
    settings: Settings
    reduction: str
    backend: str

    def all_keys(self) -> Keys | None:
        """The batch's rows and then the further keys; None where there are none of these."""
        if self.keys is None or len(self.keys[0]) == 0:
            return None
        x = self.x if self.backend == "reference" else self.x.detach()
        key_x, key_y, key_p = self.keys
        return torch.cat([x, key_x]), torch.cat([self.y, key_y]), torch.cat([self.p, key_p])


class Options(NamedTuple):
    """What ``conr_loss`` was asked for beside its rows, as given."""

    window: float
    temperature: float
    push_scale: float
    variant: str | Variant
    distance: str
    reduction: str
    backend: str

    def check(self) -> Settings:
        """The settings of the call.

        Raises:
            TypeError, ValueError: as ``conr_loss`` documents them.
        """
        scalars = (self.window, self.temperature, self.push_scale)
        validation.check_scalars(*scalars)
        validation.check_choice("distance", self.distance, DISTANCES)
        validation.check_choice("reduction", self.reduction, validation.REDUCTIONS)
        validation.check_choice("backend", self.backend, ("auto", *ops.BACKENDS, "reference"))
        variant = resolve_variant(self.variant)
        validation.check_pushing(self.push_scale, variant.pushing)
        return Settings(*map(float, scalars), variant, self.distance)


#: A training run asks for the same settings at every step.
_check_often = functools.lru_cache(maxsize=64)(Options.check)


def _settings(options: Options) -> Settings:
    if torch.compiler.is_compiling():
        from . import tracing

        scalars = map(tracing.constant, options[:3])
        return Options(*scalars, *options[3:]).check()
    is_hashable = all(type(option) in (float, int, str, Variant) for option in options)
    return _check_often(options) if is_hashable else options.check()


def prepare(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | float | None,
    keys: Keys | None,
    options: Options,
) -> Batch:
    """Checks everything, reads no tensor's values; errors as ``conr_loss`` documents them."""
    settings = _settings(options)
    if isinstance(keys, torch.nn.Module):  # a MemoryBank
        keys = keys.keys(getattr(features, "dtype", None))
    validation.check_tensors(features, targets, predictions, weights, keys)
    plan = make_plan(options.backend, features.device, features.dtype)
    y, p = _labels(targets), _labels(predictions)
    if keys is not None:
        key_x, key_y, key_p = keys
        keys = (key_x.detach(), _labels(key_y).to(y.dtype), _labels(key_p).to(p.dtype))
    w = _weights(weights, features)
    return Batch(features, y, p, w, keys, settings, options.reduction, plan.backend)


def try_prepare(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | float | None,
    keys: Keys | None,
    options: Options,
) -> Batch | Exception:
    """The batch, or the error that came instead of it: what the ranks of a group agree on."""
    try:
        return prepare(features, targets, predictions, weights, keys, options)
    except Exception as error:
        return error


def loss(batch: Batch) -> Tensor:
    """The batch's loss, reduced as it asks for."""
    x, y, p, w, keys, settings, reduction, backend = batch
    reduced = ops.reduced_loss(x, y, p, w, keys, settings, reduction, backend)
    if reduced is not None:
        return reduced
    rows = row_losses(batch, batch.all_keys())
    if batch.reduction == "none":
        return rows
    return rows.mean() if batch.reduction == "mean" and rows.shape[0] > 0 else rows.sum()


def row_losses(batch: Batch, keys: Keys | None) -> Tensor:
    """``ℓ_i`` [N] of the batch against the keys, of which its own rows are the first."""
    if batch.backend == "reference":
        return reference_losses(batch, batch.x, keys, 0)
    rows, _, _ = ops.row_losses(
        batch.x, batch.y, batch.p, batch.w, keys, 0, batch.settings, batch.backend
    )
    return rows


def reference_losses(batch: Batch, x: Tensor, keys: Keys | None, self_offset: int) -> Tensor:
    dtype = accumulation_dtype(x)
    if keys is not None:
        keys = (keys[0].to(dtype), *keys[1:])
    rows = (x.to(dtype).contiguous(), batch.y, batch.p, batch.w, keys, self_offset)
    return ops.without_autocast(reference.row_losses, x.device, *rows, batch.settings)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _labels(y: Tensor) -> Tensor:
    """Labels as a contiguous [N, L] in the dtype in which they are compared."""
    is_wide = y.dtype == torch.float64 and y.device.type == "cpu"
    y = y.detach().to(torch.float64 if is_wide else torch.float32)
    return (y[:, None] if y.dim() == 1 else y).contiguous()


def _weights(w: Tensor | float | None, x: Tensor) -> Tensor | None:
    if w is None:
        return None
    dtype = accumulation_dtype(x)
    if not isinstance(w, Tensor):
        return torch.full((x.shape[0],), float(w), dtype=dtype, device=x.device)
    w = w.detach().to(device=x.device, dtype=dtype)
    return w.reshape(-1).expand(x.shape[0]).contiguous()
