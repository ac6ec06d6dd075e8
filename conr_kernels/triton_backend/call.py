"""What all launches of one form of call share: sizes, constants of kernels, tiles."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.inputs import Keys
from ..variants import Settings
from .availability import interpreted
from .configs import (
    HALVES_HEAVY,
    HEAVY,
    SHIFTED,
    SHORT,
    SHORT_ROWS,
    Config,
    bucket,
    config,
    entry,
)
from .launch import bind

#: Multiples to which rows of wide features, and numbers of rows, are padded.
WIDE_PAD = 128
ROW_PAD = 128
#: Numbers of the head of wide features' list of pairs of tiles, and of each tile of anchors.
LIST_HEAD, LIST_TILE = 8, 7
#: Bytes of wide features' H_ij that are kept at a time: WIDE_FEATURES times those of the features,
#: but at least the first of WORKSPACE, and at most the second or half of the features' bytes,
#: whichever is more.
WIDE_FEATURES = 4
WORKSPACE = 2**27, 2**29
#: Tiles of anchors that a window has however long bands are, and keys that each visits at least
#: before the next tile takes its turn: few enough that L2 keeps the keys for all of them.
PIECES = 128
PIECE_KEYS = 8192
#: From how many rows on the forward pass takes each pair once, for narrow and for wide features
#: (fewer are too little work to add up parts); and the gradient of wide features.
MIRRORED_ROWS = 2**15, 2**13, 1
#: And from how many bytes of a row of features on the forward pass does: of narrower rows the parts
#: of sums would be most of the memory.
MIRRORED_BYTES = 128
#: From this compute capability on a kernel's programs start while the kernel before still runs
#: (programmatic dependent launch); and the first driver that keeps such launches in a captured
#: graph, CUDA 12.3's.
EARLIEST = 90
EARLY_DRIVER = 12030
#: The largest number in a list of 32 bits.
LIST_NUMBERS = 2**31 - 1


class Windows(NamedTuple):
    """How the list of wide features' pairs of tiles is cut into windows.

    Attributes:
        is_mirrored: the list has two tiles once for both, as H_ij is symmetric.
        pairs: pairs of tiles of a window.
        passes: how many windows suffice for any bands, before the negatives' copies replace the
            positives' and after.
        second: the number in the list at which negatives begin at the earliest.
        piece: tiles of keys of a piece.
        of_list, dtype: how many numbers the list itself has, and their dtype.
    """

    is_mirrored: bool
    pairs: int
    passes: tuple[int, int]
    second: int
    piece: int
    of_list: int
    dtype: torch.dtype


class Form(NamedTuple):
    """What the launches of a call depend on beside its settings; ``config`` and ``bucket`` read the
    table of tiles.
    """

    N: int
    K: int
    D: int
    L: int
    dtype: torch.dtype
    labels: torch.dtype
    has_keys: bool
    self_offset: int
    reduction: str
    arithmetic: str
    capability: int
    is_early: bool
    config: Callable[..., Config]
    bucket: Callable[..., int]


def form_of(x: Tensor, y: Tensor, keys: Keys | None, self_offset: int, reduction: str) -> Form:
    (N, D), L = x.shape, y.shape[1]
    K = N if keys is None else keys[0].shape[0]
    dtype, on = x.dtype, capability(x.device)
    return Form(
        N, K, D, L, dtype, y.dtype, keys is not None, self_offset, reduction, arithmetic(dtype),
        on, is_early(x.device), config, bucket,
    )  # fmt: skip


class Call:
    """What all launches of one form of call share."""

    def __init__(self, form: Form, s: Settings) -> None:
        self.form, self.settings = form, s
        self.bind = functools.partial(bind, form.is_early)
        self.N, self.K, self.D, self.L = form[:4]
        self.has_keys = form.has_keys
        self.architecture = architecture(form.capability)
        is_half = form.dtype.itemsize == 2
        self.dtype = torch.float64 if form.dtype == torch.float64 else torch.float32
        self.D_bucket = form.bucket(self.D, form.arithmetic)
        self.D_pad = self.D_bucket or WIDE_PAD * math.ceil(self.D / WIDE_PAD)
        of_products = precision(form.arithmetic)
        #: Whether the copies, and H_ij, hold float32 numbers as sums of two of float16.
        self.is_in_halves = form.arithmetic == "float32 highest"
        #: √(log₂e/τ), the factor of every unit feature; and what products of copies are times it.
        self.scale, self.unit = math.sqrt(math.log2(math.e) / s.temperature), 1.0
        if self.is_in_halves:
            of_products = "fp16x3"
            # In the upper part of float16's range: what is lost below it counts for nothing.
            power = 13 - math.frexp(self.scale)[1]
            self.scale, self.unit = math.ldexp(self.scale, power), math.ldexp(1.0, -2 * power)
        self.window = largest_total(s.window, self.L, s.distance, str(form.labels)[6:])
        self.is_confused = s.variant.negatives == "confused"
        self.is_tiny = s.pushing.phi == "distance" and s.window < s.SMALLEST_WINDOW
        self.is_rescaled = form.dtype == torch.float16 or self.is_in_halves
        self.is_inside = s.variant.log == "inside"
        self.pair_flags = dict(
            L=self.L,
            RMSE=s.distance == "rmse" and self.L > 1,
            SHIFTED=not s.exponent_is_small,
            PRECISION=of_products,
            # The interpreter multiplies 16-bit tiles wrongly.
            UPCAST=interpreted() and (is_half or self.is_in_halves),
        )
        #: Squares of differences must not be fused into the sum that follows.
        self.fusion = {"enable_fp_fusion": False} if self.pair_flags["RMSE"] else {}

    def flags(self, sweeps: str) -> dict[str, Any]:
        """Constants of a kernel's pairs, ``sweeps`` being ``"positives"``, ``"negatives"`` or
        ``"both"``; what the other sweep alone depends on has one value.
        """
        has_negatives = sweeps != "positives"
        return self.pair_flags | dict(
            CONFUSED=self.is_confused and has_negatives,
            SAME=not self.has_keys,
            D_PAD=self.D_pad,
            INSIDE=self.is_inside and sweeps != "negatives",
            PHI=self.settings.pushing.phi if has_negatives else "one",
        )

    def windows(self, chosen: Config, is_apart: bool) -> Windows:
        itemsize = self.form.dtype.itemsize
        n, n_j = tiles(self.N, chosen.BLOCK_I), padded(self.K) // chosen.BLOCK_J
        features = max(self.N, self.K) * self.D * itemsize
        least, most = WORKSPACE
        kept = max(least, min(WIDE_FEATURES * features, max(most, features // 2)))
        # Where bands of scalars decide and the anchors are the keys. Tensor cores read a transposed
        # factor in 16 bits alone, and float16 has a scale for each row of a tile.
        is_mirrored = self.L == 1 and self.is_confused and not self.has_keys
        is_mirrored &= self.form.dtype == torch.bfloat16 and chosen.BLOCK_I == chosen.BLOCK_J
        is_mirrored &= MIRRORED_ROWS[2] <= self.N
        n_pairs = n * (n + 1) // 2 if is_mirrored else n * n_j
        window = _even(n * n_j, kept // (chosen.BLOCK_I * chosen.BLOCK_J * itemsize))
        window = min(window, n_pairs)
        piece = min(max(PIECE_KEYS // chosen.BLOCK_J, window // PIECES, 1), window)
        of_list = LIST_HEAD + 2 * ((LIST_TILE + tiles(n_j, piece)) * n + 1)
        dtype = torch.int32 if 2 * n_pairs + 3 * window <= LIST_NUMBERS else torch.int64
        each = tiles(n_pairs, window)
        if self.is_confused and not is_apart:
            return Windows(is_mirrored, window, (each, each), each * window, piece, of_list, dtype)
        both = 2 * each
        if self.L == 1:
            # The negatives' keys are no more than those outside the label bands, so that both have
            # every key once, and twice those at the borders of a tile of anchors: bands' ends grow
            # from one tile to the next, and all the borders together have 2 K keys. The choice is
            # made for ROW_PAD anchors; each of four ends adds less than a tile.
            per_choice = ROW_PAD // chosen.BLOCK_I
            of_both = n * (n_j + 4) + 3 * per_choice * n_j
            if is_mirrored:
                # Half of them and of the tiles' pairs with themselves. Outside the label bands a
                # last tile of fewer rows is listed for tiles with which it has positives alone too:
                # n pairs at most, where the above has room for K keys more than there are.
                of_both = tiles(of_both + 2 * n, 2)
            both = min(both, tiles(of_both, window) + 1)
        return Windows(is_mirrored, window, (both, 0), 0, piece, of_list, dtype)

    @property
    def is_forward_mirrored(self) -> bool:
        """Whether a pair's exponential serves the sums of both of its rows."""
        form, is_wide = self.form, self.D_bucket == 0
        has_tile = entry("mirrored", self.architecture, self.D_bucket, form.arithmetic) is not None
        is_symmetric = not self.has_keys and self.is_confused and self.L == 1
        is_plain = not (self.pair_flags["SHIFTED"] or self.is_tiny)
        is_large = MIRRORED_ROWS[is_wide] <= self.N
        is_large &= self.D_pad * form.dtype.itemsize >= MIRRORED_BYTES
        return has_tile and is_symmetric and is_plain and is_large

    def config(self, kind: str) -> Config:
        rows, width = [], self.D_bucket
        if kind == "product":
            width = columns_of(self.D)
        key = (kind, self.architecture, width)
        is_heavy = self.L > 1 or (self.is_tiny and kind == "forward")
        is_heavy |= self.is_inside and kind == "mirrored"
        if self.form.dtype.itemsize == 2:
            rows = [HEAVY] * is_heavy + [SHIFTED] * self.pair_flags["SHIFTED"]
            rows += [SHORT] * (self.N <= SHORT_ROWS)
        elif self.is_in_halves:
            rows = [HALVES_HEAVY] * is_heavy
        row = next((row for row in rows if entry(*key, row)), self.form.arithmetic)
        return self.form.config(*key, row)


