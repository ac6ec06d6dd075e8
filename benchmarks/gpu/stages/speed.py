"""Stages that time the loss: what is claimed of it, comparators, the CUDA backend, time over N."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from conr_kernels import available_backends
from conr_kernels.core.sweep import bands
from conr_kernels.triton_backend import call

from ...batches import Batch
from ...providers import WINDOW, product
from .. import device
from ..rows import Stage
from . import packages
from .providers import BF16, COLLAPSED, F32, PRODUCT, REGIMES, Size, fits, is_correct, provider

BOTH, GRAPH = "forward+backward", "cuda graph"
SMALL = (128, 256, 512)
RATE_SIZE = 8192


def measure(
    stage: Stage,
    size: Size,
    names: Iterable[str],
    *,
    repeats: int = 9,
    steps: int = 1,
    prepare: Callable[[Batch], None] | None = None,
) -> None:
    """Peak extra memory, time of steps in a row and, as a CUDA graph, their time on the device
    alone, of the providers that are right there, in turns.
    """
    batch = size.batch()
    if prepare is not None:
        tried(stage, size, "dense fused", functools.partial(prepare, batch))
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == PRODUCT:
            runs[name] = product(batch)
        elif name in packages.MODULES:
            if run := other_package(stage, size, name, batch):
                runs[name] = run
        elif not fits(size, name):
            stage.add("not run", 1, provider=name, note="N×N does not fit", **size.row())
        elif tried(stage, size, name, functools.partial(is_correct, stage, size, name, batch)):
            runs[name] = functools.partial(provider(name).step, batch)
    for name in list(runs):
        row = dict(provider=name, mode="forward" if name == PRODUCT else BOTH, **size.row())
        peak = tried(stage, size, name, functools.partial(device.extra_bytes, runs[name]))
        if peak is None:
            del runs[name]
            continue
        stage.add("memory", peak, **row)
        device.free_memory()
    if not runs:
        return
    for name, t in device.seconds(runs, repeats, steps).items():
        mode = "forward" if name == PRODUCT else BOTH
        stage.add("time", t, provider=name, mode=mode, note=f"median of {repeats}", **size.row())
    for name, run in runs.items():  # one at a time: each keeps the memory of a whole step
        graph = tried(stage, size, name, functools.partial(device.graph, run))
        if graph is not None:
            t = device.seconds({name: graph[0]}, repeats, steps)[name]
            stage.add("time", t, provider=name, mode=GRAPH, note=f"median of {repeats}",
                      **size.row())  # fmt: skip
        del graph
        device.free_memory()


def other_package(stage: Stage, size: Size, name: str, batch: Batch) -> Callable[[], object] | None:
    """Its step; None, with the reason printed, where it cannot be imported."""
    if device.REHEARSAL:  # eager stands in for what needs a GPU
        return functools.partial(provider("eager").step, batch)
    if reason := packages.reason_against(name):
        print(f"{name} is not timed: {reason}", flush=True)
        stage.add("not run", 1, provider=name, note=reason[:300], **size.row())
        return None
    return packages.step(name, batch)


def tried(stage: Stage, size: Size, name: str, function: Callable[[], object]) -> object:
    """Its result; None, with a row that says so, where one provider fails and the others go on."""
    try:
        return function()
    except Exception as error:
        if device.is_broken():
            raise
        text = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        stage.add("failed", 1, provider=name, note=text, **size.row())
        device.free_memory()
        return None


def rates(stage: Stage) -> None:
    """The device's own ceilings: a large matrix product and a large copy, random data."""
    n = device.small(RATE_SIZE)
    a, b = (torch.randn(n, n, device=device.DEVICE).to(BF16) for _ in range(2))
    t = device.seconds({"product": lambda: a @ b}, 15, 5)["product"]
    stage.add("TFLOP/s", 2 * RATE_SIZE**3 / t / 1e12, provider="matrix product", N=RATE_SIZE,
              D=RATE_SIZE, dtype="bfloat16")  # fmt: skip
    source = torch.randn(2**10 if device.REHEARSAL else 2**30, device=device.DEVICE)
    target = torch.empty_like(source)
    t = device.seconds({"copy": lambda: target.copy_(source)}, 9)["copy"]
    stage.add("TB/s", 2 * source.nbytes / t / 1e12, provider="copy", N=2**30, dtype="float32")


def choose_dense(batch: Batch) -> None:
    """The comparator's fastest tiles for this batch's width."""
    from . import dense

    width = max(16, 1 << (batch.x.shape[1] - 1).bit_length())
    run = functools.partial(provider("dense fused").step, batch)
    for kind in dense.kinds(width):
        times = {}
        for candidate in dense.candidates(kind, width):
            dense.chosen[kind, width] = candidate
            try:
                times[candidate] = device.seconds({"step": run}, 3)["step"]
            except Exception as error:
                if device.is_broken():
                    raise
                print(f"dense fused {kind} {candidate}: {type(error).__name__}", flush=True)
            if device.REHEARSAL:
                break
        if not times:
            raise RuntimeError(f"no candidate of the dense {kind} kernel runs")
        dense.chosen[kind, width] = min(times, key=times.__getitem__)
        print(f"dense fused {kind}: {dense.chosen[kind, width]} of {times}", flush=True)


