"""Runs checks on several processes and says whose failed, in which check and with which values."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 4
#: Seconds that the other ranks have for a verdict of their own after one has failed: in a
#: collective they would wait for it for ever.
GRACE = 2.0

Check = Callable[[dist.ProcessGroup], str]
#: Of each rank, by check and size of the group: "started", "passed" or "failed", and a text.
Outcomes = list[dict[str, tuple[str, str]]]


def run_ranks(
    checks: Sequence[Check], folder: Path, sizes: Sequence[int] = (1, 2, 4), timeout: float = 240
) -> Outcomes:
    """Every check on groups of the first ranks, in as many processes as the largest group has.

    Ends soon after a check has failed on any rank.
    """
    world = max(sizes)
    processes = mp.spawn(_run, (checks, str(folder), sizes), world, join=False)
    deadline = time.monotonic() + timeout
    is_failing = False
    while not processes.join(timeout=0.5):
        if not is_failing and _failures(_read(folder, world)):
            is_failing = True
            deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
                process.join()
            break
    return _read(folder, world)


def what_happened(outcomes: Outcomes) -> str:
    """Every failure with its rank, check and values; else what each rank was doing last."""
    if failures := _failures(outcomes):
        return "\n".join(failures)
    return "no check failed; " + "; ".join(
        f"rank {rank} was in {list(of_rank)[-1] if of_rank else 'no check'}"
        for rank, of_rank in enumerate(outcomes)
    )


def _failures(outcomes: Outcomes) -> list[str]:
    return [
        f"rank {rank} failed {name}:\n{text}"
        for rank, of_rank in enumerate(outcomes)
        for name, (verdict, text) in of_rank.items()
        if verdict == "failed"
    ]


def _file(folder: Path | str, rank: int) -> Path:
    return Path(folder, f"rank{rank}.jsonl")


def _read(folder: Path, world: int) -> Outcomes:
    outcomes: Outcomes = []
    for rank in range(world):
        path = _file(folder, rank)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        records = map(json.loads, lines)
        outcomes.append({name: (verdict, text) for name, verdict, text in records})
    return outcomes


def _run(rank: int, checks: Sequence[Check], folder: str, sizes: Sequence[int]) -> None:
    torch.set_num_threads(1)
    world = max(sizes)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    with _file(folder, rank).open("w") as file:

        def note(*record: str) -> None:
            print(json.dumps(record), file=file, flush=True)

        for size, group in groups.items():
            for check in checks if rank < size else ():
                name = f"{check.__name__}-{size}"
                note(name, "started", "")
                try:
                    note(name, "passed", check(group))
                except Exception as error:
                    trace = traceback.TracebackException.from_exception(error, capture_locals=True)
                    note(name, "failed", "".join(trace.format()))
                    time.sleep(100 * GRACE)  # an end would make the others fail too
    dist.barrier()
    dist.destroy_process_group()
