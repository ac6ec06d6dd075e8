"""Trains a regression with ConR on a batch beyond the encoder's memory: CPU, one GPU or several.

    python -m benchmarks.examples.train_large_batch --rows 16384 --chunk 512
    torchrun --nproc-per-node 8 -m benchmarks.examples.train_large_batch --rows 65536 --chunk 1024

``--rows`` is the batch of all processes together, over which the ConR loss is exact. The data are
made up: a skewed label and inputs that depend on it. Prints loss and time of every step, and by how
much the first one has raised the peak memory.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conr_kernels import ConRLoss, MemoryBank, gradient_cache


class Encoder(nn.Module):
    """An MLP that returns features and predictions, the form gradient_cache asks for."""

    def __init__(self, n_inputs: int, width: int, depth: int, n_features: int) -> None:
        super().__init__()
        sizes = [n_inputs, *[width] * depth]
        hidden = [
            nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Dropout(0.1))
            for a, b in zip(sizes, sizes[1:], strict=False)
        ]
        self.body = nn.Sequential(*hidden, nn.Linear(width, n_features))
        self.head = nn.Linear(n_features, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(inputs)
        return features, self.head(features)[:, 0]


def make_batch(n_rows: int, n_inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels with a long tail, and inputs that turn with the label."""
    targets = 60 * torch.rand(n_rows, device=device) ** 3
    phase = torch.arange(n_inputs, device=device) / n_inputs
    inputs = torch.sin(targets[:, None] / 10 + 6 * phase) + 0.3 * torch.randn(
        n_rows, n_inputs, device=device
    )
    return inputs, targets


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default, text in (
        ("rows", 16384, "rows of the batch, all processes together"),
        ("chunk", 512, "rows that the encoder sees at a time"),
        ("steps", 5, "training steps"),
        ("width", 256, "width of the encoder"),
        ("depth", 8, "hidden layers of the encoder"),
        ("features", 32, "dimension of the features"),
        ("inputs", 16, "dimension of the inputs"),
        ("bank", 0, "rows of a memory bank that serve as further keys"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the ConR loss (1.0)")
    arguments = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return train(arguments, device)
    dist.init_process_group()  # started by torchrun
    train(arguments, device)
    # Nothing must hold the group any more, or gloo's threads may still hold tensors when Python
    # ends, which then aborts (pytorch/pytorch#190489).
    gc.collect()
    dist.destroy_process_group()


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    group, rank, n_ranks = None, 0, 1
    if dist.is_initialized():
        group, rank, n_ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = Encoder(arguments.inputs, arguments.width, arguments.depth, arguments.features)
    encoder = model = model.to(device)
    if group is not None:
        encoder = DistributedDataParallel(model)
    torch.manual_seed(1 + rank)  # other data on every rank
    conr = ConRLoss(window=1.5, temperature=0.1, group=group)
    bank = MemoryBank(arguments.bank, arguments.features, device=device) if arguments.bank else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    n_rows = arguments.rows // n_ranks
    if rank == 0:
        print(f"{n_ranks} processes of {n_rows} rows on {device.type}, chunks of {arguments.chunk}")

    for step in range(arguments.steps):
        inputs, targets = make_batch(n_rows, arguments.inputs, device)

        def loss(features: Tensor, predictions: Tensor, targets: Tensor = targets) -> Tensor:
            keys = None if bank is None else bank.keys(features.dtype)
            value = nn.functional.l1_loss(predictions, targets)
            value = value + arguments.beta * conr(features, targets, predictions, keys=keys)
            if bank is not None:
                bank.push(features, targets, predictions)
            return value

        before, start = peak_memory(device), time.perf_counter()
        optimizer.zero_grad()
        value = gradient_cache(encoder, inputs, loss, chunk_size=arguments.chunk)
        used = peak_memory(device) - before
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {value.item():.4f}, {time.perf_counter() - start:.2f} s")
            if step == 0:
                print(f"peak memory {used / 2**20:.1f} MiB above what there was before the step")


if __name__ == "__main__":
    main()
