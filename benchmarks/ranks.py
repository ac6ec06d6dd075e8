"""``python -m benchmarks.ranks``: one process with the union batch against W processes with a part
of it each, in turns, one thread a process, on the CPU with gloo.

A step of W processes ends when its slowest does, and begins when the one before ended: these times
add up to the clock's, whichever rank was late.

A shared machine's cores are not all its own, and ranks wait for the slowest. So the table has two
more things: the slower of W processes that compute the whole batch each and exchange nothing, and
besides medians the step that a tenth of the steps undercut, as on a quiet machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from tqdm import trange

from conr_kernels import conr_loss

from . import rows
from .batches import make_batch

#: Counted steps of a turn.
STEPS = 3
#: Bytes of the activations that an encoder would have freed: glibc adapts to pieces up to 32 MiB.
LARGER_PIECE = 31 * 2**20


def steps_of(x: Tensor, labels: tuple[Tensor, ...], group: object, of_all: bool = False) -> Tensor:
    """Steps in a row, as in training: seconds forward, backward and of this process's processor,
    a line each; ``of_all``: of all ranks together, whose slowest ends a step.

    The first step is not counted: it pays for the memory and the caches that the other kind left.
    """
    lines = []
    for _ in range(1 + STEPS):
        x.grad, processor = None, time.process_time()
        loss = conr_loss(x, *labels, group=group)
        middle = time.perf_counter()
        loss.backward()
        lines.append((middle, time.perf_counter(), time.process_time() - processor))
    ends = torch.tensor(lines, dtype=torch.float64)
    if of_all:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    middle, end, processor = ends.unbind(1)
    return torch.stack([middle[1:] - end[:-1], end[1:] - middle[1:], processor[1:]], dim=1)


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
    found: dict[str, list[Tensor]] = {"alone": [], "apart": [], "as one": []}
    for _ in trange(rounds, disable=rank > 0, unit="round"):
        dist.barrier()
        if rank == 0:
            found["alone"].append(steps_of(batch.x, union, None))
        dist.barrier()
        found["as one"].append(steps_of(x, part, dist.group.WORLD, of_all=True))
        dist.barrier()
        found["apart"].append(steps_of(batch.x, union, None, of_all=True))
    if rank == 0:
        mean = batch.x.grad[mine] * n_ranks
        print(
            f"N = {n:,}, D = {d}, {labels}, {n_ranks} ranks, float32, torch {torch.__version__}, "
            f"{rows.processor()}; gradients differ by {(mean - x.grad).norm() / mean.norm():.1e}"
        )
        report({kind: torch.cat(turns) for kind, turns in found.items()})
    dist.destroy_process_group()


def report(found: dict[str, Tensor]) -> None:
    columns = ("step", "of alone", "forward", "backward", "processor's")
    for name, q in ((f"median of {len(found['alone'])} steps", 0.5), ("fastest tenth", 0.1)):
        print(f"{name + ', ms':24}", *(f"{column:>11}" for column in columns))
        for kind, steps in found.items():
            total, alone = (t[:, :2].sum(1).quantile(q) for t in (steps, found["alone"]))
            parts = [f"{seconds * 1e3:11.1f}" for seconds in steps.quantile(q, dim=0)]
            print(f"{kind:24} {total * 1e3:11.1f} {total / alone:11.2f}", *parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16_384, help="rows of the union (16384)")
    parser.add_argument("--features", type=int, default=128, help="D (128)")
    parser.add_argument("--labels", default="agedb", choices=("agedb", "constant"))
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        batch = (options.ranks, options.rows, options.features, options.labels)
        mp.spawn(run, (*batch, options.rounds, folder), nprocs=options.ranks)


if __name__ == "__main__":
    main()
