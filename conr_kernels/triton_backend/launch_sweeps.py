"""Launches of the two sweeps over exact bands: layout.py; sweeps.py, gradient.py or wide.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .call import ROW_PAD, WIDE_PAD, Call, padded, tiles
from .launch import kernels, run_kernel

#: Programs that kernels are split into, about: eight for each multiprocessor of an H200; and the
#: most that share a forward pass's tile of anchors.
PROGRAMS = 1056
SLOTS = 8
#: Numbers of H_ij that are kept at a time: as many as the features', times this, but not fewer
#: than WORKSPACE; programs that then multiply them by the keys' features, about.
WIDE_FEATURES = 4
WORKSPACE = 2**25
WIDE_PROGRAMS = 528
GATHER_ROWS = 32
FINISH_ROWS = 64


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

    @staticmethod
    def named(copies: dict[str, Tensor | None], names: str) -> list[Tensor | None]:
        return [copies[name] for name in names.split()]

    def gather(
        self, layout: Tensor, negatives: bool, w: Tensor | None = None, poison: Tensor | None = None
    ) -> None:
        call = self.call
        coef_j, coef_i = self.coef
        n_rows = padded(call.K) + (padded(call.N) if call.has_keys else 0)
        run_kernel(
            call.place, kernels("layout").conr_gather_kernel, n_rows // GATHER_ROWS,
            layout, call.key_x, call.key_y, call.key_p, coef_j, *self.j.values(),
            call.x, call.y, call.p, w, coef_i, *self.i.values(), poison,
            call.N, call.K, call.D_pad, call.scale,
            NEGATIVES=negatives, HAS_KEYS=call.has_keys, D=call.D, D_PAD=call.D_pad, L=call.L,
            COLUMNS=self.columns, ROWS=GATHER_ROWS,
            CHUNK=min(call.D_pad, 128) if call.D_bucket else 64, num_warps=4,
        )  # fmt: skip


def _write_layout(call: Call, layout: Tensor) -> None:
    """Sorts labels and predictions and writes orders, bands and the choice of sweep."""
    module = kernels("layout")
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
        run_kernel(
            call.place,
            module.conr_spread_kernel,
            2 * L,
            call.key_y,
            call.key_p,
            spread,
            K,
            L=L,
            BLOCK=1024,
        )
        of_keys = call.y.new_empty((2, K))
        of_anchors = call.y.new_empty((2, N)) if call.has_keys else of_keys
        run_kernel(
            call.place, module.conr_sort_keys_kernel, tiles(max(K, N), 256),
            spread, call.key_y, call.key_p, call.y, call.p, of_keys, of_anchors, K, N,
            HAS_KEYS=call.has_keys, L=L, L_PAD=1 << (L - 1).bit_length(), BLOCK=256,
        )  # fmt: skip
        values = list(zip(of_keys, of_anchors, strict=True))
    arguments = []
    if has_p and not call.has_keys:
        ordered, order = _pair(*(of_key for of_key, _ in values)).sort(stable=True)
        arguments = [*([ordered[0], order[0]] * 2), *([ordered[1], order[1]] * 2)]
    for of_key, of_anchor in values[: 1 + has_p] if not arguments else ():
        arguments += of_key.sort(stable=True)
        arguments += of_anchor.sort(stable=True) if call.has_keys else arguments[-2:]
    if not has_p:
        arguments *= 2
    run_kernel(
        call.place, module.conr_bands_kernel, padded(max(K, N)) // ROW_PAD,
        *arguments, layout, N, K, call.self_offset, K.bit_length(), reach,
        HAS_KEYS=call.has_keys, HAS_P=has_p, ROWS=ROW_PAD, num_warps=4,
    )  # fmt: skip
    run_kernel(
        call.place,
        module.conr_choose_kernel,
        1,
        layout,
        N,
        K,
        EXACT=L == 1,
        HAS_P=has_p,
        ROWS=ROW_PAD,
        BLOCK=1024,
        num_warps=4,
    )


def _pair(y: Tensor, p: Tensor) -> Tensor:
    """[2, N]: labels and predictions; no copy where one stands behind the other."""
    n, at = y.shape[0], y.storage_offset()
    if y._base is not None and y._base is p._base and p.storage_offset() == at + n:
        return y._base.as_strided((2, n), (n, 1), at)
    return torch.stack((y, p))


def _flags(call: Call, negatives: bool) -> dict[str, Any]:
    """Constants of a sweep; what the other one alone depends on has one value."""
    return dict(
        NEGATIVES=negatives, CONFUSED=call.is_confused and negatives, SAME=not call.has_keys,
        D_PAD=call.D_pad, INSIDE=call.is_inside and not negatives,
        PUSHING=call.settings.variant.pushing if negatives else "none",
    )  # fmt: skip


def forward_sweeps(
    call: Call, w: Tensor | None, n_absent: Tensor | None, loss: Tensor, stats: Tensor,
    layout: Tensor,
) -> None:  # fmt: skip
    module = kernels("sweeps")
    chosen, s, variant = call.config("forward"), call.settings, call.settings.variant
    _write_layout(call, layout)
    rows = _Sorted(call, None, None)
    n_tiles = tiles(call.N, chosen.BLOCK_I)
    n_slots = min(tiles(PROGRAMS, n_tiles), SLOTS)
    poison = call.x.new_empty(call.K + call.N * call.has_keys, dtype=torch.float32)
    sums = call.x.new_empty((2, 3, n_slots, call.N), dtype=call.dtype)
    n = call.x.new_empty((n_slots, call.N), dtype=torch.int32)
    for negatives in (False, True):
        if call.is_confused or not negatives:
            rows.gather(layout, negatives, *((None, None) if negatives else (w, poison)))
        run_kernel(
            call.place, module.conr_forward_kernel, n_tiles * n_slots,
            layout, *rows.named(rows.i, "q y p"), *rows.named(rows.j, "q y p"), sums, n,
            call.N, call.K, n_slots, call.D_pad, call.window, s.push_scale,
            TINY=call.is_tiny and negatives, **_flags(call, negatives), **call.pair_flags,
            **call.options(chosen),
        )  # fmt: skip
    run_kernel(
        call.place, module.conr_finish_kernel, tiles(call.N, FINISH_ROWS),
        sums, n, poison, w, n_absent, loss, stats, call.N, call.K, n_slots, s.push_scale,
        SAME=not call.has_keys, SHIFTED=call.pair_flags["SHIFTED"], INSIDE=call.is_inside,
        PUSHING=variant.pushing, UNIT_TERMS=variant.unit_terms, COUNT_SELF=variant.count_self,
        WEIGHTED_ROWS=variant.weighted_rows, TINY=call.is_tiny, ROWS=FINISH_ROWS, SLOTS=SLOTS,
        num_warps=4,
    )  # fmt: skip


def backward_sweeps(
    call: Call, coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor
) -> None:
    rows = _Sorted(call, coef_i, coef_j)
    # ∂L/∂q_i = (1/τ) Σ_j H_ij q_j, and the sorted copies hold √(log₂e/τ)·q_j.
    kappa = 1 / (call.settings.temperature * call.scale)
    if call.D_bucket == 0:
        _backward_wide(call, rows, layout, gradient, kappa)
    else:
        _backward(call, rows, layout, gradient, kappa)


def _backward(call: Call, rows: _Sorted, layout: Tensor, gradient: Tensor, kappa: float) -> None:
    chosen, s, x = call.config("backward"), call.settings, call.x
    # The positives' part waits where the gradient will stand: 16-bit ones as two bfloat16 summands.
    G, G_rest = gradient, None
    if x.dtype.itemsize == 2:
        G = gradient.view(torch.bfloat16)
        G_rest = torch.empty_like(G)
    for negatives in (False, True):
        if call.is_confused or not negatives:
            rows.gather(layout, negatives)
        run_kernel(
            call.place, kernels("gradient").conr_backward_kernel, tiles(call.N, chosen.BLOCK_I),
            layout, *rows.named(rows.i, "q y p coef inverse"), *rows.named(rows.j, "q y p coef"),
            x, G, G_rest, gradient, call.N, call.K, call.D_pad, call.window, s.push_scale, kappa,
            D=call.D, RESCALE=x.dtype == torch.float16, **_flags(call, negatives),
            **call.pair_flags, **call.options(chosen),
        )  # fmt: skip


def _even(n: int, most: int) -> int:
    """The size of equal parts of n, of ``most`` at most."""
    return tiles(n, tiles(n, max(most, 1)))


def _backward_wide(
    call: Call, rows: _Sorted, layout: Tensor, gradient: Tensor, kappa: float
) -> None:
    module = kernels("wide")
    chosen, product = call.config("wide"), call.config("product")
    s, x, n_tiles = call.settings, call.x, tiles(call.N, chosen.BLOCK_I)
    is_rescaled = x.dtype == torch.float16
    columns = product.BLOCK_D if call.D_pad % product.BLOCK_D == 0 else WIDE_PAD
    n_tiles_j = padded(call.K) // chosen.BLOCK_J
    # A row may meet every key, and no number of the device's is known here: as many rows at a time
    # as the workspace holds with all keys, but enough to fill a GPU, and what keys then fit.
    most = max(WIDE_FEATURES * x.numel(), WORKSPACE) // (chosen.BLOCK_I * chosen.BLOCK_J)
    part = _even(n_tiles, max(most // n_tiles_j, tiles(WIDE_PROGRAMS, call.D_pad // columns)))
    row_tiles = _even(n_tiles_j, min(most // part, 2**16))
    row_size = row_tiles * chosen.BLOCK_J
    n_slots = min(tiles(PROGRAMS, part), row_tiles)
    H = x.new_empty((part * chosen.BLOCK_I, row_size))
    H_scale = None
    if is_rescaled:
        H_scale = x.new_empty(H.numel() // chosen.BLOCK_J, dtype=call.dtype)
    G = x.new_empty((call.N, call.D_pad), dtype=call.dtype)
    of_product = {name: call.pair_flags[name] for name in ("L", "PRECISION", "UPCAST")}
    for negatives in (False, True):
        if call.is_confused or not negatives:
            rows.gather(layout, negatives)
        windows = itertools.product(range(0, n_tiles, part), range(0, n_tiles_j, row_tiles))
        for first, start in windows:
            n_here = min(part, n_tiles - first)
            run_kernel(
            call.place, module.conr_wide_scores_kernel, n_here * n_slots,
                layout, *rows.named(rows.i, "q y p coef"), *rows.named(rows.j, "q y p coef"),
                H, H_scale, call.N, call.K, n_slots, first, start, row_size, call.D_pad,
                call.window, s.push_scale,
                RESCALE=is_rescaled, **_flags(call, negatives), **call.pair_flags,
                **call.options(chosen),
            )  # fmt: skip
            run_kernel(
            call.place, module.conr_wide_product_kernel, n_here * (call.D_pad // columns),
                layout, rows.j["q"], H, H_scale, G, call.N, call.K, first, start, row_size,
                NEGATIVES=negatives, CONFUSED=call.is_confused and negatives,
                SAME=not call.has_keys, D_PAD=call.D_pad, RESCALE=is_rescaled, **of_product,
                BLOCK_I=chosen.BLOCK_I, BLOCK_J=chosen.BLOCK_J, BLOCK_D=columns,
                BLOCK_K=product.BLOCK_J, **product.launch,
            )  # fmt: skip
    run_kernel(
            call.place, module.conr_wide_gradient_kernel, padded(call.N) // GATHER_ROWS,
        layout, *rows.named(rows.i, "coef inverse"), x, G, gradient,
        call.N, call.K, call.D_pad, kappa, CONFUSED=call.is_confused, SAME=not call.has_keys,
        D=call.D, D_PAD=call.D_pad, ROWS=GATHER_ROWS, CHUNK=64, num_warps=4,
    )  # fmt: skip
