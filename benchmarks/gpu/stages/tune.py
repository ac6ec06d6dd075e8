"""The stage that tunes: each candidate of the static table timed by its own kernels' launches.

Compiles the candidates in many processes, times the launches of one kind inside whole steps, and
prints the tables of ``configs.py`` with the entries that were faster put first.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from conr_kernels.triton_backend import call
from conr_kernels.triton_backend import configs as triton_configs
from conr_kernels.triton_backend.sweeps import conr_forward_positives_kernel

from .. import device
from ..rows import TABLE, Stage
from . import warm
from .candidates import ITEMS, Tile, item_candidates, kind_of, precision, tried, warm_call
from .providers import PROVIDERS, Size, provider

CROSSOVER = (512, 768, 1024, 1536, 2048)
TABLES = {
    "_HALVES": "bfloat16",
    "_FLOAT32": "float32",
    "_FLOAT32_HIGHEST": "float32 highest",
    "_FLOAT64": "float64",
}
#: A new entry must be faster by this factor.
GAIN = 0.97


def kernel_seconds(run: Callable[[], object], kind: str, repeats: int = 5) -> float:
    """Median over steps of the time of all launches of one kind; of all where none has its name."""
    launcher = type(conr_forward_positives_kernel)
    plain = launcher.run
    found: list[tuple[str | None, device.Stopwatch]] = []

    def timed(kernel, *args, **kwargs):
        watch = device.Stopwatch()
        watch.start()
        result = plain(kernel, *args, **kwargs)
        watch.stop()
        found.append((kind_of(kernel.fn.__name__), watch))
        return result

    totals = []
    with mock.patch.object(launcher, "run", timed):
        for _ in range(1 if device.REHEARSAL else repeats):
            found.clear()
            run()
            device.synchronize()
            own = [watch for name, watch in found if name == kind]
            totals.append(sum(w.seconds() for w in own or [watch for _, watch in found]))
    return statistics.median(totals)


def graph_seconds(run: Callable[[], object]) -> float:
    """A whole step as a graph: its kernels are shorter than the host takes to launch them."""
    return device.seconds({"step": device.graph(run)[0]}, 7, 20)["step"]


def precompile(stage: Stage) -> None:
    """All candidates of all items, in many processes, for at most half of the time."""
    if device.REHEARSAL:  # the interpreter compiles nothing
        return
    major, minor = torch.cuda.get_device_capability()
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


class Proposals:
    """The fastest tile of each item, where it is not the shipped one."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[int, Tile, str]]] = {}

    def add(self, kind: str, arithmetic: str, bucket: int, tile: Tile, note: str) -> None:
        self.found.setdefault((arithmetic, kind), []).append((bucket, tile, note))

    def text(self, architecture: int) -> str:
        lines = []
        for table, arithmetic in TABLES.items():
            lines.append(f"{table} = {{")
            for kind, entries in triton_configs.TABLE[arithmetic].items():
                lines.append(f'    "{kind}": [')
                for bucket, tile, note in self.found.get((arithmetic, kind), ()):
                    block_i, block_j, block_d, *launch = tile
                    of = (block_i, block_j, block_d or None, *launch)
                    # Chunked kinds serve every width above the registers' with one entry.
                    width = bucket or (0 if kind == "forward" else None)
                    lines.append(f"        ({architecture}, {width}, {of}),  # {note}")
                lines += [f"        {entry}," for entry in entries]
                lines.append("    ],")
            lines.append("}")
        return "\n".join(lines)


def one_item(stage: Stage, proposals: Proposals, kind: str, size: Size, how: str) -> None:
    tiles, bucket = item_candidates(kind, size, how)
    # A rehearsal times real launches, of the interpreter, in one item only.
    of = provider("triton") if kind.startswith("dense") else PROVIDERS["triton"]
    run = functools.partial(of.step, size.batch())

    def time() -> float:
        return graph_seconds(run) if kind.startswith("dense") else kernel_seconds(run, kind)

    with precision(how):
        arithmetic = call.arithmetic(size.dtype)
        expected: Tensor = run()
        shipped = time()
        row = dict(provider="triton", mode=f"{kind} kernels, {arithmetic}", **size.row())
        stage.add("time", shipped, **row, note="as shipped")
        best, best_tile = shipped, None
        for tile in tiles[:1] if device.REHEARSAL else tiles:
            if stage.left() < 0:
                stage.add("not run", 1, **row, note=f"no time left for {tile}")
                break
            try:
                with tried(kind, tile, bucket):
                    got = run()
                    t = time()
            except Exception as error:  # does not fit this device: no candidate
                if device.is_broken():
                    raise
                stage.add("not run", 1, **row, note=f"{tile}: {type(error).__name__}")
                continue
            is_close = (got - expected).abs().max() <= 2e-2 * expected.abs().max()
            stage.add("time", t, **row, note=str(tile) if is_close else f"{tile}: wrong")
            if is_close and t < GAIN * best:
                best, best_tile = t, tile
    if best_tile is not None:
        note = f"D={size.D}: {best * 1e3:.3f} ms, as shipped {shipped * 1e3:.3f} ms"
        proposals.add(kind, arithmetic, bucket, best_tile, note)


def crossover(stage: Stage) -> None:
    """Every pair without a sort, and the sweeps, as graphs: where DENSE_PAIRS should lie."""
    for n in CROSSOVER[:1] if device.REHEARSAL else CROSSOVER:
        size = Size(n)
        run = functools.partial(provider("triton").step, size.batch())
        graphs = {}
        for name, pairs in (("every pair", 2**40), ("sweeps", -1)):
            with mock.patch.object(call, "DENSE_PAIRS", pairs):
                graphs[name] = device.graph(run)[0]
        for name, t in device.seconds(graphs, 9, 20).items():
            stage.add("time", t, provider="triton", mode=f"cuda graph, {name}", **size.row())


def tune(stage: Stage) -> int:
    """Proposes entries of the static table and prints the tables that hold them."""
    proposals = Proposals()
    precompile(stage)
    cases: dict[str, Callable[[], None]] = {
        f"{kind} {size} {how}": functools.partial(one_item, stage, proposals, kind, size, how)
        for kind, size, how in ITEMS
    }
    names = list(cases)
    if device.REHEARSAL:
        kinds = [kind for kind, *_ in ITEMS]
        names = [names[kinds.index(kind)] for kind in ("backward", "dense")]
    first, rest = names[:6], names[6:]
    extra = {"crossover": functools.partial(crossover, stage)}
    cases = {n: cases[n] for n in first} | extra | {n: cases[n] for n in rest}
    status = stage.run(cases)
    where = call.architecture(torch.device(device.DEVICE))
    for line in proposals.text(where).split("\n"):
        print(TABLE + line, flush=True)
    return status
