"""Launches of the two sweeps over exact bands: layout.py; sweeps.py, gradient.py or wide.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .call import ROW_PAD, WIDE_PAD, Call, padded, processors, tiles

#: Keys whose H_ij a program of the wide backward kernel keeps.
WIDE_KEYS = 1024
GATHER_ROWS = 32


class _Sorted:
    """Copies of keys and anchors in one order, made for the positives, then the negatives."""

    def __init__(self, call: Call, coef_i: Tensor | None, coef_j: Tensor | None) -> None:
        self.call, self.coef = call, (coef_j, coef_i)
        self.columns = 0 if coef_i is None else coef_i.shape[1]
        self.j = self._buffers(padded(call.K))
        self.i = self._buffers(padded(call.N)) if call.has_keys else self.j

    def _buffers(self, n: int) -> dict[str, Tensor | None]:
        x, y, columns = self.call.x, self.call.y, self.columns
        return dict(
            q=x.new_empty((n, self.call.D_pad)),
            inverse=x.new_empty(n, dtype=self.call.dtype),
            y=y.new_empty((self.call.L, n)),
            p=y.new_empty((self.call.L, n)),
            coef=x.new_empty((columns, n), dtype=self.call.dtype) if columns else None,
        )

    @property
    def n_rows(self) -> int:
        return padded(self.call.K) + (padded(self.call.N) if self.call.has_keys else 0)

    def gather(
        self, layout: Tensor, negatives: bool, w: Tensor | None = None, poison: Tensor | None = None
    ) -> None:
        from .layout import conr_gather_kernel

        call = self.call
        coef_j, coef_i = self.coef
        conr_gather_kernel[(self.n_rows // GATHER_ROWS,)](
            layout, call.key_x, call.key_y, call.key_p, coef_j, *self.j.values(),
            call.x, call.y, call.p, w, coef_i, *self.i.values(), poison,
            call.N, call.K, call.D_pad, *call.key_x.stride(), *call.x.stride(), call.scale,
            NEGATIVES=negatives, HAS_KEYS=call.has_keys, D=call.D, D_PAD=call.D_pad, L=call.L,
            COLUMNS=self.columns, ROWS=GATHER_ROWS, CHUNK=min(call.D_pad, 128)
            if call.D_bucket else 64,
            num_warps=4,
        )  # fmt: skip


def _write_layout(call: Call, layout: Tensor) -> None:
    """Sorts labels and predictions and writes orders, bands and the choice of sweep."""
    from . import layout as kernels

    s, has_p = call.settings, call.is_confused
    N, K, L = call.N, call.K, call.L
    reach = s.window
    if L == 1:
        values = [(call.key_y[:, 0], call.y[:, 0]), (call.key_p[:, 0], call.p[:, 0])]
    else:
        # |Δ_c| ≤ L·d (mae), √L·d (rmse) for every component c; the margin covers d's rounding.
        reach *= L if s.distance == "mae" else math.sqrt(L)
        reach += reach * 1e-5
        spread = call.y.new_empty(2 * L)
        kernels.conr_spread_kernel[(2 * L,)](call.key_y, call.key_p, spread, K, L=L, BLOCK=1024)
        of_keys = call.y.new_empty((2, K))
        of_anchors = call.y.new_empty((2, N)) if call.has_keys else of_keys
        kernels.conr_sort_keys_kernel[(tiles(max(K, N), 256),)](
            spread, call.key_y, call.key_p, call.y, call.p, of_keys, of_anchors, K, N,
            HAS_KEYS=call.has_keys, L=L, L_PAD=1 << (L - 1).bit_length(), BLOCK=256,
        )  # fmt: skip
        values = list(zip(of_keys, of_anchors, strict=True))
    arguments = []
    for of_key, of_anchor in values[: 1 + has_p]:
        arguments += of_key.sort(stable=True)
        arguments += of_anchor.sort(stable=True) if call.has_keys else arguments[-2:]
    if not has_p:
        arguments *= 2
    kernels.conr_bands_kernel[(padded(max(K, N)) // ROW_PAD,)](
        *arguments, layout, N, K, call.self_offset, K.bit_length(), reach,
        HAS_KEYS=call.has_keys, HAS_P=has_p, ROWS=ROW_PAD, num_warps=4,
    )  # fmt: skip
    kernels.conr_choose_kernel[(1,)](
        layout, N, K, EXACT=L == 1, HAS_P=has_p, ROWS=ROW_PAD, BLOCK=1024, num_warps=4
    )


def forward_sweeps(
    call: Call, w: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor
) -> None:
    from . import sweeps as kernels

    chosen, s = call.config("forward"), call.settings
    _write_layout(call, layout)
    rows = _Sorted(call, None, None)
    poison = call.x.new_empty(rows.n_rows, dtype=torch.float32)
    E = call.x.new_empty(call.N, dtype=torch.float64)
    s_sum = torch.empty_like(E) if call.is_inside else E
    n = call.x.new_empty(call.N, dtype=torch.int32)
    common = dict(
        D_PAD=call.D_pad, SAME=not call.has_keys, INSIDE=call.is_inside,
        **call.pair_flags, **call.options(chosen),
    )  # fmt: skip
    grid = (tiles(call.N, chosen.BLOCK_I),)

    rows.gather(layout, negatives=False, w=w, poison=poison)
    kernels.conr_forward_positives_kernel[grid](
        layout, rows.i["q"], rows.i["y"], rows.j["q"], rows.j["y"],
        poison, E, s_sum, n, call.N, call.K, call.D_pad, call.window, **common,
    )  # fmt: skip
    if call.is_confused:
        rows.gather(layout, negatives=True)
    kernels.conr_forward_negatives_kernel[grid](
        layout, rows.i["q"], rows.i["y"], rows.i["p"], rows.j["q"], rows.j["y"], rows.j["p"],
        w, E, s_sum, n, loss, stats,
        call.N, call.K, call.D_pad, call.window, s.push_scale,
        TINY=call.is_tiny, **call.row_flags, **common,
    )  # fmt: skip


def backward_sweeps(
    call: Call, coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor
) -> None:
    from . import gradient as kernels

    s, x = call.settings, call.x
    rows = _Sorted(call, coef_i, coef_j)
    common = dict(
        D=call.D, D_PAD=call.D_pad, SAME=not call.has_keys, RESCALE=x.dtype == torch.float16,
        **call.pair_flags,
    )  # fmt: skip
    rows_i, rows_j = rows.i, rows.j
    # ∂L/∂q_i = (1/τ) Σ_j H_ij q_j, and the sorted copies hold √(log₂e/τ)·q_j.
    kappa = 1 / (s.temperature * call.scale)
    rows.gather(layout, negatives=False)
    if call.D_bucket == 0:
        _backward_wide(call, rows, layout, gradient, kappa, common)
        return
    chosen = call.config("backward")
    grid, common = (tiles(call.N, chosen.BLOCK_I),), {**common, **call.options(chosen)}
    # The positives' part waits where the gradient will stand: 16-bit ones as two bfloat16 summands.
    G, G_rest = gradient, None
    if x.dtype.itemsize == 2:
        G = gradient.view(torch.bfloat16)
        G_rest = torch.empty_like(G)
    kernels.conr_backward_positives_kernel[grid](
        layout, rows_i["q"], rows_i["y"], rows_i["coef"], rows_j["q"], rows_j["y"], rows_j["coef"],
        G, G_rest, call.N, call.K, call.window, INSIDE=call.is_inside, **common,
    )  # fmt: skip
    if call.is_confused:
        rows.gather(layout, negatives=True)
    kernels.conr_backward_negatives_kernel[grid](
        layout, rows_i["q"], rows_i["y"], rows_i["p"], rows_i["coef"], rows_i["inverse"],
        rows_j["q"], rows_j["y"], rows_j["p"], rows_j["coef"], x, G, G_rest, gradient,
        call.N, call.K, *x.stride(), call.window, s.push_scale, kappa,
        PUSHING=s.variant.pushing, CONFUSED=call.is_confused, **common,
    )  # fmt: skip


def _backward_wide(
    call: Call, rows: _Sorted, layout: Tensor, gradient: Tensor, kappa: float, common: dict
) -> None:
    from .wide import conr_backward_wide_kernel

    s, x, chosen, product = call.settings, call.x, call.config("wide"), call.config("product")
    columns = product.BLOCK_D if call.D_pad % product.BLOCK_D == 0 else WIDE_PAD
    n_programs = processors(x.device) * 8 // chosen.num_warps
    n_programs = min(n_programs, tiles(call.N, chosen.BLOCK_I))
    group = max(WIDE_KEYS // chosen.BLOCK_J, 1)
    H = x.new_empty(n_programs * chosen.BLOCK_I * group * chosen.BLOCK_J)
    # As many bits as the features': float16's range is kept by a factor for each row of a tile.
    H_scale = x.new_empty(n_programs * group * chosen.BLOCK_I, dtype=call.dtype)
    G = x.new_empty((call.N, call.D_pad), dtype=call.dtype)
    for negatives in (False, True):
        if negatives and call.is_confused:
            rows.gather(layout, negatives=True)
        conr_backward_wide_kernel[(n_programs,)](
            layout,
            *(rows.i[name] for name in ("q", "y", "p", "coef", "inverse")),
            *(rows.j[name] for name in ("q", "y", "p", "coef")),
            x, H, H_scale if common["RESCALE"] else None, G, gradient,
            call.N, call.K, n_programs, call.D_pad, *x.stride(), call.window, s.push_scale, kappa,
            NEGATIVES=negatives, INSIDE=call.is_inside, PUSHING=s.variant.pushing,
            CONFUSED=call.is_confused, GROUP=group, BLOCK_K=product.BLOCK_J, BLOCK_G=columns,
            **common, **call.options(chosen),
        )  # fmt: skip
