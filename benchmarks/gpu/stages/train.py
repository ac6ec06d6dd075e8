"""The stage that trains: an MLP with a regression loss and ConR, fused against careful eager."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from conr_kernels import conr_loss

from ...batches import Batch, make_batch
from ...providers import PUSH_SCALE, TEMPERATURE, WINDOW, eager_losses
from .. import device
from ..rows import Stage

BATCHES = (128, 1024, 16_384)
N_INPUTS, WIDTH, N_FEATURES = 256, 512, 128
BETA = 0.5
#: Labels have a mean of 40 or so, and the regression should not take the whole run.
CENTRE, SPREAD = 40.0, 15.0


class Model(nn.Module):
    """Features and a prediction of each row, 16-bit under autocast."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(N_INPUTS, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.Linear(WIDTH, N_FEATURES))
        self.head = nn.Linear(N_FEATURES, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(inputs)
        return features, CENTRE + SPREAD * self.head(features)[:, 0].float()


OPTIONS = dict(window=WINDOW, temperature=TEMPERATURE, push_scale=PUSH_SCALE)
#: The ConR term of the objective by its provider; without one, what the rest of a step takes.
LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    "fused": lambda rows: conr_loss(rows.x, rows.y, rows.p, rows.w, **OPTIONS),
    "eager": functools.partial(eager_losses, reduction="mean"),
    "no ConR": lambda rows: rows.x.new_zeros(()),
}


def trainer(n: int, provider: str) -> Callable[[], Tensor]:
    """One training step: the same data, model and optimizer for every provider."""
    torch.manual_seed(0)
    model = Model().to(device.DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = make_batch(device.small(n), N_INPUTS, device=device.DEVICE)
    inputs, conr = batch.x.detach(), LOSSES[provider]

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.DEVICE, dtype=torch.bfloat16):
            features, predictions = model(inputs)
            rows = Batch(features, batch.y, predictions.detach(), batch.w)
            regression = nn.functional.l1_loss(predictions, batch.y)
            loss = regression + BETA * conr(rows)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def case(stage: Stage, n: int) -> None:
    steps = {provider: trainer(n, provider) for provider in LOSSES}
    first = {provider: step().item() for provider, step in steps.items()}
    # Before the first update fused and eager see the same features: the same loss.
    difference = abs(first["fused"] / first["eager"] - 1)
    row = dict(mode="training step", N=n, D=N_INPUTS, dtype="bfloat16 autocast")
    stage.add("loss difference", difference, provider="fused", **row)
    if not difference <= 1e-2:
        stage.add("wrong", 1, provider="fused", **row, note=f"first losses {first}: not timed")
        return
    for provider, step in steps.items():
        stage.add("memory", device.extra_bytes(step), provider=provider, **row)
        device.free_memory()
    times = device.seconds(steps, 9, 10 if n <= 1024 else 2)
    for provider, t in times.items():
        stage.add("time", t, provider=provider, **row, note="median of 9")


def train(stage: Stage) -> int:
    """Seconds a step and peak memory of training."""
    return stage.run({f"batch {n}": functools.partial(case, stage, n) for n in BATCHES})
