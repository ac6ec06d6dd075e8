"""From the sums of a row to its loss and its gradient coefficients (MATHEMATICS.md).

A row's *statistics* are what the backward pass needs, for an upstream gradient of 1:

- where no exponent can be large, three columns ``(α_i, β_i, γ_i)``;
- otherwise five columns ``(±1, β_i, ±1, log|α_i|, log|γ_i|)``: the first three carry the sign
  and are multiplied by the upstream gradient, so that nothing over- or underflows before it meets
  ``exp(s_ij)``. The logarithm of nothing is ``−inf``: ``exp(s_ij)`` alone may be infinite. Where
  exponents turn out to be small, ``(α_i, β_i, γ_i, 0, 0)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..variants import Settings

#: Less than any sum of unshifted exponentials; a divisor for rows whose sum is empty.
TINY = 1e-30


def scale_statistics(stats: Tensor, g: Tensor) -> Tensor:
    """The coefficients of the gradient: statistics times the upstream gradient ``g`` [N]."""
    if stats.shape[1] == 3:
        return stats * g[:, None]
    return torch.cat([stats[:, :3] * g[:, None], stats[:, 3:]], dim=1)


def to_log_statistics(stats: Tensor) -> Tensor:
    """Three columns as five: the logarithms are those of 1."""
    return torch.cat([stats, stats.new_zeros(len(stats), 2)], dim=1)


def no_statistics(n_rows: int, like: Tensor) -> Tensor:
    """The statistics of rows without a loss: coefficients of 0."""
    stats = like.new_zeros(n_rows, like.shape[1])
    stats[:, 3:] = -torch.inf
    return stats


class RowSums(NamedTuple):
    """Sums over the pairs of each row [N], in float64 where the device has it: weights up to 1e30
    meet sums up to 1e30 here.

    Attributes:
        E, B: ``Σ_P exp s`` and ``Σ_M φ exp s``, or their logarithms.
        n, m: ``n_i``; and ``m_i``, or any number that is positive where it is.
        poison: 0, or NaN where an input is not finite.
        w: ``w_i``, or None for 1.
        s_sum: ``Σ_P s``, for ``log="inside"``.
    """

    E: Tensor
    B: Tensor
    n: Tensor
    m: Tensor
    poison: Tensor
    w: Tensor | None = None
    s_sum: Tensor | None = None


def pushing_rate(w: Tensor | None, settings: Settings) -> Tensor | float | None:
    """``r_i``, the anchor's factor of the pushing weight ``S_ij = r_i · φ(d_ij)``; None for 1."""
    is_scaled, is_weighted, _ = settings.pushing
    e, w = settings.push_scale if is_scaled else None, w if is_weighted else None
    return e if w is None else w if e is None else w * e


def finish_rows(
    rows: RowSums, n_keys: Tensor | int, settings: Settings, is_log: bool = False
) -> Tensor:
    """Losses, followed by the columns of the statistics: [4, N], or [6, N] from logarithms of sums
    (``is_log``). ``n_keys``: how many keys ``unit_terms`` counts.
    """
    E, B, n, m, poison, w, s_sum = rows
    variant, r = settings.variant, pushing_rate(w, settings)
    A = (n * m).sign_()
    scale = A + poison
    if variant.weighted_rows and w is not None:
        scale = scale * w
    n = n.clamp(min=1)
    c = share = unit_terms = log_E = None
    if variant.unit_terms:
        unit_terms = (n_keys - n).clamp_(min=0)  # negative for rows that take no part
    if variant.log == "inside":
        c = n + variant.count_self
        share = n / c

    # T = Z − E, and excess = log Z − log E without forming Z − E.
    if is_log:
        log_E, log_B = (torch.where(A > 0, t, 0.0) for t in (E, B))
        log_r = torch.as_tensor(1.0 if r is None else r, dtype=E.dtype, device=E.device).log()
        log_T = log_r + log_B
        if unit_terms is not None:
            log_T = torch.logaddexp(log_T, unit_terms.log())
        gamma = torch.ones_like(log_E)
        alpha = -gamma if share is None else gamma
        excess = torch.logaddexp(log_T - log_E, torch.zeros_like(log_E))
        log_alpha = log_T - log_E if share is None else share.log()
        log_gamma = log_r if share is None else log_alpha + log_r
        logarithms = torch.stack([log_alpha, log_gamma.expand_as(n)]) + (A.log() - log_E - excess)
    else:
        E = E.clamp(min=TINY)
        T = B if r is None else B * r
        if unit_terms is not None:
            T = T + unit_terms
        Z, ratio = E + T, T / E
        excess = torch.log1p(ratio)
        alpha = (ratio / Z).neg_() if share is None else share / Z
        gamma = Z.reciprocal() if share is None else alpha
        gamma = gamma if r is None else gamma * r

    if share is None:
        loss, beta = n.log() + excess, poison
    else:
        log_E = E.log() if log_E is None else log_E
        loss, beta = (n * (log_E + excess) - s_sum) / c, 1 / c
    scaled = torch.stack([loss, alpha, beta, gamma]).mul_(scale)
    return torch.cat([scaled, logarithms]) if is_log else scaled
