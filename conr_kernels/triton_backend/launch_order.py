"""Launches that put rows in order (ordering.py), and the copies that they leave to the sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Keys
from .call import ROW_PAD, Call, padded, tiles
from .launch import Launch, Parts

#: Rows of a block that is sorted by counting the rows before each, rows of a program that does it,
#: and searches that a program makes at a time.
SORT_BLOCK, SORT_ROWS, SEARCHES = 256, 64, 1024
#: Runs that one launch merges, by the most rows: at 8,192 rows one launch takes an H200 7 µs, at
#: 16,384 two launches of eight runs 14. Beyond: four, as each step of a row's search in each of 32
#: runs took 1.7 ps.
MERGE_FANS = {2**13: 32, 2**14: 8}
MERGE_FAN = 4
#: Beyond so many rows PyTorch sorts scalar labels and predictions: more launches, but fewer steps.
MOST_SORTED = 2**16
RANK_ROWS = 256
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
#: The most bytes of rows (in the dtype of sums), and the most rows, that one program copies.
COPIED_BYTES, COPIED_ROWS = 2**14, 32

#: A launch and the names of its pointers.
Step = tuple[Launch, str]


class Ordering:
    """Orders, bands and copies of the rows of one form of call, in its workspaces.

    ``factor``: of a row's loss in the reduced loss; ``is_apart``: the copies of both orders exist
    at once.
    """

    def __init__(self, call: Call, factor: float, is_apart: bool) -> None:
        self.call, self.factor, self.is_apart = call, factor, is_apart
        #: Of the forward pass, kept for the gradient, of the gradient.
        self.work, self.kept, self.work_of_gradient = Parts(), Parts(), Parts()
        self.is_given_sorts = call.L == 1 and max(call.N, call.K) > MOST_SORTED

    def _add_copies(self, parts: Parts, columns: int) -> None:
        """Copies of keys and anchors in the order of the labels, then in that of the predictions,
        each right behind the other.
        """
        call, form = self.call, self.call.form
        sides = [("_j", padded(call.K))] + [("_i", padded(call.N))] * call.has_keys
        for side, n in sides:
            for name, size, dtype in (
                ("q", n * call.D_pad, form.dtype), ("inverse", n, call.dtype),
                ("y", n * call.L, form.labels), ("p", n * call.L, form.labels),
                ("coef", n * columns, call.dtype),
            ):  # fmt: skip
                names = f"{name}{side}0 {name}{side}1" if self.is_apart else f"{name}{side}0"
                parts.add(names, size, dtype)

    def _pick(self, text: str, order: int = 0) -> str:
        """The names of pointers, with those of copies as they are called in this order."""
        names, order = [], order if self.is_apart else 0
        for name in text.split():
            if name.endswith(("_i", "_j")) and not name.startswith("values"):
                name = f"{name if self.call.has_keys else name[:-1] + 'j'}{order}"
            names.append(name)
        return " ".join(names)

    def _sort(self) -> Iterator[Step]:
        """Values and orders of the keys' labels and predictions, and of the anchors'."""
        from .kernels import ordering

        call, N, K, L = self.call, self.call.N, self.call.K, self.call.L
        sides, n_orders = [("_j", K)] + [("_i", N)] * call.has_keys, 1 + call.is_confused
        if self.is_given_sorts:
            ranks = call.bind(
                ordering.conr_rank_kernel, {"num_warps": 4}, HAS_KEYS=call.has_keys, ROWS=RANK_ROWS
            )
            n_programs = tiles(padded(K), RANK_ROWS) + tiles(padded(N), RANK_ROWS) * call.has_keys
            launch = Launch(ranks, n_orders * n_programs, N, K)
            yield launch, self._sides("values_order_j values_order_i layout")
            return
        columns = "key_y key_p y p"
        if L > 1:
            columns = "widest_j0 widest_j1 widest_i0 widest_i1"
            self.work.add("spread", 2 * L, call.form.labels)
            for side, n in sides:
                self.work.add(f"widest{side}0 widest{side}1", n, call.form.labels)
            spread = call.bind(ordering.conr_spread_kernel, {}, L=L, BLOCK=1024)
            yield Launch(spread, 2 * L, K), "key_y key_p spread"
            widest = call.bind(
                ordering.conr_sort_keys_kernel, {}, HAS_KEYS=call.has_keys, L=L,
                L_PAD=1 << (L - 1).bit_length(), BLOCK=256,
            )  # fmt: skip
            names = "spread key_y key_p y p widest_j0 widest_i0"
            yield Launch(widest, tiles(max(K, N), 256), K, N), self._sides(names)
        for side, n in sides:
            size = n_orders * SORT_BLOCK * tiles(n, SORT_BLOCK)
            self.work.add(f"images{side} other_images{side}", size, _INTEGERS[call.form.labels])
            self.work.add(f"sorted{side} other_sorted{side}", size, torch.int32)
            self.work.add(f"values{side}", n_orders * n, call.form.labels)
        n_rows = sum(SORT_BLOCK * tiles(n, SORT_BLOCK) for _, n in sides)
        sort = call.bind(
            ordering.conr_sort_kernel, {"num_warps": 1}, HAS_KEYS=call.has_keys, BLOCK=SORT_BLOCK,
            ROWS=SORT_ROWS,
        )  # fmt: skip
        here, other = "images_j sorted_j images_i sorted_i", "other_images_j other_sorted_j "
        other += "other_images_i other_sorted_i"
        launch = Launch(sort, n_orders * n_rows // SORT_ROWS, N, K)
        yield launch, self._sides(f"{columns} {here}")
        fan = next((fan for most, fan in MERGE_FANS.items() if max(N, K) <= most), MERGE_FAN)
        size, rows, is_last = SORT_BLOCK, SEARCHES // fan, False
        while not is_last:
            is_last = tiles(max(N, K), size) <= fan
            merge = call.bind(
                ordering.conr_merge_kernel, {"num_warps": 4}, HAS_KEYS=call.has_keys, LAST=is_last,
                BLOCK=SORT_BLOCK, ROWS=rows, RUNS=fan,
            )  # fmt: skip
            launch = Launch(merge, n_orders * n_rows // rows, N, K, size, size.bit_length())
            yield launch, self._sides(f"{here} {other} values_j values_i layout")
            size, here, other = size * fan, other, here

    def sorts(self, y: Tensor, p: Tensor, keys: Keys | None) -> list[Tensor]:
        """Values and orders of the keys, then of the anchors, where PyTorch sorts them."""
        if not self.is_given_sorts:
            return []
        found = []
        for of_y, of_p in [(y, p)] if keys is None else [keys[1:], (y, p)]:
            pair = torch.stack((of_y, of_p)[: 1 + self.call.is_confused]).view(-1, len(of_y))
            # Radix sort puts a NaN with a sign before all numbers.
            pair.nan_to_num_(math.nan, math.inf, -math.inf)
            found += pair.sort(stable=True)
        return found

    @property
    def names_of_sorts(self) -> str:
        """What the launches call the tensors of ``sorts``."""
        names = "values_j values_order_j values_i values_order_i" if self.is_given_sorts else ""
        return names if self.call.has_keys else " ".join(names.split()[:2])

    def _sides(self, names: str) -> str:
        """The names of pointers; without further keys, the anchors have none of their own."""
        if self.call.has_keys:
            return names
        return " ".join("nothing" if "_i" in name[-3:] else name for name in names.split())

    def _copies(self, order: int, columns: int) -> Iterator[Step]:
        """The copies in this order; with the first order also the bands (in the forward pass) and,
        if there is room, the second order's copies.
        """
        from .kernels import ordering

        call, s = self.call, self.call.settings
        if order == 1 and (self.is_apart or not call.is_confused):
            return
        reach = s.window
        if call.L > 1:
            # As core/sweep.py's sort_reach.
            reach *= call.L if s.distance == "mae" else math.sqrt(call.L)
            reach += reach * 1e-5 + 1e-18
        most = COPIED_BYTES // call.dtype.itemsize
        chunk = min(1 << (call.D_pad - 1).bit_length(), most)
        rows = min(most // chunk, COPIED_ROWS)
        kernel = call.bind(
            ordering.conr_order_kernel, {"num_warps": 4}, HAS_KEYS=call.has_keys,
            HAS_P=call.is_confused, EXACT=call.L == 1, BAND_ROWS=ROW_PAD,
            ORDERS=1 + self.is_apart, D=call.D, D_PAD=call.D_pad, L=call.L, COLUMNS=columns,
            ROWS=rows, CHUNK=chunk, IN_HALVES=call.is_in_halves,
        )  # fmt: skip
        n_bands = 1 + (1 + call.is_confused) * padded(call.N) // ROW_PAD
        n_programs = (padded(call.K) + padded(call.N) * call.has_keys) // rows
        first = n_bands
        names = (
            "nothing nothing layout "
            "key_x key_y key_p key_coef q_j inverse_j y_j p_j coef_j "
            "x y p nothing coef q_i inverse_i y_i p_i coef_i nothing upstream"
        )
        if not columns:
            if order == 0:
                n_programs, first = n_programs + n_bands, 0
            names = (
                f"values_j {'values_i' if call.has_keys else 'values_j'} layout "
                "key_x key_y key_p nothing q_j inverse_j y_j p_j nothing "
                "x y p w nothing q_i inverse_i y_i p_i nothing poison nothing"
            )
        launch = Launch(
            kernel, n_programs, call.N, call.K, call.form.self_offset, call.K.bit_length(),
            call.D_pad, first, order, reach, self.factor, call.scale,
        )  # fmt: skip
        yield launch, self._pick(names)


def limits() -> tuple[Any, ...]:
    """Constants that orders depend on beside the form of call."""
    return SORT_BLOCK, SORT_ROWS, SEARCHES, *MERGE_FANS.items(), MERGE_FAN, MOST_SORTED
