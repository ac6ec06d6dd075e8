"""The stage that reads the kernels' hardware counters, by Nsight Compute where it is installed."""

from __future__ import annotations

import csv
import functools
import itertools
import sys

import torch

from .. import device
from ..rows import Stage
from .providers import PROVIDERS, Size

TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
ISSUED = "smsp__issue_active.avg.pct_of_peak_sustained_active"
BUSIEST, MEAN = "sm__cycles_active.max", "sm__cycles_active.avg"
METRICS = (TENSOR, WARPS, ISSUED, BUSIEST, MEAN)
SIZES = (Size(65_536), Size(16_384, 2048), Size(512))


def one_step(n: int, d: int) -> None:
    """What the profiled process runs: kernels are compiled by the first step, counted in both."""
    PROVIDERS["triton"].step(Size(n, d).batch())
    torch.cuda.synchronize()


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Percentages of every kernel in ``ncu --csv --page raw``, its slowest launch where it has
    several: ``imbalance`` is what the busiest multiprocessor has more than the mean.
    """
    table = itertools.dropwhile(lambda line: not line.startswith('"ID"'), text.splitlines())
    found: dict[str, dict[str, float]] = {}
    slowest: dict[str, float] = {}
    for row in csv.DictReader(table):
        if not row["ID"]:  # units
            continue
        value = {name: float(row[name].replace(",", "")) for name in METRICS}
        kernel = row["Kernel Name"]
        if value[BUSIEST] > slowest.get(kernel, 0.0):
            slowest[kernel] = value[BUSIEST]
            found[kernel] = {
                "tensor pipe": value[TENSOR],
                "occupancy": value[WARPS],
                "no eligible warp": 100 - value[ISSUED],
                "imbalance": 100 * (value[BUSIEST] / value[MEAN] - 1),
            }
    return found


def profile(stage: Stage, tool: str, size: Size) -> None:
    code = f"from benchmarks.gpu.stages.counters import one_step; one_step({size.N}, {size.D})"
    command = [tool, "--clock-control", "none", "--csv", "--page", "raw"]
    command += ["--kernel-name", "regex:conr_", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-c", code]
    status, output = stage.output_of(stage.start(command))
    kernels = parsed(output) if status == 0 else {}
    if not kernels:
        errors = [line for line in output.splitlines() if "ERROR" in line] or [f"status {status}"]
        stage.add("not run", 1, provider="triton", **size.row(), note=errors[0][:300])
    for kernel, counted in kernels.items():
        for name, percent in counted.items():
            stage.add(name, percent, provider="triton", mode=kernel, note="%", **size.row())


def counters(stage: Stage) -> int:
    """Tensor pipe, occupancy, cycles without an eligible warp, imbalance, of every kernel."""
    tool = device.cuda_tool("ncu")
    if device.REHEARSAL or tool is None:
        reason = "rehearsal" if device.REHEARSAL else "ncu is not installed"
        stage.add("not run", 1, provider="triton", note=reason)
        return 0
    return stage.run({str(size): functools.partial(profile, stage, tool, size) for size in SIZES})
