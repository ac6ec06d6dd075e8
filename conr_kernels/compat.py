"""The published functions' names, argument order and defaults: changing the import is enough."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from . import validation
from .api import conr_loss

#: The drop-ins' names of ``conr_loss``'s arguments.
_SCALARS = dict(window="w", temperature="t", push_scale="e")
NAMES_OF_AGE = dict(predictions="preds", **_SCALARS)
NAMES_OF_DEPTH = dict(features="feature", targets="depth", predictions="output", **_SCALARS)


def ConR(
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    w: float = 1,
    weights: Tensor | float = 1,
    t: float = 0.07,
    e: float = 0.01,
) -> Tensor:
    r"""The published age loss: ``conr_loss`` with ``variant="released-age"``.

    With ``P_i`` (``d_ij ≤ w``, ``j ≠ i``: ``n_i`` rows), ``M_i`` (``d_ij > w``, ``δ_ij ≤ w``)::

        Z_i = Σ_{j∈P_i} exp(s_ij) + Σ_{j∈M_i} weights_i exp(e·d_ij) exp(s_ij) + (N − n_i)
        L   = (1/N) Σ_i weights_i (n_i log Z_i − Σ_{j∈P_i} s_ij) / n_i

    with the sum of L over the rows whose ``P_i`` and ``M_i`` have members.

    Args:
        features: ``x`` [N, D], any floating dtype; both views of a two-view batch in one tensor.
        targets, preds: labels and predictions [N], [N, 1] or [N, L].
        w: the window.
        weights: density weights [N], [N, 1] or a number.
        t: temperature.
        e: push scale.

    Returns:
        The mean over the N rows, differentiable in ``features``.

    Raises:
        TypeError, ValueError: as ``conr_loss``.
    """
    try:
        return conr_loss(
            features, targets, preds, weights,
            window=w, temperature=t, push_scale=e, variant="released-age",
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise _renamed(error, NAMES_OF_AGE) from None


def ConR_depth(
    feature: Tensor,
    depth: Tensor,
    output: Tensor,
    weights: Tensor | float,
    w: float = 0.2,
    t: float = 0.07,
    e: float = 0.2,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""The published depth loss: ``conr_loss`` with ``variant="released-depth"``, a row per image.

    A row's label, prediction and weight are the means over its pixels, its feature is flattened::

        Z_i = Σ_{j∈P_i} exp(s_ij) + Σ_{j∈M_i} e·weights_i·d_ij exp(s_ij) + (N − n_i)
        L   = (1/N) Σ_i (n_i log Z_i − Σ_{j∈P_i} s_ij) / (n_i + 1)

    with the sum of L over the rows whose ``P_i`` and ``M_i`` have members.

    Args:
        feature: [N, …], any floating dtype.
        depth, output: labels and predictions [N, …].
        weights: density weights [N, …] or a number.
        w: the window.
        t: temperature.
        e: push scale.
        mask: bool, of the maps' shape: True for the valid pixels. Rows average over these alone; a
            row without any takes no part (``mask`` of ``conr_loss``).

    Returns:
        The mean over the N rows that take part, differentiable in ``feature``.

    Raises:
        TypeError, ValueError: bad input; the message names the argument, what was expected and
            what was got.
    """
    named = dict(feature=feature, depth=depth, output=output)
    has_row_weights = isinstance(weights, Tensor) and weights.dim() > 0
    if has_row_weights:
        named["weights"] = weights
    validation.check_rows("feature", named)
    if mask is not None:
        validation.check_pixel_mask(mask, depth=depth, output=output)
    try:
        return conr_loss(
            _flat(feature),
            _row_means(depth, mask),
            _row_means(output, mask),
            _row_means(weights, mask) if has_row_weights else weights,
            window=w, temperature=t, push_scale=e, variant="released-depth",
            mask=None if mask is None else _flat(mask).any(dim=1),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise _renamed(error, NAMES_OF_DEPTH) from None


def _renamed(error: TypeError | ValueError, names: dict[str, str]) -> TypeError | ValueError:
    """The error of ``conr_loss`` in a drop-in's names of the arguments."""
    pattern = rf"\b({'|'.join(names)})\b"
    return type(error)(re.sub(pattern, lambda match: names[match[0]], str(error)))


def _row_means(t: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over each row [N] of a tensor [N, …], in float32 (float64 for float64), and of one that
    has the mask's shape over the mask's pixels.
    """
    t = t.detach().to(torch.float64 if t.dtype == torch.float64 else torch.float32)
    if mask is not None and t.shape == mask.shape:
        return _flat(t.masked_fill(~mask, 0.0)).sum(dim=1) / _flat(mask).sum(dim=1)
    return _flat(t).mean(dim=1)


def _flat(t: Tensor) -> Tensor:
    """[N, …] as [N, C], also of no rows."""
    return t[:, None] if t.dim() == 1 else t.flatten(1)
