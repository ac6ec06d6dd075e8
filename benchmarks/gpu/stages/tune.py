"""The stage that tunes: each candidate of the static table timed by its own kernels' launches.

Compiles the candidates in many processes, times the launches of one kind inside whole steps, and
prints the tables of ``configs.py`` with the entries that were faster put first.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from conr_kernels.triton_backend import call
from conr_kernels.triton_backend import configs as triton_configs
from conr_kernels.triton_backend.configs import Config

from .. import device
from ..rows import TABLE, Stage
from .candidates import CANDIDATES, ITEMS, Tile
from .providers import BF16, PROVIDERS, Size, provider

CONSTANTS = {"WIDE_GROUP": (4, 8, 16), "WIDE_PROGRAMS": (132, 264, 528)}
CROSSOVER = (512, 768, 1024, 1536, 2048)
TABLES = {
    "_HALVES": "bfloat16",
    "_FLOAT32": "float32",
    "_FLOAT32_HIGHEST": "float32 highest",
    "_FLOAT64": "float64",
}
#: A new entry must be faster by this factor.
GAIN = 0.97


def kind_of(kernel: str) -> str | None:
    """The kind of the table's entry that a kernel is launched with."""
    if "feature_gradient" in kernel and "dense backward" in triton_configs.KINDS:
        return "dense backward"
    if any(part in kernel for part in ("dense", "gram", "pair_gradient", "feature_gradient")):
        return "dense"
    return next((kind for kind in ("wide", "forward", "backward") if kind in kernel), None)


@contextlib.contextmanager
def precision(how: str) -> Iterator[None]:
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(how)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved)


@contextlib.contextmanager
def tried(kind: str, tile: Tile, bucket: int) -> Iterator[None]:
    """The backend takes this tile for kernels of the kind."""
    plain = call.config
    block_i, block_j, block_d, num_warps, num_stages = tile
    config = Config(block_i, block_j, block_d or bucket, num_warps, num_stages)

    def lookup(name: str, *key: object) -> Config:
        return config if name == kind else plain(name, *key)

    with mock.patch.object(call, "config", lookup):
        yield


def kernel_seconds(run: Callable[[], object], kind: str, repeats: int = 5) -> float:
    """Median over steps of the time of all launches of one kind; of all where none has its name."""
    from conr_kernels.triton_backend.sweeps import conr_forward_positives_kernel

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


def item_candidates(kind: str, size: Size, how: str) -> tuple[list[Tile], int]:
    with precision(how):
        arithmetic = call.arithmetic(size.dtype)
    bucket = triton_configs.bucket(size.D, arithmetic)
    name = "forward chunks" if kind == "forward" and bucket == 0 else kind
    tiles = CANDIDATES[name, size.dtype == BF16]
    if kind.startswith("dense") and "dense backward" in triton_configs.KINDS:
        # The two kinds hand each other sums over tiles of one width.
        width = triton_configs.config(kind, 90, bucket, arithmetic).BLOCK_J
        tiles = [tile for tile in tiles if tile[1] == width]
    return tiles, bucket


def items() -> list[tuple[str, Size, str]]:
    """Those whose kind the table has."""
    return [item for item in ITEMS if item[0] in triton_configs.KINDS]


def warm_call(kind: str, size: Size, how: str, tile: Tile, bucket: int) -> tuple:
    """The call as warm takes it."""
    call = dict(N=size.N, D=size.D, dtype=size.dtype, precision=how, tried=(kind, tile, bucket))
    return tuple(call.items())


def precompile(stage: Stage) -> None:
    """All candidates of all items, in many processes, for at most half of the time."""
    from . import warm

    if device.REHEARSAL:  # the interpreter compiles nothing
        return
    major, minor = torch.cuda.get_device_capability()
    calls = [
        warm_call(kind, size, how, tile, bucket)
        for kind, size, how in items()
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


def constants(stage: Stage) -> None:
    """Module constants of the backend that have no column in the table, as far as it has them."""
    size = Size(16_384, 2048)
    run = functools.partial(provider("triton").step, size.batch())
    for name, values in CONSTANTS.items():
        if not hasattr(call, name):
            continue
        for value in values[:1] if device.REHEARSAL else values:
            with mock.patch.object(call, name, value):
                run()
                t = kernel_seconds(run, "wide")
            stage.add("time", t, provider="triton", mode="wide kernels", **size.row(),
                      note=f"{name} = {value}")  # fmt: skip


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
        for kind, size, how in items()
    }
    extra = {
        "crossover": functools.partial(crossover, stage),
        "constants": functools.partial(constants, stage),
    }
    names = list(cases)
    cases = {name: cases[name] for name in names[:6]} | extra | {n: cases[n] for n in names[6:]}
    if device.REHEARSAL:
        kinds = [kind for kind, *_ in items()]
        some = [names[kinds.index(kind)] for kind in ("backward", "dense")]
        cases = {name: cases[name] for name in (*some, *extra)}
    status = stage.run(cases)
    where = call.architecture(torch.device(device.DEVICE))
    for line in proposals.text(where).split("\n"):
        print(TABLE + line, flush=True)
    return status
