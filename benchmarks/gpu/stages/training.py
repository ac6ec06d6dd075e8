"""A training step of an MLP: a regression loss and ConR, fused, careful eager, or none."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...batches import Batch, make_batch
from ...providers import eager_losses, package_losses
from .. import device

N_INPUTS, WIDTH, N_FEATURES = 256, 512, 128
#: The ConR term of the objective by its provider; without one, what the rest of a step takes.
LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    "fused": functools.partial(package_losses("auto"), reduction="mean"),
    "eager": functools.partial(eager_losses, reduction="mean"),
    "no ConR": lambda batch: batch.x.new_zeros(()),
}


def trainer(n: int, provider: str) -> Callable[[], Tensor]:
    """One step under autocast: the same data, model and optimizer for every provider."""
    torch.manual_seed(0)
    layers = [nn.Linear(N_INPUTS, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
    body = nn.Sequential(*layers, nn.Linear(WIDTH, N_FEATURES)).to(device.DEVICE)
    head = nn.Linear(N_FEATURES, 1).to(device.DEVICE)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-3)
    batch = make_batch(device.small(n), N_INPUTS, device=device.DEVICE)
    inputs, conr = batch.x.detach(), LOSSES[provider]

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.DEVICE, dtype=torch.bfloat16):
            features = body(inputs)
            p = 40 + 15 * head(features)[:, 0].float()  # the labels' mean and spread, about
            regression = nn.functional.l1_loss(p, batch.y)
            loss = regression + 0.5 * conr(Batch(features, batch.y, p.detach(), batch.w))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