def visited_pairs(stage: Stage, size: Size, batch: Batch) -> None:
    """Pairs inside the bands, and pairs of the tiles that meet them, of both sweeps together."""
    arithmetic = call.arithmetic(size.dtype)
    bucket = call.bucket(size.D, arithmetic)
    where = call.architecture(torch.device(device.DEVICE))
    kinds = {"forward": "forward", "backward": "backward" if bucket else "wide"}
    found = dict.fromkeys(kinds, 0)
    in_bands = 0
    for labels in (batch.y, batch.p):
        ordered = labels.sort().values
        lo, hi = bands(ordered, ordered, WINDOW)
        in_bands += int((hi - lo).sum())
        for direction, kind in kinds.items():
            tile = call.config(kind, where, bucket, arithmetic)
            found[direction] += _pairs_of_tiles(lo, hi, tile.BLOCK_I, tile.BLOCK_J)
    row = dict(provider="triton", **size.row())
    stage.add("pairs in bands", in_bands, **row)
    for direction, pairs in found.items():
        stage.add("visited pairs", pairs, mode=direction, **row)


def _pairs_of_tiles(lo: Tensor, hi: Tensor, block_i: int, block_j: int) -> int:
    first = torch.arange(0, len(lo), block_i, device=lo.device)
    last = (first + block_i).clamp(max=len(lo)) - 1
    tiles = (hi[last] + block_j - 1) // block_j - lo[first] // block_j
    return int(tiles.sum()) * block_i * block_j


def wide(stage: Stage) -> None:
    size = Size(16_384, 2048)
    visited_pairs(stage, size, size.batch())
    measure(stage, size, ["triton", PRODUCT])


def speed(stage: Stage) -> int:
    """What is claimed of the Triton backend."""
    run = functools.partial(measure, stage)
    cases: dict[str, Callable[[], None]] = {
        "rates": lambda: rates(stage),
        "N=16384 D=128": lambda: run(Size(16_384), ["triton", "eager", PRODUCT]),
        "N=65536 D=128": lambda: run(Size(65_536), ["triton", PRODUCT]),
        "N=65536 D=512": lambda: run(Size(65_536, 512), ["triton", PRODUCT]),
        "N=1048576 D=128": lambda: run(Size(2**20), ["triton"], repeats=3),
        "D=2048": lambda: wide(stage),
    }
    for n in SMALL:
        cases[f"N={n} D=128"] = functools.partial(
            run, Size(n), ["triton", "eager"], repeats=15, steps=20
        )
    for d in (128, 512):
        size = Size(65_536, d, regime=COLLAPSED)
        cases[f"collapsed D={d}"] = functools.partial(
            run, size, ["triton", "dense fused"], prepare=choose_dense
        )
    for size in (
        Size(16_384, 128, F32), Size(16_384, 512), Size(16_384, 256), Size(16_384, 64),
        Size(16_384, 2048, F32), Size(65_536, 128, F32), Size(1024), Size(2048), Size(4096),
    ):  # fmt: skip
        cases[str(size)] = functools.partial(run, size, ["triton", "eager", PRODUCT])
    return stage.run(cases)


COMPILED = Size(16_384)


def inductor(stage: Stage) -> int:
    """Fills inductor's cache for compiled eager; times nothing."""

    def once() -> None:
        of, batch = provider("compiled eager"), COMPILED.batch()
        of.row_losses(batch).sum().backward()
        of.loss(batch)
        device.synchronize()

    return stage.run({"compiled eager": once})


def compare(stage: Stage) -> int:
    """Dense fused kernels, ours for this loss and others' for theirs, and compiled eager."""
    run = functools.partial(measure, stage)
    cases: dict[str, Callable[[], None]] = {}
    for n in (16_384, 65_536):
        names = ["triton", "dense fused", *packages.MODULES]
        cases[f"dense {n}"] = functools.partial(run, Size(n), names, prepare=choose_dense)
    cases["compiled eager"] = functools.partial(run, COMPILED, ["triton", "compiled eager"])
    return stage.run(cases)


def cuda(stage: Stage) -> int:
    """``backend="cuda"`` against Triton."""
    reason = None if device.REHEARSAL else available_backends()["cuda"]
    if reason is not None:
        stage.add("not run", 1, provider="cuda", note=reason[:300])
        return 0
    sizes = (Size(16_384), Size(16_384, 128, F32), Size(65_536), Size(512), Size(16_384, 512),
             Size(16_384, regime=COLLAPSED))  # fmt: skip
    run = functools.partial(measure, stage, names=["triton", "cuda"], repeats=7)
    return stage.run({str(size): functools.partial(run, size) for size in sizes})


def grid(stage: Stage) -> int:
    """Time over N for the picture: every regime of predictions, eager, the bare product."""
    cases = {}
    for n in (2**k for k in range(7, 19)):
        for regime in REGIMES:
            names = ["triton"]
            if regime == "7 years off":
                names += ["eager"] if n <= 2**15 else []
                names += [PRODUCT] if n <= 2**17 else []
            steps, repeats = (20, 7) if n <= 2048 else (1, 5)
            size = Size(n, regime=regime)
            cases[str(size)] = functools.partial(
                measure, stage, size, names, repeats=repeats, steps=steps
            )
    return stage.run(cases)
