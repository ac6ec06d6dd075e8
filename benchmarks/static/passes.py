"""How often each loop of a kernel passes: from the launch's arguments and AgeDB's tile counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from conr_kernels.triton_backend.kernels import layout

from . import tiles
from .compiled import Launch
from .loops import Matched, Nest

STRIPS, SLICES = layout.STRIPS.value, layout.SLICES.value


def sweep_of(launch: Launch) -> str | None:
    """``"positives"``, ``"negatives"`` or ``"both"`` for the kernels of the banded sweeps."""
    if "backward_parts" in launch.name:
        return "both"
    if "SWEEPS" in launch.arguments and "BLOCK_J" in launch.arguments:
        return launch.arguments["SWEEPS"]
    if "negatives" in launch.name or launch.arguments.get("NEGATIVES") is True:
        return "negatives" if "gather" not in launch.name else None
    is_first = "positives" in launch.name or launch.arguments.get("NEGATIVES") is False
    return "positives" if is_first and "gather" not in launch.name else None


def programs_per_tile(launch: Launch) -> int:
    """Programs that share a tile of anchors: its key tiles, or the columns of its product."""
    if "list_ptr" in launch.arguments:
        _, here, _ = window_of(launch)
        return columns_of(launch) if is_product(launch) else -(-sum(here) // len(here))
    return launch.arguments.get("n_slots", 1)


def _visits(launch: Launch, sweep: str | None) -> tuple[tuple[int, int], ...]:
    """Full and edge tiles of keys of every tile of anchors of a sweep."""
    given = launch.arguments
    return tiles.visits(
        given["n_anchors"], given["n_keys"], given["BLOCK_I"], given["BLOCK_J"], sweep,
        launch.reach, launch.is_exact,
        sweep == "negatives" and not given.get("CONFUSED", True),
    )  # fmt: skip


def is_product(launch: Launch) -> bool:
    """The second phase of wide features."""
    return "BLOCK_K" in launch.arguments and "q_i_ptr" not in launch.arguments


def columns_of(launch: Launch) -> int:
    """Programs that share the columns of a product for wide features."""
    return launch.arguments["D_PAD"] // launch.arguments["BLOCK_D"]


def window_of(launch: Launch) -> tuple[str, tuple[int, ...], float]:
    """Of a window of the list for wide features: its sweep, the tiles of keys of each entry that
    has some in it, and their share of the sweep's.
    """
    sweep, runs, n_pairs = _runs_of(launch)
    here = tuple(len(run) for _, run in runs)
    return sweep, here, sum(here) / max(n_pairs, 1)


def _runs_of(launch: Launch) -> tuple[str, list[tuple[int, range]], int]:
    """Its sweep; of each entry that has some in it the tile of anchors, and which of its tiles of
    keys; how many pairs the sweep has.
    """
    given = launch.arguments
    first, window, piece = given["first"], given["window"], given["piece"]
    counts = {sweep: _counts(launch, sweep) for sweep in ("positives", "negatives")}
    n_tiles = len(counts["positives"])
    start = -(-sum(counts["positives"]) // window) * window
    if given["CONFUSED"] and not given["apart"]:
        n_keys = -(-given["n_keys"] // given["BLOCK_J"])
        of_all = n_tiles * (n_tiles + 1) // 2 if is_mirrored(launch) else n_tiles * n_keys
        start = -(-of_all // window) * window
    sweep, begin = ("negatives", start) if first >= start else ("positives", 0)
    runs = []
    for before in range(0, max(counts[sweep]), piece):
        for tile, n in enumerate(counts[sweep]):
            n = min(max(n - before, 0), piece)
            here = range(max(first - begin, 0), min(first + window - begin, n))
            if here:
                runs.append((tile, range(before + here.start, before + here.stop)))
            begin += n
    return sweep, runs, sum(counts[sweep])


def _counts(launch: Launch, sweep: str) -> list[int]:
    """Tiles of keys of every tile of anchors in a sweep's part of the list."""
    given = launch.arguments
    if is_mirrored(launch):
        n, block = given["n_anchors"], given["BLOCK_I"]
        return [b - a for a, b, _, _ in tiles.upper_runs(n, block, block, sweep, launch.reach)]
    return [sum(visit) for visit in _visits(launch, sweep)]


def is_mirrored(launch: Launch) -> bool:
    """Whether that list has each pair of tiles once; of the scores nothing depends on it."""
    given = launch.arguments
    is_square = given["BLOCK_I"] == given["BLOCK_J"] and given["H_ptr"].dtype == torch.bfloat16
    is_alone = given["SAME"] and given["CONFUSED"] and given.get("L", 1) == 1
    return given.get("MIRRORED", is_alone and is_square)


