"""``python -m benchmarks.ranks``: one process with the union batch against W processes with a part
of it each, in turns, one thread a process, on the CPU with gloo.

Prints the medians of forward and backward and the ratios; and what a step takes in the slower of W
independent processes with the union batch each, which no program can avoid: a shared machine's
cores are not all its own, and ranks wait for the slowest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import trange

from conr_kernels import conr_loss

from . import rows
from .batches import make_batch

#: Counted steps of a turn.
STEPS = 3
#: Bytes of the activations that an encoder would have freed: glibc adapts to pieces up to 32 MiB.
LARGER_PIECE = 31 * 2**20


def step(x: torch.Tensor, labels: tuple[torch.Tensor, ...], group: object) -> tuple[float, ...]:
    """Seconds of the wall clock forward and backward, and of this process's processor."""
    x.grad = None
    start, processor = time.perf_counter(), time.process_time()
    loss = conr_loss(x, *labels, group=group)
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    return middle - start, end - middle, time.process_time() - processor


def turn(x: torch.Tensor, labels: tuple[torch.Tensor, ...], group: object) -> list[tuple]:
    """Steps in a row, as in training. The first is not counted: it pays for the memory and the
    caches that the other kind left behind.
    """
    return [step(x, labels, group) for _ in range(1 + STEPS)][1:]


def slowest(steps: list[tuple]) -> list[tuple]:
    """Of each step, the rank that took longest."""
    of_ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, steps)
    return [
        max(ranks, key=lambda times: times[0] + times[1]) for ranks in zip(*of_ranks, strict=True)
    ]


def run(rank: int, n_ranks: int, n: int, d: int, labels: str, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=n_ranks)
    batch = make_batch(n, d, labels)
    union = (batch.y, batch.p, batch.w)
    mine = slice(rank * n // n_ranks, (rank + 1) * n // n_ranks)
    x = batch.x.detach()[mine].clone().requires_grad_()
    part = tuple(t[mine] for t in union)
    # As an encoder's activations do: the C library keeps freed memory for the next step once it has
    # seen larger pieces, and else returns the pages and asks for them again, in every step.
    activations = torch.empty(LARGER_PIECE, dtype=torch.uint8)
    del activations
    one, beside, several = [], [], []
    for _ in trange(rounds, disable=rank > 0, unit="round"):
        dist.barrier()
        if rank == 0:
            one += turn(batch.x, union, None)
        dist.barrier()
        beside += slowest(turn(batch.x, union, None))
        dist.barrier()
        several += slowest(turn(x, part, dist.group.WORLD))
    mean = (batch.x.grad[mine] * n_ranks - x.grad).norm() if rank == 0 else None
    if rank == 0:
        report(one, beside, several, n_ranks, f"N = {n:,}, D = {d}, {labels}")
        print(f"gradients differ by {mean / x.grad.norm():.1e} of their norm")
    dist.destroy_process_group()


def report(one: list, beside: list, several: list, n_ranks: int, batch: str) -> None:
    print(
        f"{batch}, float32, torch {torch.__version__}, {rows.processor()}, "
        f"medians of {len(one)} steps"
    )
    medians = []
    kinds = (
        ("1 process alone", one),
        (f"slower of {n_ranks} apart", beside),
        (f"{n_ranks} as one", several),
    )
    for name, steps in kinds:
        forward, backward, processor = map(statistics.median, zip(*steps, strict=True))
        total = statistics.median(a + b for a, b, _ in steps)
        medians.append((total, forward, backward, processor))
        print(
            f"{name:>19}: {total * 1e3:7.1f} ms = forward {forward * 1e3:.1f} + backward "
            f"{backward * 1e3:.1f}; processor time of one {processor * 1e3:.1f} ms"
        )
    alone, apart, ranks = medians
    names = ("step", "forward", "backward", "processor time")
    of_each = (f"{name} {b / a:.2f}" for name, a, b in zip(names, alone, ranks, strict=True))
    print(f"ratio: {', '.join(of_each)}")
    print(
        f"the slower of independent processes, which exchange nothing, takes "
        f"{apart[0] / alone[0]:.2f} of one alone here; as one they take "
        f"{ranks[0] / apart[0]:.2f} of that"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16_384, help="rows of the union (16384)")
    parser.add_argument("--features", type=int, default=128, help="D (128)")
    parser.add_argument("--labels", default="agedb", choices=("agedb", "constant"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        batch = (options.ranks, options.rows, options.features, options.labels)
        mp.spawn(run, (*batch, options.rounds, folder), nprocs=options.ranks)


if __name__ == "__main__":
    main()
