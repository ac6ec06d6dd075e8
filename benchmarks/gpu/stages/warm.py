"""Compiles what the tests and stages will launch, in many processes, before the clock matters.

The launcher itself is asked to compile without launching, with tensors without storage and a
driver that only names the target: so the entries in Triton's cache are the ones that real calls
look for. Each kernel is compiled by one process only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ...batches import Batch
from ...static import compiled
from ...static.compiled import Launch
from ...static.shipped import specialization
from .. import device
from ..rows import CHOSEN, Stage
from . import checks, choices, dense, speed
from .providers import BF16, F32

#: ``recorded_launches``'s arguments by name, maybe with ``device.path``'s and ``compiled.tried``'s;
#: or ``dense``, that kernel's D.
Call = tuple[tuple[str, object], ...]


def call_of(**arguments: object) -> Call:
    return tuple(arguments.items())


def compiling_for(architecture: int) -> contextlib.AbstractContextManager:
    """A driver that names the architecture: nothing is loaded or launched."""
    target = GPUTarget("cuda", architecture, 32)
    named = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    return mock.patch.object(driver, "_active", named)


def calls(stages: str = "") -> list[Call]:
    """Every call whose kernels these stages (all, if none is named) launch, the most wanted first:
    those of the sizes that most stages time, then those of few stages.
    """
    named = stages.split()
    found: list[dict[str, object]] = []
    for size in speed.sizes():
        of = dict(N=size.N, D=size.D, dtype=size.dtype)
        found += [of, of | dict(reduction="none")]
    parts = {
        "choices": choices.calls,
        "sanitizer": lambda: (of | dict(has_weights=False) for of in checks.sanitized("triton")),
        "tests": _of_tests,
    }
    for name, part in parts.items():
        if not named or name in named:
            found += part()
    found = [{"precision": "highest"} | call for call in found]
    return [call_of(**call) for call in found] + [call_of(dense=128)]


def _of_tests() -> Iterator[dict[str, object]]:
    """Of test_gpu.py, whose losses are those of single rows if not said otherwise, and the most
    frequent of test_gpu_host.py.
    """
    from tests.gpu import test_gpu as of
    from tests.gpu import test_gpu_host as of_host

    rows = dict(reduction="none")
    for (n, d, path), dtype, how in itertools.product(of.IN_TURNS, (BF16, F32), ("none", "mean")):
        yield dict(N=n, D=d, path=path, dtype=dtype, reduction=how)
    for (n, d, path), dtype, variant in itertools.product(of.REGIMES, of.LIMITS, of.VARIANTS):
        yield rows | dict(N=n, D=d, path=path, dtype=dtype, variant=variant)
    for (n, d, path), dtype in itertools.product(of.CHUNKED, of.LIMITS):
        yield rows | dict(N=n, D=d, path=path, dtype=dtype)
    for (n, d, path), how in itertools.product(of.PRECISION_SIZES, ("highest", "high")):
        yield rows | dict(N=n, D=d, path=path, dtype=F32, precision=how)
    for n, path in of.SMALL_AND_LARGE:
        small = rows | dict(N=n, D=64, path=path, dtype=F32)
        yield from (small | dict(L=3, distance=how, window=9.0) for how in ("mae", "rmse"))
        yield from (small | dict(L=n_l, distance=how, window=0.1) for n_l, how in of.TIES)
        yield small | dict(temperature=0.005)
    n_large = of.SMALL_AND_LARGE[1][0]
    for path, variant in itertools.product(("sorted", "once"), ("paper", "released-depth")):
        yield rows | dict(N=n_large, D=128, path=path, dtype=BF16, variant=variant)
    for n, path in (*of.SMALL_AND_LARGE, (n_large, "once")):
        yield rows | dict(N=n, D=64, path=path, dtype=BF16)
    yield rows | dict(N=64, D=33, dtype=BF16)
    for n, how in itertools.product((2**14, 2**16, 2**19), ("none", "mean")):
        yield dict(N=n, D=128, dtype=BF16, reduction=how)
    for (n, d), how in itertools.product(of_host.SIZES, ("none", "mean")):
        yield dict(N=n, D=d, dtype=BF16, reduction=how)
    for n in (128, 1000, 4096, 6000):
        yield dict(N=n, D=64, dtype=F32, has_weights=False)


def launches(call: Call, architecture: int) -> list[Launch]:
    options = dict(call)
    if width := options.get("dense"):
        return list(_of_dense(width, architecture))
    path, tried = options.pop("path", ""), options.pop("tried", None)
    with device.path(path), compiled.tried(*tried) if tried else contextlib.nullcontext():
        return compiled.recorded_launches(architecture=architecture, **options)


def _of_dense(width: int, architecture: int) -> Iterator[Launch]:
    """Of the dense comparator's kernels with each of their tiles."""
    y = torch.empty(4096, device="meta")
    x = torch.empty(4096, width, dtype=BF16, device="meta", requires_grad=True)
    forward, backward = dense.dense_forward_kernel, dense.dense_backward_kernel
    for a, b in zip(forward.configs, backward.configs, strict=True):
        with (
            compiled.intercepted(architecture) as found,
            mock.patch.object(forward, "configs", [a]),
            mock.patch.object(backward, "configs", [b]),
        ):
            torch.autograd.grad(dense.dense_losses(Batch(x, y, y, y), "mean"), x)
        yield from found


