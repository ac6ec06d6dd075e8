"""A CUDA GPU, or for a rehearsal the CPU with stand-ins for events, memory, streams and graphs.

``CONR_REHEARSE=1`` chooses the stand-ins: every line of a stage then runs without a GPU, on
batches of a few rows. Its numbers mean nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import timeit
from collections.abc import Callable, Iterator
from typing import TypeVar
from unittest import mock

import torch

REHEARSAL = os.environ.get("CONR_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
#: The backend that is measured; its stand-in is quick, Triton's interpreter is not.
TRITON = "torch" if REHEARSAL else "triton"
#: Bytes up to which both sweeps have room at once.
ROOM = ("BOTH_ORDERS", "WIDE_BOTH_ORDERS", "PARTS_BYTES")
T = TypeVar("T")


def reason_against() -> str | None:
    """Why nothing can run here; None on a GPU and in a rehearsal."""
    return None if REHEARSAL or torch.cuda.is_available() else "no CUDA device"


def architecture() -> int:
    """90 for sm_90."""
    major, minor = (9, 0) if REHEARSAL else torch.cuda.get_device_capability()
    return 10 * major + minor


def cuda_tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


@contextlib.contextmanager
def path(name: str) -> Iterator[None]:
    """Which kernels serve any number of rows: ``"every pair"``, those of few; ``"sorted"``, those
    of sorted rows; ``"once"``, of these the ones that take each pair once; ``"listed"``, such ones
    for the gradient of wide features alone; ``""``, as shipped. With ``", in turns"`` behind it, a
    sweep after the other, as where both have no room at once.
    """
    from conr_kernels.cuda_backend import backend as cuda
    from conr_kernels.triton_backend import call, launch_dense, launch_sweeps

    if not name:
        yield
        return
    name, _, turns = name.partition(", ")
    never, pairs = 2**31, 2**40 if name == "every pair" else -1
    rows = {"once": (2, 2, 2), "listed": (never, never, 2)}.get(name, (never,) * 3)
    room = {limit: getattr(launch_sweeps, limit) * (not turns) for limit in ROOM}
    with (
        mock.patch.object(launch_dense, "DENSE_PAIRS", pairs),
        mock.patch.object(cuda, "DENSE_PAIRS", pairs),
        mock.patch.object(call, "MIRRORED_ROWS", rows),
        mock.patch.multiple(launch_sweeps, **room),
    ):
        yield


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def is_broken() -> bool:
    """Whether an earlier fault has ended the context: then every call of this process fails."""
    if REHEARSAL or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def seconds(
    functions: dict[str, Callable[[], object]], repeats: int = 9, steps: int = 1
) -> dict[str, float]:
    """Medians of a call's time on the device, the functions taking turns: a change of pace meets
    all.

    A turn is ``steps`` calls in a row, as in training, after one that is not counted: it pays for
    the memory and the caches that the other kind left behind.
    """
    names = list(functions)
    if REHEARSAL:
        return {key: timeit.timeit(functions[key], number=1) for key in names}
    found: dict[str, list[float]] = {key: [] for key in names}
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(repeats):
        first = turn % len(names)
        for key in names[first:] + names[:first]:
            functions[key]()  # in the first turn it compiles and loads kernels too
            synchronize()
            start.record()
            for _ in range(steps):
                functions[key]()
            stop.record()
            stop.synchronize()
            found[key].append(start.elapsed_time(stop) / 1e3 / steps)
    return {key: statistics.median(values) for key, values in found.items()}


def steps_in_a_row(t: float) -> int:
    """Calls of so many seconds that take about 10 ms together, 20 at the most."""
    return 1 if REHEARSAL else max(1, min(20, int(0.01 / t)))


def extra_bytes(function: Callable[[], object]) -> int:
    """Peak of the memory that one call adds to what is held before; its results are dropped."""
    if REHEARSAL:
        function()
        return 1
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def bytes_free() -> int:
    return 2**34 if REHEARSAL else torch.cuda.mem_get_info()[0]


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Work goes to a stream of its own; the current stream waits for it afterwards."""
    if REHEARSAL:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def graph(function: Callable[[], T]) -> tuple[Callable[[], None], Callable[[], T]]:
    """Captures a call: ``(replay, results of the latest replay)``."""
    with side_stream():
        function()
    if REHEARSAL:
        held = [function()]
        return lambda: held.__setitem__(0, function()), lambda: held[0]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = function()
    return captured.replay, lambda: results


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any wait of the host for the device raises."""
    if REHEARSAL:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small(n: int) -> int:
    """A number of rows; in a rehearsal about 20 of them, more for more."""
    return 8 + n.bit_length() if REHEARSAL else n


def narrow(d: int) -> int:
    """A number of features; in a rehearsal few, more than the registers hold where D was that."""
    return d if not REHEARSAL else 16 if d <= 256 else 272
