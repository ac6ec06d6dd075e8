"""ConR in Triton: one visit of each pair forward, one backward, no N×N value stored, no host
synchronisation.

Up to ``DENSE_PAIRS`` pairs: every pair, no sort. Above: two sweeps over the exact bands of the
sorted labels and predictions, or, chosen on the device where that is less, the negatives outside
the label bands.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from .triton_configs import HEAVY, TABLE, Config, bucket, config
from .variants import Settings

#: Up to this many pairs the kernels without a sort serve.
DENSE_PAIRS = 1024 * 1024
#: Chunks of columns that one program of their forward kernel reads; where it would be more, a
#: launch before it splits tiles and D over about DENSE_PROGRAMS programs, DENSE_PART chunks at
#: least each.
DENSE_CHUNKS = 32
DENSE_PROGRAMS = 512
DENSE_PART = 4
#: Keys whose H_ij a program of the wide backward kernel keeps, and what its rows are padded to.
WIDE_KEYS = 1024
WIDE_PAD = 128
ROW_PAD = 128
GATHER_ROWS = 32

Keys = tuple[Tensor, Tensor, Tensor]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, and what to do; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; install it (pip install triton) or use backend="auto"'
    if device.type == "cpu":
        if interpreted():
            return _interpreter_unavailable()
        return (
            "triton compiles for GPUs and the tensors are on the CPU; move them to a GPU, set "
            'TRITON_INTERPRET=1 before the start for its interpreter, or use backend="auto"'
        )
    if device.type != "cuda":
        return f'no triton driver for {device.type} tensors here; use backend="torch" or "auto"'
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"triton needs compute capability 8.0 or above, this GPU has {major}.{minor}; "
            'use backend="cuda", "torch" or "auto"'
        )
    return None


def _interpreter_unavailable() -> str | None:
    """Its loops turn one-element arrays into numbers, which numpy 2.4 refuses."""
    import numpy

    if tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 4):
        return None
    return (
        f"triton's interpreter does not work with numpy {numpy.__version__}; "
        "install numpy below 2.4 (pip install 'numpy<2.4')"
    )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as the environment of the process says."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def layout_size(n_anchors: int, n_keys: int, dtype: torch.dtype, settings: Settings) -> int:
    """Few pairs: s_ij and the inverse norms. Else a head (the choice of sweep), both orders of keys
    and anchors, the anchors' places, the bands.
    """
    if n_anchors * n_keys <= DENSE_PAIRS:
        numbers = n_anchors * _row_of_s(n_keys) + n_anchors + n_keys
        return numbers * (2 if dtype == torch.float64 else 1)
    return ROW_PAD + 2 * _padded(n_keys) + 7 * _padded(n_anchors)


def forward(
    x: Tensor,
    y: Tensor,
    p: Tensor,
    w: Tensor | None,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py), and what ``layout_size`` says for the backward
    pass.
    """
    call = _Call(x, y, p, keys, self_offset, settings)
    loss = x.new_empty(call.N, dtype=call.dtype)
    stats = x.new_empty((call.N, 3 if settings.exponent_is_small else 5), dtype=call.dtype)
    layout = x.new_empty(layout_size(call.N, call.K, call.dtype, settings), dtype=torch.int32)
    if call.N > 0:
        w = None if w is None else w.contiguous()
        with call.device_guard():
            if call.is_dense:
                _forward_dense(call, w, loss, stats, layout)
            else:
                _forward_sweeps(call, w, loss, stats, layout)
    return loss, stats, layout


def backward(
    coef_i: Tensor,
    coef_j: Tensor | None,
    layout: Tensor,
    x: Tensor,
    y: Tensor,
    p: Tensor,
    keys: Keys | None,
    self_offset: int,
    settings: Settings,
) -> Tensor:
    """Gradient of the features [N, D] from the scaled statistics of anchors and keys."""
    call = _Call(x, y, p, keys, self_offset, settings)
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    if call.N > 0:
        coef_i = coef_i.contiguous()
        coef_j = coef_i if coef_j is None else coef_j.contiguous()
        with call.device_guard():
            if call.is_dense:
                _backward_dense(call, coef_i, coef_j, layout, gradient)
            else:
                _backward_sweeps(call, coef_i, coef_j, layout, gradient)
    return gradient


