"""The static table of the sweeps' tiles and launch options, by capability, bucket of D and dtype.

No value is tuned at run time; ``benchmarks.static`` ranks candidates from their machine code and
``make gpu`` proposes a new table from measurements.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """A tile of BLOCK_I anchors × BLOCK_J keys, in chunks of BLOCK_D columns, and its launch.

    ``max_registers``: of a thread, where the compiler would take more than it needs;
    ``in_registers``: the anchors' features stay in the registers.
    """

    BLOCK_I: int
    BLOCK_J: int
    BLOCK_D: int
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None
    in_registers: bool = False

    @property
    def tiles(self) -> dict[str, int]:
        return {"BLOCK_I": self.BLOCK_I, "BLOCK_J": self.BLOCK_J, "BLOCK_D": self.BLOCK_D}

    @property
    def launch(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


#: Bytes of the largest row of features whose gradient stays in the registers, and their number.
REGISTER_BYTES = 512
REGISTER_D = {
    "float16": REGISTER_BYTES // 2,
    "bfloat16": REGISTER_BYTES // 2,
    "float32": REGISTER_BYTES // 4,
    "float32 highest": REGISTER_BYTES // 4,
    "float64": REGISTER_BYTES // 8,
}
#: "mirrored" is the forward pass that takes each pair once, where there is an entry: BLOCK_J is the
#: tile of a program's own rows. "product" is the second phase of "wide", of the same BLOCK_I:
#: BLOCK_J keys a step into BLOCK_D columns; its buckets are numbers of columns that divide the
#: padded D.
KINDS = ("forward", "mirrored", "backward", "wide", "product")
BUCKETS = (16, 32, 64, 128, 256)
ARCHITECTURES = (80, 90, 100)


def bucket(D: int, arithmetic: str) -> int:
    """The padded width of a row that is read at once, or 0 where it is read in chunks."""
    if REGISTER_D[arithmetic] < D:
        return 0
    return next(width for width in BUCKETS if width >= D)


#: By kind and arithmetic; of several entries the first whose architecture and bucket match.
#: Columns: architecture (None: all), bucket (None: all), tile and launch (BLOCK_D None: the
#: bucket). 80 serves sm_86, sm_89 and sm_120 too, which have 99 KiB of shared memory.
_HALVES = {
    "forward": [
        (80, 0, (128, 64, 64, 4, 2)),
        (None, 0, (128, 128, 64, 8, 3)),
        (80, 256, (64, 64, None, 4, 1)),
        (80, None, (64, 64, None, 4, 2)),
        (90, 256, (64, 64, None, 4, 2, 168, True)),
        (None, 256, (64, 64, None, 4, 2)),
        (90, 128, (64, 64, None, 4, 3, 128, True)),
        (90, 64, (64, 64, None, 4, 3, 128, True)),
        (90, None, (64, 64, None, 4, 4)),
        (None, None, (128, 128, None, 8, 2)),
    ],
    "mirrored": [
        (90, 0, (128, 128, 64, 4, 3)),
        (90, 256, (64, 128, None, 4, 1)),
        (90, 128, (64, 128, None, 4, 2, 168)),
        (90, None, (64, 128, None, 4, 3, 168)),
    ],
    "backward": [
        (80, 256, (32, 64, None, 4, 2)),
        (80, 128, (32, 64, None, 4, 2)),
        (80, None, (64, 64, None, 4, 2)),
        (90, 256, (64, 64, None, 4, 2)),
        (90, 128, (64, 128, None, 4, 2)),
        (90, 64, (64, 64, None, 4, 2, 128, True)),
        (90, None, (64, 64, None, 4, 3)),
        (100, 256, (64, 64, None, 8, 2)),
        (None, None, (128, 64, None, 8, 2)),
    ],
    "wide": [
        (80, None, (64, 64, 64, 4, 3)),
        (90, None, (128, 128, 64, 8, 3, 128)),
        (None, None, (128, 64, 64, 8, 3)),
    ],
    "product": [
        (80, None, (64, 64, 128, 4, 2)),
        (90, 256, (128, 64, 256, 8, 4)),
        (90, None, (128, 64, 128, 8, 3, 128)),
        (None, None, (128, 64, 128, 8, 3)),
    ],
}
_FLOAT32 = {
    "forward": [(None, 0, (64, 64, 32, 4, 2)), (None, None, (64, 64, None, 4, 2))],
    "mirrored": [
        (90, 0, (128, 128, 32, 4, 3)),
        (90, 128, (64, 128, None, 4, 1)),
        (90, None, (64, 128, None, 4, 2, 168)),
    ],
    "backward": [
        (90, None, (64, 64, None, 4, 2)),
        (80, None, (64, 32, None, 4, 2)),
        (None, None, (64, 32, None, 8, 2)),
    ],
    "wide": [
        (90, None, (128, 128, 32, 4, 3)),
        (None, None, (64, 32, 32, 4, 3)),
    ],
    "product": [(90, None, (128, 32, 256, 8, 3)), (None, None, (64, 32, 64, 4, 3))],
}
_FLOAT32_HIGHEST = {
    "forward": [
        (None, 0, (64, 64, 64, 4, 2)),
        (90, 128, (64, 64, None, 4, 2, 168, True)),
        (100, 128, (64, 32, None, 4, 2)),
        (None, None, (64, 64, None, 4, 2)),
    ],
    "mirrored": [
        (90, 0, (64, 128, 64, 4, 2)),
        (90, 128, (64, 128, None, 4, 1)),
        (90, None, (64, 128, None, 4, 2, 168)),
    ],
    "backward": [
        (90, 128, (64, 64, None, 4, 2, 255, True)),
        (90, None, (64, 64, None, 4, 2)),
        (80, 128, (32, 64, None, 4, 2)),
        (None, None, (64, 32, None, 4, 2)),
    ],
    "wide": [(90, None, (64, 128, 64, 4, 2)), (None, None, (64, 64, 64, 4, 2))],
    "product": [
        (90, None, (64, 64, 128, 4, 2)),
        (100, None, (64, 32, 64, 4, 2)),
        (None, None, (64, 32, 128, 4, 2)),
    ],
}
_FLOAT64 = {
    "forward": [(None, 0, (16, 16, 32, 4, 1)), (None, None, (16, 16, None, 4, 1))],
    "backward": [(100, None, (16, 16, None, 2, 1)), (None, None, (16, 16, None, 4, 1))],
    "wide": [(None, None, (16, 16, 32, 4, 1))],
    "product": [(None, None, (16, 16, 64, 4, 1))],
}
#: Rescaled products are a second tile as wide as G in the registers.
_FLOAT16 = {
    **_HALVES,
    "backward": [
        (80, 256, (32, 64, None, 4, 2)),
        (None, 256, (64, 64, None, 8, 2)),
        *(row for row in _HALVES["backward"] if row[1] != 256),
    ],
    "product": [(80, None, (64, 32, 128, 4, 3)), (None, None, (128, 64, 128, 8, 3))],
}
#: 16-bit features with vector labels or a window near 0, whose pairs take more registers, or with
#: two sums of positives.
HEAVY = "16-bit heavy"
_HEAVY = {
    "mirrored": [(90, 128, (64, 128, None, 4, 2)), (90, 64, (64, 128, None, 4, 3))],
    "forward": [(None, 0, (64, 32, 64, 4, 3)), (None, None, (64, 32, None, 4, 2))],
    "backward": [(None, 256, (64, 32, None, 8, 2)), (None, None, (64, 32, None, 4, 2))],
    "wide": [
        (80, None, (64, 32, 32, 4, 3)),
        (90, None, (64, 128, 64, 4, 3)),
        (None, None, (64, 32, 64, 4, 3)),
    ],
    "product": [(90, None, (64, 64, 128, 4, 3)), (None, None, (64, 32, 128, 4, 3))],
}
#: 16-bit features with large exponents: two exponentials a pair.
SHIFTED = "16-bit shifted"
_SHIFTED = {
    "forward": [
        (80, 256, (64, 32, None, 4, 2)),
        (90, 128, (64, 64, None, 4, 2)),
        (90, 256, (64, 64, None, 4, 2)),
    ],
    "backward": [(90, 128, (64, 64, None, 4, 3))],
    "wide": [(90, None, (128, 128, 64, 4, 3))],
}
#: 16-bit features of so few rows that programs share a tile of anchors, too short a work to fill
#: registers for: an H200's forward pass took 2.1 of 14 µs less at 8,192 rows, 0.6 of 23 at 16,384.
SHORT = "16-bit short"
SHORT_ROWS = 2**14
_SHORT = {
    "forward": [
        (90, 64, (64, 64, None, 4, 4)),
        (90, 128, (64, 64, None, 4, 2)),
        (90, 256, (64, 64, None, 4, 2)),
    ],
}
#: The same of float32 in halves.
HALVES_HEAVY = "float32 highest heavy"
_HALVES_HEAVY = {
    "forward": [
        (None, 0, (64, 32, 64, 4, 2)),
        (80, None, (64, 32, None, 8, 2)),
        (None, None, (64, 32, None, 4, 2)),
    ],
    "backward": [(80, None, (32, 32, None, 4, 2)), (None, None, (64, 32, None, 4, 2))],
    "wide": [(None, None, (64, 32, 64, 4, 2))],
    "product": [(100, None, (64, 32, 64, 4, 2)), (None, None, (64, 32, 128, 4, 2))],
}
TABLE = {
    HEAVY: _HEAVY,
    HALVES_HEAVY: _HALVES_HEAVY,
    SHIFTED: _SHIFTED,
    SHORT: _SHORT,
    "float16": _FLOAT16,
    "bfloat16": _HALVES,
    "float32": _FLOAT32,
    "float32 highest": _FLOAT32_HIGHEST,
    "float64": _FLOAT64,
}


Entry = tuple[int | None, ...]


@functools.cache
def entry(kind: str, architecture: int, D_bucket: int, arithmetic: str) -> Entry | None:
    """The first that matches, or None; ``architecture`` is one of ARCHITECTURES."""
    for on, width, found in TABLE[arithmetic].get(kind, ()):
        if on in (None, architecture) and width in (None, D_bucket):
            return found
    return None


@functools.cache
def config(kind: str, architecture: int, D_bucket: int, arithmetic: str) -> Config:
    """The configuration of a kernel that has an entry."""
    found = entry(kind, architecture, D_bucket, arithmetic)
    if found is None:
        raise KeyError((kind, architecture, D_bucket, arithmetic))
    block_i, block_j, block_d, *launch = found
    return Config(block_i, block_j, block_d or D_bucket, *launch)
