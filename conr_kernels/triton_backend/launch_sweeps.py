"""Plans of the two sweeps over exact bands: layout.py; sweeps.py, gradient.py or wide.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Keys
from ..variants import Settings
from .call import ROW_PAD, WIDE_PAD, Call, Form, form_of, padded, tiles
from .configs import Config
from .launch import Launch, Parts, bind

#: Programs that kernels are split into, about: eight for each multiprocessor of an H200; and the
#: most that share a forward pass's tile of anchors.
PROGRAMS = 1056
SLOTS = 8
#: Of H_ij, bytes that are kept at a time: as many as the features', times WIDE_FEATURES, but from
#: the first to the second of these, and for larger features half as many as theirs; and the most
#: programs that take turns: four for each multiprocessor of an A100, H200 or B200.
WIDE_FEATURES = 4
WORKSPACE = 2**27, 2**29
WIDE_PROGRAMS = {80: 432, 90: 528, 100: 592}
#: Bytes of sorted features up to which one launch copies both orders; above, the negatives' copies
#: replace the positives'. Of wide features, whose negatives then need a list of their own.
BOTH_ORDERS = 2**26
WIDE_BOTH_ORDERS = 2**28
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
        both_orders = BOTH_ORDERS if call.D_bucket else WIDE_BOTH_ORDERS
        self.is_apart = call.is_confused and size <= both_orders
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
        # The positives' part waits where the gradient will stand, and its lower 16 bits elsewhere
        # if the gradient has no more.
        names = "layout q_i y_i p_i coef_i inverse_i q_j y_j p_j coef_j x G nothing gradient"
        if dtype.itemsize == 2:
            self.work_of_gradient.add("G_rest", call.N * call.D, torch.int16)
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
        columns = product.BLOCK_D if call.D_pad % product.BLOCK_D == 0 else WIDE_PAD
        tile = {"BLOCK_I": chosen.BLOCK_I, "BLOCK_J": chosen.BLOCK_J}
        n_tiles = tiles(N, chosen.BLOCK_I)
        window, passes, second = self._windows(chosen)
        parts, G, H = self.work_of_gradient, "G nothing", "H nothing"
        parts.add("list", 8 * (n_tiles + 1), torch.int64)
        parts.add("H", window * chosen.BLOCK_I * chosen.BLOCK_J, call.form.dtype)
        if call.is_rescaled:
            parts.add("H_scale", window * chosen.BLOCK_I, call.dtype)
            H = "H H_scale"
        if call.form.dtype.itemsize == 2:  # as in _backward
            parts.add("G_rest", N * call.D, torch.int16)
            G = "G G_rest"
        of_all = {"CONFUSED": call.is_confused, "SAME": not call.has_keys}
        of_list = bind(
            wide.conr_wide_list_kernel, {"num_warps": 4}, **of_all, L=call.L, **tile, BLOCK=1024
        )
        scores = bind(
            wide.conr_wide_scores_kernel, chosen.launch | call.fusion, **of_all, D_PAD=call.D_pad,
            INSIDE=call.is_inside, PUSHING=s.variant.pushing, RESCALE=call.is_rescaled,
            **call.pair_flags, **chosen.tiles,
        )  # fmt: skip
        products = bind(
            wide.conr_wide_product_kernel, product.launch, **of_all, D=call.D, D_PAD=call.D_pad,
            RESCALE=call.is_rescaled, PRECISION=call.pair_flags["PRECISION"],
            UPCAST=call.pair_flags["UPCAST"], **tile, BLOCK_D=columns, BLOCK_K=product.BLOCK_J,
        )  # fmt: skip
        of_scores = self._pick(f"layout list q_i y_i p_i coef_i q_j y_j p_j coef_j {H}")
        of_products = self._pick(f"layout list q_j {H} {G}")
        most = WIDE_PROGRAMS[call.form.architecture]
        n_programs = min(n_tiles * (call.D_pad // columns), most)
        yield Launch(of_list, 1, N, K, window, second), itemgetter("layout", "list")
        for order, n_passes in enumerate(passes):
            yield from self._gather(order, self.columns)
            for first in range(second * order, second * order + n_passes * window, window):
                numbers = N, K, first, window, int(self.is_apart)
                yield Launch(
                    scores, min(window, most), *numbers, call.D_pad, call.window, s.push_scale,
                ), of_scores  # fmt: skip
                yield Launch(products, n_programs, *numbers), of_products
        gradient = bind(
            wide.conr_wide_gradient_kernel, {"num_warps": 4}, **of_all, D=call.D, ROWS=GATHER_ROWS,
            CHUNK=64,
        )  # fmt: skip
        launch = Launch(gradient, padded(N) // GATHER_ROWS, N, K, call.D_pad, self.kappa)
        yield launch, self._pick(f"layout coef_i inverse_i x {G} gradient", 1)

    def _windows(self, chosen: Config) -> tuple[int, tuple[int, int], int]:
        """Pairs of tiles in a window of the list; how many windows suffice for any bands, before
        the negatives' copies replace the positives' and after; where negatives begin at the
        earliest.
        """
        call, itemsize = self.call, self.call.form.dtype.itemsize
        n, n_j = tiles(call.N, chosen.BLOCK_I), padded(call.K) // chosen.BLOCK_J
        features = max(call.N, call.K) * call.D * itemsize
        least, most = WORKSPACE
        kept = max(least, min(WIDE_FEATURES * features, max(most, features // 2)))
        window = _even(n * n_j, kept // (chosen.BLOCK_I * chosen.BLOCK_J * itemsize))
        each = tiles(n * n_j, window)
        if call.is_confused and not self.is_apart:
            return window, (each, each), each * window
        both = 2 * each
        if call.L == 1:
            # The negatives' keys are no more than those outside the label bands, so that both have
            # every key once, and twice those at the borders of a tile of anchors: bands' ends grow
            # from one tile to the next, and all the borders together have 2 K keys. The choice is
            # made for ROW_PAD anchors; each of four ends adds less than a tile.
            per_choice = ROW_PAD // chosen.BLOCK_I
            both = min(both, tiles(n * (n_j + 4) + 3 * per_choice * n_j, window) + 1)
        return window, (both, 0), 0


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
    limits = PROGRAMS, WIDE_FEATURES, WORKSPACE, BOTH_ORDERS, WIDE_BOTH_ORDERS
    key = (id(s), form, *limits)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= PLANS:
            _plans.clear()
        found = _plans[key] = (s, Plan(form, s))
    return found[1]
