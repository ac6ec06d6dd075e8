"""``make gpu OUT=folder``: every check and measurement that needs a GPU, so that two runs fit 15
minutes on a borrowed one.

Each stage is a process with a time limit of its own: one that fails, crashes or hangs leaves the
others alone, and what it had measured remains. Stages that time nothing run side by side. OUT gets
rows.csv, claims.csv, environment.json, log.txt, triton_table.txt and steps.png.
``--rehearse`` runs every stage on the CPU, on batches of a few rows. Other packages' losses are
timed where they can be imported: unpack their wheels and name the folder in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from . import claims, plan, steps
from .plan import LIMIT, NAMES, STAGES
from .processes import Record, run_together
from .rows import CHOSEN


def run_stages(names: list[str], record: Record, limit: float) -> None:
    """Phase after phase; a phase may use what earlier ones left of their time."""
    start, limit = time.monotonic(), limit - plan.PICTURE
    known = os.environ | {CHOSEN: " ".join(names)}
    seconds_of = plan.planned(names, limit)
    for stage in STAGES:
        if stage.name in names:
            print(f"{seconds_of[stage.phase]:6.0f} s  {stage.name:<12}{stage.what}", flush=True)
    for phase in seconds_of:
        stages = [stage for stage in STAGES if stage.name in names and stage.phase == phase]
        later = sum(seconds for other, seconds in seconds_of.items() if other > phase)
        seconds = limit - (time.monotonic() - start) - later
        if seconds < plan.LEAST:
            for stage in stages:
                record.add(stage=stage.name, metric="not run", value=1, note="no time left")
            continue
        print(f"{time.monotonic() - start:4.0f} s  {', '.join(s.name for s in stages)}: at most "
              f"{seconds:.0f} s", flush=True)  # fmt: skip
        run_together([plan.task_of(stage.name, known) for stage in stages], seconds, record)
        record.decide()


def main(arguments: list[str] | None = None) -> int:
    listing = "\n".join(f"  {stage.name:<12}{stage.what}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description=f"{__doc__}\n\nstages:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--stages", nargs="*", default=NAMES, choices=NAMES, metavar="STAGE")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the whole run")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, a few rows a batch")
    options = parser.parse_args(arguments)
    names = options.stages or NAMES
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("not run: no CUDA device")
            return 0
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out, options.rehearse)
    if options.rehearse:
        print("A rehearsal on the CPU: no number of it means anything.", flush=True)
        run_together(plan.rehearsal(names), plan.REHEARSAL_LIMIT, record)
    else:
        run_stages(names, record, options.limit)
    return finish(record, options.out)


def finish(record: Record, out: Path) -> int:
    """The picture, the steps and the table of claims; 1 where a stage failed."""
    record.decide()
    try:
        from . import plot

        plot.picture(claims.Rows(record.rows), record.environment, out / "steps.png")
    except Exception as error:  # no matplotlib, no rows: the numbers are what counts
        record.line("picture", f"no picture: {type(error).__name__}: {error}")
    problems = record.problems()
    print("\n".join(["", *problems[:25], ""]))
    print(steps.table(claims.Rows(record.rows)), claims.table(record.claims), sep="\n\n")
    print(", ".join(sorted(f"{path.name} {path.stat().st_size / 1e3:.0f} kB"
                           for path in out.iterdir())))  # fmt: skip
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
