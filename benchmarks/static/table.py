"""The table of machine code: one row for each binary that the package ships for sm_90.

Columns that need a word: ``resident``: programs on one multiprocessor at once. ``full`` tiles lie
in every anchor's band, ``edge`` tiles do not (also: a kernel's only loop over pairs; of both sweeps
the positives'), ``product``: loops that multiply and take no exponentials, per pair of a tile.
``passes``: products in the machine code for each in Triton IR, 3 in three-pass TF32, where the
instruction tells its size. ``overwritten``: buffers that a copy may write too early (buffers.py).
``h200_us_N``: microseconds of a step's launches of it at N rows, if any
are launched there; ``h200_us_few``: at those of its call, where they are few.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from . import compiled
from .buffers import overwritten
from .compiled import Launch
from .cost import Model
from .machine import machine_code, tensor_core_names
from .passes import sweep_of
from .shipped import Call, specialization

TABLE = Path(__file__).parents[1] / "results" / "static.csv"
#: The committed table's: the one whose times are predicted. ``--arch`` compiles another's.
ARCHITECTURE = 90
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
    given, phases, key = launch.arguments, model.phases(), specialization(launch)
    area = given.get("BLOCK_I", 0) * given.get("BLOCK_J", 0)
    per_pair = {k: phase.instructions * 32 * model.warps / area for k, phase in phases.items()}
    row = identity(launch, call, arch) | {
        "registers": code.registers, "spill_bytes": code.spill_bytes,
        "shared_bytes": code.shared_bytes, "resident": model.resident,
        "tensor_core": tensor_core_names(code), "passes": model.product_passes(),
        "atomics": sum(n for op, n in code.counts.items() if op.startswith(ATOMICS)),
        "overwritten": len(overwritten(binary.asm["ttgir"])),
    }  # fmt: skip
    row |= {f"per_pair_{k}": f"{per_pair[k]:.2f}" if per_pair.get(k) else "" for k in PHASES}
    row |= {f"bound_{k}": model.bound(k) if k in phases else "" for k in PHASES}
    row["bound_rest"] = "" if phases else model.bound("rest")
    # Time is predicted for an H200 at the sizes at which the kernel is launched.
    for n in ("few", *SIZES):
        time = ""
        if arch == 90 and call.is_few == (n == "few"):
            launches = call.launches(arch, call.N if call.is_few else n)
            same = [x for x in launches if specialization(x) == key]
            time = f"{sum(model.at(x).microseconds() for x in same):.1f}" if same else ""
        row[f"h200_us_{n}"] = time
    return row


def table(jobs: list[tuple[Call, int, int]]) -> list[dict[str, object]]:
    """Rows of the jobs, compiled in two processes."""
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        rows = pool.map(row_of, *zip(*jobs, strict=True))
        return list(tqdm(rows, total=len(jobs), file=sys.stderr, mininterval=2))
