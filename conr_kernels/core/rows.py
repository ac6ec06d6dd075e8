"""From the sums of a row to its loss and its gradient coefficients (spec: sections 2 to 4).

A row's *statistics* are what the backward pass needs, for an upstream gradient of 1:

- where no exponent can be large, three columns ``(α_i, β_i, γ_i)``;
- otherwise five columns ``(±1, β_i, ±1, log|α_i|, log|γ_i|)``: the first three carry the sign
  and are multiplied by the upstream gradient, so that nothing over- or underflows before it meets
  ``exp(s_ij)``. The logarithm of nothing is ``−inf``: ``exp(s_ij)`` alone may be infinite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..variants import Settings

#: Below any sum of unshifted exponentials, for rows that have none.
TINY = 1e-30


def scale_statistics(stats: Tensor, g: Tensor) -> Tensor:
    """The coefficients of the gradient: statistics times the upstream gradient ``g`` [N]."""
    if stats.shape[1] == 3:
        return stats * g[:, None]
    return torch.cat([stats[:, :3] * g[:, None], stats[:, 3:]], dim=1)


def to_log_statistics(stats: Tensor) -> Tensor:
    """Three columns as five: what they multiply has the logarithm 0."""
    return torch.cat([stats, stats.new_zeros(len(stats), 2)], dim=1)


def no_statistics(n_rows: int, like: Tensor) -> Tensor:
    """The statistics of rows that have no loss."""
    stats = like.new_zeros(n_rows, like.shape[1])
    stats[:, 3:] = -torch.inf
    return stats


class RowSums(NamedTuple):
    """Of each row [N]: ``E_i = Σ_P exp s`` and ``B_i = Σ_M φ exp s``, or their logarithms; ``n_i``,
    ``m_i``; 0, or NaN where an input is not finite; ``w_i``; ``Σ_P s``, of ``log="inside"``.

    In float64 where the device has it: weights up to 1e30 meet sums up to 1e30 here.
    """

    E: Tensor
    B: Tensor
    n: Tensor
    m: Tensor
    poison: Tensor
    w: Tensor | None = None
    s_sum: Tensor | None = None


def pushing_rate(w: Tensor | None, settings: Settings) -> Tensor | float | None:
    """``r_i``, the anchor's own part of the pushing weight ``S_ij = r_i · φ(d_ij)``; None for 1."""
    e, pushing = settings.push_scale, settings.variant.pushing
    if pushing == "none":
        return None
    if pushing == "exponential":
        return w
    return e if w is None or pushing == "distance" else w * e


def finish_rows(
    rows: RowSums, n_keys: Tensor | int, settings: Settings, is_log: bool = False
) -> Tensor:
    """Losses, and then the columns of the statistics: [4, N]; [6, N] if the sums are logarithms."""
    E, B, n, m, poison, w, s_sum = rows
    variant, r = settings.variant, pushing_rate(w, settings)
    A = (n * m).sign_()
    scale = A + poison
    if variant.weighted_rows and w is not None:
        scale = scale * w
    n = n.clamp(min=1)
    unit_terms = None
    if variant.unit_terms:
        unit_terms = (n_keys - n).clamp_(min=0)  # below 0 of rows that take no part
    c = share = None
    if variant.log == "inside":
        c = n + variant.count_self
        share = n / c
    if is_log:
        E, B = (torch.where(A > 0, t, 0.0) for t in (E, B))
        log_E, excess, log_alpha, log_gamma = _log_coefficients(E, B, r, unit_terms, share)
        gamma, log_A = torch.ones_like(n), A.log()
        alpha = -gamma if share is None else gamma
    else:
        log_E, excess, alpha, gamma = _coefficients(E, B, r, unit_terms, share)
    if share is None:
        loss, beta = n.log() + excess, poison
    else:
        loss, beta = (n * (log_E + excess) - s_sum) / c, 1 / c
    scaled = torch.stack([loss, alpha, beta, gamma]).mul_(scale)
    if not is_log:
        return scaled
    return torch.cat([scaled, torch.stack([log_alpha + log_A, log_gamma + log_A])])


#: E, B, and the pushing rate, the unit terms and ``n/c``, each None where there is none.
def _coefficients(E, B, r, unit_terms, share):
    """``log E``, where it is needed; ``log Z − log E`` without forming ``Z − E``; α and γ."""
    E = E.clamp(min=TINY)
    T = B if r is None else B * r  # Z − E
    if unit_terms is not None:
        T = T + unit_terms
    Z, ratio = E + T, T / E
    if share is None:
        log_E, alpha, gamma = None, (ratio / Z).neg_(), Z.reciprocal()
    else:
        log_E, alpha = E.log(), share / Z
        gamma = alpha
    return log_E, torch.log1p(ratio), alpha, gamma if r is None else gamma * r


def _log_coefficients(E, B, r, unit_terms, share):
    """The same of ``log E`` and ``log B``, with ``log |α|`` and ``log γ``."""
    log_r = torch.as_tensor(1.0 if r is None else r, dtype=E.dtype, device=E.device).log()
    log_T = B + log_r
    if unit_terms is not None:
        log_T = torch.logaddexp(log_T, unit_terms.log())
    excess = torch.logaddexp(log_T - E, torch.zeros_like(E))
    log_Z = E + excess
    if share is None:
        return E, excess, log_T - E - log_Z, log_r - log_Z
    log_alpha = share.log() - log_Z
    return E, excess, log_alpha, log_alpha + log_r
