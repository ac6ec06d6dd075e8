"""``python -m benchmarks.gpu --rehearse``: every stage's lines on the CPU, on a few rows a batch.

Three processes instead of one for each stage: starting them would take most of the time.
"""

from __future__ import annotations

import os
import sys

from ..rows import ROOT
from .plan import pytest_command
from .processes import Record, Task, run_together

LIMIT = 500.0
TESTS = {
    "tests": "tests/gpu/test_gpu.py",
    "cuda-tests": "tests/cuda_backend/test_cuda_gpu.py",
    "integration": "tests/gpu/test_gpu_integration.py",
}


def tasks(names: list[str]) -> list[Task]:
    given = {"CONR_REHEARSE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment = os.environ | given
    environment.pop("TRITON_INTERPRET", None)
    interpreted = environment | {"TRITON_INTERPRET": "1"}
    stage = [sys.executable, "-m", "benchmarks.gpu.stage"]
    found = []
    if files := [file for name, file in TESTS.items() if name in names]:
        command = pytest_command(files, 1)
        found.append(Task("tests", lambda *_: command, environment))
    if others := [name for name in names if name not in TESTS and name != "warm"]:
        found.append(Task("stages", lambda *_: [*stage, ",".join(others)], interpreted))
    if "warm" in names:
        found.append(Task("warm", lambda *_: [*stage, "warm"], environment))
    return found


def run(names: list[str], record: Record) -> None:
    print("A rehearsal on the CPU: no number of it means anything.", flush=True)
    run_together(tasks(names), LIMIT, record, ROOT)
