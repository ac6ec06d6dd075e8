"""Seconds per epoch and peak memory of a step: of every method, and of ConR over the batch."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from conr_kernels import gradient_cache

from . import data
from .execute import parts_of
from .methods import Step
from .plan import Size
from .rows import LAST, Row, Run, Store
from .splits import split
from .train import Budget, objective, prepare, train, two_views

#: Eager's pair matrices need about this much per pair; more than the budget is not run.
EAGER_PAIR_BYTES, MEMORY_BUDGET = 26, 2 * 2**30
#: Seconds of a turn of one case, and turns of each.
TURN_S, N_TURNS = 0.3, 5
CACHE_CHUNK = 1024
BATCHES = tuple(2**k for k in range(6, 15))


def measure(store: Store, size: Size, device: str, common: Mapping[str, str]) -> None:
    """Appends the rows of every case that is not there; cases of a group are timed in turns."""
    groups = [[run for run in group if run not in store.done] for group in cases(size)]
    for group in tqdm([group for group in groups if group], desc="cost", unit="group"):
        seconds = epoch_seconds(group, size, device)
        for run in group:
            fields = asdict(run) | common
            rows = [Row(**fields, metric="epoch seconds", value=seconds[run])]
            rows.append(Row(**fields, metric="peak bytes", value=peak_bytes(run, size, device)))
            store.append(run, [*rows, Row(**fields, metric=LAST, value=seconds[run])])


def cases(size: Size) -> list[list[Run]]:
    """Every method and both forms of ConR at the usual batch; then ConR over the batch."""
    groups = []
    for name in size.studied[:1]:
        base = Run("cost", name, "vanilla", seed=0)
        found = [replace(base, method=method, weight=1.0) for method in size.methods]
        groups.append(found + [with_conr(base, backend) for backend in ("auto", "reference")])
    for name in size.large_data:
        n_train = len(split(data.load(name), 0, n_train=size.n_large_rows).train.labels)
        for batch in BATCHES:
            if batch > min(n_train, max(size.batches)):
                continue
            base = Run("cost", name, "vanilla", seed=0, batch=batch)
            group = [base, with_conr(base, "auto")]
            if fits_eager(batch):
                group.append(with_conr(base, "reference"))
            if batch > CACHE_CHUNK:
                group.append(with_conr(base, "gradient_cache"))
            groups.append(group)
    return groups


def with_conr(run: Run, backend: str) -> Run:
    return replace(run, conr="paper", conr_weight=1.0, window=1.0, push=1.0, backend=backend)


def fits_eager(batch: int) -> bool:
    return (2 * batch) ** 2 * EAGER_PAIR_BYTES <= MEMORY_BUDGET


def step_of(run: Run, size: Size, device: str) -> tuple[Callable[[], object], int]:
    """A training step with a network that 100 steps have brought off its first predictions, and
    the steps of an epoch."""
    n_train = size.n_train if run.data in size.studied[:1] else size.n_large_rows
    sample = split(data.load(run.data), run.seed, n_train=n_train)
    net = train(sample, parts_of(replace(run, conr=""), 1.0), run.seed, Budget(n_steps=100), device)
    task, steps_per_epoch = prepare(sample, run.batch, 1, device)
    is_cached = run.backend == "gradient_cache"
    backend = "auto" if is_cached else run.backend
    parts = parts_of(run, data.load(run.data).window, backend)
    for part in parts:
        part.to(device).start(task)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    generator = torch.Generator().manual_seed(run.seed)
    rows = torch.randperm(len(task.labels), generator=generator)[: run.batch].to(device).repeat(2)

    def step() -> None:
        views = two_views(task.inputs[rows[: run.batch]], generator)
        optimizer.zero_grad()
        if is_cached:
            cached_backward(net, parts, views, rows, task)
        else:
            objective(net, parts, views, rows, task)[0].backward()
        optimizer.step()

    return step, steps_per_epoch


def cached_backward(net, parts, views, rows, task) -> None:
    """As ``objective(…)[0].backward()``, encoding a chunk at a time."""

    def model(chunk):
        x = net.encoder(chunk)
        return x, net.predict(x)

    def loss(x, p):
        step = Step(x, task.labels[rows], p, rows, task.scale)
        return parts[0].regression(step) + sum(t.weight * t.term(step) for t in parts[1:])

    gradient_cache(model, views, loss, chunk_size=CACHE_CHUNK)


def epoch_seconds(group: list[Run], size: Size, device: str) -> dict[Run, float]:
    """Median step times the steps of an epoch, in rotating turns: the machine's pace meets all."""
    made = {run: step_of(run, size, device) for run in group}
    found: dict[Run, list[float]] = {run: [] for run in group}
    for turn in range(N_TURNS):
        k = turn % len(group)
        for run in group[k:] + group[:k]:
            step, _ = made[run]
            first = seconds_of(step, device)
            if turn == 0 and first > 10 * TURN_S:  # a long step needs no warm-up
                found[run].append(first)
            repeats = min(max(int(TURN_S / first), 1), 100)
            if first <= 10 * TURN_S or turn < 2:
                found[run] += [seconds_of(step, device) for _ in range(repeats)]
    return {run: statistics.median(times) * made[run][1] for run, times in found.items()}


def seconds_of(step: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Run, size: Size, device: str) -> float:
    """Peak extra memory of a step: on the CPU the growth of the resident set, in a fresh process,
    from Linux's high-water mark; elsewhere (no ``/proc``) not a number."""
    if device != "cpu":
        step, _ = step_of(run, size, device)
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return float("nan")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.training.cost"])
    with context.Pool(1) as pool:
        return pool.apply(_growth, (run, size))


def _growth(run: Run, size: Size) -> int:
    torch.set_num_threads(1)
    step_of(replace(run, batch=64), size, "cpu")[0]()
    step, _ = step_of(run, size, "cpu")
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _resident("VmRSS")
    step()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        (line,) = [t for t in file if t.startswith(field + ":")]
    return int(line.split()[1]) * 1024
