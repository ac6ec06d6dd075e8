"""Stages that time the loss: what is claimed of it, comparators, the CUDA backend, time over N."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from conr_kernels import available_backends
from conr_kernels.triton_backend import call
from conr_kernels.variants import Settings, resolve_variant

from ...providers import PUSH_SCALE, TEMPERATURE, WINDOW, product
from ...static import tiles
from .. import device
from ..rows import Stage
from . import packages
from .providers import (
    BF16,
    COLLAPSED,
    F32,
    OFF,
    PRODUCT,
    PROVIDERS,
    REGIMES,
    Size,
    fits,
    is_correct,
)
from .training import LOSSES, N_INPUTS, trainer

BOTH, GRAPH = "forward+backward", "cuda graph"
RATE_SIZE = 8192
T = TypeVar("T")
Runs = dict[str, Callable[[], object]]
Row = dict[str, object]
Cases = dict[str, functools.partial[None]]


def tried(stage: Stage, row: Row, function: Callable[..., T], *arguments: object) -> T | None:
    """Its result; None, with a row that says so, where one provider fails and the others go on."""
    try:
        return function(*arguments)
    except Exception as error:
        if device.is_broken():
            raise
        stage.fail(error, **row)
        torch.cuda.empty_cache()
        return None


def timed(
    stage: Stage, runs: Runs, row: Row, repeats: int, steps: int, has_graph: bool = True
) -> None:
    """Peak extra memory, time of steps in a row, in turns, and, as a CUDA graph, their time on the
    device alone: of as many replays in a row as hide the start of the first.
    """
    rows = {
        name: row | dict(provider=name, mode="forward" if name == PRODUCT else row["mode"])
        for name in runs
    }
    note = f"median of {repeats}"
    for name in list(runs):
        peak = tried(stage, rows[name], device.extra_bytes, runs[name])
        if peak is None:
            del runs[name]
            continue
        stage.add("memory", peak, **rows[name])
        torch.cuda.empty_cache()
    if not runs:
        return
    found = device.seconds(runs, repeats, steps)
    for name, t in found.items():
        stage.add("time", t, **rows[name], note=note)
    for name in runs if has_graph else ():  # one at a time: each keeps the memory of a whole step
        graph = tried(stage, rows[name], device.graph, runs[name])
        if graph is not None:
            in_a_row = max(steps, device.steps_in_a_row(found[name]))
            t = device.seconds({name: graph[0]}, repeats, in_a_row)[name]
            stage.add("time", t, **rows[name] | {"mode": GRAPH}, note=note)
        del graph
        torch.cuda.empty_cache()


def measure(
    stage: Stage, size: Size, names: Iterable[str], *, repeats: int = 9, steps: int = 1
) -> None:
    """Memory and times of the providers that are right there."""
    batch, row = size.batch(), size.row()
    runs: Runs = {}
    for name in names:
        if name == PRODUCT:
            runs[name] = product(batch)
        elif name in packages.MODULES:
            if device.REHEARSAL:  # eager stands in for what needs a GPU
                runs[name] = functools.partial(PROVIDERS["eager"].step, batch)
            elif reason := packages.reason_against(name):
                stage.add("not run", 1, provider=name, note=reason[:300], **row)
            else:
                runs[name] = packages.step(name, batch)
        elif not fits(size, name):
            stage.add("not run", 1, provider=name, note="N×N does not fit", **row)
        elif tried(stage, row | {"provider": name}, is_correct, stage, size, name, batch):
            runs[name] = functools.partial(PROVIDERS[name].step, batch)
    timed(stage, runs, row | {"mode": BOTH}, repeats, steps)


def cases(stage: Stage, sizes: Iterable[Size], names: Iterable[str], **options: int) -> Cases:
    """``measure`` at these sizes."""
    return {str(size): functools.partial(measure, stage, size, names, **options) for size in sizes}


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


def visited_pairs(stage: Stage, size: Size) -> None:
    """Of wide features the pairs inside the bands, and those of the tiles of each product of a
    step, of both sweeps together; half as many where it takes a pair once.
    """
    row = dict(provider="triton", **size.row())
    stage.add("pairs in bands", _pairs(size.N, 1, 1), **row)
    x = torch.empty(size.N, size.D, dtype=size.dtype, device="meta")
    form = call.form_of(x, torch.empty(size.N, 1, device="meta"), None, 0, "mean")
    where = call.capability(torch.device(device.DEVICE))
    settings = Settings(WINDOW, TEMPERATURE, PUSH_SCALE, resolve_variant("paper"))
    of = call.Call(form._replace(capability=where), settings)
    forward, wide = (
        of.config("mirrored" if of.is_forward_mirrored else "forward"),
        of.config("wide"),
    )
    products = {
        "forward": (forward, of.is_forward_mirrored),
        "scores": (wide, of.windows(wide, True).is_mirrored),
        "product": (wide, False),
    }
    for mode, (tile, once) in products.items():
        n = _pairs(size.N, tile.BLOCK_I, tile.BLOCK_J, once)
        stage.add("visited pairs", n, mode=mode, **row)


def _pairs(n: int, block_i: int, block_j: int, once: bool = False) -> int:
    found = 0
    for sweep in ("positives", "negatives"):
        if once:
            runs = tiles.upper_runs(n, block_j, block_i, sweep, WINDOW)
            found += sum(end - begin for begin, end, _, _ in runs)
        else:
            visits = tiles.visits(n, n, block_i, block_j, sweep, WINDOW, exact=True, outside=False)
            found += sum(full + edge for full, edge in visits)
    return block_i * block_j * found


def training(stage: Stage, n: int) -> None:
    """Time and memory of a training step, with and without ConR."""
    steps = {provider: trainer(n, provider) for provider in LOSSES}
    first = {provider: step().item() for provider, step in steps.items()}
    # Before the first update fused and eager see the same features: the same loss.
    difference = abs(first["fused"] / first["eager"] - 1)
    row = dict(mode="training step", N=n, D=N_INPUTS, dtype="bfloat16 autocast")
    stage.add("loss difference", difference, provider="fused", **row)
    if not difference <= 1e-2:
        stage.add("wrong", 1, provider="fused", **row, note=f"first losses {first}: not timed")
        return
    timed(stage, steps, row, 9, 10 if n <= 1024 else 2, has_graph=False)


def claimed(stage: Stage) -> Cases:
    """What is claimed of Triton's steps, alone and in a training step, the most wanted first."""
    with_eager, wide = ["triton", "eager", PRODUCT], Size(16_384, 2048)
    found: Cases = {"rates": functools.partial(rates, stage)}
    found |= cases(stage, [Size(16_384)], with_eager)
    found |= cases(stage, [Size(65_536), Size(65_536, 512)], ["triton", PRODUCT])
    found["visited pairs"] = functools.partial(visited_pairs, stage, wide)
    of_asked = [Size(16_384, 512), wide, Size(65_536, 128, F32)]
    found |= cases(stage, of_asked, ["triton", PRODUCT])
    found |= cases(stage, [Size(65_536, 512, regime=COLLAPSED)], ["triton"])
    found |= cases(stage, [Size(65_536, regime=COLLAPSED)], ["triton", "dense fused"])
    found |= cases(stage, [Size(2**20)], ["triton"], repeats=3)
    found |= cases(stage, map(Size, (128, 256, 512)), with_eager[:2], repeats=15, steps=20)
    for n in (128, 1024, 16_384):
        found[f"training, batch {n}"] = functools.partial(training, stage, n)
    found |= cases(stage, [Size(16_384, 128, F32), Size(1024), Size(2048), Size(4096)], with_eager)
    others = (
        Size(16_384, 256), Size(16_384, 64), Size(65_536, 256), Size(65_536, 64),
        Size(16_384, 2048, F32),
    )  # fmt: skip
    return found | cases(stage, others, ["triton", PRODUCT])


