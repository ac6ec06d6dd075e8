"""How long a compiled kernel would take on an H200: a model, not a measurement.

Assumptions, all of them:

- The machine: 132 multiprocessors at 1.755 GHz; each issues 4 warp instructions, evaluates 16
  exponentials and 64 float64 operations per cycle, multiplies 4,096 FLOP of 16-bit numbers, 2,048
  of TF32 and 256 of float64, and moves 128 bytes to or from shared memory. 10.6 TB/s from the L2
  cache of 50 MB, shared evenly, at most 64 bytes per cycle and multiprocessor; 4.8 TB/s from HBM.
  Three-pass TF32 is three products; mma.sync reaches 60 % of wgmma. For sm_80 and sm_100, which get
  a bound but no time, the rates of products and of float64 and the shared memory are their own.
- Every instruction of a loop is issued on every pass (machine code), products that two warps both
  compute count twice; loads and stores of a tile go
  to L2 once per program (Triton IR), also where the first-level cache would serve them; loops run
  as often as the tile counts of AgeDB's labels say, with window 1 and predictions 7 years off.
- The wgmma instructions read their operands from shared memory, the first one from registers where
  the machine code says so.
- Within one program a tile's products and its arithmetic alternate and do not overlap; programs
  that share a multiprocessor overlap, but not perfectly. With W resident programs a tile takes
  ``(u^1.5 + a^1.5)^(2/3)`` of the busiest unit's time u and ``a = (products + arithmetic + latency)
  / W``; where a is larger the bound is called *latency*, with the busiest unit in brackets.
- The exponent is fitted to 20 tiles of earlier kernels on an H200; the order of 35 tiles of these
  agrees (results/h200-tuning.csv: rank correlation 0.79 to 0.99). Of the shipped (h200-b99b7b8.csv)
  the times are 0.95 to 1.14 of the measured for sweeps and wide features, 0.80 and 0.97 for 4,096
  rows, and where each pair is taken once 0.77 (65,536, D = 128) and 1.24 (16,384, D = 2,048).
- A load takes 600 cycles. Of a loop that the compiler pipelines (a product and more than one
  stage) each entry waits for one, and a pass takes no less than ``600 / (stages - 1)``; of any
  other loop that loads, each pass waits for one.
- Programs are placed in order on the first free place; the kernel ends with the last of them.
- Each tensor crosses the HBM bus once. Where what all resident programs work on exceeds the L2
  cache, the same share of all traffic goes to HBM.
- Each program of ``conr_order_kernel`` is taken to do what all kinds of them do: too long a time.
- Nothing for the launch, the host, clock changes or power limits: a lower bound for small batches.
"""

from __future__ import annotations

import copy
import heapq
import re
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from . import tiles
from .compiled import Launch
from .loops import CodeLoop, Matched, Nest, code_loops, match, nest_of
from .machine import MachineCode, is_tensor_core, opcode, product_flop
from .passes import (
    anchor_tiles,
    is_of_few_rows,
    is_product,
    phases_of,
    programs_per_tile,
    sweep_of,
    window_of,
)

SMS, CLOCK = 132, 1.755e9
ISSUE, MUFU, SHARED = 4, 16, 128
L2_BANDWIDTH, L2_PORT, L2_BYTES, HBM_BANDWIDTH = 10.6e12, 64, 50e6, 4.8e12
LATENCY = 600
#: Exponent of the norm that adds the busiest unit's time to that of waiting; infinite: perfect
#: overlap.
OVERLAP = 1.5
#: Full and edge tiles of a tile of anchors, where what they share is spread over them.
TYPICAL = 32
#: Registers, shared memory, threads and programs of one multiprocessor.
REGISTERS, THREADS, PROGRAMS = 65_536, 2048, 32
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
#: FLOP per cycle and multiprocessor by kind of product, and float64 operations: A100, H200, B200.
FLOP = {
    80: {"half": 2048, "tf32": 1024, "f64": 128},
    90: {"half": 4096, "tf32": 2048, "f64": 256},
    100: {"half": 8192, "tf32": 4096, "f64": 256},
}
#: Share of it that mma.sync reaches where wgmma exists.
OLD_PRODUCTS = 0.6
FLOAT64 = {80: 32, 90: 64, 100: 64}
PASSES = {"tf32x3": 3}
UNITS = ("issue", "exponential", "tensor", "shared", "float64", "L2")
DOUBLES = ("DFMA", "DADD", "DMUL", "DSETP", "DMNMX")
WIDTH = {"LDS": 4, "STS": 4, "LDSM": 4, "STSM": 4, "LDGSTS": 4}


@dataclass(frozen=True)
class Phase:
    """A kind of work of one program ("full", "edge", "product" or "rest") and the cycles of each
    unit for one pass through it.

    ``instructions``: of a thread.
    """

    units: dict[str, float]
    latency: float
    instructions: float

    @property
    def busiest(self) -> tuple[str, float]:
        return max(self.units.items(), key=lambda item: item[1])

    @property
    def alone(self) -> float:
        """Cycles of one program that has the multiprocessor for itself."""
        return _one_after_the_other(self.units) + self.latency


