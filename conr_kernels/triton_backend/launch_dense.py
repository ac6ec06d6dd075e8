"""Launches of the kernels for few rows (dense.py, dense_gradient.py): every pair, no sort."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..variants import Settings
from .availability import interpreted
from .call import arithmetic, largest_total, precision, tiles
from .launch import Place, bind

#: Up to this many pairs the kernels without a sort serve, where a row of the gradient stays in the
#: registers; up to KEPT_PAIRS they do for any D, and the forward pass leaves s_ij.
DENSE_PAIRS = 4096 * 4096
KEPT_PAIRS = 1024 * 1024
#: Programs that a launch is cut into where its tiles allow; no device is asked, for equal bits.
PROGRAMS = 528
#: Most parts of the keys in which row sums, and gradients, wait for their addition.
SUM_PARTS = 32
GRADIENT_PARTS = 8
#: Chunks of columns that one program reads for its tiles; where it would be more, a launch before
#: it splits tiles and D over about PROGRAMS programs, GRAM_PART chunks at least each.
GRAM_CHUNKS = 32
GRAM_PART = 4
#: Largest D whose gradient tile stays in the registers, by the size of a feature.
REGISTER_D = {2: 256, 4: 128, 8: 64}
PAD = 16

Keys = tuple[Tensor, Tensor, Tensor]


class Tile(NamedTuple):
    """BLOCK_I anchors × BLOCK_J keys × BLOCK_D columns, and how the tile is launched."""

    BLOCK_I: int
    BLOCK_J: int
    BLOCK_D: int
    num_warps: int
    num_stages: int = 2

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_I": self.BLOCK_I, "BLOCK_J": self.BLOCK_J, "BLOCK_D": self.BLOCK_D}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def serves(n_anchors: int, n_keys: int, D: int, dtype: torch.dtype) -> bool:
    n_pairs = n_anchors * n_keys
    return n_pairs <= DENSE_PAIRS and (n_pairs <= KEPT_PAIRS or REGISTER_D[dtype.itemsize] >= D)


def kept_size(n_anchors: int, n_keys: int) -> int:
    """Numbers that backward needs: inverse norms, factors and, of few pairs, s_ij."""
    is_kept = n_anchors * n_keys <= KEPT_PAIRS
    return 2 * _padded(n_anchors) + _padded(n_keys) * (1 + (n_anchors if is_kept else 0))


def _tiles(n: int, D: int, dtype: torch.dtype, is_kept: bool) -> tuple[Tile, Tile]:
    """Of the sums and of the gradient; small ones where there are few rows."""
    is_one_chunk = REGISTER_D[dtype.itemsize] >= D
    width = max(1 << (D - 1).bit_length(), 16) if is_one_chunk else 0
    if dtype == torch.float64:
        return Tile(16, 16, 32, 4), Tile(16, 16, 32 if is_kept else width, 4)
    block, warps = (16, 4) if n <= 256 else (32, 4) if n <= 512 else (64, 8)
    if dtype.itemsize == 2:
        chunk = 64 if width in (0, 256) else width
        if is_kept:
            columns = min(width or 64, 64 if block == 64 else 32)
            return Tile(block, block, chunk, warps), Tile(block, block, columns, 4)
        return Tile(128, 64, chunk, 8), Tile(64, 64, width, 8 if width == 256 else 4)
    is_highest = arithmetic(dtype).endswith("highest")
    block_j, chunk = min(block, 32), min(width or 64, 32 if is_highest else 64)
    gradient = Tile(block, block_j, 32, 4)
    if not is_kept:
        gradient = Tile(32 if is_highest else 64, 32, width, 4)
    return Tile(block, block_j, chunk, 4), gradient


class Plan:
    """What the launches of one form of call have in common."""

    def __init__(
        self, N: int, K: int, D: int, L: int, dtype: torch.dtype, labels: torch.dtype, s: Settings
    ) -> None:
        from . import dense, dense_gradient

        variant = s.variant
        self.N, self.K, self.D = N, K, D
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        is_wide = labels == torch.float64 and interpreted()
        self.window = largest_total(s.window, L, s.distance, "float64" if is_wide else "float32")
        self.push_scale, self.inverse_tau = s.push_scale, 1 / s.temperature
        self.scale = math.log2(math.e) / s.temperature
        self.columns = 3 if s.exponent_is_small else 5
        is_kept, is_inside = N * K <= KEPT_PAIRS, variant.log == "inside"
        sums, gradient = _tiles(max(N, K), D, dtype, is_kept)

        self.tiles_i, self.tiles_j = tiles(N, sums.BLOCK_I), tiles(K, sums.BLOCK_J)
        self.per_part, self.n_parts = _cut(self.tiles_j, self.tiles_i, SUM_PARTS)
        chunks = tiles(D, gradient.BLOCK_D)
        self.gradient_tiles_j = tiles(K, gradient.BLOCK_J)
        n_tiles = tiles(N, gradient.BLOCK_I) * chunks
        self.gradient_per_part, self.gradient_parts = _cut(
            self.gradient_tiles_j, n_tiles, GRADIENT_PARTS
        )
        self.gradient_programs = n_tiles * self.gradient_parts
        self._cut_gram(sums)

        n_fields = 7 if self.columns == 5 else 5 if is_inside else 4
        n_padded = _padded(N)
        self.kept_size = kept_size(N, K)
        self.sums_size = n_fields * self.n_parts * n_padded
        self.G_size = _padded(self.gradient_parts * N * D)
        self.gradient_size = self.G_size + self.gradient_parts * n_padded
        self.stats_size = _padded(N * self.columns)

        numbers = dict(PRECISION=precision(arithmetic(dtype)))
        # The interpreter multiplies 16-bit tiles wrongly.
        numbers["UPCAST"] = interpreted() and dtype.itemsize == 2
        rows = dict(SHIFTED=self.columns == 5, INSIDE=is_inside, PUSHING=variant.pushing)
        rmse = s.distance == "rmse" and L > 1
        pairs = dict(
            D=D, L=L, RMSE=rmse, **rows, CONFUSED=variant.negatives == "confused",
            KEPT=is_kept, WIDE=is_wide, **numbers,
        )  # fmt: skip
        # Squares of differences must not be fused into the sum that follows.
        fusion = {"enable_fp_fusion": False} if rmse else {}
        self.gram = bind(dense.conr_gram_kernel, sums.options, D=D, **numbers, **sums.blocks)
        self.sums = bind(
            dense.conr_dense_sums_kernel, sums.options | fusion, **pairs, **sums.blocks
        )
        self.rows_block = 16
        self.rows = bind(
            dense.conr_dense_rows_kernel, {"num_warps": 4}, **rows,
            UNIT_TERMS=variant.unit_terms, COUNT_SELF=variant.count_self,
            WEIGHTED_ROWS=variant.weighted_rows, ROWS=self.rows_block,
            PARTS=1 << (self.n_parts - 1).bit_length(),
        )  # fmt: skip
        self.total = bind(dense.conr_total_kernel, {"num_warps": 4}, BLOCK=1024)
        self.gradient = bind(
            dense_gradient.conr_dense_gradient_kernel, gradient.options | fusion,
            **pairs, **gradient.blocks,
        )  # fmt: skip
        block_d = min(1 << (D - 1).bit_length(), 256)
        self.finish_rows = 8 if chunks == 1 or block_d >= D else 4
        self.finish_programs = tiles(N, self.finish_rows) * tiles(D, block_d)
        self.finish = bind(
            dense_gradient.conr_dense_finish_kernel, {"num_warps": 4},
            D=D, COLUMNS=self.columns, IS_ONE_CHUNK=block_d >= D, ROWS=self.finish_rows,
            BLOCK_D=block_d,
        )  # fmt: skip

    def _cut_gram(self, sums: Tile) -> None:
        n_tiles, chunks = self.tiles_i * self.tiles_j, tiles(self.D, sums.BLOCK_D)
        self.gram_size, self.gram_chunks, self.gram_parts = 0, chunks, 1
        if chunks == 1 or self.per_part * chunks <= GRAM_CHUNKS:
            return
        n_parts = min(tiles(PROGRAMS, n_tiles), tiles(chunks, GRAM_PART))
        self.gram_chunks = tiles(chunks, n_parts)
        self.gram_parts = tiles(chunks, self.gram_chunks)
        size = sums.BLOCK_I * sums.BLOCK_J + sums.BLOCK_I + sums.BLOCK_J
        self.gram_size = self.gram_parts * n_tiles * size


def _cut(tiles_j: int, tiles_i: int, most: int) -> tuple[int, int]:
    """Tiles of keys a part, and parts, for about PROGRAMS programs."""
    n_parts = min(max(tiles(PROGRAMS, max(tiles_i, 1)), 1), tiles_j, most)
    per_part = tiles(tiles_j, max(n_parts, 1))
    return per_part, tiles(tiles_j, max(per_part, 1))


def _padded(n: int) -> int:
    return tiles(n, PAD) * PAD


#: Plans by the identity of their settings, which the entry keeps alive, then by form.
_plans: dict[int, tuple[Settings, dict[tuple, Plan]]] = {}
PLANS = 64


def plan_of(x: Tensor, y: Tensor, keys: Keys | None, s: Settings) -> Plan:
    entry = _plans.get(id(s))
    if entry is None:
        if len(_plans) >= PLANS:
            _plans.clear()
        entry = _plans[id(s)] = (s, {})
    N, D = x.shape
    K = N if keys is None else len(keys[0])
    form = (
        N, K, D, y.shape[-1] if y.dim() == 2 else 1, x.dtype, y.dtype,
        torch.get_float32_matmul_precision(), KEPT_PAIRS, GRAM_CHUNKS, GRAM_PART,
    )  # fmt: skip
    plan = entry[1].get(form)
    if plan is None:
        if len(entry[1]) >= PLANS:
            entry[1].clear()
        plan = entry[1][form] = Plan(*form[:6], s)
    return plan


def sum_rows(
    plan: Plan,
    place: Place | None,
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    keys: Keys | None,
    self_offset: int,
    n_absent: Tensor | None,
    kept: Tensor,
    sums: Tensor,
    loss: Tensor,
    stats: Tensor,
    at: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Losses and statistics; ``at``: where sums, losses and statistics begin in their tensors."""
    sums_at, loss_at, stats_at = at
    key_x, key_y, key_p = keys or (x, y, p)
    gram = None
    if plan.gram_size:
        gram = x.new_empty(plan.gram_size, dtype=plan.dtype)
        plan.gram(
            place, plan.tiles_i * plan.tiles_j * plan.gram_parts, x, key_x, gram,
            plan.N, plan.K, plan.tiles_j, plan.gram_chunks, plan.D,
        )  # fmt: skip
    plan.sums(
        place, plan.tiles_i * plan.n_parts, x, y, p, key_x, key_y, key_p, gram, kept, sums,
        plan.N, plan.K, self_offset, plan.tiles_j, plan.per_part, plan.gram_parts, sums_at,
        plan.D, plan.window, plan.push_scale, plan.scale,
    )  # fmt: skip
    plan.rows(
        place, tiles(plan.N, plan.rows_block), w, n_absent, sums, loss, stats,
        plan.N, plan.K, plan.n_parts, sums_at, loss_at, stats_at, plan.push_scale,
    )  # fmt: skip