def speed(stage: Stage) -> int:
    """What is claimed of the Triton backend."""
    return stage.run(claimed(stage))


def sizes() -> list[Size]:
    """Of the stage ``speed``."""
    found = claimed(Stage("speed", 0.0)).values()
    return [case.args[1] for case in found if case.func is measure]


COMPILED = Size(16_384)


def inductor(stage: Stage) -> int:
    """Fills inductor's cache for compiled eager; times nothing."""

    def once() -> None:
        of, batch = PROVIDERS["compiled eager"], COMPILED.batch()
        of.row_losses(batch).sum().backward()
        of.loss(batch)
        device.synchronize()

    return stage.run({"compiled eager": once})


def compare(stage: Stage) -> int:
    """Dense fused kernels, ours for this loss and others' for theirs, and compiled eager."""
    found = cases(stage, [COMPILED, Size(65_536)], ["triton", "dense fused", *packages.MODULES])
    # Last: where inductor's cache is empty, it takes the rest of the time.
    of_compiled = functools.partial(measure, stage, COMPILED, ["triton", "compiled eager"])
    return stage.run(found | {f"{COMPILED}, compiled": of_compiled})


def cuda(stage: Stage) -> int:
    """``backend="cuda"`` against Triton."""
    reason = None if device.REHEARSAL else available_backends()["cuda"]
    if reason is not None:
        stage.add("not run", 1, provider="cuda", note=reason[:300])
        return 0
    sizes = (Size(16_384), Size(16_384, 128, F32), Size(65_536), Size(512), Size(16_384, 512),
             Size(16_384, regime=COLLAPSED))  # fmt: skip
    return stage.run(cases(stage, sizes, ["triton", "cuda"], repeats=7))


def grid(stage: Stage) -> int:
    """Time over N for the picture: every regime of predictions, eager, the bare product."""
    found: Cases = {}
    for n in (2**k for k in range(7, 19)):
        options = dict(repeats=7, steps=20) if n <= 2048 else dict(repeats=5)
        names = ["triton", *["eager"] * (n <= 2**15), *[PRODUCT] * (n <= 2**17)]
        for regime in REGIMES:
            of = names if regime == OFF else names[:1]
            found |= cases(stage, [Size(n, regime=regime)], of, **options)
    return stage.run(found)
