"""No two programs of a launch share what one of them writes, and between a program's write and
another access of the place is a barrier, as between a read and a write of a place that has another
number in the tile. On a GPU neither programs nor threads have an order; the interpreter runs one
program after another without threads, and computes the same with a race.

Collected by test_triton.py alone, as triton_interpreted.py is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from conr_kernels.triton_backend import launch_sweeps

from .triton_cases import BF16, F16, F64, Case, forced
from .triton_mirrored import small_tiles
from .triton_strips import strips

Addresses = np.ndarray
NOTHING = np.empty(0, np.uint64)


class Races:
    """The reads and writes of interpreted kernels, in units of two bytes.

    found: what is wrong. A read of what the same thread wrote would be none; the interpreter does
    not know threads, and no kernel does that without a barrier.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.stores: list[Addresses] = []  # of each program that has ended
        self.loads: list[Addresses] = []
        self.here: dict[str, list[Addresses]] = {"stores": [], "loads": []}
        #: Written, and read with the places of a tile, since the program's last barrier.
        self.fresh: list[Addresses] = []
        self.read: list[tuple[Addresses, np.ndarray]] = []

    def next_program(self) -> None:
        for kind in ("stores", "loads"):
            getattr(self, kind).append(np.unique(np.concatenate([NOTHING, *self.here[kind]])))
        self.here = {"stores": [], "loads": []}
        self.barrier()

    def end_launch(self) -> None:
        self.next_program()
        stores, loads = (_with_programs(of) for of in (self.stores, self.loads))
        same = stores[0][1:] == stores[0][:-1]
        if same.any():
            self.found.add("two programs write one place")
        if len(stores[0]):
            at = np.searchsorted(stores[0], loads[0]).clip(max=len(stores[0]) - 1)
            if ((stores[0][at] == loads[0]) & (stores[1][at] != loads[1])).any():
                self.found.add("a program reads what another one writes")
        self.stores, self.loads = [], []

    def barrier(self) -> None:
        self.fresh, self.read = [], []

    def is_fresh(self, units: Addresses) -> bool:
        return any(_overlap(written, units) for written in self.fresh)

    def load(self, ptrs, mask) -> None:
        units = _units(ptrs, mask)
        if self.is_fresh(units):
            self.found.add("a program reads what it wrote, without a barrier")
        self.here["loads"].append(units)
        self.read.append((units, ptrs.data))

    def store(self, ptrs, value, mask) -> None:
        units = _units(ptrs, mask)
        if self.is_fresh(units):
            self.found.add("a program writes a place twice, without a barrier")
        for of_read, tile in self.read:  # of the same places, each thread has its own
            if _overlap(of_read, units) and not np.array_equal(tile, ptrs.data):
                self.found.add("a program writes what it read elsewhere, without a barrier")
        places, values = ptrs.data[mask.data], np.broadcast_to(value.data, mask.data.shape)
        each = np.unique(np.stack((places, _bits(values[mask.data]))), axis=1)
        if len(np.unique(places)) != each.shape[1]:
            self.found.add("a store has two values for one place")
        self.here["stores"].append(units)
        self.fresh.append(units)


def _overlap(a: Addresses, b: Addresses) -> bool:
    if not len(a) or not len(b) or a[-1] < b[0] or b[-1] < a[0]:
        return False
    return np.intersect1d(a, b, assume_unique=True).size > 0


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}").astype(np.uint64)


