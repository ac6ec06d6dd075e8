"""One call's input, checked and in the form that backends take, and its loss."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference, validation
from .backends import choose_backend
from .core.inputs import Inputs, Keys
from .core.labels import as_keys, as_labels, as_weights
from .variants import DISTANCES, Settings, Variant, resolve_variant


class Batch(NamedTuple):
    """Features x [N, D] as given; y, p [N, L] in the dtype in which labels are compared; w [N] or
    None.

    Attributes:
        keys: the caller's further rows [K, …] in the same form, or None.
        mask, key_mask: bool [N], [K]: the rows, and the further keys, that take part; None for all.
            With a ``key_mask`` there is always a ``mask``.
        n_absent: a scalar: how many of all keys take no part, once ``without_absent`` has moved
            these beyond everybody's window.
        reduces: the backend computes the reduced loss in one call; labels and predictions are then
            as given where ``ops.takes_any_labels``.
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
    key_mask: Tensor | None = None
    n_absent: Tensor | None = None
    reduces: bool = False

    def all_keys(self) -> Keys | None:
        """The batch's rows and then the further keys; None where there are none of these."""
        if self.keys is None or len(self.keys[0]) == 0:
            return None
        x = self.x if self.backend == "reference" else self.x.detach()
        key_x, key_y, key_p = self.keys
        return torch.cat([x, key_x]), torch.cat([self.y, key_y]), torch.cat([self.p, key_p])

    def inputs(self, keys: Keys | None, self_offset: int = 0) -> Inputs:
        """The backends' input; ``keys``: all keys, or None where the rows are the keys."""
        of_call = (keys, self_offset, self.settings, self.n_absent)
        return Inputs(self.x, self.y, self.p, self.w, *of_call)


class Options(NamedTuple):
    """The options of ``conr_loss``, as given."""

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
        scalars = validation.check_scalars(self.window, self.temperature, self.push_scale)
        validation.check_choice("distance", self.distance, DISTANCES)
        validation.check_choice("reduction", self.reduction, validation.REDUCTIONS)
        validation.check_choice("backend", self.backend, ("auto", *ops.BACKENDS, "reference"))
        variant = resolve_variant(self.variant)
        settings = Settings(*scalars, variant, self.distance)
        validation.check_push_scale(self.push_scale, variant.pushing, settings.pushing.phi)
        return settings


@functools.lru_cache(maxsize=64, typed=True)
def _check_often(*options: Any) -> Settings:
    """``Options.check``, remembered: a training run asks for the same settings at every step."""
    return Options(*options).check()


@functools.lru_cache(maxsize=64)
def _one(settings: Settings) -> Settings:
    """One object for equal settings: backends look up what they know of it by identity."""
    return settings


def _settings(options: Options) -> Settings:
    try:
        return _check_often(*options)
    except TypeError:  # an option that cannot be hashed, or an illegal one
        return _one(options.check())


def _traced_settings(options: Options) -> Settings:
    from . import tracing

    scalars = map(tracing.constant, options[:3])
    return Options(*scalars, *options[3:]).check()


#: The backend of every form of input that has passed the checks; None on the CPU, where the choice
#: depends on the environment too.
_passed: dict[tuple[Any, ...], str | None] = {}
FORMS = 256


def _checked_backend(
    x: Tensor, y: Tensor, p: Tensor, w: Tensor | float | None, backend: str
) -> str:
    """The backend for input without keys and mask, which is checked if its form is new."""
    form = _form_of(x, y, p, w, backend)
    found = None if form is None else _passed.get(form)
    if found is not None:
        return found
    if form is None or form not in _passed:
        validation.check_tensors(x, y, p, w, None)
    found = choose_backend(backend, x.device, x.dtype)
    if form is not None:
        if len(_passed) >= FORMS:
            _passed.clear()
        _passed[form] = None if x.device.type == "cpu" else found
    return found


