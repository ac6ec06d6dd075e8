"""``python -m benchmarks.static``: what the compiler makes of every shipped Triton configuration,
without a GPU.

One row for each kernel of each configuration and architecture: resources, instructions per pair of
each inner loop, the unit that bounds it, and the time predicted for an H200 from the tile counts
of AgeDB's labels.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from conr_kernels.triton_configs import ARCHITECTURES, KINDS, REGISTER_D
from conr_kernels.variants import PRESETS

from . import compiled, machine, rank
from .compiled import Launch
from .machine import Loop, MachineCode

TABLE = Path(__file__).parent / "results" / "static.csv"
AGES = Path(__file__).parent / "agedb_dir_train_ages.csv"
#: (variant, D, arithmetic): the presets with and without large exponents, every entry of the table.
CONFIGURATIONS = [
    ("paper", 64, "bfloat16"),
    ("paper", 128, "bfloat16"),
    ("paper", 256, "bfloat16"),
    ("paper", 2048, "bfloat16"),
    ("released-age", 128, "bfloat16"),
    ("released-age", 128, "float16"),
    ("paper", 128, "float32"),
    ("paper", 64, "float32 highest"),
    ("paper", 512, "float32 highest"),
    ("paper", 64, "float64"),
]
#: An H200: multiprocessors, cycles a second; thread instructions, exponentials and FLOP per cycle
#: of one.
SMS, CLOCK, ISSUE, MUFU = 132, 1.755e9, 128, 16
FLOP = {"bfloat16": 4096, "float16": 4096, "float32": 2048, "float32 highest": 2048, "float64": 256}
PASSES = {"float32 highest": 3}
SIZES = (16_384, 65_536)
#: Atomics on global memory.
ATOMICS = ("ATOMG", "ATOM.", "RED.")


def shipped() -> list[tuple[str, int, str, int]]:
    return [(*key, arch) for key in CONFIGURATIONS for arch in ARCHITECTURES]


def rows_of(variant: str, D: int, arithmetic: str, arch: int) -> list[dict[str, object]]:
    """The rows of one configuration: its sweeps' kernels, in the order of their launches."""
    dtype = getattr(torch, arithmetic.split()[0])
    precision = "highest" if arithmetic.endswith("highest") else "high"
    launches = compiled.recorded_launches(
        16_384, D, dtype, arch, variant=variant, precision=precision
    )
    return [
        _row(launch, variant, D, arithmetic, arch) for launch in launches if "ward_" in launch.name
    ]


def _row(launch: Launch, variant: str, D: int, arithmetic: str, arch: int) -> dict[str, object]:
    code = machine.machine_code(compiled.compile_launch(launch, arch))
    given = launch.arguments
    block_i, block_j, width = given["BLOCK_I"], given["BLOCK_J"], given["D_PAD"]
    threads = 32 * launch.options["num_warps"]
    is_wide, is_backward = "wide" in launch.name, "backward" in launch.name
    sweep = "negatives" if "negatives" in launch.name or given.get("NEGATIVES") else "positives"
    loops = [] if is_wide or width != given["BLOCK_D"] else machine.pair_loops(code)
    per_pair = [len(loop.instructions) * threads / (block_i * block_j) for loop in loops]
    if len(loops) != 2:  # chunks of D inside the pairs' loop, or exponentials in software
        per_pair, loops = [], []
    flop = 2 * width * (2 if is_backward else 1) * PASSES.get(arithmetic, 1)
    tensor = flop / FLOP[arithmetic]
    bounds = [_bound(n, loop, threads / (block_i * block_j), tensor)
              for n, loop in zip(per_pair, loops, strict=True)]  # fmt: skip
    row: dict[str, object] = {
        "arch": arch, "variant": variant, "D": D, "arithmetic": arithmetic,
        "kernel": launch.name, "sweep": sweep,
        "tile": f"{block_i}x{block_j}x{given['BLOCK_D']}",
        "num_warps": launch.options["num_warps"], "num_stages": launch.options["num_stages"],
        "registers": code.registers, "spill_bytes": code.spill_bytes,
        "shared_bytes": code.shared_bytes, "tensor_core": _tensor_core(code),
        "atomics": sum(n for op, n in code.counts.items() if op.startswith(ATOMICS)),
        "per_pair_full": f"{per_pair[0]:.2f}" if per_pair else "",
        "per_pair_edge": f"{per_pair[1]:.2f}" if per_pair else "",
        "bound_full": bounds[0][0] if bounds else "tensor",
        "bound_edge": bounds[1][0] if bounds else "tensor",
    }  # fmt: skip
    cycles = [bound[1] for bound in bounds] or [tensor, tensor]
    for n in SIZES:
        full, edge = tile_counts(n, block_i, block_j)[sweep]
        pairs = (full * cycles[0] + edge * cycles[1]) * block_i * block_j
        row[f"h200_us_{n}"] = f"{pairs / SMS / CLOCK * 1e6:.1f}" if arch == 90 else ""
    return row


