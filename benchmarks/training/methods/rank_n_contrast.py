"""Rank-N-Contrast (Zha et al., NeurIPS 2023), here beside the regression loss, not before it."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Method, Step

TEMPERATURE = 2.0


class RankNContrast(Method):
    """``−log( exp(s_ij) / Σ_{k≠i, d_ik ≥ d_ij} exp(s_ik) )``, mean over i ≠ j.

    ``s_ij = −‖x_i − x_j‖/τ``, labels at distance ``d_ij``.
    """

    def term(self, step: Step) -> Tensor:
        itself = torch.eye(len(step.x), dtype=torch.bool, device=step.x.device)
        s = -torch.cdist(step.x, step.x) / TEMPERATURE
        d = (step.y[:, None] - step.y).abs().mean(dim=2).masked_fill(itself, -1.0)
        far_first, order = d.sort(dim=1, descending=True)  # the row itself comes last
        far_first, s = far_first[:, :-1].contiguous(), s.gather(1, order)[:, :-1]
        last_tie = torch.searchsorted(-far_first, -far_first, right=True) - 1
        return (s.logcumsumexp(dim=1).gather(1, last_tie) - s).mean()
