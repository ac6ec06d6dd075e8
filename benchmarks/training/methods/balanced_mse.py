"""Balanced MSE, its batch form BMC (Ren et al., CVPR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Method, Step

INITIAL_SIGMA = 0.5


class BalancedMSE(Method):
    """``−log softmax_j(−‖p_i − y_j‖² / 2σ²)`` at j = i, times ``2σ²``; σ is learned."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.sigma = nn.Parameter(torch.tensor(INITIAL_SIGMA))

    def regression(self, step: Step) -> Tensor:
        squares = ((step.p[:, None] - step.y) / step.scale).square().sum(dim=2)
        noise = 2 * self.sigma.square()
        target = torch.arange(len(squares), device=squares.device)
        return functional.cross_entropy(-squares / noise, target) * noise.detach()
