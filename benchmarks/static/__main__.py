"""``python -m benchmarks.static``: what the compiler makes of every shipped Triton kernel.

One row for each binary, without a GPU: resources, tensor-core instructions, instructions per pair
of each inner loop, what bounds it, and the time predicted for an H200 from AgeDB's tile counts.
The predictions rank configurations (``--rank``); cost.py states everything that they assume.
"""

from __future__ import annotations

import argparse
import sys

from conr_kernels.triton_backend.configs import ARCHITECTURES, KINDS, REGISTER_D
from conr_kernels.variants import PRESETS

from ..rows import as_csv
from . import rank, shipped
from .table import ARCHITECTURE, SIZES, TABLE, table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--rank", choices=KINDS, help="sort candidates by predicted time instead")
    parser.add_argument("--D", type=int, default=128)
    parser.add_argument("--dtype", choices=REGISTER_D, default="bfloat16")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=ARCHITECTURE)
    parser.add_argument("--variant", choices=PRESETS, default="paper")
    parser.add_argument("--N", type=int, default=SIZES[-1], help="rows")
    options = parser.parse_args()
    if options.rank:
        rank.rank(options.rank, options.D, options.dtype, options.arch, options.variant, options.N)
        return 0
    text = as_csv(table(list(shipped.distinct(options.arch))))
    if options.arch != ARCHITECTURE:
        print(text, end="")
        return 0
    if options.check:
        same = text == TABLE.read_text()
        print(f"{TABLE.name} {'regenerates byte for byte' if same else 'differs'}")
        return 0 if same else 1
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)
    print(f"{text.count(chr(10)) - 1} rows in {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
