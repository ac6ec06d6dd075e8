"""From the sums of a row to its loss and its gradient coefficients (spec: sections 2 to 4).

A row's *statistics* are what the backward pass needs, for an upstream gradient of 1:

- where no exponent can be large, three columns ``(α_i, β_i, γ_i)``;
- otherwise five columns ``(±1, β_i, ±1, log|α_i|, log|γ_i|)``: the first three carry the sign
  and are multiplied by the upstream gradient, so that nothing over- or underflows before it meets
  ``exp(s_ij)``. The logarithm of nothing is ``−inf``: ``exp(s_ij)`` alone may be infinite.
"""

from __future__ import annotations

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
    """Three columns as five."""
    alpha, beta, gamma = stats.unbind(1)
    log_alpha, log_gamma = alpha.abs().log(), gamma.abs().log()
    return torch.stack([alpha.sign(), beta, gamma.sign(), log_alpha, log_gamma], dim=1)


def no_statistics(n_rows: int, like: Tensor) -> Tensor:
    """The statistics of rows that have no loss."""
    stats = like.new_zeros(n_rows, like.shape[1])
    stats[:, 3:] = -torch.inf
    return stats


def collapse_statistics(stats: Tensor) -> Tensor:
    """Five columns as three."""
    alpha, beta, gamma, log_alpha, log_gamma = stats.unbind(1)
    return torch.stack([alpha * log_alpha.exp(), beta, gamma * log_gamma.exp()], dim=1)


def pushing_rate(w: Tensor | None, settings: Settings) -> Tensor | float | None:
    """``r_i``, the anchor's own part of the pushing weight ``S_ij = r_i · φ(d_ij)``; None for 1."""
    e, pushing = settings.push_scale, settings.variant.pushing
    if pushing == "none":
        return None
    if pushing == "exponential":
        return w
    return e if w is None or pushing == "distance" else w * e


def finish_rows(
    E: Tensor,
    B: Tensor,
    n: Tensor,
    m: Tensor,
    poison: Tensor,
    n_keys: Tensor | int,
    settings: Settings,
    w: Tensor | None = None,
    s_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses [N] and statistics [N, 3] from ``E_i = Σ_P exp s``, ``B_i = Σ_M φ exp s`` and counts.

    Runs in the dtype of its inputs, float64 where the device has it: weights up to 1e30 meet sums
    up to 1e30 here. ``poison`` [N] is 0, or NaN where an input of the row is not finite.
    """
    variant = settings.variant
    r = pushing_rate(w, settings)
    scale = (n * m).clamp_(max=1).add_(poison)  # A_i
    if variant.weighted_rows and w is not None:
        scale = scale * w
    n = n.clamp(min=1)
    E = E.clamp(min=TINY)
    other = B if r is None else B * r
    if variant.unit_terms:
        other = other + (n_keys - n).clamp_(min=0)  # below 0 of rows that take no part
    Z = E + other
    ratio = other / E
    excess = torch.log1p(ratio)  # log Z − log E, without forming Z − E
    if variant.log == "outside":
        loss = n.log_().add_(excess)
        alpha, beta, gamma = ratio.div_(Z).neg_(), poison, Z.reciprocal_()
    else:
        c = n + variant.count_self
        loss = (E.log_().add_(excess).mul_(n) - s_sum) / c
        alpha, beta = n / (c * Z), c.reciprocal_()
        gamma = alpha
    gamma = gamma if r is None else gamma * r
    stats = torch.stack([alpha, beta, gamma], dim=1)
    return loss.mul_(scale), stats.mul_(scale[:, None])


def finish_log_rows(
    E: Tensor,
    B: Tensor,
    n: Tensor,
    m: Tensor,
    poison: Tensor,
    n_keys: Tensor | int,
    settings: Settings,
    w: Tensor | None = None,
    s_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same where E and B are ``log E_i`` and ``log B_i``: losses [N] and statistics [N, 5]."""
    variant = settings.variant
    r = pushing_rate(w, settings)
    r = torch.as_tensor(1.0 if r is None else r, dtype=E.dtype, device=E.device)
    is_anchor = (n > 0) & (m > 0)
    log_E = torch.where(is_anchor, E, 0.0)
    log_B = torch.where(is_anchor, B, 0.0)
    n = torch.where(is_anchor, n, 1).to(log_E.dtype)
    log_r = r.log()
    log_T = log_r + log_B  # of Z − E
    if variant.unit_terms:
        log_T = torch.logaddexp(log_T, (n_keys - n).clamp_(min=0).log())
    excess = torch.logaddexp(log_T - log_E, torch.zeros_like(log_E))  # log Z − log E
    log_Z = log_E + excess
    one = torch.ones_like(log_E)
    if variant.log == "outside":
        loss = n.log() + excess
        sign_alpha, log_alpha = -one, log_T - log_Z - log_E
        beta, log_gamma = torch.zeros_like(log_E), log_r - log_Z
    else:
        c = n + variant.count_self
        loss = (n * log_Z - s_sum) / c
        sign_alpha, log_alpha = one, (n / c).log() - log_Z
        beta, log_gamma = 1 / c, log_alpha + log_r
    stats = torch.stack([sign_alpha, beta, one, log_alpha, log_gamma], dim=1)
    stats = torch.where(is_anchor[:, None], stats, no_statistics(1, stats))
    scale = poison + 1 if w is None or not variant.weighted_rows else w + poison
    return torch.where(is_anchor, loss, 0.0) * scale, scale_statistics(stats, scale)