def _form_of(
    x: Tensor, y: Tensor, p: Tensor, w: Tensor | float | None, backend: str
) -> tuple[Any, ...] | None:
    """Everything that the checks read; None where inputs are not plain tensors."""
    kinds = type(x), type(y), type(p), type(w)
    if not ops.PLAIN.issuperset(kinds[:3]) or x.is_nested or y.is_nested or p.is_nested:
        return None
    of_weights: tuple[Any, ...]
    if kinds[3] not in ops.PLAIN:
        if validation.is_number(w) and not 0 <= w <= validation.FLOAT32_MAX:
            return None
        of_weights = (kinds[3],)
    elif w.is_nested:
        return None
    else:
        of_weights = (w.shape, w.dtype, w.layout, w.device)
    return (
        backend, x.shape, x.dtype, x.layout, x.device, y.shape, y.dtype, y.layout, y.device,
        p.shape, p.dtype, p.layout, p.device, of_weights,
    )  # fmt: skip


def prepare(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | float | None,
    keys: Keys | None,
    mask: Tensor | None,
    options: Options,
    in_group: bool = False,
) -> Batch:
    """Checks everything without reading a tensor's values; raises as ``conr_loss`` documents."""
    is_traced = torch.compiler.is_compiling()
    settings = _traced_settings(options) if is_traced else _settings(options)
    keys = as_keys(keys, getattr(features, "dtype", None))
    x, reduction = features, options.reduction
    if keys is None and mask is None and not is_traced:
        backend = _checked_backend(x, targets, predictions, weights, options.backend)
        of_call = (settings, reduction, backend)
        is_raw = not in_group and ops.takes_any_labels(x, backend)
        if is_raw and ops.reduces(x, targets, None, *of_call):
            rows = (x, targets, predictions, as_weights(weights, x), None)
            return Batch(*rows, *of_call, reduces=True)
    else:
        validation.check_tensors(x, targets, predictions, weights, keys, mask)
        backend = choose_backend(options.backend, x.device, x.dtype)
    y, p = as_labels(targets), as_labels(predictions)
    key_mask = None
    if keys is not None:
        key_x, key_y, key_p, *masks = keys
        if masks:
            key_mask = masks[0].detach().reshape(-1)
            mask = key_mask.new_ones(len(x)) if mask is None else mask
        keys = (key_x.detach(), as_labels(key_y).to(y.dtype), as_labels(key_p).to(p.dtype))
    w = as_weights(weights, x)
    is_reduced = mask is None and not in_group and not is_traced
    is_reduced = is_reduced and ops.reduces(x, y, keys, settings, reduction, backend)
    mask = None if mask is None else mask.detach().reshape(-1).clone()  # saved for backward
    return Batch(x, y, p, w, keys, settings, reduction, backend, mask, key_mask, reduces=is_reduced)


def try_prepare(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | float | None,
    keys: Keys | None,
    mask: Tensor | None,
    options: Options,
) -> Batch | Exception:
    """The batch, or the error that ``prepare`` raised: the ranks of a group raise together."""
    try:
        return prepare(features, targets, predictions, weights, keys, mask, options, in_group=True)
    except Exception as error:
        return error


def loss(batch: Batch) -> Tensor:
    """The batch's loss, reduced by its ``reduction``."""
    if batch.reduces:
        return ops.reduced_loss(batch.inputs(None), batch.keys, batch.reduction, batch.backend)
    n_present = None
    if batch.mask is not None:
        reach, n_present, n_absent = extent(batch)
        batch = without_absent(batch, reach, n_absent)
    rows = row_losses(batch)
    if batch.reduction == "none":
        return rows
    if batch.reduction == "sum" or rows.shape[0] == 0:
        return rows.sum()
    return rows.mean() if n_present is None else rows.sum() / n_present.clamp(min=1)


