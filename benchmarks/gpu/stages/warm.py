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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ...batches import Batch
from ...static import compiled
from ...static.compiled import Launch
from .. import device
from ..rows import Stage
from . import candidates, dense
from .providers import BF16, F32

#: ``recorded_launches``'s arguments by name, maybe with a tile that is tried; or the width of the
#: dense comparator.
Call = tuple[tuple[str, object], ...]


class TargetOnly:
    """A driver that names the architecture: nothing is loaded or launched."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(architecture: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(TargetOnly(architecture))
    try:
        yield
    finally:
        driver._active = before


def calls() -> list[Call]:
    """Every call whose kernels the tests and the stages use, the most used first."""
    from tests.gpu import test_gpu

    found: list[dict[str, object]] = []
    for d in (128, 512, 2048, 64, 256):
        for dtype in (BF16, F32):
            found += [dict(N=n, D=d, dtype=dtype, precision="highest") for n in (512, 16_384)]
    for (n, d), dtype, variant in itertools.product(
        test_gpu.REGIMES, test_gpu.LIMITS, test_gpu.VARIANTS
    ):
        found.append(dict(N=n, D=d, dtype=dtype, variant=variant, precision="highest"))
    for n, d in test_gpu.PRECISION_SIZES:
        found += [dict(N=n, D=d, dtype=F32, precision=how) for how in ("highest", "high")]
    for n, distance in itertools.product((200, 1800), ("mae", "rmse")):
        found.append(dict(N=n, D=64, dtype=F32, L=3, distance=distance, precision="highest"))
    found += [dict(N=n, D=64, dtype=F32, temperature=0.005, precision="highest")
              for n in (200, 1800)]  # fmt: skip
    found += [dict(N=n, D=64, dtype=BF16, precision="highest") for n in (100, 1500)]
    found += [dict(dense=width) for width in (128, 512)]
    return [tuple(call.items()) for call in found]


def launches(call: Call, architecture: int) -> list[Launch]:
    options = dict(call)
    if width := options.get("dense"):
        return list(_of_dense(width, architecture))
    with contextlib.ExitStack() as stack:
        if "tried" in options:
            stack.enter_context(candidates.tried(*options.pop("tried")))
        return compiled.recorded_launches(architecture=architecture, **options)


def _of_dense(width: int, architecture: int) -> Iterator[Launch]:
    """Of a step of the dense comparator with each of its candidates."""
    y = torch.empty(4096, device="meta")
    x = torch.empty(4096, width, dtype=BF16, device="meta", requires_grad=True)
    for kind in dense.kinds(width):
        for candidate in dense.candidates(kind, width):
            with (
                compiled.intercepted(architecture) as found,
                mock.patch.dict(dense.chosen, {(kind, width): candidate}),
            ):
                torch.autograd.grad(dense.dense_losses(Batch(x, y, y, y), "mean"), x)
            yield from found


def key_of(launch: Launch) -> str:
    """What the launcher distinguishes kernels by."""
    source = compiled.source_of(launch)
    parts = (launch.name, source.signature, source.constants, source.attrs, launch.options)
    return str([sorted(p.items(), key=str) if isinstance(p, dict) else p for p in parts])


def distinct(all_calls: list[Call], architecture: int) -> list[tuple[Call, int]]:
    """For each kernel once: a call that launches it, and which of its launches that is."""
    found: dict[str, tuple[Call, int]] = {}
    for call in all_calls:
        for index, launch in enumerate(launches(call, architecture)):
            found.setdefault(key_of(launch), (call, index))
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


def compile_all(
    work: list[tuple[Call, int]], architecture: int, left: Callable[[], float]
) -> tuple[int, list[str]]:
    """How many kernels were compiled before the time was up, and what went wrong."""
    n_processes = max(1, min(14, (os.cpu_count() or 2) - 1))
    n_done, problems = 0, []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(n_processes, context)
    try:
        waiting = [pool.submit(compile_one, *task, architecture) for task in work]
        for future in as_completed(waiting, timeout=max(left(), 0.1)):
            n_done += 1
            problems += [future.result()] if future.result() else []
    except TimeoutError:
        problems.append(f"time is up, {len(work) - n_done} kernels are left")
    finally:
        for process in list((pool._processes or {}).values()):
            if left() <= 0:
                process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
    return n_done, problems


def warm(stage: Stage) -> int:
    start, (major, minor) = time.monotonic(), device.architecture()
    architecture = 10 * major + minor
    wanted = calls()
    work = distinct([wanted[0], wanted[-1]] if device.REHEARSAL else wanted, architecture)
    if device.REHEARSAL:
        work = [work[0], work[-1]]
    print(f"{len(work)} distinct kernels, listed in {time.monotonic() - start:.1f} s", flush=True)
    n_done, problems = compile_all(work, architecture, stage.left)
    stage.add("kernels", n_done, provider="triton", note=f"of {len(work)}")
    stage.add("wall seconds", time.monotonic() - start)
    print("\n".join(sorted(set(problems))), flush=True)
    return 0