def distinct(all_calls: list[Call], architecture: int) -> list[tuple[Call, int]]:
    """For each kernel once: a call that launches it, and which of its launches that is."""
    found: dict[str, tuple[Call, int]] = {}
    for call in all_calls:
        for index, launch in enumerate(launches(call, architecture)):
            found.setdefault(specialization(launch), (call, index))
    return list(found.values())


_recorded = functools.lru_cache(maxsize=64)(launches)


def compile_one(call: Call, index: int, architecture: int) -> str:
    """Compiles one launch as the launcher would; what went wrong, or nothing."""
    launch = _recorded(call, architecture)[index]
    names = launch.kernel.arg_names
    arguments = {name: launch.arguments[name] for name in names if name in launch.arguments}
    try:
        with compiling_for(architecture):
            kernel = JITFunction.run(
                launch.kernel, **arguments, **launch.options, grid=launch.grid, warmup=True
            )
        if torch.cuda.is_available():
            # The C function that launches it, which the first launch would compile.
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:
        return f"{launch.name}: {type(error).__name__}: {error}".split("\n")[0][:200]
    return ""


def compile_all(stage: Stage, wanted: list[Call], seconds: float) -> None:
    """The kernels of these calls, until the time is up: a row of how many, what went wrong in the
    log.
    """
    end, architecture = time.monotonic() + seconds, device.architecture()
    work = distinct(wanted, architecture)
    if device.REHEARSAL:
        work = [work[0], work[-1]]
    print(f"{len(work)} distinct kernels, {end - time.monotonic():.1f} s left", flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(max(1, min(14, (os.cpu_count() or 2) - 1)), context)
    waiting = [pool.submit(compile_one, *task, architecture) for task in work]
    done, left = wait(waiting, timeout=max(end - time.monotonic(), 0.1))
    problems = {future.result() for future in done} - {""}
    if left:
        problems.add(f"time is up, {len(left)} kernels are left")
        for process in list(pool._processes.values()):
            process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    stage.add("kernels", len(done), provider="triton", note=f"of {len(work)}")
    print("\n".join(sorted(problems)), flush=True)


def warm(stage: Stage) -> int:
    start, wanted = time.monotonic(), calls(os.environ.get(CHOSEN, ""))
    compile_all(stage, [wanted[0], wanted[-1]] if device.REHEARSAL else wanted, stage.left())
    stage.add("wall seconds", time.monotonic() - start)
    return 0
