"""``python -m benchmarks``: the gate, then time and memory, a table, rows as CSV and a picture."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
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


def cases(device: str, largest: int) -> Iterable[tuple[int, str, list[Step]]]:
    """What is timed in turns: ``(N, labels, steps)``."""
    sizes = [(n, "agedb") for n in SIZES if n <= largest]
    if largest >= CONSTANT_SIZE:
        sizes.append((CONSTANT_SIZE, "constant"))
    for n, labels in sizes:
        names = [t.name for t in providers(device) if n <= t.largest]
        if n in PRODUCT_SIZES and labels == "agedb":
            names.append(report.PRODUCT)
        yield n, labels, [Step(name, n, labels, device) for name in names]


def fits(step: Step, by_name: dict[str, Provider]) -> bool:
    """Whether memory is enough; says so if not."""
    pair_bytes = by_name[step.provider].pair_bytes if step.provider in by_name else 4
    needed, available = step.n**2 * pair_bytes, measure.memory_available(step.device)
    if needed > 0.9 * available:
        tqdm.write(
            f"skipped: {step.provider} at N = {step.n:,} needs about {report.bytes_text(needed)}, "
            f"{report.bytes_text(available)} are available"
        )
        return False
    return True


def measure_case(steps: list[Step], by_name: dict[str, Provider], common: dict, bar: tqdm):
    """The rows of one N and kind of labels."""
    first, steps = {}, [step for step in steps if fits(step, by_name) or bar.update()]
    for step in steps:
        bar.set_description(f"N = {step.n:,}, {step.provider}")
        first[step] = measure.first_step(step)
        bar.update()
    seconds = measure.times([t for t in steps if first[t][0] <= measure.LONG_STEP_S])
    for step in steps:
        kernel = "conr paper, " + ("AgeDB" if step.labels == "agedb" else "constant p")
        values = seconds.get(step, [first[step][0]])
        found = {"time": statistics.median(values), "memory": first[step][1]}
        if step.provider in by_name:
            provider = by_name[step.provider]
            found["difference"] = measure.row_difference(provider, step.n, step.labels, step.device)
        mode = MODE if step.provider in by_name else "forward"
        for metric, value in found.items():
            n_runs = len(values) if metric == "time" else 1
            yield rows.Row(
                kernel=kernel, provider=step.provider, mode=mode, metric=metric, size=step.n,
                value=value, n_runs=n_runs, **common,
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
    plan = list(cases(device, options.largest))
    with tqdm(total=sum(len(steps) for _, _, steps in plan), unit="case") as bar:
        for _, _, steps in plan:
            found += measure_case(steps, {t.name: t for t in candidates}, common, bar)
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
