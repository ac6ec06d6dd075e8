"""``make gpu OUT=folder``: every check and measurement that needs a GPU, in at most nine minutes.

Each stage is a process with a time limit of its own: one that fails, crashes or hangs leaves the
others alone, and what it had measured remains. Stages that time nothing run side by side. OUT gets
rows.csv, claims.csv, environment.json, log.txt, triton_table.txt and steps.png.
``--rehearse`` runs every stage on the CPU, on batches of a few rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import claims
from .processes import Record, Task, run_together

ROOT = Path(__file__).parents[2]
#: Seconds of a whole run, and the least that a stage is worth starting with.
LIMIT, LEAST = 530.0, 12.0
#: What a stage keeps of its limit to end by itself, and tests at a time.
MARGIN, TEST_PROCESSES = 8.0, 8
INTEGRATION = ["tests/gpu/test_gpu_integration.py", "tests/interface/test_compile.py",
               "tests/interface/test_training_modes.py"]  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage, its seconds in a run of all stages, and those it runs side by side with."""

    name: str
    seconds: float
    phase: int
    what: str


STAGES = [
    Stage("warm", 60, 0, "compiles Triton kernels in many processes"),
    Stage("inductor", 60, 0, "compiles the comparators that are compiled"),
    Stage("build", 60, 0, "builds csrc/ with nvcc"),
    Stage("tests", 110, 1, "tests of the Triton backend"),
    Stage("integration", 110, 1, "tests of the loss inside PyTorch"),
    Stage("cuda-tests", 110, 1, "tests of the CUDA backend"),
    Stage("sanitizer", 110, 1, "compute-sanitizer"),
    Stage("speed", 80, 2, "what is claimed of the Triton backend's speed"),
    Stage("compare", 80, 3, "dense fused kernels, FlexAttention, compiled eager"),
    Stage("cuda", 25, 4, "the CUDA backend's speed"),
    Stage("train", 30, 5, "training steps"),
    Stage("grid", 45, 6, "time over N"),
    Stage("tune", 90, 7, "candidates for the static table"),
]
NAMES = [stage.name for stage in STAGES]


def pytest_command(files: list[str], n_processes: int, *options: str) -> list[str]:
    """Every file's tests, the first twenty failures at the most, a line for each."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.pytest_rows", *files]
    command += ["-q", "--maxfail=20", "--tb=short", "-p", "no:cacheprovider", *options]
    if n_processes > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(n_processes)]
    return command


def command_of(stage: str) -> Callable[[float, list[str]], list[str]]:
    """From the seconds a process has and the cases that are done to its command."""
    tests = {
        "tests": (["tests/gpu/test_gpu.py"], TEST_PROCESSES),
        "cuda-tests": (["tests/cuda_backend/test_cuda_gpu.py"], 2),
        "integration": (INTEGRATION, 3, "-k", "gpu_integration or cuda"),
    }
    if stage in tests:
        return lambda seconds, done: pytest_command(*tests[stage])

    def command(seconds: float, done: list[str]) -> list[str]:
        left_out = [part for case in done for part in ("--done", case)]
        given = ["--seconds", f"{max(seconds - MARGIN, 1):.0f}", *left_out]
        return [sys.executable, "-m", "benchmarks.gpu.stage", stage, *given]

    return command


def run_stages(names: list[str], record: Record, limit: float) -> None:
    """Phase after phase; a phase may use what earlier ones left of their time."""
    start = time.monotonic()
    chosen = [stage for stage in STAGES if stage.name in names]
    for phase in sorted({stage.phase for stage in chosen}):
        stages = [stage for stage in chosen if stage.phase == phase]
        later = {stage.phase: stage.seconds for stage in chosen if stage.phase > phase}
        seconds = limit - (time.monotonic() - start) - sum(later.values())
        if seconds < LEAST:
            for stage in stages:
                record.add(stage=stage.name, metric="not run", value=1, note="no time left")
            continue
        print(f"{time.monotonic() - start:4.0f} s  {', '.join(s.name for s in stages)}: at most "
              f"{seconds:.0f} s", flush=True)  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        tasks = [Task(s.name, command_of(s.name), environment) for s in stages]
        run_together(tasks, seconds, record, ROOT)
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
    if options.rehearse:
        from . import rehearsal

        return rehearsal.main(names, options.out)

    import torch

    if not torch.cuda.is_available():
        print("not run: no CUDA device")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out)
    run_stages(names, record, options.limit)
    return finish(record, options.out)


def finish(record: Record, out: Path) -> int:
    """The picture and the table of claims; 1 where a stage failed."""
    record.decide()
    try:
        from . import plot

        plot.picture(record.rows, record.environment, out / "steps.png")
    except Exception as error:  # no matplotlib, no rows: the numbers are what counts
        record.log("picture", f"no picture: {type(error).__name__}: {error}")
    problems = record.problems()
    print("\n".join(["", *problems[:25], ""]))
    print(claims.table(record.claims))
    print(", ".join(sorted(f"{path.name} {path.stat().st_size / 1e3:.0f} kB"
                           for path in out.iterdir())))  # fmt: skip
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
