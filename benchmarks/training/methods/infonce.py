"""InfoNCE on the two views: a contrastive control that knows no labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .base import Method, Step

TEMPERATURE = 0.2


class InfoNCE(Method):
    """``−log softmax_{j≠i}(q_i·q_j / τ)`` at the other view of the row."""

    def term(self, step: Step) -> Tensor:
        q = functional.normalize(step.x, dim=1)
        n = len(q)
        itself = torch.eye(n, dtype=torch.bool, device=q.device)
        s = (q @ q.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        return functional.cross_entropy(s, torch.arange(n, device=q.device).roll(n // 2))
