"""Density weights ``w_j``: rare labels weigh more. Computed once per data set, not per batch."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from . import validation

METHODS = ("inverse", "sqrt_inverse")
SMOOTHINGS = ("gaussian", "triangular", "laplace")


def density_weights(
    targets: Any,
    method: str = "inverse",
    bin_width: float = 1.0,
    smoothing: str | None = None,
    kernel_size: int = 5,
    sigma: float = 2.0,
) -> Tensor:
    r"""The paper's ``w_j``: (root of the) inverse frequency of each label's bin, scaled to mean 1.

    Label ``y_j`` falls into bin ``b_j = ⌊y_j / bin_width⌋``; one that its dtype cannot tell from a
    bin's lower edge counts as on that edge, so that 0.7 is in bin 7 of width 0.1. With ``c(b)``
    labels in bin ``b`` and a kernel ``k`` (label distribution smoothing, Yang et al. 2021)::

        density(b) = Σ_{|o| ≤ kernel_size // 2} k(o) c(b + o)         (c(b) without smoothing)
        w_j ∝ 1 / density(b_j)        or    1 / √density(b_j),        mean of w = 1

    Only occupied bins are stored: memory is O(N·L) however wide the labels' range is.

    Args:
        targets: labels of the whole training set [N, …], any real values and signs: a Tensor, a
            numpy array, a pandas column or a list; masked entries of a masked array, and None in a
            list or an array of objects, are NaN. Integers are taken in float64, exact up to 2⁵³.
            Each of several components has its own frequencies, and a row's weight is the mean over
            its components: joint bins of many components would hold one row each, of equal weights.
        method: ``"inverse"`` or ``"sqrt_inverse"`` (milder).
        bin_width: width of a bin in the labels' units, > 0.
        smoothing: None or the kernel over offsets ``o`` in bins: ``"gaussian"`` ``exp(−o²/2σ²)``,
            ``"triangular"`` ``1 − |o|/(kernel_size // 2 + 1)``, ``"laplace"`` ``exp(−|o|/σ)``.
        kernel_size: number of bins under the kernel, odd.
        sigma: width ``σ`` of the kernel in bins, > 0; unused by ``"triangular"``.

    Returns:
        Weights [N] on the labels' device, computed on the CPU; float32 (float64 for float64).
        A row with a non-finite label has the weight NaN and is not counted; the mean of the others
        is 1. Warns (``UserWarning``) if all weights are equal although the labels differ.

    Raises:
        TypeError, ValueError: bad input, or a label whose ``y_j / bin_width`` overflows; the
            message names the argument, what was expected and what was got.
    """
    validation.check_choice("method", method, METHODS)
    if smoothing is not None:
        validation.check_choice("smoothing", smoothing, SMOOTHINGS)
    validation.check_density(bin_width, kernel_size, sigma)
    y = label_rows("targets", targets)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    device = targets.device if isinstance(targets, Tensor) else "cpu"
    rounding = torch.finfo(y.dtype).eps / 2 if y.dtype.is_floating_point else 0.0
    bins = _bin_index(y.double(), float(bin_width), rounding)
    beyond = y[y.isfinite() & ~bins.isfinite()]
    if len(beyond) > 0:
        raise ValueError(
            f"bin_width must keep targets / bin_width finite, got {bin_width} with a label of "
            f"{beyond[0].item():g}"
        )
    kernel = _kernel(smoothing, kernel_size, float(sigma))

    is_finite = bins.isfinite().all(dim=1)
    density = torch.stack([_density(b, kernel) for b in bins[is_finite].unbind(1)], dim=1)
    w = density.reciprocal() if method == "inverse" else density.rsqrt()
    w = (w / w.mean(dim=0)).mean(dim=1)
    weights = w.new_full((len(y),), torch.nan)
    weights[is_finite] = w / w.mean()
    if len(w) > 0 and w.amax() - w.amin() <= 1e-9 and bool((y[is_finite] != y[is_finite][0]).any()):
        n_bins = max(len(b.unique()) for b in bins[is_finite].unbind(1))
        warnings.warn(
            f"all density weights are equal although the labels differ: with bin_width={bin_width} "
            f"each of the {n_bins} bins holds equally many of the "
            f"{len(w)} labels. Bins too narrow hold one label each, bins too wide hold all",
            UserWarning,
            stacklevel=2,
        )
    return weights.to(device=device, dtype=dtype)


def label_rows(name: str, labels: Any) -> Tensor:
    """Labels as [N, L] on the CPU from a Tensor, array, column or list [N, …] of numbers; masked
    entries of a masked array are NaN.
    """
    if not isinstance(labels, Tensor):
        kind = type(labels).__name__
        try:
            if hasattr(labels, "to_numpy"):  # a column of pandas, say
                labels = labels.to_numpy()
            if str(getattr(labels, "dtype", "")) == "object":
                labels = labels.astype(float)
            if hasattr(labels, "filled"):  # a masked array
                is_integer = labels.dtype.kind in "iu"
                labels = (labels.astype(float) if is_integer else labels).filled(math.nan)
            if isinstance(labels, (list, tuple)):
                labels = [math.nan if label is None else label for label in labels]
                as_given = torch.tensor(labels, device="cpu")
                is_float = as_given.is_floating_point()
                labels = as_given.new_tensor(labels, dtype=torch.float64) if is_float else as_given
            elif hasattr(labels, "__array__"):
                labels = labels.__array__()
                in_order = labels.dtype.newbyteorder("=")  # of this machine; files have others
                labels = torch.from_numpy(labels.astype(in_order))  # a copy, of any strides
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must hold numbers only, got a {kind}: {error}") from None
        if not isinstance(labels, Tensor):
            raise TypeError(f"{name} must be a Tensor, an array, a column or a list, got {kind}")
    validation.check_rows(name, {name: labels})
    if labels.is_meta:
        raise ValueError(f"{name} must hold values, got a Tensor on the meta device")
    labels = labels.detach().cpu()
    return labels[:, None] if labels.dim() == 1 else labels.flatten(1)


def _bin_index(y: Tensor, bin_width: float, rounding: float) -> Tensor:
    """``⌊y / bin_width⌋`` as float64, with labels within their rounding of an edge put on it."""
    v = y / bin_width
    nearest = v.round()
    tolerance = (rounding + 2 * torch.finfo(torch.float64).eps) * v.abs()
    return torch.where((v - nearest).abs() <= tolerance, nearest, v.floor())


def _kernel(smoothing: str | None, kernel_size: int, sigma: float) -> list[float]:
    """``k(0), k(1), …``, not normalised: the weights' scale to mean 1 absorbs any factor."""
    half = kernel_size // 2
    if smoothing is None:
        return [1.0]
    if smoothing == "gaussian":
        return [math.exp(-0.5 * (o / sigma) * (o / sigma)) for o in range(half + 1)]
    if smoothing == "triangular":
        return [1 - o / (half + 1) for o in range(half + 1)]
    return [math.exp(-o / sigma) for o in range(half + 1)]


def _density(b: Tensor, kernel: list[float]) -> Tensor:
    """``Σ_o k(o) c(b + o)`` for every row [N] from its bin ``b`` [N]; empty bins are not stored."""
    bins, index, counts = b.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    density = kernel[0] * counts
    for offset, k in enumerate(kernel[1:], start=1):
        for neighbour in (bins - offset, bins + offset):
            at = torch.searchsorted(bins, neighbour).clamp(max=max(len(bins) - 1, 0))
            found = (bins[at] - bins).abs() == offset
            density = density + k * torch.where(found, counts[at], 0.0)
    return density[index]