def _one_after_the_other(units: dict[str, float]) -> float:
    """Products, then arithmetic."""
    arithmetic = max(units["issue"], units["exponential"], units["float64"])
    return max(units["tensor"], units["shared"]) + arithmetic


class Model:
    """One compiled launch: its phases, and the time they take."""

    def __init__(self, launch: Launch, ttir: str, code: MachineCode, architecture: int) -> None:
        self.launch, self.code, self.architecture = launch, code, architecture
        self.tree = match(nest_of(ttir), code_loops(code))
        self.warps = launch.options.get("num_warps", 4)
        self.stages = launch.options.get("num_stages", 3)
        self.has_tensor_cores = any(map(is_tensor_core, code.counts))
        self._units = {id(loop): self._count(loop) for loop in self.tree.walk()}

    @property
    def resident(self) -> int:
        """Programs that fit on one multiprocessor at once."""
        registers = -(-self.code.registers // 8) * 8 * 32 * self.warps
        limits = (
            REGISTERS // max(registers, 1),
            SHARED_BYTES[self.architecture] // (self.code.shared_bytes + 1024),
            THREADS // (32 * self.warps),
            PROGRAMS,
        )
        return max(min(limits), 1)

    def phases(self) -> dict[str, Phase]:
        """One pass through each kind of tile."""
        found = self._phases(self._typical, self.l2_share(SMS))
        return {kind: phase for kind, (phase, _) in found.items() if kind != "rest"}

    def _phases(self, visit: tuple[int, ...], l2: float) -> dict[str, tuple[Phase, float]]:
        """The phases of an anchor tile with so many tiles of keys, and how often each passes."""
        return {
            kind: (self._phase(node, n, l2), n)
            for kind, node, n in phases_of(self.tree, self.launch, *visit)
            if n
        }

    @property
    def _typical(self) -> tuple[int, ...]:
        """Full and edge tiles; of a product for wide features, of one tile of anchors."""
        if sweep_of(self.launch) == "both":
            return (TYPICAL,) * 4
        return (1 if is_product(self.launch) else TYPICAL), TYPICAL

    def l2_share(self, n_programs: int) -> float:
        return min(L2_BANDWIDTH / CLOCK / min(n_programs, SMS), L2_PORT)

    def _phase(self, node: list[tuple[Matched, float]], n: float, l2: float) -> Phase:
        units, latency, instructions = dict.fromkeys(UNITS, 0.0), 0.0, 0.0
        for loop, passes in node:
            passes /= n
            for unit, cycles in self._own(loop, l2).items():
                units[unit] += cycles * passes
            latency += self._latency(loop) * passes
            instructions += passes * (len(loop.code.instructions) if loop.code else 0)
        return Phase(units, latency, instructions)

    def _own(self, loop: Matched, l2: float) -> dict[str, float]:
        """Cycles of each unit for one pass through a loop's own body."""
        return self._units[id(loop)] | {"L2": loop.nest.bytes / l2}

    def _count(self, loop: Matched) -> dict[str, float]:
        rates, code, units = FLOP[self.architecture], loop.code, dict.fromkeys(UNITS, 0.0)
        if self.has_tensor_cores:
            kinds = {k: n * PASSES.get(k, 1) for k, n in loop.nest.products.items()}
            cycles = sum(n / rates[k[:4]] for k, n in kinds.items() if k[:4] in rates)
            if code is not None and kinds:
                done = sum(product_flop(opcode(line), self.warps) for line in code.instructions)
                cycles *= max(1.0, done / sum(kinds.values()))
                cycles /= OLD_PRODUCTS if code.count("HMMA") and self.architecture == 90 else 1
            units["tensor"] = cycles
        if code is not None:
            units["issue"] = len(code.instructions) * self.warps / ISSUE
            units["exponential"] = code.count("MUFU") * 32 * self.warps / MUFU
            units["float64"] = code.count(*DOUBLES) * 32 * self.warps / FLOAT64[self.architecture]
            units["shared"] = (shared_bytes(code, self.warps) + loop.nest.operand_bytes
                               * bool(code.count("UTCHMMA"))) / SHARED  # fmt: skip
        return units

    def _latency(self, loop: Matched) -> float:
        """What one pass waits for: its loads, and the first ones of pipelined loops in it."""
        waits = sum(LATENCY for child in loop.loops if self._is_pipelined(child.nest))
        if self._is_pipelined(loop.nest):
            work = _one_after_the_other(self._own(loop, L2_PORT))
            return waits + max(0.0, LATENCY / (self.stages - 1) - work)
        return waits + LATENCY * (loop.nest.loads > 0)

    def _is_pipelined(self, nest: Nest) -> bool:
        return bool(nest.products) and not nest.loops and nest.loads > 0 and self.stages > 1

    def product_passes(self) -> str:
        """Products in the machine code for each in Triton IR."""
        done = sum(n * product_flop(op, self.warps) for op, n in self.code.counts.items())
        asked = sum(sum(loop.nest.products.values()) for loop in self.tree.walk())
        return f"{done / asked:.3g}" if done and asked else ""

    def at(self, launch: Launch) -> Model:
        """The same binary, launched with other sizes."""
        other = copy.copy(self)
        other.launch = launch
        return other

    def microseconds(self) -> float:
        """Of the whole launch."""
        busy = self._makespan() / CLOCK
        return 1e6 * max(busy, self._hbm_bytes() / HBM_BANDWIDTH)

    def bound(self, kind: str) -> str:
        """What bounds a kind of tile: a unit, or the latency of too few resident programs. A kernel
        without pairs has one kind, "rest", and memory for L2.
        """
        phase = self._phases(self._typical, self.l2_share(SMS))[kind][0]
        unit, cycles = phase.busiest
        resident = self._filled if kind == "rest" else self.resident
        unit = "memory" if kind == "rest" and unit == "L2" else unit
        return f"latency ({unit})" if cycles < phase.alone / resident else unit

    @property
    def _filled(self) -> int:
        """Programs on one multiprocessor that the grid really has."""
        return min(self.resident, -(-self.launch.grid[0] // SMS))

    def _work(self) -> list[tuple[float, float]]:
        """Every program's cycles: of the busiest units, and alone."""
        share = self.l2_share(self.launch.grid[0])
        seen: dict[tuple[int, ...], tuple[float, float]] = {}
        per_tile = []
        for visit in anchor_tiles(self.launch):
            if visit not in seen:
                phases = self._phases(visit, share).values()
                seen[visit] = (
                    sum(n * phase.busiest[1] for phase, n in phases),
                    sum(n * phase.alone for phase, n in phases),
                )
            per_tile.append(seen[visit])
        return [per_tile[program % len(per_tile)] for program in range(self.launch.grid[0])]

    def _makespan(self) -> float:
        work = self._work()
        resident = self._filled
        places = [0.0] * (SMS * resident)
        for busiest, alone in work:
            both = (busiest * resident) ** OVERLAP + alone**OVERLAP
            heapq.heapreplace(places, places[0] + both ** (1 / OVERLAP))
        return max(places)

    def l2_bytes(self) -> float:
        total = 0.0
        for visit, times in Counter(anchor_tiles(self.launch)).items():
            for _, node, _ in phases_of(self.tree, self.launch, *visit):
                total += times * sum(loop.nest.bytes * passes for loop, passes in node)
        return total * max(1, self.launch.grid[0] / len(anchor_tiles(self.launch)))

    def _hbm_bytes(self) -> float:
        given = self.launch.arguments
        unique = {id(t): t.numel() * t.element_size() for name, t in given.items()
                  if isinstance(t, Tensor) and name != "H_ptr"}  # fmt: skip
        once = sum(unique.values())
        if is_of_few_rows(self.launch):  # of a workspace that its launches share, its own part
            return min(once, self.l2_bytes())
        sweep = sweep_of(self.launch)
        if "H_ptr" in given:
            sweep, here, share = window_of(self.launch)
            area = given["BLOCK_I"] * given["BLOCK_J"]
            once = once * share + sum(here) * area * given["H_ptr"].element_size()
            if not here:
                return 0.0
        if sweep is None:
            return once
        live = self._live_bytes(sweep)
        return max(once, self.l2_bytes() * max(0.0, 1 - L2_BYTES / max(live, 1)))

    def _live_bytes(self, sweep: str) -> float:
        """What the resident programs of a sweep read and write again and again."""
        given = self.launch.arguments
        n, block_i = given["n_anchors"], given["BLOCK_I"]
        n_programs = min(self.launch.grid[0], SMS * self.resident)
        own = -(-n_programs // programs_per_tile(self.launch)) * block_i
        rows = own + tiles.band_rows(n, sweep)
        live, seen = 0.0, set()
        for name, value in given.items():
            if not isinstance(value, Tensor) or name in ("x_ptr", "gradient_ptr", "H_ptr"):
                continue
            if id(value) not in seen:
                seen.add(id(value))
                share = 1.0 if value.numel() < n else min(1.0, rows / n)
                live += value.numel() * value.element_size() * share
        if "H_ptr" in given:
            live += own * tiles.band_rows(n, sweep) * given["H_ptr"].element_size()
        return live


def shared_bytes(code: CodeLoop, warps: int) -> float:
    """Bytes that one pass moves between registers, tensor cores or L2 and shared memory."""
    total = 0.0
    for line in code.instructions:
        op = opcode(line)
        name, *parts = op.split(".")
        if name in WIDTH and not line.startswith("@!PT"):
            per_lane = next((int(p) // 8 for p in parts if p in ("64", "128")), 4)
            if name in ("LDSM", "STSM"):
                per_lane = 4 * int(parts[-1] if parts[-1] in ("2", "4") else 1)
            total += 32 * warps * per_lane
        elif found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
            m, n, k = map(int, found.groups())
            has_a = re.search(r"HGMMA\S* \w+, gdesc", line) is not None
            total += (n + m * has_a) * k * (32 / k) * (warps / 4)
    return total