def row_flags(s: Settings) -> dict[str, bool]:
    """Constants of kernels that finish rows."""
    variant = s.variant
    return dict(
        INSIDE=variant.log == "inside",
        SCALED=s.pushing.is_scaled,
        WEIGHTED=s.pushing.is_weighted,
        UNIT_TERMS=variant.unit_terms,
        COUNT_SELF=variant.count_self,
        WEIGHTED_ROWS=variant.weighted_rows,
    )


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
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "float32 highest"
    return _NAMES[dtype]


_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def precision(arithmetic: str) -> str:
    """``input_precision`` of products of features as given: three TF32 products reach float32's
    accuracy with a third of its instructions.
    """
    if torch.version.hip is not None:
        return "ieee"  # not every AMD GPU has TF32
    return {"float32 highest": "tf32x3", "float64": "ieee"}.get(arithmetic, "tf32")


@functools.cache
def capability(device: torch.device) -> int:
    """90 for compute capability 9.0. AMD's GPUs count as 80, and a device without kernels of its
    own, of the interpreter or of recorded launches, as 90.
    """
    if device.type != "cuda":
        return 90
    if torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(capability: int) -> int:
    """The architecture in the table whose tensor cores a device has: sm_120's are sm_80's."""
    return {9: 90, 10: 100, 11: 100}.get(capability // 10, 80)


def is_early(device: torch.device) -> bool:
    """Whether kernels are launched there before the previous one has completed, and wait for it."""
    return capability(device) >= EARLIEST and _can_be_early()


@functools.cache
def _can_be_early() -> bool:
    """Whether kernels are compiled, and Triton and the driver (if any) support such launches."""
    if interpreted():
        return False
    from triton.language.extra import cuda

    driver = driver_version() if torch.cuda.is_available() else EARLY_DRIVER
    return hasattr(cuda, "gdc_wait") and driver >= EARLY_DRIVER


def driver_version() -> int:
    """12030 for a driver of CUDA 12.3; 0 if it is unknown."""
    found = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return 0
    return found.value


def _even(n: int, most: int) -> int:
    """The size of equal parts of n, at most ``most``."""
    return tiles(n, tiles(n, max(most, 1)))


def limits_of_calls() -> tuple[Any, ...]:
    """Constants that a ``Call`` depends on beside its form: tests and measurements change them."""
    sizes = WIDE_FEATURES, WORKSPACE, PIECES, PIECE_KEYS, LIST_NUMBERS
    return *MIRRORED_ROWS, MIRRORED_BYTES, *sizes


def padded(n: int) -> int:
    return math.ceil(n / ROW_PAD) * ROW_PAD


def layout_size(n_anchors: int, n_keys: int, has_keys: bool, is_confused: bool) -> int:
    """The sweeps' layout: a head (the choice of sweep); the anchors' places among further keys; for
    each order the keys, the bands, the keys' ranks and, with further keys, the anchors and their
    ranks.
    """
    anchors = padded(n_anchors)
    order = 2 * padded(n_keys) + (4 if has_keys else 2) * anchors
    return ROW_PAD + has_keys * anchors + (1 + is_confused) * order


def columns_of(D: int) -> int:
    """The columns of the largest tile that divides a padded row of wide features."""
    return WIDE_PAD * (2 - tiles(D, WIDE_PAD) % 2)


def tiles(n: int, block: int) -> int:
    return -(-n // block)
