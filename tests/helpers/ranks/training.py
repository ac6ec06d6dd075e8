"""Checks of ``group=`` in training: DistributedDataParallel and the gradient cache."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conr_kernels import ConRLoss, MemoryBank, gradient_cache, notices

from .rows import EVEN, make_rows, part


class Encoder(nn.Module):
    def __init__(self, p_dropout: float = 0.0) -> None:
        super().__init__()
        hidden = [nn.Linear(5, 16), nn.Tanh(), nn.Dropout(p_dropout), nn.Linear(16, 6)]
        self.body, self.head = nn.Sequential(*hidden), nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(inputs)
        return features, self.head(features)


def objective(features: Tensor, predictions: Tensor, y: Tensor, group: object) -> Tensor:
    conr = ConRLoss(group=group, temperature=0.1)
    return nn.functional.mse_loss(predictions[:, 0], y) + conr(features, y, predictions)


def check_ddp_training(group: dist.ProcessGroup) -> str:
    """Ranks with DDP train as one process with the union batch, with and without a gradient
    cache.
    """
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    n = 24 // n_ranks
    g = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(24, 5, generator=g), torch.randint(0, 6, (24,), generator=g).float())
        for _ in range(5)
    ]

    def train(how: str) -> Encoder:
        torch.manual_seed(0)
        model = Encoder()
        wrapped = (
            model if how == "one process" else DistributedDataParallel(model, process_group=group)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for inputs, y in batches:
            optimizer.zero_grad()
            if how == "one process":
                objective(*wrapped(inputs), y, None).backward()
            else:
                inputs, y = (t[rank * n : (rank + 1) * n] for t in (inputs, y))
                if how == "cache":
                    gradient_cache(
                        wrapped, inputs, lambda f, p, y=y: objective(f, p, y, group),
                        # Ranks may take different numbers of chunks.
                        chunk_size=3 + rank,
                    )  # fmt: skip
                else:
                    objective(*wrapped(inputs), y, group).backward()
            optimizer.step()
        return model

    start = list(Encoder().parameters())
    one = list(train("one process").parameters())
    assert all(not torch.equal(a, b) for a, b in zip(start, one, strict=True))
    for how in ("ddp", "cache"):
        for a, b in zip(train(how).parameters(), one, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    return ""


class Centred(nn.Module):
    """Reads and moves a buffer, which DDP takes from rank 0 in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.linear(x - self.centre)
        self.centre.lerp_(x.detach().mean(0), 0.5)
        return features, features[:, :1]


def check_gradient_cache_shares_buffers(group: dist.ProcessGroup) -> str:
    """A chunk as large as the batch is a plain DDP step, also where ranks' buffers differ."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    x, y, *_ = part(make_rows(36, 3, torch.float32), EVEN[n_ranks], rank)

    def loss(features: Tensor, predictions: Tensor) -> Tensor:
        return objective(features, predictions, y[:, 0], group)

    found: list[list[Tensor]] = []
    for is_cached in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Centred(), process_group=group)
        values = []
        for _ in range(3):
            if is_cached:
                values.append(gradient_cache(model, x + rank, loss, chunk_size=len(x)))
            else:
                values.append(loss(*model(x + rank)))
                values[-1].backward()
        found.append([t.detach() for t in (*values, model.module.linear.weight.grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
    return ""


class WithBank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bank = nn.Linear(6, 5), MemoryBank(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.linear(x)
        self.bank.push(features, x[:, 0], x[:, 0])
        return features.sum()


def check_bank_in_a_ddp_module(group: dist.ProcessGroup) -> str:
    """A bank whose rows DDP overwrites is told of; one whose buffers it ignores keeps its own."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    for is_ignored in (False, True):
        notices._told.discard("bank")
        module = WithBank()
        if is_ignored:
            names = [f"bank.{name}" for name, _ in module.bank.named_buffers()]
            module._ddp_params_and_buffers_to_ignore = names
        model = DistributedDataParallel(module, process_group=group)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(2):
                model(torch.full((2, 6), 10.0 * step + rank))
        seen = sum("MemoryBank is part" in str(warning.message) for warning in told)
        assert seen == (n_ranks > 1 and not is_ignored), (is_ignored, told)
        first = 0.0 if seen else float(rank)
        assert module.bank.targets[:, 0].tolist() == [first, first, 10.0 + rank, 10.0 + rank]
    return ""