def gradient_parts(
    plan: Plan,
    place: Place | None,
    x: Tensor,
    y: Tensor,
    p: Tensor,
    keys: Keys | None,
    self_offset: int,
    kept: Tensor,
    coef_i: Tensor,
    coef_j: Tensor,
    G: Tensor,
    loss: Tensor | None = None,
    out: Tensor | None = None,
    factor: float = 1.0,
    at: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """``Σ_j H_ij q_j`` in parts, and the total of the losses; ``at``: of coefficients, G, losses."""
    coef_at, G_at, loss_at = at
    key_x, key_y, key_p = keys or (x, y, p)
    plan.gradient(
        place, plan.gradient_programs, x, y, p, coef_i, key_x, key_y, key_p, coef_j, kept, G,
        loss, out, plan.N, plan.K, self_offset, plan.gradient_tiles_j, plan.gradient_per_part,
        coef_at, G_at, G_at + plan.G_size, loss_at, plan.window, plan.push_scale, factor,
    )  # fmt: skip


def finish_gradient(
    plan: Plan,
    place: Place | None,
    x: Tensor,
    coef: Tensor,
    kept: Tensor,
    G: Tensor,
    upstream: Tensor | None,
    gradient: Tensor,
    factor: float = 1.0,
    at: tuple[int, int] = (0, 0),
) -> None:
    """The gradient of x from its parts; ``at``: of coefficients and G."""
    coef_at, G_at = at
    plan.finish(
        place, plan.finish_programs, x, coef, kept, G, upstream, gradient,
        plan.N, plan.gradient_parts, coef_at, G_at, G_at + plan.G_size, factor, plan.inverse_tau,
    )  # fmt: skip


def forward_dense(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    keys: Keys | None, self_offset: int, n_absent: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor,
) -> None:  # fmt: skip
    kept, sums = layout.view(plan.dtype), x.new_empty(plan.sums_size, dtype=plan.dtype)
    sum_rows(plan, place, x, y, p, w, keys, self_offset, n_absent, kept, sums, loss, stats)


def backward_dense(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, keys: Keys | None,
    self_offset: int, coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    kept, G = layout.view(plan.dtype), x.new_empty(plan.gradient_size, dtype=plan.dtype)
    gradient_parts(plan, place, x, y, p, keys, self_offset, kept, coef_i, coef_j, G)
    finish_gradient(plan, place, x, coef_i, kept, G, None, gradient)


def reduced_dense(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    loss: Tensor, work: Tensor, factor: float, with_gradient: bool,
) -> None:  # fmt: skip
    """``factor·Σ_i ℓ_i`` and, where it is wanted, the gradient's parts, in one workspace."""
    stats_at = plan.kept_size
    loss_at = stats_at + plan.stats_size
    sums_at = loss_at + _padded(plan.N)
    at = (sums_at, loss_at, stats_at)
    sum_rows(plan, place, x, y, p, w, None, 0, None, work, work, work, work, at)
    if with_gradient:
        # The sums have served: the parts take their place.
        gradient_parts(
            plan, place, x, y, p, None, 0, work, work, work, work, work, loss, factor,
            (stats_at, sums_at, loss_at),
        )  # fmt: skip
    else:
        plan.total(place, 1, work, loss, plan.N, loss_at, factor)


def work_size(plan: Plan, with_gradient: bool) -> int:
    last = max(plan.sums_size, plan.gradient_size if with_gradient else 0)
    return plan.kept_size + plan.stats_size + _padded(plan.N) + last


def reduced_gradient(
    plan: Plan, place: Place | None, x: Tensor, work: Tensor, upstream: Tensor, gradient: Tensor,
    factor: float,
) -> None:  # fmt: skip
    """``upstream·factor`` times the gradient whose parts ``reduced_dense`` left."""
    at = (plan.kept_size, plan.kept_size + plan.stats_size + _padded(plan.N))
    finish_gradient(plan, place, x, work, work, work, upstream, gradient, factor, at)
