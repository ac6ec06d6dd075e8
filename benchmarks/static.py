"""``python -m benchmarks.static``: what the compiler makes of every shipped Triton kernel.

One row for each binary, without a GPU: resources, tensor-core instructions, instructions per pair
of each inner loop, what bounds it, and the time predicted for an H200 from AgeDB's tile counts.
The predictions rank configurations (``--rank``); cost.py states everything that they assume.

Columns that need a word: ``resident``: programs on one multiprocessor at once. ``full`` tiles lie
in every anchor's band, ``edge`` tiles do not (also: a kernel's only loop over pairs), ``product``:
loops that multiply and take no exponentials, per pair of a tile. ``passes``: products in the
machine code for each in Triton IR, 3 in three-pass TF32, where the instruction tells its size.
``h200_us_N``: microseconds of one launch at N rows; the kernels for few rows at 1,024.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from conr_kernels.triton_backend.configs import ARCHITECTURES, KINDS, REGISTER_D
from conr_kernels.variants import PRESETS

from . import compiled, rank, shipped
from .compiled import Launch
from .cost import Model
from .machine import machine_code, tensor_core_names
from .passes import sweep_of
from .shipped import DENSE, Call

TABLE = Path(__file__).parent / "results" / "static.csv"
SIZES = (16_384, 65_536)
#: Atomics on global memory.
ATOMICS = ("ATOMG", "ATOM.", "RED.")
PHASES = ("full", "edge", "product")


def identity(launch: Launch, call: Call, arch: int) -> dict[str, object]:
    """What a row is about: known without compiling anything."""
    given = launch.arguments
    tile = (given[name] for name in ("BLOCK_I", "BLOCK_J", "BLOCK_D") if name in given)
    return {
        "arch": arch, "kernel": launch.name, "sweep": sweep_of(launch) or "",
        "arithmetic": call.arithmetic, "D": call.D, "call": str(call),
        "tile": "x".join(map(str, tile)), "num_warps": launch.options.get("num_warps", 4),
        "num_stages": launch.options.get("num_stages", ""),
    }  # fmt: skip


def row_of(call: Call, index: int, arch: int) -> dict[str, object]:
    """The row of one launch of a call."""
    launch = call.launches(arch)[index]
    binary = compiled.compile_launch(launch, arch)
    code = machine_code(binary)
    model = Model(launch, binary.asm["ttir"], code, arch)
    given, phases = launch.arguments, model.phases()
    area = given.get("BLOCK_I", 0) * given.get("BLOCK_J", 0)
    per_pair = {k: phase.instructions * 32 * model.warps / area for k, phase in phases.items()}
    row = identity(launch, call, arch) | {
        "registers": code.registers, "spill_bytes": code.spill_bytes,
        "shared_bytes": code.shared_bytes, "resident": model.resident,
        "tensor_core": tensor_core_names(code), "passes": model.product_passes(),
        "atomics": sum(n for op, n in code.counts.items() if op.startswith(ATOMICS)),
    }  # fmt: skip
    for kind in PHASES:
        row[f"per_pair_{kind}"] = f"{per_pair[kind]:.2f}" if per_pair.get(kind) else ""
    for kind in PHASES:
        row[f"bound_{kind}"] = model.bound(kind) if kind in phases else ""
    row["bound_rest"] = "" if phases else model.bound("rest")
    for n in (DENSE, *SIZES):
        # Time is predicted for an H200 at the sizes at which the kernel is launched.
        is_asked = arch == 90 and (call.N == DENSE) == (n == DENSE)
        time = ""
        if is_asked:
            time = f"{model.at(call.launches(arch, n)[index]).microseconds():.1f}"
        row[f"h200_us_{n}"] = time
    return row


def table(jobs: list[tuple[Call, int, int]]) -> list[dict[str, object]]:
    """Rows of the jobs, in their order, compiled in two processes."""
    rows: dict[tuple, dict] = {}
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(row_of, *job): job for job in jobs}
        for done in tqdm(as_completed(pending), total=len(pending), file=sys.stderr, mininterval=2):
            rows[pending[done]] = done.result()
    return [rows[job] for job in jobs]


def as_csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--rank", choices=KINDS, help="sort candidates by predicted time instead")
    parser.add_argument("--D", type=int, default=128)
    parser.add_argument("--dtype", choices=REGISTER_D, default="bfloat16")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--variant", choices=PRESETS, default="paper")
    parser.add_argument(
        "--N", type=int, help="rows; default 65,536, or 1,024 for few rows' kernels"
    )
    options = parser.parse_args()
    if options.rank:
        n = options.N or (DENSE if options.rank.startswith("dense") else SIZES[-1])
        rank.rank(options.rank, options.D, options.dtype, options.arch, options.variant, n)
        return 0
    text = as_csv(table(list(shipped.distinct())))
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
