"""The stage that tunes: each candidate of the static table, in whole steps as CUDA graphs.

Compiles the candidates in many processes and prints the entries that were faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

from conr_kernels.triton_backend import call, launch_dense

from .. import device
from ..rows import TABLE, Stage
from . import warm
from .candidates import ITEMS, Tile, item_candidates, precision, tried, warm_call
from .providers import PROVIDERS, Size, provider

CROSSOVER = (512, 768, 1024, 1536, 2048)
#: A new entry must take at most this share of the shipped step.
GAIN = 0.99


def graph_seconds(run: Callable[[], object]) -> float:
    """Of a whole step on the device alone, however the host launches its kernels."""
    return device.seconds({"step": device.graph(run)[0]}, 7, 20)["step"]


def precompile(stage: Stage) -> None:
    """All candidates of all items, in many processes, for at most half of the time."""
    if device.REHEARSAL:  # the interpreter compiles nothing
        return
    major, minor = device.architecture()
    calls = [
        warm_call(kind, size, how, tile, bucket)
        for kind, size, how in ITEMS
        for tiles, bucket in [item_candidates(kind, size, how)]
        for tile in tiles
    ]
    work = warm.distinct(calls, 10 * major + minor)
    limit = stage.left() / 2
    n_done, problems = warm.compile_all(work, 10 * major + minor, lambda: stage.left() - limit)
    stage.add("kernels", n_done, provider="triton", note=f"of {len(work)}")
    print("\n".join(sorted(set(problems))), flush=True)


def entry(kind: str, arithmetic: str, bucket: int, tile: Tile) -> str:
    """The line to put first in ``configs.py``; one of a chunked kind serves every width that is
    read in chunks.
    """
    major, minor = device.architecture()
    block_i, block_j, block_d, *launch = tile
    width = bucket or (0 if kind == "forward" else None)
    of = (block_i, block_j, block_d or None, *launch)
    return f"{arithmetic}, {kind}: ({10 * major + minor}, {width}, {of}),"


def one_item(stage: Stage, kind: str, size: Size, how: str) -> None:
    tiles, bucket = item_candidates(kind, size, how)
    run = functools.partial(PROVIDERS["triton"].step, size.batch())
    with precision(how):
        arithmetic = call.arithmetic(size.dtype)
        expected, shipped = run(), graph_seconds(run)
        row = dict(provider="triton", mode=f"{kind}, {arithmetic}", **size.row())
        stage.add("time", shipped, **row, note="as shipped")
        best, best_tile = GAIN * shipped, None
        for tile in tiles[:1] if device.REHEARSAL else tiles:
            if stage.left() < 0:
                stage.add("not run", 1, **row, note=f"no time left for {tile}")
                break
            try:
                with tried(kind, tile, bucket):
                    got, t = run(), graph_seconds(run)
            except Exception as error:  # does not fit this device: no candidate
                if device.is_broken():
                    raise
                stage.add("not run", 1, **row, note=f"{tile}: {type(error).__name__}")
                continue
            is_close = (got - expected).abs().max() <= 2e-2 * expected.abs().max()
            stage.add("time", t, **row, note=str(tile) if is_close else f"{tile}: wrong")
            if is_close and t < best:
                best, best_tile = t, tile
    if best_tile is not None:
        note = f"{size}: {best * 1e3:.3f} ms a step, as shipped {shipped * 1e3:.3f} ms"
        print(f"{TABLE}{entry(kind, arithmetic, bucket, best_tile)}  # {note}", flush=True)


def crossover(stage: Stage) -> None:
    """Every pair without a sort, and the sweeps, as graphs: where DENSE_PAIRS should lie."""
    for n in CROSSOVER[:1] if device.REHEARSAL else CROSSOVER:
        size = Size(n)
        run = functools.partial(provider("triton").step, size.batch())
        graphs = {}
        for name, pairs in (("every pair", 2**40), ("sweeps", -1)):
            with mock.patch.object(launch_dense, "DENSE_PAIRS", pairs):
                graphs[name] = device.graph(run)[0]
        for name, t in device.seconds(graphs, 9, 20).items():
            stage.add("time", t, provider="triton", mode=f"cuda graph, {name}", **size.row())


def tune(stage: Stage) -> int:
    """Proposes entries of the static table."""
    precompile(stage)
    cases: dict[str, Callable[[], None]] = {}
    for n, (kind, size, how) in enumerate(ITEMS):
        if n == 4:
            cases["crossover"] = functools.partial(crossover, stage)
        if not device.REHEARSAL or n == 1:  # the interpreter is slow
            cases[f"{kind} {size} {how}"] = functools.partial(one_item, stage, kind, size, how)
    return stage.run(cases)