def extent(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The largest magnitude of a label or prediction that takes part, NaN where one is NaN
    (float64); how many rows do; how many rows and keys do not. Scalars on the batch's device.
    """
    labels = [t.masked_fill(~batch.mask[:, None], 0.0) for t in (batch.y, batch.p)]
    n_present = batch.mask.sum()
    n_absent = len(batch.x) - n_present
    if batch.key_mask is not None:
        is_absent = ~batch.key_mask
        labels += [t.masked_fill(is_absent[:, None], 0.0) for t in batch.keys[1:]]
        n_absent = n_absent + is_absent.sum()
    elif batch.keys is not None:
        labels += batch.keys[1:]
    nothing = batch.y.new_zeros(1)
    largest = torch.cat([nothing, *(t.abs().reshape(-1) for t in labels)]).amax()
    return largest.double(), n_present, n_absent


def without_absent(batch: Batch, reach: Tensor, n_absent: Tensor, first: int = 0) -> Batch:
    """The batch with its absent rows moved to where no other row's window reaches them.

    No backend knows of a mask. An absent row gets features of 0 and one number as its label and its
    prediction, farther than the window from all labels and predictions that take part (the largest
    of which is ``reach``) and, rounding aside, from the other absent rows'. As label and prediction
    are one number, two absent rows are never a negative pair, so that none is an anchor; two that
    collide by rounding are positives of each other, without effect. Absent further keys share one
    place.

    Args:
        n_absent: absent rows of all keys; ``first``: the number of rows of other ranks before.
    """
    variant, h, mask = batch.settings.variant, batch.settings.window, batch.mask
    # Distances, and the sums over components of which they are made, stay in float32's range.
    L, most = batch.y.shape[1], 3e38
    if L > 1:
        most = math.sqrt(most / L) if batch.settings.distance == "rmse" else most / L
    step = 2 * min(h, 1e30) + 1e-6 * (reach + 1)
    places = torch.arange(first + 1, first + 2 + len(mask), device=mask.device)
    far = (3 * reach + step * places + 1).minimum((most - reach).clamp(min=0))
    # Where the window reaches everything that takes part nobody has a negative, nor may get one.
    far = torch.where((1 + 1e-5) * 2 * reach <= h, 0.0, far)
    # One number in both dtypes of labels.
    far = far.float()[:, None]
    far, far_key = far[:-1], far[-1]
    is_present, p, settings = mask[:, None], batch.p, batch.settings
    if variant.negatives == "all":  # as if all predictions were alike: 0, or NaN
        p, variant = p * 0, replace(variant, negatives="confused")
        settings = _one(replace(settings, variant=variant))
    keys = batch.keys
    if keys is not None and settings is not batch.settings:
        keys = (*keys[:2], keys[2] * 0)
    if batch.key_mask is not None:
        is_key = batch.key_mask[:, None]
        key_x, *labels = keys
        labels = (torch.where(is_key, t, far_key.to(t.dtype)) for t in labels)
        keys = (torch.where(is_key, key_x, 0.0), *labels)
    return batch._replace(
        x=torch.where(is_present, batch.x, 0.0),
        y=torch.where(is_present, batch.y, far.to(batch.y.dtype)),
        p=torch.where(is_present, p, far.to(p.dtype)),
        w=None if batch.w is None else torch.where(mask, batch.w, 0.0),
        keys=keys,
        settings=settings,
        n_absent=n_absent if variant.unit_terms else None,
    )


def row_losses(batch: Batch) -> Tensor:
    """``ℓ_i`` [N] of the batch against its own rows and the further keys."""
    inputs = batch.inputs(batch.all_keys())
    if batch.backend == "reference":
        return reference_losses(inputs)
    return ops.row_losses(inputs, batch.backend)


def reference_losses(inputs: Inputs) -> Tensor:
    x, y, p, w, keys, *rest, n_absent = inputs
    w = None if w is None else w.clone()  # saved for backward: the caller may overwrite theirs
    if keys is not None:
        keys = (keys[0].to(inputs.dtype), *keys[1:])
    rows = (x.to(inputs.dtype).contiguous(), y, p, w, keys, *rest)
    n_absent = 0 if n_absent is None else n_absent
    return ops.without_autocast(reference.row_losses, x.device, *rows, n_absent)