def is_of_few_rows(launch: Launch) -> bool:
    return launch.name.startswith("conr_dense_")


def _tiles_of_parts(given: dict) -> tuple[tuple[int, int], ...]:
    """Tiles of keys, every one an edge, of each part, for all chunks of columns of the gradient."""
    per_part, n_tiles_j = given["per_part"], given["n_tiles_j"]
    n_chunks = math.ceil(given["D"] / given["BLOCK_D"]) if "G_at" in given else 1
    return tuple(
        (0, min(per_part, n_tiles_j - first))
        for first in range(0, n_tiles_j, per_part)
        for _ in range(n_chunks)
    )


def anchor_tiles(launch: Launch) -> tuple[tuple[int, ...], ...]:
    """Full and edge tiles of keys of each program of a sweep (of both sweeps the positives', then
    the negatives'), of each part of the keys for few rows; one pair of ones elsewhere.
    """
    if "per_part" in launch.arguments:
        return _tiles_of_parts(launch.arguments)
    if "H_ptr" in launch.arguments:
        return _turns(launch)
    if sweep_of(launch) is None:
        return ((1, 1),)
    if sweep_of(launch) == "both":
        shares = _shares(launch, "positives"), _shares(launch, "negatives")
        return tuple((*s, 0, 0) for s in shares[0]) + tuple((0, 0, *s) for s in shares[1])
    return _shares(launch, sweep_of(launch))


def _shares(launch: Launch, sweep: str) -> tuple[tuple[int, int], ...]:
    """Full and edge tiles of each program of a sweep."""
    if has_strips(launch):
        return _of_strips(launch, sweep)
    n_programs = programs_per_tile(launch)
    return tuple(
        (_share(full, slot, n_programs), _share(edge, slot, n_programs))
        for full, edge in _visits(launch, sweep)
        for slot in range(n_programs)
    )


def has_strips(launch: Launch) -> bool:
    """Whether a forward pass takes each pair of rows once."""
    return "mirrored" in launch.name


