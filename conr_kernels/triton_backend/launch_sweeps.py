"""Plans of the two sweeps over exact bands: ordering.py; sweeps.py, gradient.py or wide.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..variants import Settings
from .call import ROW_PAD, WIDE_PAD, Call, Form, padded, tiles
from .configs import Config
from .launch import OWN_KEYS, Launch, Parts, Steps, bind

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
#: Bytes of sorted features up to which one launch copies both orders, and the gradient of a reduced
#: loss finds them kept; above, the negatives' copies replace the positives'. Of wide features,
#: whose negatives then need a list of their own.
BOTH_ORDERS = 2**26
WIDE_BOTH_ORDERS = 2**28
#: Bytes of the gradient's parts up to which one launch serves both sweeps of the backward pass, and
#: about how many programs, by the size of a feature; above, the positives' part waits in the
#: gradient's memory.
PARTS_BYTES = 2**25
PARTS_PROGRAMS = {2: 256, 4: 512, 8: 512}
GATHER_ROWS = 32
FINISH_ROWS = 64
PROJECTED_ROWS = 16

#: A launch and the names of its pointers.
Step = tuple[Launch, str]


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
        is_wide, is_reduced = call.D_bucket == 0, form.reduction != "none"
        both_orders = WIDE_BOTH_ORDERS if is_wide else BOTH_ORDERS
        self.is_apart = call.is_confused and size <= both_orders
        #: No sweep's copies take the place of the other's: one launch serves both.
        self.stand_apart = self.is_apart or not call.is_confused
        self.is_kept = is_reduced and size <= BOTH_ORDERS and not is_wide
        chosen = call.config("forward")
        self.n_slots = min(tiles(PROGRAMS, tiles(N, chosen.BLOCK_I)), SLOTS)

        self.work, self.kept, self.work_of_gradient = Parts(), Parts(), Parts()
        self.kept.add("layout", layout_size(N, K), torch.int32)
        self.kept.add("loss", N, call.dtype)
        self.rank = "rank" if self.is_kept else "nothing"
        if self.is_kept:
            self._add_copies(self.kept, columns)
            self.work.add("rank", (1 + self.is_apart) * padded(N), torch.int32)
        else:
            self.kept.add("stats", N * columns, call.dtype)
            self._add_copies(self.work, 0)
            self._add_copies(self.work_of_gradient, columns)
        self.work.add("poison", K + N * call.has_keys, torch.float32)
        self.work.add("sums", 2 * 3 * self.n_slots * N, call.dtype)
        self.work.add("n", self.n_slots * N, torch.int32)
        self.sort_keys = self._sort_keys() if L > 1 else None
        forward = list(self._forward())
        backward = list(self._backward_wide() if is_wide else self._backward_narrow())
        if not is_reduced:
            rows, sorts = "x y p key_x key_y key_p", "key_values key_order values order"
            self.forward = Steps(
                f"{rows} w n_absent {sorts} loss stats layout", {}, forward, self.work
            )
            self.backward = Steps(
                f"{rows} coef key_coef layout G gradient", {"upstream": "nothing"}, backward,
                self.work_of_gradient,
            )  # fmt: skip
        else:
            aliases = OWN_KEYS | {
                "n_absent": "nothing", "key_values": "values", "key_order": "order",
            }  # fmt: skip
            self.forward = Steps(
                "x y p w values order total", aliases, forward, self.kept, self.work
            )
            rows, aliases = "x", {}
            if not self.is_kept:
                rows, aliases = "x y p", OWN_KEYS | {"coef": "stats", "key_coef": "stats"}
            self.backward = Steps(
                f"{rows} upstream G gradient", aliases, backward, self.kept, self.work_of_gradient
            )

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
        """Names of pointers, those of copies in this order."""
        names, order = [], order if self.is_apart else 0
        for name in text.split():
            if name.endswith(("_i", "_j")):
                name = f"{name if self.call.has_keys else name[:-1] + 'j'}{order}"
            names.append(name)
        return " ".join(names)

    def _sort_keys(self) -> Steps:
        from . import ordering

        call, L = self.call, self.call.L
        self.work.add("spread", 2 * L, call.form.labels)
        spread = Launch(bind(ordering.conr_spread_kernel, {}, L=L, BLOCK=1024), 2 * L, call.K)
        values = bind(
            ordering.conr_sort_keys_kernel, {}, HAS_KEYS=call.has_keys, L=L,
            L_PAD=1 << (L - 1).bit_length(), BLOCK=256,
        )  # fmt: skip
        steps = [
            (spread, "key_y key_p spread"),
            (
                Launch(values, tiles(max(call.K, call.N), 256), call.K, call.N),
                "spread key_y key_p y p of_keys of_anchors",
            ),
        ]
        return Steps("y p key_y key_p of_keys of_anchors", {}, steps, self.work)

    def _gather(self, order: int, columns: int) -> Iterator[Step]:
        """The copies in this order; with the first also the bands, in the forward pass, and, where
        there is room, the second.
        """
        from . import ordering

        call, s = self.call, self.call.settings
        if order == 1 and (self.is_apart or not call.is_confused):
            return
        reach = s.window
        if call.L > 1:
            # As core/sweep.py's sort_reach.
            reach *= call.L if s.distance == "mae" else math.sqrt(call.L)
            reach += reach * 1e-5 + 1e-18
        kernel = bind(
            ordering.conr_order_kernel, {"num_warps": 4}, HAS_KEYS=call.has_keys,
            HAS_P=call.is_confused, EXACT=call.L == 1, BAND_ROWS=ROW_PAD, D=call.D,
            D_PAD=call.D_pad, L=call.L, COLUMNS=columns, ROWS=GATHER_ROWS,
            CHUNK=min(call.D_pad, 128) if call.D_bucket else 64, IN_HALVES=call.is_in_halves,
        )  # fmt: skip
        n_bands = 1 + padded(max(call.N, call.K)) // ROW_PAD
        n_programs = self.gather_programs * (1 + self.is_apart)
        first = n_bands + self.gather_programs * order
        names = (
            "nothing nothing nothing nothing layout nothing "
            "key_x key_y key_p key_coef q_j inverse_j y_j p_j coef_j "
            "x y p nothing coef q_i inverse_i y_i p_i coef_i nothing upstream"
        )
        if not columns:
            if order == 0:
                n_programs, first = n_programs + n_bands, 0
            names = (
                f"key_values key_order values order layout {self.rank} "
                "key_x key_y key_p nothing q_j inverse_j y_j p_j nothing "
                "x y p w nothing q_i inverse_i y_i p_i nothing poison nothing"
            )
        launch = Launch(
            kernel, n_programs, call.N, call.K, call.form.self_offset, call.K.bit_length(),
            call.D_pad, first, int(self.is_apart), reach, self.factor, call.scale,
        )  # fmt: skip
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
        from . import dense, sweeps

        call, s, variant = self.call, self.call.settings, self.call.settings.variant
        chosen, n_slots = call.config("forward"), self.n_slots
        sweeps_of = {0: "both"} if self.stand_apart else {0: "positives", 1: "negatives"}
        for order, which in sweeps_of.items():
            yield from self._gather(order, 0)
            has_negatives = which != "positives"
            kernel = bind(
                sweeps.conr_forward_kernel, chosen.launch | call.fusion, SWEEPS=which,
                CONFUSED=call.is_confused and has_negatives, SAME=not call.has_keys,
                D_PAD=call.D_pad, INSIDE=call.is_inside and which != "negatives",
                PUSHING=variant.pushing if has_negatives else "none",
                TINY=call.is_tiny and has_negatives, **call.pair_flags, **chosen.tiles,
            )  # fmt: skip
            n_programs = tiles(call.N, chosen.BLOCK_I) * n_slots * (1 + (which == "both"))
            launch = Launch(
                kernel, n_programs, call.N, call.K, n_slots, call.D_pad, int(self.is_apart),
                call.unit, call.window, s.push_scale,
            )  # fmt: skip
            yield launch, self._pick("layout q_i y_i p_i q_j y_j p_j sums n")
        finish = bind(
            sweeps.conr_finish_kernel, {"num_warps": 4}, SAME=not call.has_keys,
            SHIFTED=call.pair_flags["SHIFTED"], INSIDE=call.is_inside, PUSHING=variant.pushing,
            UNIT_TERMS=variant.unit_terms, COUNT_SELF=variant.count_self,
            WEIGHTED_ROWS=variant.weighted_rows, TINY=call.is_tiny, ORDERS=1 + self.is_apart,
            ROWS=FINISH_ROWS, SLOTS=SLOTS,
        )  # fmt: skip
        n_rows = padded(call.N) if self.is_kept else call.N
        launch = Launch(finish, tiles(n_rows, FINISH_ROWS), call.N, call.K, n_slots, s.push_scale)
        stats = "coef_j" if self.is_kept else "stats"
        yield launch, self._pick(f"sums n poison w n_absent {self.rank} loss {stats}")
        if call.form.reduction != "none":
            total = bind(dense.conr_total_kernel, {"num_warps": 16}, BLOCK=8192)
            yield Launch(total, 1, call.N, self.factor), "loss total"

    @property
    def kappa(self) -> float:
        """∂L/∂q_i = (1/τ) Σ_j H_ij q_j, and the sorted copies hold √(log₂e/τ)·q_j."""
        return 1 / (self.call.settings.temperature * self.call.scale)

    def _backward_narrow(self) -> Iterator[Step]:
        call = self.call
        tiles_i = tiles(call.N, call.config("backward").BLOCK_I)
        n_slots = min(tiles(PARTS_PROGRAMS[call.form.dtype.itemsize], 2 * tiles_i), SLOTS)
        size = 2 * n_slots * call.N * call.D_pad
        # Two exponentials a pair in the loops of both sweeps would spill, or of halves need twice
        # the shared memory.
        is_too_much = call.form.dtype == torch.float32 and call.pair_flags["SHIFTED"]
        if self.stand_apart and size * call.dtype.itemsize <= PARTS_BYTES and not is_too_much:
            self.work_of_gradient.add("G_parts", size, call.dtype)
            return self._backward_at_once(n_slots)
        return self._backward_in_turn()

    def _backward_at_once(self, n_slots: int) -> Iterator[Step]:
        from . import gradient

        call, s = self.call, self.call.settings
        chosen, upstream, kappa = call.config("backward"), "nothing", self.kappa
        if self.is_kept:
            upstream, kappa = "upstream", kappa * self.factor
        else:
            yield from self._gather(0, self.columns)
        of_sums = bind(
            gradient.conr_backward_parts_kernel, chosen.launch | call.fusion,
            APART=int(self.is_apart), CONFUSED=call.is_confused, SAME=not call.has_keys,
            D_PAD=call.D_pad,
            INSIDE=call.is_inside, PUSHING=s.variant.pushing, RESCALE=call.is_rescaled,
            **call.pair_flags, **chosen.tiles,
        )  # fmt: skip
        launch = Launch(
            of_sums, 2 * n_slots * tiles(call.N, chosen.BLOCK_I),
            call.N, call.K, n_slots, call.D_pad, call.unit, call.window, s.push_scale,
        )  # fmt: skip
        yield launch, self._pick("layout q_i y_i p_i coef_i q_j y_j p_j coef_j G_parts")
        of_rows = bind(
            gradient.conr_gradient_kernel, {"num_warps": 4}, SAME=not call.has_keys, D=call.D,
            D_PAD=call.D_pad, ROWS=PROJECTED_ROWS,
        )  # fmt: skip
        numbers = call.N, call.K, 2 * n_slots, kappa
        launch = Launch(of_rows, tiles(padded(call.N), PROJECTED_ROWS), *numbers)
        yield launch, self._pick(f"layout coef_i inverse_i x G_parts {upstream} gradient")

    def _backward_in_turn(self) -> Iterator[Step]:
        from . import gradient

        call, s = self.call, self.call.settings
        chosen, dtype = call.config("backward"), call.form.dtype
        # The positives' part waits where the gradient will stand, and its lower 16 bits elsewhere
        # if the gradient has no more.
        rest, upstream, kappa = "nothing", "nothing", self.kappa
        if dtype.itemsize == 2:
            rest = "G_rest"
            self.work_of_gradient.add(rest, call.N * call.D, torch.int16)
        apart = self.is_kept and self.is_apart
        if self.is_kept:
            upstream, kappa = "upstream", kappa * self.factor
        for order in (0, 1):
            if not self.is_kept:
                yield from self._gather(order, self.columns)
            kernel = bind(
                gradient.conr_backward_kernel, chosen.launch | call.fusion, D=call.D,
                RESCALE=call.is_rescaled, **self._flags(order), **call.pair_flags, **chosen.tiles,
            )  # fmt: skip
            launch = Launch(
                kernel, tiles(call.N, chosen.BLOCK_I),
                call.N, call.K, call.D_pad, int(apart), call.unit, call.window, s.push_scale, kappa,
            )  # fmt: skip
            yield launch, self._pick(
                "layout q_i y_i p_i coef_i inverse_i q_j y_j p_j coef_j "
                f"x G {rest} {upstream} gradient", 0 if apart else order,
            )  # fmt: skip

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
        yield Launch(of_list, 1, N, K, window, second), "layout list"
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
        numbers = N, K, call.D_pad, int(self.is_apart), self.kappa
        launch = Launch(gradient, padded(N) // GATHER_ROWS, *numbers)
        yield launch, self._pick(f"layout coef_i inverse_i x {G} gradient")

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


def limits() -> tuple[Any, ...]:
    """What plans depend on beside the form of call."""
    return PROGRAMS, WIDE_FEATURES, WORKSPACE, BOTH_ORDERS, WIDE_BOTH_ORDERS, PARTS_BYTES
