"""Focal-R: rows with a large error weigh more (Yang et al., ICML 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Method, Step, row_l1

BETA, GAMMA = 0.2, 1.0


class FocalR(Method):
    """``mean sigmoid(β e_i)^γ e_i`` of the errors ``e_i``, within the sigmoid in label units."""

    def regression(self, step: Step) -> Tensor:
        e = row_l1(step)
        return (torch.sigmoid(BETA * step.scale * e) ** GAMMA * e).mean()
