"""Other packages' fused losses over every pair of the same N × D, from their wheels where they are.

They are no ConR: what they show is what one step of a dense loss costs, so nothing is compared but
time and memory. memeff (Apache-2.0): LiT, a softmax over all keys, gradient of one side.
siglip-kernel (Apache-2.0): SigLIP, a sigmoid of every pair, gradients of both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...batches import Batch
from ...providers import TEMPERATURE

MODULES = {"memeff": "memeff", "siglip-kernel": "siglip_kernel"}


def reason_against(name: str) -> str | None:
    """Why a package's loss cannot be timed; None where it can be imported."""
    try:
        importlib.import_module(MODULES[name])
    except Exception as error:  # a wheel may fail as it likes where its GPU or Triton is missing
        return f"{type(error).__name__}: {error}"
    return None


def step(name: str, batch: Batch) -> Callable[[], Tensor]:
    """Forward and backward of the package's loss of these rows against themselves in turn."""
    module = importlib.import_module(MODULES[name])
    keys = F.normalize(batch.x.detach().roll(1, 0), dim=1)
    if name == "memeff":
        loss = module.MemoryEfficientLiTLoss(temperature=TEMPERATURE)
    else:
        scale = torch.tensor(1 / TEMPERATURE, device=batch.x.device).log()
        bias = torch.tensor(-10.0, device=batch.x.device)

        def loss(x: Tensor, keys: Tensor) -> Tensor:
            return module.fused_siglip_loss(F.normalize(x, dim=1), keys, scale, bias)

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(batch.x, keys), batch.x)
        return gradient

    return run