class _Call:
    """What one call has in common for all its launches."""

    def __init__(
        self, x: Tensor, y: Tensor, p: Tensor, keys: Keys | None, self_offset: int, s: Settings
    ) -> None:
        self.x, self.y, self.p = x, y.contiguous(), p.contiguous()
        self.has_keys = keys is not None
        if keys is None:
            self.key_x, self.key_y, self.key_p = self.x, self.y, self.p
        else:
            self.key_x, self.key_y, self.key_p = keys[0], keys[1].contiguous(), keys[2].contiguous()
        self.self_offset, self.settings = self_offset, s
        self.N, self.D = x.shape
        self.K, self.L = self.key_x.shape[0], y.shape[1]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.is_dense = self.N * self.K <= DENSE_PAIRS
        self.arithmetic = arithmetic(x.dtype)
        self.D_bucket = bucket(self.D, self.arithmetic)
        self.D_pad = self.D_bucket or WIDE_PAD * math.ceil(self.D / WIDE_PAD)
        variant = s.variant
        #: √(log₂e/τ), the factor of every unit feature.
        self.scale = math.sqrt(math.log2(math.e) / s.temperature)
        self.window = largest_total(s.window, self.L, s.distance, str(y.dtype)[6:])
        self.is_confused = variant.negatives == "confused"
        self.is_tiny = s.scales_by_distance and s.window < s.SMALLEST_WINDOW
        self.pair_flags = dict(
            L=self.L,
            RMSE=s.distance == "rmse" and self.L > 1,
            SHIFTED=not s.exponent_is_small,
            PRECISION=precision(self.arithmetic),
            # The interpreter multiplies 16-bit tiles wrongly.
            UPCAST=interpreted() and x.dtype.itemsize == 2,
        )
        self.row_flags = dict(
            PUSHING=variant.pushing,
            CONFUSED=self.is_confused,
            UNIT_TERMS=variant.unit_terms,
            COUNT_SELF=variant.count_self,
            WEIGHTED_ROWS=variant.weighted_rows,
        )
        self.is_inside = variant.log == "inside"

    def device_guard(self):
        return torch.cuda.device(self.x.device) if self.x.is_cuda else contextlib.nullcontext()

    def config(self, kind: str) -> Config:
        is_heavy = self.L > 1 or (self.is_tiny and kind == "forward")
        is_heavy = is_heavy and self.x.dtype.itemsize == 2
        row = HEAVY if is_heavy and kind in TABLE[HEAVY] else self.arithmetic
        return config(kind, architecture(self.x.device), self.D_bucket, row)

    def options(self, chosen: Config) -> dict[str, Any]:
        """Launch options; squares of differences must not be fused into the sum that follows."""
        fusion = {"enable_fp_fusion": False} if self.pair_flags["RMSE"] else {}
        return {**chosen.tiles, **chosen.launch, **fusion}

    def strides(self) -> tuple[int, ...]:
        return *self.x.stride(), *self.key_x.stride()


@functools.lru_cache(maxsize=64)
def largest_total(window: float, L: int, distance: str, dtype: str) -> float:
    """The largest sum over L components whose distance rounds to the window or below, so that the
    kernels compare as the reference does and divide nothing: division and root are monotone.
    """
    if L == 1 or math.isinf(window):
        return window
    import numpy as np

    h, n = np.dtype(dtype).type(window), np.dtype(dtype).type(L)

    def is_within(total: np.floating) -> bool:
        mean = total / n
        return bool((mean if distance == "mae" else np.sqrt(mean)) <= h)

    with np.errstate(over="ignore", under="ignore"):
        total = n * (h if distance == "mae" else h * h)
        while not is_within(total):
            total = np.nextafter(total, np.dtype(dtype).type(0))
        while np.isfinite(total) and is_within(following := np.nextafter(total, n * np.inf)):
            total = following
    return float(total)


