"""The forward pass that takes each pair of rows once: which tiles a program meets, that strips
share no memory, and losses. As triton_interpreted.py.
"""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from conr_kernels import conr_loss
from conr_kernels.triton_backend import call, launch_sweeps
from conr_kernels.triton_backend.configs import Config
from conr_kernels.triton_backend.kernels import layout, mirrored

from .triton_cases import BF16, F16, Case, forced

H = 1.0
SIDES = [(64, 64), (128, 64)]
LABELS = {
    "one": lambda n, g: torch.zeros(n),
    "far": lambda n, g: torch.randint(0, 3, (n,), generator=g) * 100.0,
    "ladder": lambda n, g: torch.arange(n) / 40.0,
    # As far as strips of two blocks must reach, of which nearly as many as may meet one row.
    "long ladder": lambda n, g: torch.arange(n) / 4042.0,
    "few": lambda n, g: torch.randn(n, generator=g).round(),
    "crowds": lambda n, g: torch.cat((torch.zeros(n // 2), torch.arange(n - n // 2) / 3.0)),
    "steps": lambda n, g: torch.arange(n).div(n / 7, rounding_mode="floor"),
    # The first anchor of a tile reaches its first half; others of this one not all of the second.
    "half a tile": lambda n, g: torch.arange(n) // 64 * 1.0 + (torch.arange(n) % 64 > 32) * 0.5,
}


@triton.jit
def tiles_kernel(
    layout_ptr, out_ptr, n_rows, n_tiles,
    NEGATIVES: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    for tile in range(n_tiles):
        runs = layout.upper_tiles(tile, layout_ptr, n_rows, NEGATIVES, BLOCK_I, BLOCK_J)
        for c in tl.static_range(4):
            tl.store(out_ptr + tile * 4 + c, runs[c])


@triton.jit
def choice_kernel(values_ptr, layout_ptr, n_rows, n_steps, reach):
    layout.choose_sweep(
        values_ptr, values_ptr, layout_ptr, n_rows, n_rows, n_steps, reach, True, 128
    )


@triton.jit
def bands_kernel(values_ptr, layout_ptr, n_rows, n_steps, reach):
    layout.find_bands(
        tl.program_id(0), values_ptr, values_ptr, layout_ptr, n_rows, n_rows, 0, n_steps, reach,
        False, 128,
    )  # fmt: skip


def layout_of(y: Tensor, p: Tensor) -> Tensor:
    """As the forward pass leaves it, but for orders and ranks."""
    n = len(y)
    found = torch.zeros(call.layout_size(n, n, False, True), dtype=torch.int32)
    values = torch.stack((y.sort().values, p.sort().values))
    choice_kernel[(1,)](values, found, n, n.bit_length(), H)
    bands_kernel[(2 * call.padded(n) // 128,)](values, found, n, n.bit_length(), H)
    return found


def runs_of(found: Tensor, n: int, negatives: bool, sides: tuple[int, int]) -> list[list[int]]:
    n_tiles = -(-n // sides[0])
    out = torch.full((n_tiles, 4), -1, dtype=torch.int32)
    tiles_kernel[(1,)](found, out, n, n_tiles, negatives, *sides)
    return out.tolist()


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("predictions", LABELS)
def test_tiles_meet_every_pair_once(labels: str, predictions: str, sides: tuple[int, int]) -> None:
    """Each pair of a set lies in one tile of its earlier row's own rows and the later row's; full
    tiles have pairs of the set alone, where predictions decide of those near each other.
    """
    n, g = 500, torch.Generator().manual_seed(0)
    y, p = LABELS[labels](n, g), LABELS[predictions](n, g)
    found = layout_of(y, p)
    own, met = sides
    for negatives in (False, True):
        runs = runs_of(found, n, negatives, sides)
        is_outside = negatives and found[0] > 0
        of = (p if negatives and not is_outside else y).sort().values
        in_set = (of[:, None] - of[None, :]).abs() <= H
        if is_outside:
            in_set = ~in_set
        for tile, (a, b, c, d) in enumerate(runs):
            assert tile * own // met <= a <= b <= -(-n // met) and a <= c <= d <= max(b, c)
            rows = in_set[tile * own : (tile + 1) * own]
            behind = rows[:, tile * own :].any(0).nonzero() + tile * own
            assert ((a <= behind // met) & (behind // met < b)).all(), (tile, a, b)
            if is_outside and found[0] == 1:
                assert c == d
            elif not is_outside:
                assert rows[:, c * met : d * met].all()
                assert negatives or not (c < d and c * met < (tile + 1) * own)
        for column in (0, 1) if own == met else (1,):
            ends = [run[column] for run in runs]
            assert ends == sorted(ends)


LOST = {
    f"{lost} from {share}": lambda n, g, lost=lost, share=share: torch.where(
        torch.arange(n) < share * n, torch.arange(n) / 40.0, lost
    )
    for lost in (math.nan, math.inf, -math.inf)
    for share in (0, 0.5)
}
STRIPS = [
    (n, labels, predictions)
    for n, kinds in (
        (100, ("one", "ladder")),
        (4100, ("one", "ladder", "crowds")),
        (9000, ("ladder",)),
    )
    for labels in LABELS
    for predictions in kinds
]
STRIPS += [(4500, lost, kind) for lost in LOST for kind in ("ladder", lost)]
STRIPS += [(4500, "ladder", lost) for lost in LOST]


@pytest.mark.parametrize(("n", "labels", "predictions"), STRIPS, ids=str)
def test_strips_that_meet_one_row_have_memory_of_their_own(
    n: int, labels: str, predictions: str
) -> None:
    g = torch.Generator().manual_seed(1)
    kinds = LABELS | LOST
    found = layout_of(kinds[labels](n, g), kinds[predictions](n, g))
    for negatives, at in ((False, layout.POSITIVE_STRIPS), (True, layout.NEGATIVE_STRIPS)):
        size = int(found[at.value])
        assert size >= 1
        ends = [b for _, b, _, _ in runs_of(found, n, negatives, (128, 128))]
        strips = [(first, ends[first : first + size][-1]) for first in range(0, len(ends), size)]
        met_by = [
            [s % layout.STRIPS.value for s, (first, end) in enumerate(strips) if first <= t < end]
            for t in range(len(ends))
        ]
        assert all(len(set(each)) == len(each) for each in met_by)
        # No larger than it must be: that costs programs.
        assert size == 1 or max(map(len, met_by)) >= layout.STRIPS.value // 2 - 1


@contextlib.contextmanager
def strips(n: int, slices: int, tile: tuple[int, int]):
    """The kernels with so many strips and slices at most, and tiles of these sides."""
    changed = dict(
        STRIPS=tl.constexpr(n), SLICES=tl.constexpr(slices), PARTS_OF_SUMS=tl.constexpr(n + slices)
    )
    plain = call.config

    def config(kind: str, architecture: int, width: int, arithmetic: str) -> Config:
        if kind == "mirrored":
            return Config(*tile, width or 64, 4, 2)
        return plain(kind, architecture, width, arithmetic)

    with (
        mock.patch.multiple(layout, **changed),
        mock.patch.multiple(mirrored, **changed),
        mock.patch.object(call, "config", config),
    ):
        yield


SEVERAL = [
    (Case(400, 16, labels="ages"), (64, 128)),
    (Case(400, 16, "released-depth", labels="ages", regime="parts"), (64, 128)),
    (Case(301, 20, "no-pushing", labels="decimal", window=0.2), (64, 64)),
    (Case(257, 16, labels="halves"), (64, 128)),
    (Case(260, 16, labels="equal"), (64, 64)),
    (Case(257, 16, window=3.0, labels="halves", regime="parts"), (64, 64)),
    (Case(300, 300, "released-depth", labels="ages"), (128, 128)),
    (Case(257, 70, labels="ages", dtype=BF16), (64, 128)),
    (Case(257, 300, labels="halves", dtype=F16, regime="parts"), (128, 128)),
]


@pytest.mark.parametrize(("case", "tile"), SEVERAL, ids=str)
def test_losses_of_several_strips_and_slices(case: Case, tile: tuple[int, int]) -> None:
    given = case.inputs()
    exact, _ = case.run("reference", torch.float64, given)
    unit = 2e-6 if case.dtype == torch.float32 else 2e-2
    for n, slices, n_programs in ((4, 2, 7), (32, 16, 24)):
        with (
            forced(case.regime),
            strips(n, slices, tile),
            mock.patch.object(launch_sweeps, "PROGRAMS", n_programs),
            torch.no_grad(),
        ):
            losses = conr_loss(
                given["x"], given["y"], given["p"], given["w"], window=case.window,
                push_scale=case.push_scale, variant=case.variant, reduction="none",
                backend="triton",
            )  # fmt: skip
        assert (losses - exact).abs().max() <= unit * exact.abs().max()
    assert exact.count_nonzero() > case.N / 4 or case.labels == "equal"