def _tensor_core(code: MachineCode) -> str:
    names = sorted({op.split(".")[0] for op in code.counts if machine.is_tensor_core(op)})
    counts = (sum(n for op, n in code.counts.items() if op.split(".")[0] == name) for name in names)
    return " ".join(f"{name}:{n}" for name, n in zip(names, counts, strict=True))


def _bound(per_pair: float, loop: Loop, share: float, tensor: float) -> tuple[str, float]:
    """The unit that needs most cycles for a pair on one multiprocessor, and those cycles."""
    cycles = {
        "issue": per_pair / ISSUE,
        "exponential": loop.count("MUFU") * share / MUFU,
        "tensor": tensor,
    }
    return max(cycles.items(), key=lambda item: item[1])


@functools.cache
def batch(n: int) -> tuple[Tensor, Tensor]:
    """Sorted labels with AgeDB-DIR's counts, and sorted predictions about 7 years off."""
    with AGES.open() as file:
        counts = {float(row["age"]): int(row["count"]) for row in csv.DictReader(file)}
    ages = torch.tensor(list(counts), dtype=torch.float64)
    below = torch.tensor(list(counts.values()), dtype=torch.float64).cumsum(0)
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    y = ages[torch.searchsorted(below / below[-1], quantiles)]
    # Errors by their quantiles too, in an order without relation to the labels': no random numbers.
    golden = (torch.arange(n, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) + 0.25) % 1
    deviation = 7 * math.sqrt(math.pi / 2)
    errors = deviation * math.sqrt(2) * torch.special.erfinv(2 * golden.clamp(1e-9, 1 - 1e-9) - 1)
    return y, (y + errors).sort().values


@functools.cache
def tile_counts(n: int, block_i: int, block_j: int) -> dict[str, tuple[int, int]]:
    """Full and edge tiles of both sweeps (window 1): as the kernels' ``segments``."""
    counts = {}
    for name, values in zip(("positives", "negatives"), batch(n), strict=True):
        lo = torch.searchsorted(values, values - 1)
        hi = torch.searchsorted(values, values + 1, right=True)
        first = torch.arange(0, n, block_i)
        last = (first + block_i - 1).clamp(max=n - 1)
        start, stop = lo[first] // block_j, -(-hi[last] // block_j)
        full = (hi[first] // block_j - -(-lo[last] // block_j)).clamp(min=0)
        if name == "positives":  # tiles with a row's pair with itself are edges
            full = (full - -(-block_i // block_j)).clamp(min=0)
        counts[name] = (int(full.sum()), int((stop - start - full).sum()))
    return counts


def as_csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.static")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--rank", choices=KINDS, help="sort candidates by predicted time instead")
    parser.add_argument("--D", type=int, default=128)
    parser.add_argument("--dtype", choices=REGISTER_D, default="bfloat16")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--variant", choices=PRESETS, default="paper")
    parser.add_argument("--N", type=int, default=65_536)
    options = parser.parse_args()
    if options.rank:
        rank.rank(options.rank, options.D, options.dtype, options.arch, options.variant, options.N)
        return 0
    groups = []
    for key in shipped():
        print(f"compiling {key}", file=sys.stderr, flush=True)
        groups.append(rows_of(*key))
    text = as_csv([row for group in groups for row in group])
    if options.check:
        same = text == TABLE.read_text()
        print(f"{TABLE.name} {'regenerates byte for byte' if same else 'differs'}")
        return 0 if same else 1
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