def arithmetic(dtype: torch.dtype) -> str:
    """The dtype's name, and whether float32 products must be float32's own."""
    highest = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return str(dtype).removeprefix("torch.") + (" highest" if highest else "")


def precision(arithmetic: str) -> str:
    """``input_precision``: three TF32 products reach float32's accuracy at a third of its
    instructions.
    """
    if torch.version.hip is not None:
        return "ieee"  # not every AMD GPU has TF32
    return {"float32 highest": "tf32x3", "float64": "ieee"}.get(arithmetic, "tf32")


@functools.cache
def architecture(device: torch.device) -> int:
    """The column of the table: the largest shipped architecture that is not above the device's."""
    if device.type != "cuda":
        return 90  # the interpreter: the fewest programs
    if torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 100 if major >= 10 else 90 if major == 9 else 80


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; no bit of a result depends on it."""
    if device.type != "cuda":
        return 132  # the interpreter: an H200's
    return torch.cuda.get_device_properties(device).multi_processor_count


def _padded(n: int) -> int:
    return math.ceil(n / ROW_PAD) * ROW_PAD


def _row_of_s(n_keys: int) -> int:
    """The stride of the kept s_ij: rows that start on 64 bytes are read 16 bytes at a time."""
    return math.ceil(n_keys / 16) * 16


def _tiles(n: int, block: int) -> int:
    return -(-n // block)


def _gram(call: _Call, chosen: Config) -> tuple[Tensor | None, int]:
    """Partial products of the rows where they are too many for one program; None elsewhere."""
    from . import triton_dense

    tiles_j, chunks = _tiles(call.K, chosen.BLOCK_J), _tiles(call.D, chosen.BLOCK_D)
    if chunks == 1 or tiles_j * chunks <= DENSE_CHUNKS:
        return None, 1
    n_tiles = _tiles(call.N, chosen.BLOCK_I) * tiles_j
    n_parts = min(_tiles(DENSE_PROGRAMS, n_tiles), _tiles(chunks, DENSE_PART))
    per_part = _tiles(chunks, n_parts)
    n_parts = _tiles(chunks, per_part)
    size = chosen.BLOCK_I * chosen.BLOCK_J + chosen.BLOCK_I + chosen.BLOCK_J
    gram = call.x.new_empty(n_parts * n_tiles * size, dtype=call.dtype)
    triton_dense.conr_gram_kernel[(n_tiles * n_parts,)](
        call.x, call.key_x, gram, call.N, call.K, *call.strides(), tiles_j, per_part, call.D,
        D=call.D, PRECISION=call.pair_flags["PRECISION"], UPCAST=call.pair_flags["UPCAST"],
        **chosen.tiles, **chosen.launch,
    )  # fmt: skip
    return gram, n_parts


def _forward_dense(
    call: _Call, w: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor
) -> None:
    from . import triton_dense

    chosen, s = call.config("dense"), call.settings
    gram, n_parts = _gram(call, chosen)
    triton_dense.conr_forward_dense_kernel[(_tiles(call.N, chosen.BLOCK_I),)](
        call.x, call.y, call.p, w, call.key_x, call.key_y, call.key_p, gram, loss, stats,
        layout.view(call.dtype),
        call.N, call.K, call.self_offset, *call.strides(), _row_of_s(call.K),
        _tiles(call.K, chosen.BLOCK_J), n_parts, call.D,
        call.window, s.push_scale, call.scale * call.scale,
        D=call.D, INSIDE=call.is_inside, **call.pair_flags, **call.row_flags,
        **call.options(chosen),
    )  # fmt: skip


def _backward_dense(
    call: _Call, coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor
) -> None:
    from . import triton_dense

    s, of_pairs, chosen = call.settings, call.config("dense"), call.config("dense backward")
    kept, stride = layout.view(call.dtype), _row_of_s(call.K)
    tiles_i, tiles_j = _tiles(call.N, of_pairs.BLOCK_I), _tiles(call.K, of_pairs.BLOCK_J)
    W = call.x.new_empty((call.N, stride), dtype=call.dtype)
    radial = call.x.new_empty((call.N, tiles_j), dtype=call.dtype)
    fusion = {"enable_fp_fusion": False} if call.pair_flags["RMSE"] else {}
    triton_dense.conr_pair_gradient_kernel[(tiles_i * tiles_j,)](
        call.y, call.p, coef_i, call.key_y, call.key_p, coef_j, kept, W, radial,
        call.N, call.K, call.self_offset, stride, tiles_j, call.window, s.push_scale,
        INSIDE=call.is_inside, PUSHING=s.variant.pushing, CONFUSED=call.is_confused,
        **{name: call.pair_flags[name] for name in ("L", "RMSE", "SHIFTED")},
        BLOCK_I=of_pairs.BLOCK_I, BLOCK_J=of_pairs.BLOCK_J, num_warps=of_pairs.num_warps, **fusion,
    )  # fmt: skip
    chunks = _tiles(call.D, chosen.BLOCK_D)
    triton_dense.conr_feature_gradient_kernel[(_tiles(call.N, chosen.BLOCK_I) * chunks,)](
        call.x, coef_i, call.key_x, kept, W, radial, gradient,
        call.N, call.K, *call.strides(), stride, tiles_j, 1 / s.temperature,
        D=call.D, COLUMNS=coef_i.shape[1], PRECISION=call.pair_flags["PRECISION"],
        **chosen.tiles, **chosen.launch,
    )  # fmt: skip


class _Sorted:
    """Copies of keys and anchors in one order, made for the positives, then the negatives."""

    def __init__(self, call: _Call, coef_i: Tensor | None, coef_j: Tensor | None) -> None:
        self.call, self.coef = call, (coef_j, coef_i)
        self.columns = 0 if coef_i is None else coef_i.shape[1]
        self.j = self._buffers(_padded(call.K))
        self.i = self._buffers(_padded(call.N)) if call.has_keys else self.j

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
        return _padded(self.call.K) + (_padded(self.call.N) if self.call.has_keys else 0)

    def gather(
        self, layout: Tensor, negatives: bool, w: Tensor | None = None, poison: Tensor | None = None
    ) -> None:
        from .triton_layout import conr_gather_kernel

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


def _write_layout(call: _Call, layout: Tensor) -> None:
    """Sorts labels and predictions and writes orders, bands and the choice of sweep."""
    from . import triton_layout as kernels

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
        kernels.conr_sort_keys_kernel[(_tiles(max(K, N), 256),)](
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
    kernels.conr_bands_kernel[(_padded(max(K, N)) // ROW_PAD,)](
        *arguments, layout, N, K, call.self_offset, K.bit_length(), reach,
        HAS_KEYS=call.has_keys, HAS_P=has_p, ROWS=ROW_PAD, num_warps=4,
    )  # fmt: skip
    kernels.conr_choose_kernel[(1,)](
        layout, N, K, EXACT=L == 1, HAS_P=has_p, ROWS=ROW_PAD, BLOCK=1024, num_warps=4
    )


def _forward_sweeps(
    call: _Call, w: Tensor | None, loss: Tensor, stats: Tensor, layout: Tensor
) -> None:
    from . import triton_sweeps as kernels

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
    grid = (_tiles(call.N, chosen.BLOCK_I),)

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


def _backward_sweeps(
    call: _Call, coef_i: Tensor, coef_j: Tensor, layout: Tensor, gradient: Tensor
) -> None:
    from . import triton_gradient as kernels

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
    grid, common = (_tiles(call.N, chosen.BLOCK_I),), {**common, **call.options(chosen)}
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
    call: _Call, rows: _Sorted, layout: Tensor, gradient: Tensor, kappa: float, common: dict
) -> None:
    from .triton_wide import conr_backward_wide_kernel

    s, x, chosen, product = call.settings, call.x, call.config("wide"), call.config("product")
    columns = product.BLOCK_D if call.D_pad % product.BLOCK_D == 0 else WIDE_PAD
    n_programs = processors(x.device) * 8 // chosen.num_warps
    n_programs = min(n_programs, _tiles(call.N, chosen.BLOCK_I))
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
