"""The Triton kernels of wide features in the interpreter where one H_ij serves both its tiles.

Collected by test_triton.py alone, as triton_interpreted.py is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from conr_kernels import triton_backend
from conr_kernels.core.inputs import Inputs
from conr_kernels.triton_backend import call, launch_sweeps
from conr_kernels.triton_backend.configs import Config
from conr_kernels.variants import PRESETS, Settings

from .memory import fresh_tensors_full_of
from .triton_cases import BF16, SENTINEL, Case, forced, guarded_allocations

#: Rows of a tile, and keys of a step: the shipped tiles are too few and too slow here.
SIDE, STEP = 32, 16
PAPER = Settings(1.0, 0.2, 0.01, PRESETS["paper"])


@contextlib.contextmanager
def small_tiles(
    window: int, piece: int, side_j: int = SIDE, allocations=guarded_allocations
) -> Iterator[None]:
    """Wide features at any D, windows of so many pairs of tiles at most, pieces of so many tiles of
    keys.
    """
    chosen = {"wide": Config(SIDE, side_j, 64, 4, 2), "product": Config(SIDE, STEP, 128, 4, 2)}
    plain, size = call.config, window * SIDE * side_j * 2

    def config(kind: str, *key: object) -> Config:
        return chosen.get(kind) or plain(kind, *key)

    with (
        forced("sweeps", allocations),
        mock.patch.multiple(
            call,
            config=config,
            bucket=lambda *_: 0,
            WORKSPACE=(size, size),
            PIECE_KEYS=piece * side_j,
            PIECES=2**31,
        ),
    ):
        yield


def rows_of(n: int, kind: str) -> Tensor:
    g = torch.Generator().manual_seed(n)
    return {
        "equal": lambda: torch.zeros(n),
        "ladder": lambda: torch.arange(n) / 60,
        "crowds": lambda: torch.cat((torch.zeros(n // 2), torch.arange(n - n // 2) / 50)),
        "far": lambda: torch.arange(n) * 3.0,
        "steps": lambda: (torch.arange(n) // 50) * 0.7,
        "random": lambda: torch.randn(n, generator=g) * 2,
    }[kind]()


class Sweep(NamedTuple):
    """Which pairs of tiles have pairs of rows, and the caller's rows in its order."""

    has_pairs: Tensor
    order: Tensor

    def pairs(self, piece: int) -> list[tuple[int, int]]:
        """Every one once, as the list has them."""
        runs = [[j for j in range(i, len(row)) if row[j]] for i, row in enumerate(self.has_pairs)]
        longest = max(len(run) for run in runs)
        return [
            (i, j)
            for begin in range(0, longest, piece)
            for i, run in enumerate(runs)
            for j in run[begin : begin + piece]
        ]


