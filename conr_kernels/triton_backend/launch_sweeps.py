"""Plans of the two sweeps over exact bands: layout.py; sweeps.py, gradient.py or wide.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Keys
from ..variants import Settings
from .call import ROW_PAD, WIDE_PAD, Call, Form, form_of, padded, tiles
from .launch import Launch, Parts, bind

#: Programs that kernels are split into, about: eight for each multiprocessor of an H200; and the
#: most that share a forward pass's tile of anchors.
PROGRAMS = 1056
SLOTS = 8
#: Numbers of H_ij that are kept at a time: as many as the features', times this, but not fewer
#: than WORKSPACE; programs that then multiply them by the keys' features, about.
WIDE_FEATURES = 4
WORKSPACE = 2**25
WIDE_PROGRAMS = 528
#: Bytes of sorted features up to which one launch copies both orders; above, the negatives' copies
#: replace the positives'.
BOTH_ORDERS = 2**26
GATHER_ROWS = 32
FINISH_ROWS = 64

#: A launch, and what picks its pointers from all by their names.
Step = tuple[Launch, itemgetter]


def layout_size(n_anchors: int, n_keys: int) -> int:
    """A head (the choice of sweep), both orders of keys and anchors, the anchors' places, the
    bands.
    """
    return ROW_PAD + 2 * padded(n_keys) + 7 * padded(n_anchors)


class Plan:
    """The launches of one form of call, with all but their pointers, and its workspaces."""

    def __init__(self, form: Form, s: Settings) -> None:
        self.call = call = Call(form, s)
        N, K, L, columns = call.N, call.K, call.L, 3 if s.exponent_is_small else 5
        self.columns = columns
        #: Of a row's factor in the reduced loss.
        self.factor = 1 / N if form.reduction == "mean" else 1.0
        n_rows = padded(K) + (padded(N) if call.has_keys else 0)
        self.gather_programs = n_rows // GATHER_ROWS
        size = n_rows * call.D_pad * form.dtype.itemsize
        self.is_apart = call.is_confused and size <= BOTH_ORDERS
        chosen = call.config("forward")
        self.n_slots = min(tiles(PROGRAMS, tiles(N, chosen.BLOCK_I)), SLOTS)

        #: Where the losses are reduced: layout, statistics and losses.
        self.kept = Parts()
        self.kept.add("layout", layout_size(N, K), torch.int32)
        self.kept.add("stats", N * columns, call.dtype)
        self.kept.add("loss", N, call.dtype)
        self.work = Parts()
        self._add_copies(self.work, 0)
        self.work.add("excess", tiles(N, ROW_PAD), torch.int32)
        self.work.add("poison", K + N * call.has_keys, torch.float32)
        self.work.add("sums", 2 * 3 * self.n_slots * N, call.dtype)
        self.work.add("n", self.n_slots * N, torch.int32)
        self.sort_keys = list(self._sort_keys()) if L > 1 else []
        self.forward = list(self._forward())
        self.work_of_gradient = Parts()
        self._add_copies(self.work_of_gradient, columns)
        is_wide = call.D_bucket == 0
        self.backward = list(self._backward_wide() if is_wide else self._backward())

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
                for order in range(1 + self.is_apart if size else 0):
                    parts.add(f"{name}{side}{order}", size, dtype)

    def _pick(self, text: str, order: int = 0) -> itemgetter:
        """Picks the pointers of these names, those of copies in this order."""
        found, order = [], order if self.is_apart else 0
        for name in text.split():
            if name.endswith(("_i", "_j")):
                name = f"{name if self.call.has_keys else name[:-1] + 'j'}{order}"
            found.append(name)
        return itemgetter(*found)

    def _sort_keys(self) -> Iterator[Step]:
        from . import layout

        call, L = self.call, self.call.L
        self.work.add("spread", 2 * L, call.form.labels)
        spread = bind(layout.conr_spread_kernel, {}, L=L, BLOCK=1024)
        yield Launch(spread, 2 * L, call.K), itemgetter("key_y", "key_p", "spread")
        values = bind(
            layout.conr_sort_keys_kernel, {}, HAS_KEYS=call.has_keys, L=L,
            L_PAD=1 << (L - 1).bit_length(), BLOCK=256,
        )  # fmt: skip
        names = self._pick("spread key_y key_p y p of_keys of_anchors")
        yield Launch(values, tiles(max(call.K, call.N), 256), call.K, call.N), names

    def _bands(self) -> Step:
        from . import layout

        call, s = self.call, self.call.settings
        reach = s.window
        if call.L > 1:
            # |Δ_c| ≤ L·d (mae), √L·d (rmse) for every component c; the margin covers d's rounding.
            reach *= call.L if s.distance == "mae" else math.sqrt(call.L)
            reach += reach * 1e-5
        bands = bind(
            layout.conr_bands_kernel, {"num_warps": 4}, HAS_KEYS=call.has_keys,
            HAS_P=call.is_confused, EXACT=call.L == 1, ROWS=ROW_PAD,
        )  # fmt: skip
        n_programs = padded(max(call.N, call.K)) // ROW_PAD
        n_steps = call.K.bit_length()
        numbers = call.N, call.K, call.form.self_offset, n_steps, reach
        names = (
            "key_values0 key_order0 values0 order0 key_values1 key_order1 values1 order1 "
            "layout excess"
        )
        return Launch(bands, n_programs, *numbers), self._pick(names)

    def _gather(self, order: int, columns: int) -> Iterator[Step]:
        """The copies in this order; in both, where there is room, with the first."""
        from . import layout

        call = self.call
        if order == 1 and (self.is_apart or not call.is_confused):
            return
        gather = bind(
            layout.conr_gather_kernel, {"num_warps": 4}, HAS_KEYS=call.has_keys, D=call.D,
            D_PAD=call.D_pad, L=call.L, COLUMNS=columns, ROWS=GATHER_ROWS,
            CHUNK=min(call.D_pad, 128) if call.D_bucket else 64,
        )  # fmt: skip
        launch = Launch(
            gather, self.gather_programs * (1 + self.is_apart), call.N, call.K, call.D_pad,
            self.gather_programs * order, int(self.is_apart), self.factor, call.scale,
        )  # fmt: skip
        names = (
            "layout excess key_x key_y key_p nothing q_j inverse_j y_j p_j nothing "
            "x y p w nothing q_i inverse_i y_i p_i nothing poison nothing"
        )
        if columns:
            names = (
                "layout nothing key_x key_y key_p key_coef q_j inverse_j y_j p_j coef_j "
                "x y p nothing coef q_i inverse_i y_i p_i coef_i nothing upstream"
            )
        yield launch, self._pick(names)

    def _flags(self, order: int) -> dict[str, Any]:
        """Constants of a sweep; what the other one alone depends on has one value."""
        call, negatives = self.call, order == 1
        return dict(
            NEGATIVES=negatives, CONFUSED=call.is_confused and negatives, SAME=not call.has_keys,
            D_PAD=call.D_pad, INSIDE=call.is_inside and not negatives,
            PUSHING=call.settings.variant.pushing if negatives else "none",
        )  # fmt: skip

    def _forward(self) -> Iterator[Step]:
        from . import dense_rows, sweeps

        call, s, variant = self.call, self.call.settings, self.call.settings.variant
        chosen, n_slots = call.config("forward"), self.n_slots
        yield self._bands()
        for order in (0, 1):
            yield from self._gather(order, 0)
            kernel = bind(
                sweeps.conr_forward_kernel, chosen.launch | call.fusion,
                TINY=call.is_tiny and order == 1, **self._flags(order), **call.pair_flags,
                **chosen.tiles,
            )  # fmt: skip
            launch = Launch(
                kernel, tiles(call.N, chosen.BLOCK_I) * n_slots,
                call.N, call.K, n_slots, call.D_pad, call.window, s.push_scale,
            )  # fmt: skip
            yield launch, self._pick("layout q_i y_i p_i q_j y_j p_j sums n", order)
        finish = bind(
            sweeps.conr_finish_kernel, {"num_warps": 4}, SAME=not call.has_keys,
            SHIFTED=call.pair_flags["SHIFTED"], INSIDE=call.is_inside, PUSHING=variant.pushing,
            UNIT_TERMS=variant.unit_terms, COUNT_SELF=variant.count_self,
            WEIGHTED_ROWS=variant.weighted_rows, TINY=call.is_tiny, ROWS=FINISH_ROWS, SLOTS=SLOTS,
        )  # fmt: skip
        launch = Launch(finish, tiles(call.N, FINISH_ROWS), call.N, call.K, n_slots, s.push_scale)
        yield launch, self._pick("sums n poison w n_absent loss stats")
        if call.form.reduction != "none":
            total = bind(dense_rows.conr_total_kernel, {"num_warps": 16}, BLOCK=8192)
            yield Launch(total, 1, call.N, 0, self.factor), itemgetter("loss", "total")

    @property
    def kappa(self) -> float:
        """∂L/∂q_i = (1/τ) Σ_j H_ij q_j, and the sorted copies hold √(log₂e/τ)·q_j."""
        return 1 / (self.call.settings.temperature * self.call.scale)

    def _backward(self) -> Iterator[Step]:
        from . import gradient

        call, s = self.call, self.call.settings
        chosen, dtype = call.config("backward"), call.form.dtype
        # The positives' part waits where the gradient will stand: 16-bit ones as two bfloat16
        # summands.
        names = "layout q_i y_i p_i coef_i inverse_i q_j y_j p_j coef_j x G nothing gradient"
        if dtype.itemsize == 2:
            self.work_of_gradient.add("G_rest", call.N * call.D, torch.bfloat16)
            names = names.replace("nothing", "G_rest")
        for order in (0, 1):
            yield from self._gather(order, self.columns)
            kernel = bind(
                gradient.conr_backward_kernel, chosen.launch | call.fusion, D=call.D,
                RESCALE=call.is_rescaled, **self._flags(order), **call.pair_flags, **chosen.tiles,
            )  # fmt: skip
            launch = Launch(
                kernel, tiles(call.N, chosen.BLOCK_I),
                call.N, call.K, call.D_pad, call.window, s.push_scale, self.kappa,
            )  # fmt: skip
            yield launch, self._pick(names, order)

    def _backward_wide(self) -> Iterator[Step]:
        from . import wide

        call, s, N, K = self.call, self.call.settings, self.call.N, self.call.K
        chosen, product = call.config("wide"), call.config("product")
        n_tiles, n_tiles_j = tiles(N, chosen.BLOCK_I), padded(K) // chosen.BLOCK_J
        columns = product.BLOCK_D if call.D_pad % product.BLOCK_D == 0 else WIDE_PAD
        # A row may meet every key, and no number of the device's is known here: as many rows at a
        # time as the workspace holds with all keys, but enough to fill a GPU, and what keys then
        # fit.
        pair_size = chosen.BLOCK_I * chosen.BLOCK_J
        most = max(WIDE_FEATURES * N * call.D, WORKSPACE) // pair_size
        part = _even(n_tiles, max(most // n_tiles_j, tiles(WIDE_PROGRAMS, call.D_pad // columns)))
        row_tiles = _even(n_tiles_j, min(most // part, 2**16))
        row_size = row_tiles * chosen.BLOCK_J
        n_slots = min(tiles(PROGRAMS, part), row_tiles)
        parts, H_size = self.work_of_gradient, part * chosen.BLOCK_I * row_size
        parts.add("H", H_size, call.form.dtype)
        H_scale = "nothing"
        if call.is_rescaled:
            H_scale = "H_scale"
            parts.add(H_scale, H_size // chosen.BLOCK_J, call.dtype)
        parts.add("G", N * call.D_pad, call.dtype)
        of_product = {name: call.pair_flags[name] for name in ("L", "PRECISION", "UPCAST")}
        for order in (0, 1):
            yield from self._gather(order, self.columns)
            scores = bind(
                wide.conr_wide_scores_kernel, chosen.launch | call.fusion, RESCALE=call.is_rescaled,
                **self._flags(order), **call.pair_flags, **chosen.tiles,
            )  # fmt: skip
            flags = self._flags(order)
            products = bind(
                wide.conr_wide_product_kernel, product.launch,
                **{name: flags[name] for name in ("NEGATIVES", "CONFUSED", "SAME", "D_PAD")},
                RESCALE=call.is_rescaled, **of_product, BLOCK_I=chosen.BLOCK_I,
                BLOCK_J=chosen.BLOCK_J, BLOCK_D=columns, BLOCK_K=product.BLOCK_J,
            )  # fmt: skip
            of_scores = self._pick(
                f"layout q_i y_i p_i coef_i q_j y_j p_j coef_j H {H_scale}", order
            )
            of_products = self._pick(f"layout q_j H {H_scale} G", order)
            windows = itertools.product(range(0, n_tiles, part), range(0, n_tiles_j, row_tiles))
            for first, start in windows:
                n_here = min(part, n_tiles - first)
                numbers = first, start, row_size
                yield Launch(
                    scores, n_here * n_slots, N, K, n_slots, *numbers, call.D_pad, call.window,
                    s.push_scale,
                ), of_scores  # fmt: skip
                n_programs = n_here * (call.D_pad // columns)
                yield Launch(products, n_programs, N, K, *numbers), of_products
        gradient = bind(
            wide.conr_wide_gradient_kernel, {"num_warps": 4}, CONFUSED=call.is_confused,
            SAME=not call.has_keys, D=call.D, D_PAD=call.D_pad, ROWS=GATHER_ROWS, CHUNK=64,
        )  # fmt: skip
        launch = Launch(gradient, padded(N) // GATHER_ROWS, N, K, call.D_pad, self.kappa)
        yield launch, self._pick("layout coef_i inverse_i x G gradient", 1)


def _even(n: int, most: int) -> int:
    """The size of equal parts of n, of ``most`` at most."""
    return tiles(n, tiles(n, max(most, 1)))


#: By the identity of their settings, which an entry keeps alive, and the form.
_plans: dict[tuple[Any, ...], tuple[Settings, Plan]] = {}
PLANS = 64


def plan_of(
    x: Tensor, y: Tensor, keys: Keys | None, self_offset: int, s: Settings, reduction: str
) -> Plan:
    form = form_of(x, y, keys, self_offset, reduction)
    key = (id(s), form, PROGRAMS, WIDE_FEATURES, WORKSPACE, WIDE_PROGRAMS, BOTH_ORDERS)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= PLANS:
            _plans.clear()
        found = _plans[key] = (s, Plan(form, s))
    return found[1]
