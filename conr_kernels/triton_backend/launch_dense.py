"""Launches of the kernels for few rows (dense.py): every pair, no sort."""

from __future__ import annotations

import math

from torch import Tensor

from .call import Call, tiles
from .configs import Config

#: Chunks of columns that one program of their forward kernel reads; where it would be more, a
#: launch before it splits tiles and D over about DENSE_PROGRAMS programs, DENSE_PART chunks at
#: least each.
DENSE_CHUNKS = 32
DENSE_PROGRAMS = 512
DENSE_PART = 4


def row_of_s(n_keys: int) -> int:
    """The stride of the kept s_ij: rows that start on 64 bytes are read 16 bytes at a time."""
    return math.ceil(n_keys / 16) * 16


def _gram(call: Call, chosen: Config) -> tuple[Tensor | None, int]:
    """Partial products of the rows where they are too many for one program; None elsewhere."""
    from . import dense

    tiles_j, chunks = tiles(call.K, chosen.BLOCK_J), tiles(call.D, chosen.BLOCK_D)
    if chunks == 1 or tiles_j * chunks <= DENSE_CHUNKS:
        return None, 1
    n_tiles = tiles(call.N, chosen.BLOCK_I) * tiles_j
    n_parts = min(tiles(DENSE_PROGRAMS, n_tiles), tiles(chunks, DENSE_PART))
    per_part = tiles(chunks, n_parts)
    n_parts = tiles(chunks, per_part)
    size = chosen.BLOCK_I * chosen.BLOCK_J + chosen.BLOCK_I + chosen.BLOCK_J
    gram = call.x.new_empty(n_parts * n_tiles * size, dtype=call.dtype)
    dense.conr_gram_kernel[(n_tiles * n_parts,)](
        call.x, call.key_x, gram, call.N, call.K, *call.strides(), tiles_j, per_part, call.D,
        D=call.D, PRECISION=call.pair_flags["PRECISION"], UPCAST=call.pair_flags["UPCAST"],
        **chosen.tiles, **chosen.launch,
    )  # fmt: skip
    return gram, n_parts


def forward_dense(
    call: Call, w: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor
) -> None:
    from . import dense

    chosen, s = call.config("dense"), call.settings
    gram, n_parts = _gram(call, chosen)
    dense.conr_forward_dense_kernel[(tiles(call.N, chosen.BLOCK_I),)](
        call.x, call.y, call.p, w, call.key_x, call.key_y, call.key_p, gram, loss, stats,
        layout.view(call.dtype),
        call.N, call.K, call.self_offset, *call.strides(), row_of_s(call.K),
        tiles(call.K, chosen.BLOCK_J), n_parts, call.D,
        call.window, s.push_scale, call.scale * call.scale,
        D=call.D, INSIDE=call.is_inside, **call.pair_flags, **call.row_flags,
        **call.options(chosen),
    )  # fmt: skip


def backward_dense(
    call: Call, coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor
) -> None:
    from . import dense

    s, of_pairs, chosen = call.settings, call.config("dense"), call.config("dense backward")
    kept, stride = layout.view(call.dtype), row_of_s(call.K)
    tiles_i, tiles_j = tiles(call.N, of_pairs.BLOCK_I), tiles(call.K, of_pairs.BLOCK_J)
    W = call.x.new_empty((call.N, stride), dtype=call.dtype)
    radial = call.x.new_empty((call.N, tiles_j), dtype=call.dtype)
    fusion = {"enable_fp_fusion": False} if call.pair_flags["RMSE"] else {}
    dense.conr_pair_gradient_kernel[(tiles_i * tiles_j,)](
        call.y, call.p, coef_i, call.key_y, call.key_p, coef_j, kept, W, radial,
        call.N, call.K, call.self_offset, stride, tiles_j, call.window, s.push_scale,
        INSIDE=call.is_inside, PUSHING=s.variant.pushing, CONFUSED=call.is_confused,
        **{name: call.pair_flags[name] for name in ("L", "RMSE", "SHIFTED")},
        BLOCK_I=of_pairs.BLOCK_I, BLOCK_J=of_pairs.BLOCK_J, num_warps=of_pairs.num_warps, **fusion,
    )  # fmt: skip
    chunks = tiles(call.D, chosen.BLOCK_D)
    dense.conr_feature_gradient_kernel[(tiles(call.N, chosen.BLOCK_I) * chunks,)](
        call.x, coef_i, call.key_x, kept, W, radial, gradient,
        call.N, call.K, *call.strides(), stride, tiles_j, 1 / s.temperature,
        D=call.D, COLUMNS=coef_i.shape[1], PRECISION=call.pair_flags["PRECISION"],
        **chosen.tiles, **chosen.launch,
    )  # fmt: skip