def _units(ptrs, mask) -> Addresses:
    """The addresses of an access, halved, in ascending order."""
    size = max(ptrs.get_element_ty().primitive_bitwidth // 16, 1)
    first = ptrs.data[mask.data].astype(np.uint64) // np.uint64(2)
    return np.unique(first[:, None] + np.arange(size, dtype=np.uint64))


def _with_programs(of: list[Addresses]) -> tuple[Addresses, np.ndarray]:
    """All programs' addresses in ascending order, and whose each is."""
    numbers = np.repeat(np.arange(len(of)), [len(units) for units in of])
    addresses = np.concatenate([NOTHING, *of])
    order = np.argsort(addresses, kind="stable")
    return addresses[order], numbers[order]


@contextlib.contextmanager
def watched() -> Iterator[Races]:
    races, kind = Races(), type(interpreter_builder)
    plain = {
        name: getattr(kind, name)
        for name in ("create_masked_load", "create_masked_store", "set_grid_idx", "set_grid_dim")
    }

    def load(self, ptrs, mask, *rest):
        races.load(ptrs, mask)
        return plain["create_masked_load"](self, ptrs, mask, *rest)

    def store(self, ptrs, value, mask, *rest):
        races.store(ptrs, value, mask)
        return plain["create_masked_store"](self, ptrs, value, mask, *rest)

    def begin(self, *place):
        races.next_program()
        plain["set_grid_idx"](self, *place)

    def launch(self, *grid):
        races.end_launch()
        plain["set_grid_dim"](self, *grid)

    with mock.patch.multiple(
        kind, create_masked_load=load, create_masked_store=store, set_grid_idx=begin,
        set_grid_dim=launch, create_barrier=lambda self: races.barrier(),
    ):  # fmt: skip
        yield races
    races.end_launch()


@triton.jit
def racing_kernel(x_ptr, KIND: tl.constexpr):
    here, columns = tl.program_id(0), tl.arange(0, 4)
    if KIND == "two programs write one place":
        tl.store(x_ptr + here * 3 + columns, columns.to(tl.float32))
    elif KIND == "a program reads what another one writes":
        x = tl.load(x_ptr + (1 - here) * 4 + columns)
        tl.store(x_ptr + here * 4 + columns, x)
    elif KIND == "a program reads what it wrote, without a barrier":
        tl.store(x_ptr + here * 4 + columns, columns.to(tl.float32))
        x = tl.load(x_ptr + here * 4 + 3 - columns)
        tl.store(x_ptr + 8 + here * 4 + columns, x)
    elif KIND == "a program writes a place twice, without a barrier":
        tl.store(x_ptr + here * 4 + columns, columns.to(tl.float32))
        tl.store(x_ptr + here * 4 + 3 - columns, columns.to(tl.float32))
    elif KIND == "a program writes what it read elsewhere, without a barrier":
        x = tl.load(x_ptr + here * 4 + 3 - columns)
        tl.store(x_ptr + here * 4 + columns, x)
    elif KIND == "a store has two values for one place":
        tl.store(x_ptr + here * 4 + columns // 2, columns.to(tl.float32))
    else:
        x = tl.load(x_ptr + here * 4 + columns)
        tl.store(x_ptr + here * 4 + columns, x + 1, mask=columns < 3)
        tl.debug_barrier()
        x = tl.load(x_ptr + here * 4 + 3 - columns)
        tl.debug_barrier()
        tl.store(x_ptr + here * 4 + 3 - columns, x)


@pytest.mark.parametrize(
    "kind",
    [
        "two programs write one place",
        "a program reads what another one writes",
        "a program reads what it wrote, without a barrier",
        "a program writes a place twice, without a barrier",
        "a program writes what it read elsewhere, without a barrier",
        "a store has two values for one place",
        "",
    ],
)
def test_races_are_seen(kind: str) -> None:
    with watched() as races:
        racing_kernel[(2,)](torch.zeros(16), kind)
    assert races.found == ({kind} if kind else set())


CASES = [
    *(Case(200, 24, labels="ages", regime=r) for r in ("sweeps", "in turn", "parts")),
    Case(150, 24, "released-depth"),
    Case(150, 24, "contrastive", regime="parts"),
    *(Case(100, 24, regime=r) for r in ("dense", "dense-split", "dense-recomputed")),
    Case(100, 24, "released-age", regime="dense-split"),
    Case(140, 150, labels="ages", regime="windows"),
    Case(140, 150, labels="ages", regime="pieces"),
    Case(140, 20, labels="equal"),
    Case(100, 20, "released-age", K=90),
    Case(100, 20, "released-depth", L=3, K=90, distance="rmse"),
    Case(90, 20, "released-depth", L=2, regime="dense"),
    Case(140, 150, dtype=F16, labels="ages"),
    Case(70, 40, "released-age", dtype=F64),
    Case(140, 16, labels="rare"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_kernel_has_a_race(case: Case) -> None:
    with watched() as races, forced(case.regime):
        case.run("triton", case.dtype, case.inputs())
    assert not races.found


@pytest.mark.parametrize(
    ("case", "tile"),
    [
        (Case(300, 16, labels="ages"), (64, 64)),
        (Case(260, 16, "released-depth", labels="ages"), (64, 64)),
        (Case(260, 300, "released-depth", labels="ages", dtype=F16), (128, 128)),
    ],
    ids=str,
)
def test_strips_of_several_tiles_have_no_race(case: Case, tile: tuple[int, int]) -> None:
    with (
        watched() as races,
        forced(case.regime),
        strips(4, 2, tile),
        mock.patch.object(launch_sweeps, "PROGRAMS", 7),
    ):
        case.run("triton", case.dtype, case.inputs())
    assert not races.found


@pytest.mark.parametrize(("variant", "side_j"), [("paper", 64), ("contrastive", 32)])
def test_windows_of_tiles_listed_once_have_no_race(variant: str, side_j: int) -> None:
    case = Case(250, 24, variant, labels="ages", dtype=BF16)
    with watched() as races, small_tiles(9, 3, side_j):
        case.run("triton", case.dtype, case.inputs())
    assert not races.found
