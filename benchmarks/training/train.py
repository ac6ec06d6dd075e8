"""One training run: a small network, two views of each row, any method with any further terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .methods import Method, Step, Task
from .splits import Split

WIDTH = 64
LEARNING_RATE = 3e-3
#: Of a view: the noise added to inputs of variance 1, and the share of columns set to the mean.
NOISE, DROPOUT = 0.1, 0.1


@dataclass(frozen=True)
class Budget:
    """Rows of a batch before they are viewed twice, and steps in all."""

    batch: int = 64
    n_steps: int = 500
    learning_rate: float = LEARNING_RATE


class Net(nn.Module):
    """An encoder of two hidden layers, the second of which is the feature, and a linear head."""

    def __init__(self, n_inputs: int, n_labels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(n_inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
        )
        self.head = nn.Linear(WIDTH, n_labels)
        self.register_buffer("mean", torch.zeros(n_labels))
        self.register_buffer("scale", torch.ones(()))

    def predict(self, x: Tensor) -> Tensor:
        """Predictions in the labels' units from features."""
        return self.mean + self.scale * self.head(x)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.predict(self.encoder(inputs))


#: Called at each step with the epoch, counted from 0, the batch and the network.
Watch = Callable[[int, Step, Net], None]


def two_views(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Both augmented views [2B, F], one after the other: noise, and columns left out."""
    u = inputs.repeat(2, 1)
    noise = torch.randn(u.shape, generator=generator).to(u.device)
    is_kept = torch.rand(u.shape, generator=generator).to(u.device) >= DROPOUT
    return (u + NOISE * noise) * is_kept


def prepare(split: Split, batch: int, n_steps: int, device: str) -> tuple[Task, int]:
    """The task on its device, and the steps of an epoch."""
    train = split.train
    steps_per_epoch = max(1, len(train.labels) // batch)
    task = Task(
        inputs=train.inputs.to(device), labels=train.labels.to(device), bins=train.bins.to(device),
        n_bins=len(split.counts), bin_width=split.bin_width, scale=train.labels.std().item(),
        n_epochs=max(1, round(n_steps / steps_per_epoch)),
    )  # fmt: skip
    return task, steps_per_epoch


def train(
    split: Split,
    parts: Sequence[Method],
    seed: int,
    budget: Budget | None = None,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Net:
    """Trains from the seed; every method sees the same batches and the same views.

    Args:
        parts: the first one's regression loss and features count; all terms are added.
    """
    budget = budget or Budget()
    task, steps_per_epoch = prepare(split, budget.batch, budget.n_steps, device)
    torch.manual_seed(seed)
    net = Net(task.inputs.shape[1], task.labels.shape[1]).to(device)
    net.mean.copy_(task.labels.mean(dim=0))
    net.scale.fill_(task.scale)
    for part in parts:
        part.to(device).start(task)
    parameters = [t for module in (net, *parts) for t in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=budget.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, task.n_epochs * steps_per_epoch
    )
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(task.n_epochs):
        order = torch.randperm(len(task.labels), generator=generator).to(device)
        for rows in order.split(budget.batch)[:steps_per_epoch]:
            views = two_views(task.inputs[rows], generator)
            loss, step = objective(net, parts, views, rows.repeat(2), task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if watch is not None:
                watch(epoch, step, net)
        for part in parts:
            part.end_epoch(epoch + 1, net)
    return net


def objective(
    net: Net, parts: Sequence[Method], views: Tensor, rows: Tensor, task: Task
) -> tuple[Tensor, Step]:
    """The loss of a batch: the first part's regression and all terms, times their weights."""
    x = net.encoder(views)
    p = net.predict(parts[0].calibrate(x, rows))
    step = Step(x, task.labels[rows], p, rows, task.scale)
    loss = parts[0].regression(step)
    if x.requires_grad:  # not behind a frozen encoder, which no term could change
        for part in parts:
            term = part.term(step)
            loss = loss if term is None else loss + part.weight * term
    return loss, step


@torch.no_grad()
def predictions(net: Net, inputs: Tensor) -> Tensor:
    """Predictions [N, L] on the CPU."""
    return net(inputs.to(net.mean.device)).cpu()
