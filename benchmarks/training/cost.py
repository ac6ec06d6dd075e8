"""Seconds per epoch and peak memory of a step: of every method, and of ConR over the batch."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from conr_kernels import gradient_cache

from . import data
from .execute import parts_of
from .methods import Step
from .methods.vanilla import Vanilla
from .plan import Size
from .rows import LAST, Row, Run, Store
from .splits import split
from .train import Budget, objective, prepare, train, two_views

#: Eager's pair matrices need about this much per pair; more than the budget is not run.
EAGER_PAIR_BYTES, MEMORY_BUDGET = 29, 2 * 2**30
#: Seconds of a turn of one case, turns of each, and the step that is a turn of its own.
TURN_S, N_TURNS, LONG_STEP_S = 0.2, 4, 1.0
CACHE_CHUNK = 1024
BATCHES = tuple(2**k for k in range(6, 15))


def measure(store: Store, size: Size, device: str, common: Mapping[str, str]) -> None:
    """Appends the rows of every case that is not there; cases of a group are timed in turns."""
    groups = [[run for run in group if run not in store.done] for group in cases(size)]
    for group in tqdm([group for group in groups if group], desc="cost", unit="group"):
        steps, counts = zip(*(step_of(run, size, device) for run in group), strict=True)
        medians = step_seconds(list(steps), device)
        for run, step, count, seconds in zip(group, steps, counts, medians, strict=True):
            fields = asdict(run) | common
            found = {"epoch seconds": count * seconds, "peak bytes": peak_bytes(step, device)}
            found[LAST] = count * seconds
            store.append(run, [Row(**fields, metric=t, value=v) for t, v in found.items()])


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
    net = train(sample, [Vanilla()], run.seed, Budget(n_steps=100), device)
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


def step_seconds(steps: list[Callable[[], object]], device: str) -> list[float]:
    """Median times, measured in rotating turns: a change of the machine's pace meets all."""
    found: list[list[float]] = [[] for _ in steps]
    for turn in range(N_TURNS):
        for k in range(len(steps)):
            k = (k + turn) % len(steps)
            first = seconds_of(steps[k], device)
            if first > LONG_STEP_S:  # needs no warm-up
                found[k].append(first)
            else:
                repeats = min(max(int(TURN_S / max(first, 1e-9)), 1), 100)
                found[k] += [seconds_of(steps[k], device) for _ in range(repeats)]
    return [statistics.median(times) for times in found]


def seconds_of(step: Callable[[], object], device: str) -> float:
    """On the CPU its own seconds, which other users of the machine hardly lengthen."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Peak of what a step allocates for tensors, above what there was before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [t for t in profiler.profiler.kineto_results.events() if t.name() == "[memory]"]
    return max(
        itertools.accumulate(t.nbytes() for t in sorted(events, key=lambda t: t.start_ns())),
        default=0,
    )
