"""``python -m benchmarks``: the gate, then time and memory, a table, rows as CSV and a picture."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import measure, plot, report, rows
from .measure import Step
from .providers import Provider, providers

SIZES = tuple(2**k for k in range(6, 17))
CONSTANT_SIZE = 4096
PRODUCT_SIZES = (8192, 16_384)
RESULTS = Path(__file__).parent / "results"
MODE = "forward+backward"


def cases(candidates: list[Provider], device: str, largest: int) -> list[list[Step]]:
    """What is timed in turns: the steps of one N and kind of labels."""
    sizes = [(n, "agedb") for n in SIZES if n <= largest]
    sizes += [(CONSTANT_SIZE, "constant")] * (largest >= CONSTANT_SIZE)
    found = []
    for n, labels in sizes:
        names = [provider.name for provider in candidates if n <= provider.largest]
        names += [report.PRODUCT] * (n in PRODUCT_SIZES and labels == "agedb")
        found.append([Step(name, n, labels, device) for name in names])
    return found


def fits(step: Step, by_name: dict[str, Provider]) -> bool:
    """Whether memory is enough; says so if not."""
    pair_bytes = by_name[step.provider].pair_bytes if step.provider in by_name else 4
    needed, available = step.n**2 * pair_bytes, measure.memory_available(step.device)
    if needed > 0.9 * available:
        tqdm.write(
            f"skipped: {step.provider} at N = {step.n:,} needs about {report.bytes_text(needed)}, "
            f"{report.bytes_text(available)} are available"
        )
    return needed <= 0.9 * available


def measure_case(
    steps: list[Step], by_name: dict[str, Provider], common: dict, bar: tqdm
) -> Iterator[rows.Row]:
    """The rows of one N and kind of labels."""
    first: dict[Step, tuple[float, int]] = {}
    for step in steps:
        bar.set_description(f"N = {step.n:,}, {step.provider}")
        if fits(step, by_name):
            first[step] = measure.first_step(step)
        bar.update()
    seconds = measure.times([step for step in first if first[step][0] <= measure.LONG_STEP_S])
    for step, (first_seconds, memory) in first.items():
        values, provider = seconds.get(step, [first_seconds]), by_name.get(step.provider)
        found = {"time": statistics.median(values), "memory": memory}
        if provider is not None:
            found["difference"] = measure.row_difference(provider, step.n, step.labels, step.device)
        for metric, value in found.items():
            yield rows.Row(
                kernel="conr paper, " + ("AgeDB" if step.labels == "agedb" else "constant p"),
                provider=step.provider, mode="forward" if provider is None else MODE, metric=metric,
                size=step.n, value=value, n_runs=len(values) if metric == "time" else 1, **common,
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="largest N")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for CSV and picture")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    candidates = providers(device)
    common = rows.environment(device)
    print(f"ConR on {common['device']}, {common['threads']} threads, torch {common['torch']}")

    problems = measure.gate(candidates, device)
    if problems:
        print("Nothing was timed: results are wrong.", *problems, sep="\n  ", file=sys.stderr)
        return 1
    print("Losses and gradients agree with the float64 reference; measuring.", flush=True)

    found: list[rows.Row] = []
    plan, by_name = cases(candidates, device, options.largest), {t.name: t for t in candidates}
    with tqdm(total=sum(map(len, plan)), unit="case") as bar:
        for steps in plan:
            found += measure_case(steps, by_name, common, bar)
    name = "cpu" if device == "cpu" else "gpu"
    rows.write(options.output / f"{name}.csv", [vars(row) for row in found])
    plot.picture(found, options.output / f"{name}.png")

    print(report.table(found))
    print(
        "\ntime: median of one forward+backward step; memory: its peak above what was there;\n"
        "speed, saving: eager's time, memory over this; difference: largest error\n"
        "of a row loss against the float64 reference, over the largest row loss\n"
    )
    print(report.summary(found))
    print(f"\n{options.output}/{name}.csv, {name}.png; {time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
