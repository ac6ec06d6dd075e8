"""The launches of the forward pass over exact bands: those of launch_order.py, then sweeps.py or
mirrored.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from .call import padded, row_flags, tiles
from .launch import Launch
from .launch_order import Ordering, Step

#: The most programs that share a tile of anchors.
SLOTS = 8
FINISH_ROWS = 64


class Forward(Ordering):
    """Losses and statistics of the rows of one form of call.

    ``stand_apart``: no sweep's copies replace the other's, so that one launch serves both;
    ``is_kept``: the copies are kept for the gradient; ``n_shares``: programs that share a tile of
    rows; ``n_slots``: parts of a row's sums.
    """

    stand_apart: bool
    is_kept: bool
    n_shares: int
    n_slots: int

    def _forward(self) -> Iterator[Step]:
        from .kernels import dense, layout, sweeps

        call, s = self.call, self.call.settings
        chosen, n_slots = call.config("forward"), self.n_slots
        yield from self._sort()
        sweeps_of = {0: "both"} if self.stand_apart else {0: "positives", 1: "negatives"}
        if call.is_forward_mirrored:
            n_sums = 1 + call.is_inside + self.stand_apart
            n_parts = n_sums * layout.PARTS_OF_SUMS.value * padded(call.N)
            self.work.add("parts", n_parts, call.dtype)
        for order, which in sweeps_of.items():
            yield from self._copies(order, 0)
            if call.is_forward_mirrored:
                yield from self._mirrored(which)
                continue
            kernel = call.bind(
                sweeps.conr_forward_kernel, chosen.launch | call.fusion, SWEEPS=which,
                TINY=call.is_tiny and which != "positives", **call.flags(which), **chosen.tiles,
                RESIDENT=chosen.in_registers,
            )  # fmt: skip
            n_programs = tiles(call.N, chosen.BLOCK_I) * n_slots * (1 + (which == "both"))
            launch = Launch(
                kernel, n_programs, call.N, call.K, n_slots, call.D_pad, int(self.is_apart),
                call.unit, call.window, s.push_scale,
            )  # fmt: skip
            yield launch, self._pick("layout q_i y_i p_i q_j y_j p_j sums n")
        finish = call.bind(
            sweeps.conr_finish_kernel, {"num_warps": 4}, SAME=not call.has_keys, **row_flags(s),
            SHIFTED=call.pair_flags["SHIFTED"], TINY=call.is_tiny, ORDERS=1 + self.is_apart,
            ROWS=FINISH_ROWS, SLOTS=SLOTS, REDUCED=call.form.reduction != "none",
        )  # fmt: skip
        n_programs = tiles(padded(call.N), FINISH_ROWS)
        launch = Launch(finish, n_programs, call.N, call.K, n_slots, s.push_scale)
        stats = "coef_j" if self.is_kept else "stats"
        layout = "layout" if self.is_kept else "nothing"
        yield launch, self._pick(f"sums n poison w n_absent {layout} loss {stats}")
        if call.form.reduction != "none":
            total = call.bind(dense.conr_total_kernel, {"num_warps": 4}, BLOCK=1024)
            yield Launch(total, 1, n_programs, self.factor), "loss total"

    def _mirrored(self, which: str) -> Iterator[Step]:
        """The sums of one sweep, or of both."""
        from .kernels import mirrored

        call, s, chosen = self.call, self.call.settings, self.call.config("mirrored")
        n_sweeps, n_tiles = 1 + (which == "both"), tiles(call.N, chosen.BLOCK_J)
        of_sums = {"SWEEPS": which, "INSIDE": call.is_inside and which != "negatives"}
        kernel = call.bind(
            mirrored.conr_mirrored_kernel, chosen.launch, **of_sums, D_PAD=call.D_pad,
            PHI=s.pushing.phi if which != "positives" else "one",
            PRECISION=call.pair_flags["PRECISION"], UPCAST=call.pair_flags["UPCAST"],
            **chosen.tiles,
        )  # fmt: skip
        launch = Launch(
            kernel, n_sweeps * n_tiles * self.n_shares, call.N, call.D_pad, int(self.is_apart),
            call.unit, call.window, s.push_scale,
        )  # fmt: skip
        yield launch, self._pick("layout q_i y_i p_i parts")
        total = call.bind(
            mirrored.conr_mirrored_sums_kernel, {"num_warps": 4}, **of_sums, BLOCK_I=chosen.BLOCK_I
        )
        n_sums = n_sweeps * tiles(call.N, chosen.BLOCK_I)
        launch = Launch(total, n_sums, call.N, n_tiles * self.n_shares)
        yield launch, "layout parts sums n"
