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


def anchor_tiles(launch: Launch) -> tuple[tuple[int, int], ...]:
    """Full and edge tiles of keys that each program of a sweep visits; one pair of ones elsewhere."""
    sweep, given = sweep_of(launch), launch.arguments
    if sweep is None:
        return ((1, 1),)
    L = given["L"]
    reach = 1.0 * (1 if L == 1 else math.sqrt(L) if given.get("RMSE") else L)
    reach = float(given.get("h", 1.0)) * reach
    visits = tiles.visits(
        given["n_anchors"], given["n_keys"], given["BLOCK_I"], given["BLOCK_J"], sweep, reach,
        L == 1, sweep == "negatives" and not given.get("CONFUSED", True),
    )  # fmt: skip
    n_slots, first = given.get("n_slots", 1), given.get("first", 0)
    if "BLOCK_K" in given:  # the product of wide features: programs that share out its columns
        n_programs = given["D_PAD"] // given["BLOCK_D"]
        here = visits[first : first + launch.grid[0] // n_programs]
        return tuple((0, full + edge) for full, edge in here for _ in range(n_programs))
    if "first" in given:  # every tile is taken for an edge
        here = visits[first : first + launch.grid[0] // n_slots]
        visits = tuple((0, full + edge) for full, edge in here)
    return tuple(
        (_share(full, slot, n_slots), _share(edge, slot, n_slots))
        for full, edge in visits
        for slot in range(n_slots)
    )


def _share(n: int, slot: int, n_slots: int) -> int:
    """Of n tiles, those of one of the programs that share them."""
    return n * (slot + 1) // n_slots - n * slot // n_slots


def phases_of(
    tree: Matched, launch: Launch, full: int, edge: int
) -> Iterator[tuple[str, list[tuple[Matched, float]], float]]:
    """The phases of one anchor tile: ``(kind, [(loop, passes)], tiles)``."""
    given = launch.arguments
    pairs = [m for m in tree.walk() if m is not tree and m.nest.exponentials]
    kinds = {"full": full, "edge": edge} if len(pairs) == 2 else {"edge": full + edge}
    if tree.nest.exponentials:
        yield "edge", list(_subtree(tree, given, 1.0)), 1.0
        return
    names = iter(kinds)
    rest: list[tuple[Matched, float]] = []

    def walk(m: Matched, times: float):
        rest.append((m, times))
        for loop in m.loops:
            known = _trips(loop.nest, given)
            if loop.nest.exponentials:
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
    yield loop, times * known if known is not None else n * steps
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
