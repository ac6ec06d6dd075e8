"""The static table of tile shapes and launch options: keyed by capability, bucket of D and dtype.

No value is tuned at run time; ``benchmarks.static`` ranks candidates from their machine code and
``make gpu`` proposes a new table from measurements.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile of BLOCK_I anchors × BLOCK_J keys, chunk of BLOCK_D columns, and how it is launched."""

    BLOCK_I: int
    BLOCK_J: int
    BLOCK_D: int
    num_warps: int
    num_stages: int

    @property
    def tiles(self) -> dict[str, int]:
        return {"BLOCK_I": self.BLOCK_I, "BLOCK_J": self.BLOCK_J, "BLOCK_D": self.BLOCK_D}

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


#: Largest D whose gradient tile stays in registers, by bytes of an element.
REGISTER_D = {2: 256, 4: 128, 8: 64}
KINDS = ("forward", "backward", "wide", "dense")
BUCKETS = (16, 32, 64, 128, 256)
ARCHITECTURES = (80, 90, 100)


def bucket(D: int, itemsize: int) -> int:
    """The padded width of a row that is read at once, or 0 where it is read in chunks."""
    if D > REGISTER_D[itemsize]:
        return 0
    return next(width for width in BUCKETS if D <= width)


@functools.cache
def config(kind: str, architecture: int, D_bucket: int, itemsize: int) -> Config:
    """The configuration of a kernel: ``architecture`` is 80, 90 or 100, the largest that fits."""
    if kind == "dense":
        return Config(16, 64, 64, 4, 2) if itemsize == 2 else Config(16, 32, 32, 4, 2)
    if itemsize == 8:
        return Config(32, 32, D_bucket or 32, 4, 2)
    if kind == "wide" or D_bucket == 0:
        if itemsize == 4:
            return Config(64, 64, 32, 4, 2)
        return Config(128, 128, 64, 8, 3)
    if itemsize == 4:
        return Config(64, 64, D_bucket, 4, 2)
    if D_bucket == 256:
        return Config(128, 64, 256, 8, 2)
    return Config(128, 128, D_bucket, 8, 2)
