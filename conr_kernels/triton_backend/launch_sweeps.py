"""The two sweeps over exact bands: plans and workspaces of launch_forward.py; then gradient.py or
wide.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Keys
from ..variants import Settings
from . import launch_order
from .call import (
    ROW_PAD,
    WIDE_PAD,
    Call,
    Form,
    form_of,
    layout_size,
    limits_of_calls,
    padded,
    tiles,
)
from .launch import OWN_KEYS, Launch, Place, Steps, place_of
from .launch_forward import FINISH_ROWS, SLOTS, Forward
from .launch_order import Step

#: About how many programs a sweep has at least: two for each multiprocessor of an H200, so that
#: those of both sweeps fill it.
PROGRAMS = 264
#: The same for wide features, whose programs take long for a tile of keys: more end more evenly.
WIDE_SLICES = 768
#: The most programs of four warps that take turns, for wide features: four for each multiprocessor
#: of an A100, H200 or B200; half as many of eight warps.
WIDE_PROGRAMS = {80: 432, 90: 528, 100: 592}
#: Bytes of sorted features up to which one launch copies both orders, and the gradient of a reduced
#: loss finds them kept; above, the negatives' copies replace the positives'. And the same for wide
#: features, whose negatives then need a list of their own.
BOTH_ORDERS = 2**26
WIDE_BOTH_ORDERS = 2**28
#: Bytes of the gradient's parts up to which one launch serves both sweeps of the backward pass, and
#: about how many programs, by the size of a feature; above, the positives' part waits in the
#: gradient's memory.
PARTS_BYTES = 2**25
PARTS_PROGRAMS = {2: 256, 4: 512, 8: 512}
PROJECTED_ROWS = 16
#: Numbers of a program for wide gradients: rows, or columns of one row at a time.
GRADIENT_TILE = 4096

#: By the identity of settings (an entry keeps them alive) and the form of call.
_plans: dict[tuple[Any, ...], tuple[Settings, Plan]] = {}
PLANS = 64


class Plan(Forward):
    """The launches of one form of call, with all but their pointers, and its workspaces."""

    def __init__(self, form: Form, s: Settings) -> None:
        call = Call(form, s)
        N, K, columns = call.N, call.K, s.n_statistics
        n_rows = padded(K) + (padded(N) if call.has_keys else 0)
        size = n_rows * call.D_pad * form.dtype.itemsize
        is_wide, is_reduced = call.D_bucket == 0, form.reduction != "none"
        both_orders = WIDE_BOTH_ORDERS if is_wide else BOTH_ORDERS
        is_apart = call.is_confused and size <= both_orders
        super().__init__(call, 1 / N if form.reduction == "mean" else 1.0, is_apart)
        self.columns = columns
        self.stand_apart = is_apart or not call.is_confused
        self.is_kept = is_reduced and self.stand_apart and size <= BOTH_ORDERS
        chosen = call.config("mirrored" if call.is_forward_mirrored else "forward")
        n_programs = WIDE_SLICES if is_wide and not call.is_forward_mirrored else PROGRAMS
        n_tiles = tiles(N, chosen.BLOCK_J if call.is_forward_mirrored else chosen.BLOCK_I)
        self.n_shares = min(tiles(n_programs, n_tiles), SLOTS)
        self.n_slots = 1 if call.is_forward_mirrored else self.n_shares

        self.kept.add("layout", layout_size(N, K, call.has_keys, call.is_confused), torch.int32)
        if self.is_kept:
            self._add_copies(self.kept, columns)
        else:
            self.kept.add("stats", N * columns, call.dtype)
            self._add_copies(self.work, 0)
            self._add_copies(self.work_of_gradient, columns)
        self.work.add("poison", K + N * call.has_keys, torch.float32)
        self.work.add("sums", 2 * 3 * self.n_slots * N, call.dtype)
        self.work.add("n", self.n_slots * N, torch.int32)
        if is_reduced:
            self.work.add("loss", tiles(padded(N), FINISH_ROWS), torch.float64)
        forward = list(self._forward())
        backward = list(self._backward_wide() if is_wide else self._backward_narrow())
        if not is_reduced:
            rows = "x y p key_x key_y key_p"
            given = f"{rows} w n_absent {self.names_of_sorts} loss stats layout"
            self.forward = Steps(given, {}, forward, self.work)
            self.backward = Steps(
                f"{rows} coef key_coef layout G gradient", {"upstream": "nothing"}, backward,
                self.work_of_gradient,
            )  # fmt: skip
        else:
            aliases = OWN_KEYS | {"n_absent": "nothing"}
            given = f"x y p w {self.names_of_sorts} total"
            self.forward = Steps(given, aliases, forward, self.kept, self.work)
            rows, aliases = "x", {}
            if not self.is_kept:
                rows, aliases = "x y p", OWN_KEYS | {"coef": "stats", "key_coef": "stats"}
            self.backward = Steps(
                f"{rows} upstream G gradient", aliases, backward, self.kept, self.work_of_gradient
            )

    def _upstream_and_kappa(self) -> tuple[str, float]:
        """The pointer to the upstream gradient, unless it is in the coefficients, and the factor
        from ``G`` to ``∂L/∂q_i``: the sorted copies hold √(log₂e/τ)·q_j.
        """
        kappa = 1 / (self.call.settings.temperature * self.call.scale)
        return ("upstream", kappa * self.factor) if self.is_kept else ("nothing", kappa)

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
        from .kernels import gradient

        call, s = self.call, self.call.settings
        chosen, (upstream, kappa) = call.config("backward"), self._upstream_and_kappa()
        if not self.is_kept:
            yield from self._copies(0, self.columns)
        of_sums = call.bind(
            gradient.conr_backward_parts_kernel, chosen.launch | call.fusion, overlaps=True,
            APART=int(self.is_apart), RESCALE=call.is_rescaled, **call.flags("both"),
            **chosen.tiles, RESIDENT=chosen.in_registers,
        )  # fmt: skip
        launch = Launch(
            of_sums, 2 * n_slots * tiles(call.N, chosen.BLOCK_I),
            call.N, call.K, n_slots, call.D_pad, call.unit, call.window, s.push_scale,
        )  # fmt: skip
        yield launch, self._pick("layout q_i y_i p_i coef_i q_j y_j p_j coef_j G_parts")
        of_rows = call.bind(
            gradient.conr_gradient_kernel, {"num_warps": 4}, overlaps=True,
            SAME=not call.has_keys, D=call.D, D_PAD=call.D_pad, ROWS=PROJECTED_ROWS,
        )  # fmt: skip
        numbers = call.N, call.K, 2 * n_slots, kappa
        launch = Launch(of_rows, tiles(padded(call.N), PROJECTED_ROWS), *numbers)
        yield launch, self._pick(f"layout coef_i inverse_i x G_parts {upstream} gradient")

    def _backward_in_turn(self) -> Iterator[Step]:
        from .kernels import gradient

        call, s = self.call, self.call.settings
        chosen, dtype = call.config("backward"), call.form.dtype
        # The positives' part waits where the gradient will stand, and its lower 16 bits elsewhere
        # if the gradient has no more.
        rest, (upstream, kappa) = "nothing", self._upstream_and_kappa()
        if dtype.itemsize == 2:
            rest = "G_rest"
            self.work_of_gradient.add(rest, call.N * call.D, torch.int16)
        apart = self.is_kept and self.is_apart
        for order, which in enumerate(("positives", "negatives")):
            copies = [] if self.is_kept else list(self._copies(order, self.columns))
            yield from copies
            # In float32 a wait between the sum and its end would spill.
            is_late = order == 1 and not copies and dtype.itemsize == 2
            kernel = call.bind(
                gradient.conr_backward_kernel, chosen.launch | call.fusion, overlaps=True, D=call.D,
                RESCALE=call.is_rescaled, LATE=is_late, RESIDENT=chosen.in_registers,
                NEGATIVES=order == 1, **call.flags(which), **chosen.tiles,
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
        from .kernels import tile_list, wide

        call, s, N, K = self.call, self.call.settings, self.call.N, self.call.K
        chosen, product = call.config("wide"), call.config("product")
        columns = product.BLOCK_D if call.D_pad % product.BLOCK_D == 0 else WIDE_PAD
        tile = {"BLOCK_I": chosen.BLOCK_I, "BLOCK_J": chosen.BLOCK_J}
        n_tiles = tiles(N, chosen.BLOCK_I)
        is_mirrored, window, passes, second, piece, of_list, dtype = call.windows(
            chosen, self.is_apart
        )
        parts, G, H = self.work_of_gradient, "G nothing", "H nothing"
        parts.add("list", of_list, dtype)
        parts.add("windows", sum(passes) + 1, torch.int32)
        parts.add("H", window * chosen.BLOCK_I * chosen.BLOCK_J, call.form.dtype)
        if call.is_rescaled:
            parts.add("H_scale", window * chosen.BLOCK_I, call.dtype)
            H = "H H_scale"
        if call.form.dtype.itemsize == 2:  # as in _backward_in_turn
            parts.add("G_rest", N * call.D, torch.int16)
            G = "G G_rest"
        of_all = {"CONFUSED": call.is_confused, "SAME": not call.has_keys}
        of_pairs = {"RESCALE": call.is_rescaled, "BLOCK_K": product.BLOCK_J}
        pairs = call.bind(
            tile_list.conr_wide_list_kernel, {"num_warps": 4}, **of_all, L=call.L,
            MIRRORED=is_mirrored, **tile,
            BLOCK=min(max(1 << (n_tiles - 1).bit_length(), 128), 1024),
        )  # fmt: skip
        scores, later_scores = (
            call.bind(
                wide.conr_wide_scores_kernel, chosen.launch | call.fusion, overlaps=True,
                LATE=is_late, **of_pairs, **call.flags("both"), **chosen.tiles,
            )
            for is_late in (False, True)
        )  # fmt: skip
        products = call.bind(
            wide.conr_wide_product_kernel, product.launch, overlaps=True, **of_all, D=call.D,
            D_PAD=call.D_pad, PRECISION=call.pair_flags["PRECISION"],
            UPCAST=call.pair_flags["UPCAST"], MIRRORED=is_mirrored, **of_pairs, **tile,
            BLOCK_D=columns,
        )  # fmt: skip
        of_scores = self._pick(f"layout list windows q_i y_i p_i coef_i q_j y_j p_j coef_j {H}")
        of_products = self._pick(f"layout list windows q_j {H} {G}")
        most = WIDE_PROGRAMS[call.architecture]
        n_scores = min(window, max(4 * most // chosen.num_warps, 1))
        # A sum of 128 numbers a thread leaves registers for half as many programs.
        most = 4 * most // max(product.num_warps, product.BLOCK_I * columns // 2048)
        n_products = min(n_tiles * (call.D_pad // columns), max(most, 1))
        yield Launch(pairs, 1, N, K, window, piece, second), "layout list windows"
        for order, n_passes in enumerate(passes):
            if not self.is_kept:
                yield from self._copies(order, self.columns)
            for number in range(n_passes):
                numbers = N, K, second * order + number * window, window, piece, int(self.is_apart)
                yield Launch(
                    later_scores if number else scores, n_scores, *numbers, call.D_pad, call.unit,
                    call.window, s.push_scale,
                ), of_scores  # fmt: skip
                yield Launch(products, n_products, *numbers), of_products
        yield self._gradient_wide(wide.conr_wide_gradient_kernel, of_all, G)

    def _gradient_wide(self, kernel: Any, constants: dict[str, Any], G: str) -> Step:
        call, (upstream, kappa) = self.call, self._upstream_and_kappa()
        most = GRADIENT_TILE * 4 // call.dtype.itemsize
        chunk = min(1 << (call.D - 1).bit_length(), most)
        n_rows = min(most // chunk, ROW_PAD)
        gradient = call.bind(
            kernel, {"num_warps": 4}, overlaps=True, **constants, D=call.D, ROWS=n_rows,
            CHUNK=chunk,
        )  # fmt: skip
        numbers = call.N, call.K, call.D_pad, int(self.is_apart), kappa
        launch = Launch(gradient, padded(call.N) // n_rows, *numbers)
        return launch, self._pick(f"layout coef_i inverse_i x {G} {upstream} gradient")


def limits() -> tuple[Any, ...]:
    """Constants that plans depend on beside the form of call."""
    sizes = BOTH_ORDERS, WIDE_BOTH_ORDERS, PARTS_BYTES
    return PROGRAMS, WIDE_SLICES, *sizes, *launch_order.limits(), *limits_of_calls()


def plan_of(
    x: Tensor, y: Tensor, keys: Keys | None, self_offset: int, s: Settings, reduction: str
) -> Plan:
    key = (id(s), form_of(x, y, keys, self_offset, reduction), *limits())
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= PLANS:
            _plans.clear()
        found = _plans[key] = (s, Plan(key[1], s))
    return found[1]


def forward(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    keys: Keys | None, n_absent: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor,
) -> None:  # fmt: skip
    """Losses, statistics and layout."""
    work = plan.work.new(x)
    rows = x, y, p, *(keys or (x, y, p))
    sorts = plan.sorts(y, p, keys)
    plan.forward(place, [work], *rows, w, n_absent, *sorts, loss, stats, layout)


def backward(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, keys: Keys | None,
    coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    """The gradient of x from coefficients in which the upstream gradient is."""
    rows = x, y, p, *(keys or (x, y, p)), coef_i, coef_j, layout
    work = plan.work_of_gradient.new(x)
    plan.backward(place, [work], *rows, _sum_in(gradient), gradient)


def _sum_in(gradient: Tensor) -> Tensor:
    """Where the positives' part of a gradient waits: the upper half of numbers of 32 bits."""
    return gradient.view(torch.int16) if gradient.dtype.itemsize == 2 else gradient


def reduced(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    wants_gradient: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    """The reduced loss; what is kept for its gradient, also of labels and predictions: the caller
    may change his own.
    """
    loss, kept, work = x.new_empty((), dtype=plan.call.dtype), plan.kept.new(x), plan.work.new(x)
    plan.forward(place, [kept, work], x, y, p, w, *plan.sorts(y, p, None), loss)
    return loss, (kept, None if plan.is_kept else torch.stack((y, p)))


def reduced_gradient(
    x: Tensor, kept: Tensor, pair: Tensor | None, plan: Plan, upstream: Tensor
) -> Tensor:
    """The gradient of x for an upstream gradient of the reduced loss."""
    x = x.contiguous()
    gradient, work = torch.empty_like(x), plan.work_of_gradient.new(x)
    rows = (x,) if pair is None else (x, *pair)
    plan.backward(place_of(x), [kept, work], *rows, upstream, _sum_in(gradient), gradient)
    return gradient