def sweeps_of(y: Tensor, p: Tensor, choice: int, side: int = SIDE) -> list[Sweep]:
    """The positives' and the negatives', from the comparison of every pair of rows."""
    found = []
    for values, is_outside in ((y, False), (y if choice else p, choice > 0)):
        sorted_values, order = values.sort(stable=True)
        n = -(-len(values) // side)
        is_near = torch.zeros(n * side, n * side, dtype=torch.bool)
        difference = sorted_values[:, None] - sorted_values[None, :]
        is_near[: len(values), : len(values)] = difference.abs() <= PAPER.window
        is_near = is_near.view(n, side, n, side)
        has_pairs = ~is_near.all(3).all(1) if is_outside else is_near.any(3).any(1)
        found.append(Sweep(has_pairs, order))
    return found


def choice_of(y: Tensor, p: Tensor) -> bool:
    """Whether the negatives are visited outside the label bands: ``layout.choose_sweep``."""
    n, ends = len(y), []
    for values in (p.sort().values, y.sort().values):
        lo = torch.searchsorted(values, values - PAPER.window)
        ends.append((lo, torch.searchsorted(values, values + PAPER.window, right=True)))
    first = torch.arange(0, n, 128)
    last = (first + 127).clamp(max=n - 1)
    of_p = ends[0][1][last] - ends[0][0][first]
    of_y = (ends[1][1][first] - ends[1][0][last]).clamp(min=0)
    return bool((of_p + of_y - n).sum() >= 0)


def plan_of(n: int, D: int) -> launch_sweeps.Plan:
    x, y = torch.empty(n, D, dtype=BF16), torch.empty(n, 1)
    return launch_sweeps.Plan(call.form_of(x, y, None, 0, "none"), PAPER)


def layout_of(y: Tensor, p: Tensor) -> Tensor:
    with forced("sweeps", contextlib.nullcontext):
        inputs = Inputs(torch.ones(len(y), 1), y[:, None], p[:, None], None, None, 0, PAPER)
        return triton_backend.forward(inputs)[-1]


def kernels_of(plan: launch_sweeps.Plan) -> dict[str, list]:
    found: dict[str, list] = {}
    for step, _ in plan.backward.steps:
        name = step.kernel.function.__name__.removeprefix("conr_wide_").removesuffix("_kernel")
        found.setdefault(name, []).append(step)
    return found


def tiles_of(numbers: Tensor) -> Tensor:
    """A tile H_ij of each pair, of numbers that bfloat16 holds: no pair's are its neighbour's, no
    row's or column's are either.
    """
    i, j = torch.arange(SIDE)[:, None], torch.arange(SIDE)[None, :]
    return (numbers % 7 * 32)[:, None, None] + (i % 4 * 8 + j % 8)


#: Labels, predictions, rows, pairs of a window, tiles of a piece. All predictions within the
#: window, or some without; all in one window of the list, or tiles that many have a part of.
LISTS = [
    ("ladder", "random", 190, 7, 2), ("ladder", "ladder", 161, 40, 40),
    ("crowds", "crowds", 193, 8, 3), ("steps", "random", 130, 1, 1), ("far", "far", 150, 4, 1),
    ("far", "equal", 170, 6, 2), ("equal", "ladder", 130, 2, 2), ("random", "random", 20, 3, 1),
    ("steps", "equal", 190, 9, 9), ("random", "equal", 33, 1, 1),
]  # fmt: skip


class Products:
    """The kernels of a backward pass but the scores, and the sums that they leave."""

    def __init__(self, y: Tensor, p: Tensor, window: int, piece: int) -> None:
        self.n, self.layout = len(y), layout_of(y, p)
        with small_tiles(window, piece, allocations=contextlib.nullcontext):
            self.plan = plan_of(self.n, 150)
            self.steps, parts = kernels_of(self.plan), self.plan.work_of_gradient
            whole = torch.full((parts.size,), -1, dtype=torch.int32)
            self.work = dict(zip(parts.parts, parts.tensors(whole), strict=True))
            (self.of_list,) = self.steps["list"]
            self.of_list(self.layout, self.work["list"], self.work["windows"])

    def sums(self, q: Tensor, tiles_of_window) -> Tensor:
        """``Σ H_ij q_j`` from the tiles of H of each window, in memory in which something was;
        around them stand numbers that would show.
        """
        D = self.plan.call.D
        G, rest = (torch.full((self.n, D), SENTINEL // 2**16, dtype=torch.int16) for _ in range(2))
        for step in self.steps["product"]:
            first, window = step.numbers[2:4]
            H = torch.full((3 * window, SIDE, SIDE), 1e30, dtype=BF16)
            blocks = H.view(-1, SIDE // STEP, SIDE, STEP)
            tiles = tiles_of_window(first, window).view(window, SIDE, SIDE // STEP, STEP)
            blocks[window : 2 * window] = tiles.transpose(1, 2)
            step(self.layout, self.work["list"], self.work["windows"], q, H[window:], None, G, rest)
        return (G.int() << 16 | rest.int() & 0xFFFF).view(torch.float32)


@pytest.mark.parametrize("labels, predictions, n, window, piece", LISTS)
def test_each_pair_of_tiles_is_computed_once_and_added_to_both(
    labels: str, predictions: str, n: int, window: int, piece: int
) -> None:
    """Products of tiles that tell which they are, transposed or not, with features that tell whose
    rows they are.
    """
    y, p = rows_of(n, labels), rows_of(n, predictions)
    products = Products(y, p, window, piece)
    sweeps = sweeps_of(y, p, int(products.layout[0]))
    pieces = [sweep.pairs(products.of_list.numbers[3]) for sweep in sweeps]
    second, end, last = products.work["list"][:3].tolist()
    assert [end, last - second] == [len(pairs) for pairs in pieces]
    for sweep, pairs in zip(sweeps, pieces, strict=True):
        assert 2 * len(pairs) == sweep.has_pairs.sum() + sweep.has_pairs.diagonal().sum()
    assert choice_of(y, p) == (products.layout[0] > 0)

    numbers = torch.full((last + window,), -1)
    numbers[:end] = torch.arange(end)
    numbers[second:last] = torch.arange(end, end + last - second)

    def tiles_of_window(first: int, window: int) -> Tensor:
        here = numbers[first : first + window]
        here = torch.cat((here, here.new_full((window - len(here),), -1)))
        return torch.where((here < 0)[:, None, None], math.nan, tiles_of(here).float())

    q, rows = torch.zeros(2, call.padded(n), 256, dtype=BF16), torch.arange(n)
    for block in range(2):  # of columns: a program each
        q[:, rows, 128 * block + rows // SIDE] = block + 1
    found = products.sums(q, tiles_of_window)

    expected, number = torch.zeros(n, 150), 0
    n_tiles = len(sweeps[0].has_pairs)
    is_key = (torch.arange(n_tiles * SIDE) < n).float().view(n_tiles, SIDE)
    for sweep, pairs in zip(sweeps, pieces, strict=True):
        total = torch.zeros(n_tiles, SIDE, 150)
        for i, j in pairs:
            H_ij = tiles_of(torch.tensor([number]))[0].float()
            for tile, keys, H in [(i, j, H_ij), (j, i, H_ij.T)][: 1 + (i < j)]:
                for block in range(2):
                    total[tile, :, 128 * block + keys] += (block + 1) * H @ is_key[keys]
            number += 1
        expected[sweep.order] += total.view(-1, 150)[:n]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("window", [PAPER.window, math.inf])
@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("predictions", ["equal", "random"])
def test_where_labels_are_not_finite_no_tile_is_read_that_is_none(
    lost: float, predictions: str, window: float, monkeypatch
) -> None:
    """Within an infinite window bands need not agree from both sides."""
    monkeypatch.setitem(globals(), "PAPER", replace(PAPER, window=window))
    y, p = rows_of(180, "ladder"), rows_of(180, predictions)
    y[50:170] = lost
    products = Products(y, p, 4, 2)
    q = torch.ones(2, 256, 256, dtype=BF16)
    found = products.sums(q, lambda first, window: torch.ones(window, SIDE, SIDE))
    assert (found.abs() <= 4 * len(y)).all()


@pytest.mark.parametrize(
    ("where", "lost"),
    [
        ("labels and predictions", math.nan), ("predictions", math.nan), ("some", math.nan),
        ("predictions", math.inf), ("some", -math.inf),
    ],
)  # fmt: skip
def test_windows_suffice_where_rows_are_not_finite(where: str, lost: float) -> None:
    """They meet no tile but their own, and what else the list's memory holds stays."""
    n = 700
    y, p = rows_of(n, "far"), rows_of(n, "far")
    p[n // 2 if where == "some" else 0 :] = lost
    if where != "predictions":
        y[n // 2 if where == "some" else 0 :] = lost
    products = Products(y, p, 1, 1)
    last, windows = int(products.work["list"][2]), products.work["windows"]
    assert last <= len(windows) - 1
    # Of their order's two triangles no more than a tile of rows beside another.
    assert last <= 4 * -(-n // SIDE)
    assert (products.work["H"].view(torch.int16) == -1).all()


def test_windows_suffice_for_any_bands_of_labels_and_predictions() -> None:
    """With tiles as large as those that choose the sweep, or smaller: what both sweeps list."""
    g, tightest = torch.Generator().manual_seed(0), 0
    for number in range(400):
        side = (32, 64, 128)[number % 3]
        n = int(torch.randint(1, 1500, (), generator=g))
        kinds = ["equal", "ladder", "crowds", "far", "steps", "random"]
        y, p = (
            rows_of(n, kinds[int(torch.randint(6, (), generator=g))])
            * 2 ** int(torch.randint(-3, 7, (), generator=g))
            for _ in range(2)
        )
        p = y if number % 4 == 0 else p
        sweeps = sweeps_of(y, p, choice_of(y, p), side)
        counts = [int(sweep.has_pairs.triu().sum()) for sweep in sweeps]
        of = plan_of(n, 300).call
        chosen = Config(side, side, 64, 4, 2)
        for most in (1, 5, 40):
            size = most * side**2 * 2
            with (
                mock.patch.object(call, "WORKSPACE", (size, size)),
                mock.patch.object(call, "WIDE_FEATURES", 0),
            ):
                together, apart = (of.windows(chosen, is_apart) for is_apart in (True, False))
            assert together.is_mirrored and together.pairs == apart.pairs <= max(most, 1)
            needed = sum(-(-count // together.pairs) for count in counts)
            assert needed <= together.passes[0] and together.passes[1] == 0
            assert max(counts) <= apart.second == apart.passes[0] * apart.pairs
            assert apart.passes[0] == apart.passes[1]
            tightest = max(tightest, needed / together.passes[0])
    assert tightest > 0.9


GRADIENTS = [
    Case(161, 100, "paper", BF16, labels="ages"),
    Case(140, 100, "released-age", BF16, labels="halves"),
]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_the_gradient_is_that_of_both_triangles(case: Case) -> None:
    given, found = case.inputs(), []
    for side_j, window, piece in ((SIDE, 5, 2), (SIDE, 5, 2), (SIDE, 99, 99), (64, 99, 99)):
        with small_tiles(window, piece, side_j):
            form = call.form_of(given["x"], given["y"], None, 0, "none")
            plan = launch_sweeps.Plan(form, PAPER)
            (of_list,) = kernels_of(plan)["list"]
            assert of_list.kernel.keywords["MIRRORED"] is (side_j == SIDE)
            found.append(case.run("triton", case.dtype, given)[1])
    *mirrored, whole = found
    assert torch.equal(mirrored[0], mirrored[1])
    for gradient in mirrored:  # in bfloat16 a number may round the other way
        error = (gradient.double() - whole.double()).norm(dim=1)
        assert (error <= 2**-7 * whole.double().norm(dim=1)).all()


def test_mirrored_windows_without_pairs_read_nothing_that_was_not_written() -> None:
    case, found = Case(130, 100, "paper", BF16, labels="rare"), []
    given = case.inputs()
    for byte in (0, 0x5A):
        with small_tiles(1, 1, allocations=partial(fresh_tensors_full_of, byte)):
            found.append(case.run("triton", BF16, given)[1])
    assert torch.equal(*found)
