"""One call's input, checked and in the form the backends take; and its row losses, fused or in
reference.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference, validation
from .core.labels import accumulation_dtype, as_labels, as_weights
from .plan import make_plan
from .variants import DISTANCES, Settings, Variant, resolve_variant

Keys = tuple[Tensor, Tensor, Tensor]


class Batch(NamedTuple):
    """Features x [N, D] as given; y, p [N, L] in the dtype in which labels are compared; w [N] or
    None.

    ``keys`` are the caller's further rows [K, …] in the same form, or None. ``mask``, bool [N]: the
    rows that take part, None for all; ``n_absent``, a scalar: how many keys do not, which are far
    from all others by then (``without_absent``).
    """

    x: Tensor
    y: Tensor
    p: Tensor
    w: Tensor | None
    keys: Keys | None
    settings: Settings
    reduction: str
    backend: str
    mask: Tensor | None = None
    n_absent: Tensor | None = None

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
        validation.check_push_scale(self.push_scale, variant.pushing)
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
    mask: Tensor | None,
    options: Options,
) -> Batch:
    """Checks everything, reads no tensor's values; errors as ``conr_loss`` documents them."""
    settings = _settings(options)
    if isinstance(keys, torch.nn.Module):  # a MemoryBank
        keys = keys.keys(getattr(features, "dtype", None))
    validation.check_tensors(features, targets, predictions, weights, keys, mask)
    plan = make_plan(options.backend, features.device, features.dtype)
    y, p = as_labels(targets), as_labels(predictions)
    if keys is not None:
        key_x, key_y, key_p = keys
        keys = (key_x.detach(), as_labels(key_y).to(y.dtype), as_labels(key_p).to(p.dtype))
    w = as_weights(weights, features)
    mask = None if mask is None else mask.detach().reshape(-1)
    return Batch(features, y, p, w, keys, settings, options.reduction, plan.backend, mask)


def try_prepare(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | float | None,
    keys: Keys | None,
    mask: Tensor | None,
    options: Options,
) -> Batch | Exception:
    """The batch, or the error that came instead of it: what the ranks of a group agree on."""
    try:
        return prepare(features, targets, predictions, weights, keys, mask, options)
    except Exception as error:
        return error


def loss(batch: Batch) -> Tensor:
    """The batch's loss, reduced as it asks for."""
    if batch.mask is not None:
        return _loss_of_present(batch)
    x, y, p, w, keys, settings, reduction, backend, *_ = batch
    reduced = ops.reduced_loss(x, y, p, w, keys, settings, reduction, backend)
    if reduced is not None:
        return reduced
    rows = row_losses(batch, batch.all_keys())
    if batch.reduction == "none":
        return rows
    return rows.mean() if batch.reduction == "mean" and rows.shape[0] > 0 else rows.sum()


def _loss_of_present(batch: Batch) -> Tensor:
    """The loss of a batch with a mask."""
    reach, n_present = extent(batch)
    batch = without_absent(batch, reach, batch.x.shape[0] - n_present)
    rows = row_losses(batch, batch.all_keys())
    if batch.reduction == "none":
        return rows
    return rows.sum() / n_present.clamp(min=1) if batch.reduction == "mean" else rows.sum()


def extent(batch: Batch) -> tuple[Tensor, Tensor]:
    """The largest magnitude of a label or prediction that takes part, NaN where one is NaN
    (float64); and how many rows take part. Scalars on the batch's device.
    """
    labels = [batch.y, batch.p]
    if batch.mask is not None:
        labels = [t.masked_fill(~batch.mask[:, None], 0.0) for t in labels]
    if batch.keys is not None:
        labels += batch.keys[1:]
    nothing = batch.y.new_zeros(1)
    largest = torch.cat([nothing, *(t.abs().reshape(-1) for t in labels)]).amax()
    n_present = nothing.new_tensor(len(batch.x)) if batch.mask is None else batch.mask.sum()
    return largest.double(), n_present


def without_absent(batch: Batch, reach: Tensor, n_absent: Tensor, first: int = 0) -> Batch:
    """The batch with its absent rows where no other row's window reaches them.

    No backend knows of a mask. An absent row gets features of 0, and one number for its label and
    its prediction: farther than the window from all labels and predictions that take part, the
    largest of which is ``reach``, and mostly from the other absent rows'. Label and prediction
    being one number, two absent rows are no negative pair, so that none is an anchor; where two
    collide by rounding they are idle positives of one another.

    Args:
        n_absent: absent rows of all keys; ``first``: the number of rows of other ranks before.
    """
    variant, h = batch.settings.variant, batch.settings.window
    mask = torch.ones_like(batch.y[:, 0], dtype=torch.bool) if batch.mask is None else batch.mask
    step = 2 * min(h, 1e30) + 1e-6 * (reach + 1)
    places = torch.arange(first + 1, first + 1 + len(mask), device=mask.device)
    # One number in both dtypes of labels, within the range of the narrower.
    far = (3 * reach + step * places + 1).clamp(max=1e38).float()[:, None]
    is_present, p, settings = mask[:, None], batch.p, batch.settings
    if variant.negatives == "all":  # as if all predictions were alike: 0, or NaN
        p, variant = p * 0, replace(variant, negatives="confused")
        settings = replace(settings, variant=variant)
    keys = batch.keys
    if keys is not None and settings is not batch.settings:
        keys = (*keys[:2], keys[2] * 0)
    return batch._replace(
        x=torch.where(is_present, batch.x, 0.0),
        y=torch.where(is_present, batch.y, far.to(batch.y.dtype)),
        p=torch.where(is_present, p, far.to(p.dtype)),
        w=None if batch.w is None else torch.where(mask, batch.w, 0.0),
        keys=keys,
        settings=settings,
        n_absent=n_absent if variant.unit_terms else None,
    )


def row_losses(batch: Batch, keys: Keys | None) -> Tensor:
    """``ℓ_i`` [N] of the batch against the keys, of which its own rows are the first."""
    if batch.backend == "reference":
        return reference_losses(batch, batch.x, keys, 0)
    rows, _, _ = ops.row_losses(
        batch.x, batch.y, batch.p, batch.w, keys, 0, batch.settings, batch.backend, batch.n_absent
    )
    return rows


def reference_losses(batch: Batch, x: Tensor, keys: Keys | None, self_offset: int) -> Tensor:
    dtype = accumulation_dtype(x)
    if keys is not None:
        keys = (keys[0].to(dtype), *keys[1:])
    n_absent = 0 if batch.n_absent is None else batch.n_absent
    rows = (x.to(dtype).contiguous(), batch.y, batch.p, batch.w, keys, self_offset)
    return ops.without_autocast(reference.row_losses, x.device, *rows, batch.settings, n_absent)
