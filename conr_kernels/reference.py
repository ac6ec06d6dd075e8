"""The equations of ConR in eager PyTorch, one statement per line of the mathematics: the oracle.

O(N²) memory, differentiable to any order by PyTorch itself. Nothing clever happens here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .variants import Settings


def unit_rows(x: Tensor) -> Tensor:
    """``q_i = x_i / ‖x_i‖₂``; a zero row gives ``q_i = 0`` and gradient 0."""
    is_zero = (x == 0).all(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(x.masked_fill(is_zero, 1.0), dim=1, keepdim=True)
    return torch.where(is_zero, torch.zeros_like(x), x / norm)


def pair_distance(y_i: Tensor, y_j: Tensor, distance: str) -> Tensor:
    """``d_ij`` [..., N, K] of label rows [..., N, L] and [..., K, L]: mean absolute or root mean
    square.

    The components are added one after another, in their order: every backend does the same, so that
    all of them round, and therefore decide ``d_ij ≤ h``, alike. Their sum is divided by a tensor:
    by a number PyTorch divides on a CPU, but multiplies with its reciprocal on a GPU.
    """
    n_components = y_i.shape[-1]
    if n_components == 1:
        return (y_i - y_j.mT).abs_()
    total: Tensor | None = None
    for c in range(n_components):
        difference = (y_i[..., :, c, None] - y_j[..., None, :, c]).abs_()
        term = difference if distance == "mae" else difference * difference
        total = term if total is None else total + term
    mean = total / total.new_full((), n_components)
    return mean if distance == "mae" else mean.sqrt()


def masks(
    y_i: Tensor, p_i: Tensor, y_j: Tensor, p_j: Tensor, self_offset: int, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Label distances ``d_ij`` and the masks ``[j ∈ P_i]``, ``[j ∈ M_i]``, each [N, K]."""
    h = settings.window
    d_ij = pair_distance(y_i, y_j, settings.distance)
    self_j = torch.arange(len(y_i), device=y_i.device) + self_offset
    is_self = self_j[:, None] == torch.arange(len(y_j), device=y_i.device)[None, :]
    positive = (d_ij <= h) & ~is_self
    negative = d_ij > h
    if settings.variant.negatives == "confused":
        negative = negative & (pair_distance(p_i, p_j, settings.distance) <= h)
    return d_ij, positive, negative


def row_losses(
    x_i: Tensor,
    y_i: Tensor,
    p_i: Tensor,
    w_i: Tensor | None,
    keys: tuple[Tensor, Tensor, Tensor] | None,
    self_offset: int,
    settings: Settings,
    n_absent: Tensor | int = 0,
) -> Tensor:
    """``ℓ_i`` of the anchors [N] against the keys; ``keys=None``: the anchors themselves.

    Args:
        x_i: features [N, D] in the accumulation dtype. y_i, p_i: labels, predictions [N, L].
        w_i: weights [N] or None for 1.
        keys: features, labels, predictions of all rows that can be positives or negatives, the
            anchors included: row ``self_offset + i`` of the keys is anchor ``i``.
        n_absent: how many keys ``unit_terms`` does not count.
    """
    variant, tau, e = settings.variant, settings.temperature, settings.push_scale
    x_j, y_j, p_j = (x_i, y_i, p_i) if keys is None else keys
    w_i = torch.ones(len(x_i), dtype=x_i.dtype, device=x_i.device) if w_i is None else w_i

    not_finite = poison(x_i, y_i, p_i, w_i, *(keys or ()))
    # As a factor it reaches the gradient even of rows that are no anchors, and is 1 otherwise.
    x_i = x_i * (1 + not_finite.detach())

    q_i = unit_rows(x_i)
    q_j = q_i if keys is None else unit_rows(x_j)
    s_ij = q_i @ q_j.T / tau
    d_ij, positive, negative = masks(y_i, p_i, y_j, p_j, self_offset, settings)
    d_ij = d_ij.to(x_i.dtype)
    n_i = positive.sum(dim=1)
    m_i = negative.sum(dim=1)
    is_anchor = (n_i > 0) & (m_i > 0)

    # Rows that are no anchors sum over all pairs instead of none: finite, and masked at the end.
    positive = positive | ~is_anchor[:, None]
    negative = negative | ~is_anchor[:, None]
    log_phi = {
        "one": lambda: torch.zeros_like(d_ij),
        "distance": lambda: d_ij.masked_fill(~negative | (d_ij == 0), 1.0).log(),
        "exponential": lambda: e * d_ij,
    }[settings.pushing.phi]()
    factors_of_r_i = [torch.full_like(w_i, e)] if settings.pushing.is_scaled else []
    factors_of_r_i += [w_i] if settings.pushing.is_weighted else []

    log_E = torch.logsumexp(s_ij.masked_fill(~positive, -torch.inf), dim=1)
    log_B = torch.logsumexp((s_ij + log_phi).masked_fill(~negative, -torch.inf), dim=1)
    log_rest = log_B  # of Z − E, which is not subtracted
    for factor in factors_of_r_i:
        log_rest = _log_scaled(factor, log_rest)
    if variant.unit_terms:
        n_other = len(x_j) - n_absent - n_i
        log_rest = torch.logaddexp(n_other.clamp(min=0).to(x_i.dtype).log(), log_rest)

    n = n_i.clamp(min=1).to(x_i.dtype)
    if variant.log == "outside":
        loss = n.log() - logsigmoid(log_E - log_rest)
    else:
        log_Z = torch.logaddexp(log_E, log_rest)
        s_sum = s_ij.masked_fill(~positive, 0.0).sum(dim=1)
        loss = (n * log_Z - s_sum) / (n + variant.count_self)
    if variant.weighted_rows:
        loss = loss * w_i
    return torch.where(is_anchor, loss, 0.0) + not_finite


def _log_scaled(r: Tensor, log_b: Tensor) -> Tensor:
    """``log(r·exp(log_b))`` for ``r ≥ 0``; the derivatives of any order exist at 0."""
    is_zero = r == 0
    log_r = r.masked_fill(is_zero, 1.0).log()
    return torch.where(is_zero, -torch.inf, log_r + log_b)


def poison(*inputs: Tensor | None) -> Tensor:
    """0 where every input is finite, NaN otherwise: masks and comparisons would hide a NaN."""
    return sum((t * 0).sum() for t in inputs if t is not None)
