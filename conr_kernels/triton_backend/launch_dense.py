"""Launches of the kernels for few rows (dense.py, dense_gradient.py): every pair, no sort."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.inputs import Keys
from ..variants import Settings
from . import call, launch
from .availability import interpreted
from .call import arithmetic, is_early, largest_total, precision, row_flags, tiles
from .configs import REGISTER_BYTES, Config
from .launch import OWN_KEYS, Launch, Parts, Place, Steps, place_of

#: Up to this many pairs the kernels without a sort serve, where a row of the gradient stays in the
#: registers; up to KEPT_PAIRS they do for any D, and the forward pass keeps s_ij.
DENSE_PAIRS = 4096 * 4096
KEPT_PAIRS = 1024 * 1024
#: About how many programs a launch has, as far as its tiles allow; the same on every device, for
#: equal bits.
PROGRAMS = 528
#: The most parts into which keys are cut for row sums, and for gradients, to be added up later.
SUM_PARTS = 32
GRADIENT_PARTS = 8
#: The most chunks of columns that one program reads for its tiles; beyond, another launch splits
#: tiles and D over about PROGRAMS programs of at least GRAM_PART chunks each.
GRAM_CHUNKS = 32
GRAM_PART = 4
#: Rows that one program finishes.
ROWS = 8
PAD = 16


def serves(n_anchors: int, n_keys: int, D: int, dtype: torch.dtype) -> bool:
    n_pairs = n_anchors * n_keys
    is_narrow = D * dtype.itemsize <= REGISTER_BYTES
    return n_pairs <= DENSE_PAIRS and (n_pairs <= KEPT_PAIRS or is_narrow)


def kept_size(n_anchors: int, n_keys: int) -> int:
    """How many numbers backward needs: inverse norms, factors and, of few pairs, s_ij."""
    is_kept = n_anchors * n_keys <= KEPT_PAIRS
    return 2 * _padded(n_anchors) + _padded(n_keys) * (1 + (n_anchors if is_kept else 0))


def _tiles(
    n: int, D: int, dtype: torch.dtype, is_kept: bool, architecture: int
) -> tuple[Config, Config]:
    """The tiles of the sums and of the gradient; small ones where there are few rows."""
    is_one_chunk = D * dtype.itemsize <= REGISTER_BYTES
    width = max(1 << (D - 1).bit_length(), 16) if is_one_chunk else 0
    if dtype == torch.float64:
        return Config(16, 16, 32, 4, 1), Config(16, 16, 32 if is_kept else width, 4)
    block, warps = (16, 4) if n <= 256 else (32, 4) if n <= 512 else (64, 8)
    if dtype.itemsize == 2:
        chunk = 64 if width in (0, 256) else width
        if is_kept:
            warps = 4 if architecture == 90 else warps
            sums = Config(block, block, chunk, warps, _stages(block, chunk, D, architecture))
            columns = min(width or 64, 64 if block == 64 else 32)
            stages = 1 if block == 64 else 2  # two would spill on sm_100
            return sums, Config(block, block, columns, 4, stages)
        if architecture == 80:  # where operands of products take registers too
            return Config(64, 32, chunk, 4), Config(32, 64, width, 4)
        if architecture == 90:  # with four warps two programs share a multiprocessor
            sums = Config(64, 64, width, 4) if width > 64 else Config(128, 64, width, 8)
            if width == 256 and dtype == torch.float16:
                return sums, Config(64, 64, width, 8)
            return sums, Config(64, 32 if width == 256 else 128, width, 4)
        return Config(128, 64, chunk, 8), Config(64, 64, width, 8 if width == 256 else 4)
    is_highest = arithmetic(dtype).endswith("highest")
    is_narrow = is_highest or block == 32
    block_j, chunk = min(block, 32), min(width or 64, 32 if is_narrow else 64)
    stages = 2 if is_highest else _stages(block, chunk, D, architecture)
    gradient = Config(block, block_j, 32, 4)
    if not is_kept:
        gradient = Config(32 if is_highest else 64, 32, width, 4)
    return Config(block, block_j, chunk, 4 if is_one_chunk else warps, stages), gradient


def _stages(block: int, chunk: int, D: int, architecture: int) -> int:
    """Of the sums' chunks. Both a product, which on sm_90 runs on while its program does from 64
    rows on, and squares read them: Triton 3.6 to 3.8 would copy the next one over that which the
    product still reads.
    """
    return 1 if architecture == 90 and block >= 64 and chunk < D else 2


class Form(NamedTuple):
    """What a plan depends on beside the settings. ``reduction``: of the losses, ``"none"`` for
    calls of the operators.
    """

    N: int
    K: int
    D: int
    L: int
    dtype: torch.dtype
    labels: torch.dtype
    self_offset: int
    reduction: str
    capability: int
    is_early: bool


class Plan:
    """The launches of one form of call; all but their pointers."""

    def __init__(self, form: Form, s: Settings) -> None:
        from .kernels import dense, dense_gradient

        N, K, D, L, dtype, labels, self_offset, reduction, on, early = form
        bind = functools.partial(launch.bind, early, overlaps=N * K <= KEPT_PAIRS)
        variant = s.variant
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        is_wide = labels == torch.float64 and interpreted()
        window = largest_total(s.window, L, s.distance, "float64" if is_wide else "float32")
        columns = s.n_statistics
        is_kept, is_inside = N * K <= KEPT_PAIRS, variant.log == "inside"
        of_sums, of_gradient = _tiles(max(N, K), D, dtype, is_kept, call.architecture(on))
        tiles_i, tiles_j = tiles(N, of_sums.BLOCK_I), tiles(K, of_sums.BLOCK_J)
        per_part, n_parts = _cut(tiles_j, tiles_i, SUM_PARTS)
        n_tiles = tiles(N, of_gradient.BLOCK_I) * tiles(D, of_gradient.BLOCK_D)
        gradient_tiles_j = tiles(K, of_gradient.BLOCK_J)
        gradient_per_part, gradient_parts = _cut(gradient_tiles_j, n_tiles, GRADIENT_PARTS)
        # Where s_ij is not kept, memory does not grow with the pairs.
        gram_size, gram_chunks, gram_parts = (
            _cut_gram(of_sums, tiles_i * tiles_j, per_part, D) if is_kept else (0, 0, 1)
        )
        factor = 1 / max(N, 1) if reduction == "mean" else 1.0

        # The interpreter multiplies 16-bit tiles wrongly.
        is_upcast = interpreted() and dtype.itemsize == 2
        products = dict(PRECISION=precision(arithmetic(dtype)), UPCAST=is_upcast)
        is_rmse = s.distance == "rmse" and L > 1
        pairs = dict(
            D=D, L=L, RMSE=is_rmse, SHIFTED=columns == 5, INSIDE=is_inside, PHI=s.pushing.phi,
            CONFUSED=variant.negatives == "confused", KEPT=is_kept, WIDE=is_wide, **products,
        )  # fmt: skip
        # Squares of differences must not be fused into the sum that follows.
        fusion = {"enable_fp_fusion": False} if is_rmse else {}
        gram = Launch(
            bind(dense.conr_gram_kernel, of_sums.launch, D=D, **products, **of_sums.tiles),
            tiles_i * tiles_j * gram_parts, N, K, tiles_j, gram_chunks, D,
        )  # fmt: skip
        sums = Launch(
            bind(
                dense.conr_dense_sums_kernel, of_sums.launch | fusion, **pairs, **of_sums.tiles
            ),
            tiles_i * n_parts, N, K, self_offset, tiles_j, per_part, gram_parts, D,
            window, s.push_scale, math.log2(math.e) / s.temperature,
        )  # fmt: skip
        finished = Launch(
            bind(
                dense.conr_dense_rows_kernel, {"num_warps": 4}, SHIFTED=columns == 5,
                **row_flags(s), ROWS=ROWS, PARTS=1 << (n_parts - 1).bit_length(),
            ),
            tiles(N, ROWS), N, K, n_parts, s.push_scale,
        )  # fmt: skip
        total = Launch(bind(dense.conr_total_kernel, {"num_warps": 4}, BLOCK=1024), 1, N, factor)
        gradient = Launch(
            bind(
                dense_gradient.conr_dense_gradient_kernel, of_gradient.launch | fusion,
                **pairs, **of_gradient.tiles,
            ),
            n_tiles * gradient_parts, N, K, self_offset, gradient_tiles_j, gradient_per_part,
            window, s.push_scale, factor,
        )  # fmt: skip
        width = min(1 << (D - 1).bit_length(), 256)
        finish_rows = 8 if width >= D else 4
        finish = Launch(
            bind(
                dense_gradient.conr_dense_finish_kernel, {"num_warps": 4}, D=D, COLUMNS=columns,
                ROWS=finish_rows, BLOCK_D=width,
            ),
            tiles(N, finish_rows) * tiles(D, width), N, gradient_parts, factor, 1 / s.temperature,
        )  # fmt: skip

        of_gram = "gram" if gram_size else "nothing"
        forward = [(gram, "x key_x gram")] if gram_size else []
        forward += [
            (sums, f"x y p key_x key_y key_p {of_gram} kept sums"),
            (finished, "w n_absent sums loss stats"),
        ]
        of_pairs = "x y p coef key_x key_y key_p key_coef kept G radial"
        backward = finish, "x coef kept G radial upstream gradient"
        n_padded, n_fields = _padded(N), 7 if columns == 5 else 5 if is_inside else 4
        kept = dict(kept=kept_size(N, K), stats=N * columns, loss=N)
        scratch = dict(gram=gram_size, sums=n_fields * n_parts * n_padded)
        of_gradient = dict(G=gradient_parts * N * D, radial=gradient_parts * n_padded)
        if reduction == "none":
            self.work = _parts(self.dtype, scratch)
            self.work_of_gradient = _parts(self.dtype, of_gradient)
            self.forward = Steps(
                "x y p w key_x key_y key_p n_absent kept loss stats", {}, forward, self.work
            )
            steps = [(gradient, f"{of_pairs} nothing nothing"), backward]
            self.backward = Steps(
                "x y p key_x key_y key_p coef key_coef kept gradient", {"upstream": "nothing"},
                steps, self.work_of_gradient,
            )  # fmt: skip
        else:
            aliases = OWN_KEYS | {"n_absent": "nothing", "coef": "stats", "key_coef": "stats"}
            self.work = _parts(self.dtype, kept, scratch)
            self.work_of_gradient = _parts(self.dtype, kept, scratch, of_gradient)
            self.forward = Steps(
                "x y p w total", aliases, [*forward, (total, "loss total")], self.work
            )
            steps = [*forward, (gradient, f"{of_pairs} loss total")]
            self.forward_with_gradient = Steps(
                "x y p w total", aliases, steps, self.work_of_gradient
            )
            self.backward = Steps(
                "x upstream gradient", {"coef": "stats"}, [backward], self.work_of_gradient
            )


def _parts(dtype: torch.dtype, *sizes: dict[str, int]) -> Parts:
    parts = Parts()
    for name, n in (item for group in sizes for item in group.items()):
        parts.add(name, n, dtype)
    return parts


def _cut(tiles_j: int, tiles_i: int, most: int) -> tuple[int, int]:
    """Tiles of keys per part, and the number of parts, for about PROGRAMS programs."""
    n_parts = min(max(tiles(PROGRAMS, tiles_i), 1), tiles_j, most)
    per_part = tiles(tiles_j, n_parts)
    return per_part, tiles(tiles_j, per_part)


def _cut_gram(of_sums: Config, n_tiles: int, per_part: int, D: int) -> tuple[int, int, int]:
    """The size of the partial products (0: no launch is needed for them), the chunks per part and
    the number of parts.
    """
    chunks = tiles(D, of_sums.BLOCK_D)
    if chunks == 1 or per_part * chunks <= GRAM_CHUNKS:
        return 0, chunks, 1
    n_parts = min(tiles(PROGRAMS, n_tiles), tiles(chunks, GRAM_PART))
    per_part = tiles(chunks, n_parts)
    n_parts = tiles(chunks, per_part)
    block_i, block_j = of_sums.BLOCK_I, of_sums.BLOCK_J
    return n_parts * n_tiles * (block_i * block_j + block_i + block_j), per_part, n_parts


def _padded(n: int) -> int:
    return tiles(n, PAD) * PAD


#: By the identity of settings (an entry keeps them alive) and the form of call.
_plans: dict[tuple[Any, ...], tuple[Settings, Plan]] = {}
PLANS = 64


def plan_of(
    x: Tensor, y: Tensor, keys: Keys | None, self_offset: int, s: Settings, reduction: str
) -> Plan:
    N, D = x.shape
    K = N if keys is None else keys[0].shape[0]
    form = (
        N, K, D, 1 if y.ndim == 1 else y.shape[1], x.dtype, y.dtype, self_offset, reduction,
        call.capability(x.device), is_early(x.device),
    )  # fmt: skip
    of_products = x.dtype == torch.float32 and torch.get_float32_matmul_precision()
    key = (id(s), form, of_products, KEPT_PAIRS, GRAM_CHUNKS, GRAM_PART)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= PLANS:
            _plans.clear()
        found = _plans[key] = (s, Plan(Form(*form), s))
    return found[1]


def forward(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    keys: Keys | None, n_absent: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor,
) -> None:  # fmt: skip
    """Losses, statistics and what the gradient reads."""
    rows = x, y, p, w, *(keys or (x, y, p)), n_absent
    results = layout.view(plan.dtype), loss, stats
    plan.forward(place, [plan.work.new(x)], *rows, *results)


def backward(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, keys: Keys | None,
    coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    """The gradient of x from coefficients in which the upstream gradient is."""
    rows = x, y, p, *(keys or (x, y, p)), coef_i, coef_j, layout.view(plan.dtype)
    plan.backward(place, [plan.work_of_gradient.new(x)], *rows, gradient)


def reduced(
    plan: Plan, place: Place | None, x: Tensor, y: Tensor, p: Tensor, w: Tensor | None,
    wants_gradient: bool,
) -> tuple[Tensor, tuple[Tensor]]:  # fmt: skip
    """The reduced loss; and the workspace, which holds the gradient's parts if it is wanted."""
    steps, parts = plan.forward, plan.work
    if wants_gradient:
        steps, parts = plan.forward_with_gradient, plan.work_of_gradient
    loss, work = x.new_empty((), dtype=plan.dtype), parts.new(x)
    steps(place, [work], x, y, p, w, loss)
    return loss, (work,)


def reduced_gradient(x: Tensor, work: Tensor, plan: Plan, upstream: Tensor) -> Tensor:
    """The gradient of x for an upstream gradient of the reduced loss."""
    x = x.contiguous()
    gradient = torch.empty_like(x)
    plan.backward(place_of(x), [work], x, upstream, gradient)
    return gradient