def strip_size(launch: Launch, sweep: str) -> int:
    """Tiles of rows of a strip, as ``layout.choose_sweep`` sets it."""
    n, own = launch.arguments["n_anchors"], launch.arguments["BLOCK_J"]
    if sweep == "both":  # about
        sweep = "positives"
    ends = [end for _, end, _, _ in tiles.upper_runs(n, 128, 128, sweep, launch.reach)]
    reach = max(end - block for block, end in enumerate(ends)) + (sweep == "positives")
    return min(-(-(reach + 1) // (STRIPS - 2)), -(-len(ends) // STRIPS)) * (128 // own)


def _of_strips(launch: Launch, sweep: str) -> tuple[tuple[int, int], ...]:
    """Full and edge tiles of each program of a sweep, of a slice of what a strip meets."""
    given = launch.arguments
    n_programs = launch.grid[0] // (2 if given["SWEEPS"] == "both" else 1)
    sides = given["BLOCK_J"], given["BLOCK_I"]
    runs = tiles.upper_runs(given["n_anchors"], *sides, sweep, launch.reach)
    size, found = strip_size(launch, sweep), []
    n_slices = min(n_programs // -(-len(runs) // size), SLICES)
    for first in range(0, len(runs), size):
        own = runs[first : first + size]
        begin, n = own[0][0], own[-1][1] - own[0][0]
        for part in range(n_slices):
            left, right = (begin + n * at // n_slices for at in (part, part + 1))
            of_all = sum(max(min(b, right) - max(a, left), 0) for a, b, _, _ in own)
            full = sum(max(min(d, right) - max(c, left), 0) for _, _, c, d in own)
            found.append((full, of_all - full))
    return (*found, *[(0, 0)] * (n_programs - len(found)))


def _turns(launch: Launch) -> tuple[tuple[int, int], ...]:
    """Of each program of a launch for wide features: none and the tiles of pairs of its scores; the
    tiles of anchors of its products, once for each of their columns, and their tiles of pairs.
    """
    n_programs, (_, here, _) = launch.grid[0], window_of(launch)
    if not is_product(launch):
        return tuple((0, len(range(p, sum(here), n_programs))) for p in range(n_programs))
    per_tile = _mirrored_counts(launch) if is_mirrored(launch) else here
    items = [n for n in per_tile for _ in range(columns_of(launch))]
    return tuple(
        (sum(n > 0 for n in mine), sum(mine))
        for p in range(n_programs)
        for mine in [items[p::n_programs]]
    )


def _mirrored_counts(launch: Launch) -> list[int]:
    """Pairs of the window that a tile is anchors or keys of, of all tiles from the first's on."""
    _, runs, _ = _runs_of(launch)
    found = [0] * -(-launch.arguments["n_anchors"] // launch.arguments["BLOCK_I"])
    for tile, run in runs:
        found[tile] += len(run)
        for distance in run:
            found[tile + distance] += distance > 0
    first = runs[0][0] if runs else 0
    return found[first:] + found[:first]


def _share(n: int, slot: int, n_slots: int) -> int:
    """Of n tiles, those of one of the programs that share them."""
    return n * (slot + 1) // n_slots - n * slot // n_slots


def phases_of(
    tree: Matched, launch: Launch, full: int, edge: int, *negatives: int
) -> Iterator[tuple[str, list[tuple[Matched, float]], float]]:
    """The phases of one anchor tile: ``(kind, [(loop, passes)], tiles)``."""
    given = launch.arguments
    has_pairs = "BLOCK_J" in given  # the exponentials of the kernels that finish rows are no pairs'
    pairs = [m for m in tree.walk() if m is not tree and m.nest.exponentials and has_pairs]
    kinds = {"full": full, "edge": edge}
    if negatives:
        kinds |= dict(zip(("full of negatives", "edge of negatives"), negatives, strict=True))
    if len(pairs) != len(kinds):
        kinds = {"edge": sum(kinds.values())}
    if tree.nest.exponentials and has_pairs:
        yield "edge", list(_subtree(tree, given, 1.0)), 1.0
        return
    if is_product(launch):
        (loop,) = (m for m in tree.loops if m.nest.has_product)
        yield "product", list(_products(loop, given, full, edge)), edge
        search = [m for m in tree.loops if m is not loop and edge]  # an empty window ends at once
        yield "rest", [(m, 1.0) for m in (tree, *search)], 1.0
        return
    names = iter(kinds)
    rest: list[tuple[Matched, float]] = []

    def walk(m: Matched, times: float) -> Iterator:
        nonlocal names
        rest.append((m, times))
        for loop in m.loops:
            known = _trips(loop.nest, given)
            if has_strips(launch) and any(inner.nest.exponentials for inner in loop.loops):
                here = list(itertools.islice(names, 2))  # once for each of a strip's tiles of rows
                names = itertools.chain(here, names)
                is_here = sum(kinds[kind] for kind in here) > 0
                yield from walk(loop, strip_size(launch, sweep_of(launch)) * is_here)
            elif loop.nest.exponentials and has_pairs:
                kind = next(names)
                n = kinds[kind] if known is None else times * known
                yield kind, list(_subtree(loop, given, n)), n
            elif loop.nest.has_product:
                n = full + edge + sum(negatives) if pairs or sweep_of(launch) else times
                yield "product", list(_products(loop, given, times, n)), n
            else:
                rest.append((loop, times * (known or 1)))

    yield from walk(tree, 1.0)
    yield "rest", rest, 1.0


def _products(loop: Matched, given: dict, times: float, n: float) -> Iterator:
    """Passes of a nest of products over ``n`` tiles: its loops over D come from outside in. Wide
    features: of ``times`` tiles of anchors, in steps of a tile's keys.
    """
    if "BLOCK_K" in given:
        (entries,) = loop.loops
        # Half of them transposed, in a loop of their own, where pairs are listed once.
        steps = n * (given["BLOCK_J"] // given["BLOCK_K"]) / len(entries.loops)
        yield from ((loop, times), (entries, times), *((child, steps) for child in entries.loops))
        return
    known = _trips(loop.nest, given)
    if known is None:  # a part of D: so many columns, or chunks
        part = given.get("chunk", given.get("n_chunks", 0) * loop.nest.step)
        known = math.ceil(part / loop.nest.step) if part else None
    passes = times * known if known is not None else n
    yield loop, passes
    for child in loop.loops:
        inner = _trips(child.nest, given)
        yield child, passes * inner if inner is not None else n * (known or 1)


def _subtree(m: Matched, given: dict, times: float) -> Iterator[tuple[Matched, float]]:
    yield m, times
    for loop in m.loops:
        yield from _subtree(loop, given, times * (_trips(loop.nest, given) or 1))


def _trips(nest: Nest, given: dict) -> int | None:
    """Passes of a loop that counts to an argument; None for bounds that are found on the device."""
    end = given.get(nest.bound)
    return -(-end // nest.step) if isinstance(end, int) and nest.step else None
