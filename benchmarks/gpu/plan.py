"""The stages of ``make gpu``: what each does, when, how long it may take, and its command."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from .processes import Task

#: Seconds of a whole run, of which the picture and the tables take the last, and the least that a
#: stage is worth starting with.
LIMIT, PICTURE, LEAST = 390.0, 10.0, 12.0
REHEARSAL_LIMIT = 500.0
#: What a stage keeps of its limit to end by itself.
MARGIN = 8.0
HOST = "tests/gpu/test_gpu_host.py"
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
    Stage("warm", 60, 0, "compiles the other stages' Triton kernels in many processes"),
    Stage("inductor", 60, 0, "compiles eager with inductor"),
    Stage("build", 60, 0, "builds csrc/ with nvcc"),
    Stage("tests", 90, 1, "tests of the Triton backend"),
    Stage("integration", 90, 1, "tests of the loss inside PyTorch"),
    Stage("cuda-tests", 90, 1, "tests of the CUDA backend"),
    Stage("sanitizer", 90, 1, "compute-sanitizer"),
    Stage("speed", 75, 2, "what is claimed of the Triton backend's speed, and training steps"),
    Stage("choices", 60, 3, "pairs once or from both sides, tiles, sorts: what constants decide"),
    Stage("compare", 30, 4, "dense fused kernels, ours and others', and compiled eager"),
    Stage("cuda", 10, 5, "the CUDA backend's speed"),
    Stage("counters", 20, 6, "hardware counters of the kernels, by ncu"),
    Stage("grid", 15, 7, "time over N"),
    Stage("tune", 20, 8, "candidates for the static table"),
]
NAMES = [stage.name for stage in STAGES]
#: Files, processes and options of the stages that are tests. Inductor's compilation would outlast
#: what else is tested of the host.
TESTS = {
    "tests": (["tests/gpu/test_gpu.py", HOST], 12, "-k", "not reduce_overhead"),
    "cuda-tests": (["tests/cuda_backend/test_cuda_gpu.py"], 2),
    "integration": ([*INTEGRATION, HOST], 3, "-k", "gpu_integration or cuda or reduce_overhead"),
}


def planned(names: list[str], limit: float) -> dict[int, float]:
    """Seconds of each phase of these stages in their order: all shorter where the limit is."""
    phases = {stage.phase: stage.seconds for stage in STAGES if stage.name in names}
    share = min(1.0, limit / sum(phases.values()))
    return {phase: share * seconds for phase, seconds in phases.items()}


def pytest_command(files: list[str], n_processes: int, *options: str) -> list[str]:
    """Every file's tests, a line for each; a kernel that is wrong everywhere fails fewer than end
    the run.
    """
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.pytest_rows", *files]
    command += ["-q", "--maxfail=80", "--tb=short", "-p", "no:cacheprovider", *options]
    if n_processes > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(n_processes)]
    return command


def task_of(stage: str, environment: Mapping[str, str] = os.environ) -> Task:
    """A stage's process, or with commas between them that of several."""

    def command(seconds: float, done: list[str]) -> list[str]:
        if stage in TESTS:
            return pytest_command(*TESTS[stage])
        left_out = [part for case in done for part in ("--done", case)]
        given = ["--seconds", f"{max(seconds - MARGIN, 1):.0f}", *left_out]
        return [sys.executable, "-m", "benchmarks.gpu.stage", stage, *given]

    return Task(stage, command, {**environment, "PYTHONUNBUFFERED": "1"})


def rehearsal(names: list[str]) -> list[Task]:
    """Every stage's lines on the CPU, on a few rows a batch, in three processes: starting one for
    each stage would take most of the time.
    """
    environment = os.environ | {"CONR_REHEARSE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    found = []
    if files := [files[0] for name, (files, *_) in TESTS.items() if name in names]:
        found.append(Task("tests", lambda *_: pytest_command(files, 1), environment))
    if others := [name for name in names if name not in TESTS and name != "warm"]:
        found.append(task_of(",".join(others), environment | {"TRITON_INTERPRET": "1"}))
    if "warm" in names:
        found.append(task_of("warm", environment))
    return found
