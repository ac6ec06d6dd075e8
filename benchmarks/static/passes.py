"""How often each loop of a kernel passes: from the launch's arguments and AgeDB's tile counts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from . import tiles
from .compiled import Launch
from .loops import Matched, Nest


def sweep_of(launch: Launch) -> str | None:
    """``"positives"`` or ``"negatives"`` for the kernels of the banded sweeps."""
    if "negatives" in launch.name or launch.arguments.get("NEGATIVES") is True:
        return "negatives" if "gather" not in launch.name else None
    is_first = "positives" in launch.name or launch.arguments.get("NEGATIVES") is False
    return "positives" if is_first and "gather" not in launch.name else None


def programs_per_tile(launch: Launch) -> int:
    """Programs that share a tile of anchors: its key tiles, or the columns of its product."""
    given = launch.arguments
    is_product = "BLOCK_K" in given
    return given["D_PAD"] // given["BLOCK_D"] if is_product else given.get("n_slots", 1)


def _visits(launch: Launch) -> tuple[tuple[int, int], ...]:
    """Full and edge tiles of keys of every tile of anchors of a sweep."""
    given, sweep = launch.arguments, sweep_of(launch)
    L = given["L"]
    reach = given.get("h", 1.0) * (1.0 if L == 1 else math.sqrt(L) if given.get("RMSE") else L)
    return tiles.visits(
        given["n_anchors"], given["n_keys"], given["BLOCK_I"], given["BLOCK_J"], sweep, reach,
        L == 1, sweep == "negatives" and not given.get("CONFUSED", True),
    )  # fmt: skip


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


def anchor_tiles(launch: Launch) -> tuple[tuple[int, int], ...]:
    """Full and edge tiles of keys of each program of a sweep, of each part of the keys for few
    rows; one pair of ones elsewhere.
    """
    if "per_part" in launch.arguments:
        return _tiles_of_parts(launch.arguments)
    if sweep_of(launch) is None:
        return ((1, 1),)
    given, visits, n_programs = launch.arguments, _visits(launch), programs_per_tile(launch)
    if "H_ptr" in given:  # some rows and some of their keys, every tile an edge
        most = given["row_size"] // given["BLOCK_J"]
        here = visits[given["first"] :][: launch.grid[0] // n_programs]
        counts = (min(max(full + edge - given["start"], 0), most) for full, edge in here)
        visits = tuple((0, n) for n in counts)
    if "BLOCK_K" in given:
        return tuple(visit for visit in visits for _ in range(n_programs))
    return tuple(
        (_share(full, slot, n_programs), _share(edge, slot, n_programs))
        for full, edge in visits
        for slot in range(n_programs)
    )


def visited_here(launch: Launch) -> tuple[float, float]:
    """Tiles of pairs of one launch for wide features, and their share of a sweep's."""
    visited = sum(n for _, n in anchor_tiles(launch))
    visited /= programs_per_tile(launch) if "BLOCK_K" in launch.arguments else 1
    return visited, visited / max(sum(map(sum, _visits(launch))), 1)


def _share(n: int, slot: int, n_slots: int) -> int:
    """Of n tiles, those of one of the programs that share them."""
    return n * (slot + 1) // n_slots - n * slot // n_slots


def phases_of(
    tree: Matched, launch: Launch, full: int, edge: int
) -> Iterator[tuple[str, list[tuple[Matched, float]], float]]:
    """The phases of one anchor tile: ``(kind, [(loop, passes)], tiles)``."""
    given = launch.arguments
    has_pairs = "BLOCK_J" in given  # the exponentials of the kernels that finish rows are no pairs'
    pairs = [m for m in tree.walk() if m is not tree and m.nest.exponentials and has_pairs]
    kinds = {"full": full, "edge": edge} if len(pairs) == 2 else {"edge": full + edge}
    if tree.nest.exponentials and has_pairs:
        yield "edge", list(_subtree(tree, given, 1.0)), 1.0
        return
    names = iter(kinds)
    rest: list[tuple[Matched, float]] = []

    def walk(m: Matched, times: float):
        rest.append((m, times))
        for loop in m.loops:
            known = _trips(loop.nest, given)
            if loop.nest.exponentials and has_pairs:
                kind = next(names)
                n = kinds[kind] if known is None else times * known
                yield kind, list(_subtree(loop, given, n)), n
            elif loop.nest.has_product:
                n = full + edge if pairs or sweep_of(launch) else times
                yield "product", list(_products(loop, given, times, n)), n
            else:
                rest.append((loop, times * (known or 1)))

    yield from walk(tree, 1.0)
    yield "rest", rest, 1.0


def _products(loop: Matched, given: dict, times: float, n: float) -> Iterator:
    """Passes of a nest of products over ``n`` tiles: its loops over D come from outside in."""
    known = _trips(loop.nest, given)
    if known is None:  # a part of D: so many columns, or chunks
        part = given.get("chunk", given.get("n_chunks", 0) * loop.nest.step)
        known = math.ceil(part / loop.nest.step) if part else None
    steps = given["BLOCK_J"] // given.get("BLOCK_K", given["BLOCK_J"])
    passes = times * known if known is not None else n * steps
    yield loop, passes
    for child in loop.loops:
        inner = _trips(child.nest, given)
        yield child, passes * inner if inner is not None else n * (known or 1) * steps


def _subtree(m: Matched, given: dict, times: float) -> Iterator[tuple[Matched, float]]:
    yield m, times
    for loop in m.loops:
        yield from _subtree(loop, given, times * (_trips(loop.nest, given) or 1))


def _trips(nest: Nest, given: dict) -> int | None:
    """Passes of a loop that counts to an argument; None for bounds that are found on the device."""
    end = given.get(nest.bound)
    return -(-end // nest.step) if isinstance(end, int) and nest.step else None
