"""Time and peak memory of one step, and its largest difference from the float64 reference."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark.utils.timer import timer

from conr_kernels import reference
from conr_kernels.variants import Settings, resolve_variant

from .batches import Batch, make_batch
from .providers import PUSH_SCALE, TEMPERATURE, WINDOW, Provider, product, providers

#: A step that takes longer is timed once, where its memory is measured.
LONG_STEP_S = 6.0
#: Seconds of one provider's turn, at the most 50 steps.
TURN_S = 0.05
#: Rows whose losses are compared at any N, and the largest N of the gate.
SAMPLED_ROWS, LARGEST_GATE = 64, 1024
ERROR_FACTOR, ERROR_FLOOR = 3.0, 1e-6


@dataclass(frozen=True)
class Step:
    """What is run: a provider (or ``"q @ q.T"``) on a batch of N rows."""

    provider: str
    n: int
    labels: str
    device: str

    def prepare(self) -> Callable[[], object]:
        batch = make_batch(self.n, labels=self.labels, device=self.device)
        if self.provider == "q @ q.T":
            return product(batch)
        (provider,) = [t for t in providers(self.device) if t.name == self.provider]
        return lambda: provider.step(batch)


def first_step(step: Step) -> tuple[float, int]:
    """Seconds and peak extra bytes of one step: in a fresh process on the CPU, here on a GPU.

    On the CPU the extra memory is the growth of the resident set above what the batch and a warm-up
    with 64 rows hold, from Linux's own high-water mark (VmHWM), reset just before the step. The
    process is fresh so that no memory cached by earlier steps hides it.
    """
    if step.device == "cpu":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.measure"])
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_first_step_on_cpu, step, torch.get_num_threads()).result()
    run = step.prepare()
    run()  # compiles and loads kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return seconds(run), torch.cuda.max_memory_allocated() - before


def _first_step_on_cpu(step: Step, n_threads: int) -> tuple[float, int]:
    torch.set_num_threads(n_threads)
    replace(step, n=64).prepare()()
    run = step.prepare()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = linux_bytes("self/status", "VmRSS")
    return seconds(run), max(0, linux_bytes("self/status", "VmHWM") - before)


def linux_bytes(file: str, field: str) -> int:
    """A field of a file in /proc that counts in kB."""
    lines = Path("/proc", file).read_text().splitlines()
    (found,) = [line for line in lines if line.startswith(field + ":")]
    return int(found.split()[1]) * 1024


def seconds(run: Callable[[], object]) -> float:
    start = timer()  # waits for the device
    run()
    return timer() - start


def times(steps: list[Step], budget_s: float = 1.0) -> dict[Step, list[float]]:
    """Seconds of repeated steps, in rotating turns: a change of the machine's pace meets all.

    A turn is a run of steps of one kind, as in training, the first of them not counted: it pays for
    the memory and the caches that the other kind left behind.
    """
    runs = {step: step.prepare() for step in steps}
    found: dict[Step, list[float]] = {step: [] for step in steps}
    start = time.perf_counter()
    for n_rounds in range(1, 101):
        turn = n_rounds % max(len(steps), 1)
        for step in steps[turn:] + steps[:turn]:
            uncounted = seconds(runs[step])
            repeats = min(max(int(TURN_S / max(uncounted, 1e-9)), 1), 50)
            found[step] += [seconds(runs[step]) for _ in range(repeats)]
        if n_rounds >= 3 and time.perf_counter() - start > budget_s:
            break
    return found


def memory_available(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return linux_bytes("meminfo", "MemAvailable")


def row_difference(provider: Provider, n: int, labels: str, device: str) -> float:
    """Largest difference of a row loss from the float64 reference, over the largest row loss.

    Of the first rows of the batch, which are in random order, against all others.
    """
    batch = make_batch(n, labels=labels, device=device)
    with torch.no_grad():
        exact = exact_losses(batch, batch.x.double(), SAMPLED_ROWS)
        found = provider.row_losses(batch)[: len(exact)].double()
    return ((found - exact).abs().max() / exact.abs().max()).item()


def exact_losses(batch: Batch, x: Tensor, n_rows: int) -> Tensor:
    """Of the first rows as anchors against all rows as keys, ``x`` [N, D] in float64."""
    y, p, w = batch.y[:, None], batch.p[:, None], batch.w.double()
    settings = Settings(WINDOW, TEMPERATURE, PUSH_SCALE, resolve_variant("paper"))
    rows = (t[:n_rows] for t in (x, y, p, w))
    return reference.row_losses(*rows, (x, y, p), 0, settings)


def exact(batch: Batch, g: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``ℓ_i`` of the first rows, as many as ``g_i``, and the gradient [N, D] of
    ``Σ g_i ℓ_i``, in float64.
    """
    x = batch.x.detach().double().requires_grad_()
    losses = exact_losses(batch, x, len(g))
    (gradient,) = torch.autograd.grad(losses, x, g.to(losses))
    return losses.detach(), gradient


def gate(candidates: list[Provider], device: str) -> list[str]:
    """What is wrong with the providers' losses and gradients; nothing may be timed unless empty.

    Each must be within 3 times the error of eager, the first of them, plus 1e-6 of the largest
    term. Eager itself must be right to 1e-5.
    """
    problems = []
    for n, labels in ((64, "agedb"), (257, "agedb"), (257, "constant"), (LARGEST_GATE, "agedb")):
        batch = make_batch(n, labels=labels, device=device)
        truths = exact(batch, torch.full((n,), 1 / n))
        if not truths[0].count_nonzero() > n // 4:
            problems.append(f"N = {n}, {labels}: too few anchors for a check")
        largest = [truth.abs().max().item() for truth in truths]
        allowed = [1e-5 * most for most in largest]
        for provider in candidates:
            found = (provider.row_losses(batch), provider.step(batch))
            errors = [
                (got.detach().double() - truth).abs().max().item()
                for got, truth in zip(found, truths, strict=True)
            ]
            problems += [
                f"{provider.name}, N = {n}, {labels}: {what} differs from the reference by "
                f"{error:.2e}, allowed {limit:.2e}"
                for what, error, limit in zip(("loss", "gradient"), errors, allowed, strict=True)
                if not error <= limit
            ]
            if provider is candidates[0]:
                allowed = [
                    ERROR_FACTOR * error + ERROR_FLOOR * most
                    for error, most in zip(errors, largest, strict=True)
                ]
    return problems
