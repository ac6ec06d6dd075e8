"""What one call has in common for all its launches: rows, constants of its kernels, tiles."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..variants import Settings
from .availability import interpreted
from .configs import HEAVY, SHIFTED, Config, bucket, config, entry
from .launch import place_of

#: What the rows of wide features, and the numbers of rows, are padded to.
WIDE_PAD = 128
ROW_PAD = 128

Keys = tuple[Tensor, Tensor, Tensor]


class Call:
    """What one call has in common for all its launches."""

    def __init__(
        self, x: Tensor, y: Tensor, p: Tensor, keys: Keys | None, self_offset: int, s: Settings
    ) -> None:
        # Rows stand one behind the other: no bit of a result depends on how they are handed over.
        self.x, self.y, self.p = x.contiguous(), y.contiguous(), p.contiguous()
        self.has_keys = keys is not None
        given = (self.x, self.y, self.p) if keys is None else keys
        self.key_x, self.key_y, self.key_p = (t.contiguous() for t in given)
        self.place = place_of(self.x)
        self.self_offset, self.settings = self_offset, s
        self.N, self.D = x.shape
        self.K, self.L = self.key_x.shape[0], y.shape[1]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
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
        rows, key = [], (kind, architecture(self.x.device), self.D_bucket)
        if self.x.dtype.itemsize == 2:
            is_heavy = self.L > 1 or (self.is_tiny and kind == "forward")
            rows = [HEAVY] * is_heavy + [SHIFTED] * self.pair_flags["SHIFTED"]
        row = next((row for row in rows if entry(*key, row)), self.arithmetic)
        return config(*key, row)

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


def padded(n: int) -> int:
    return math.ceil(n / ROW_PAD) * ROW_PAD


def tiles(n: int, block: int) -> int:
    return -(-n // block)
