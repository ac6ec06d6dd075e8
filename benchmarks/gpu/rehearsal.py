"""``python -m benchmarks.gpu --rehearse``: every stage's lines on the CPU, on a few rows a batch.

Three processes instead of one for each stage: starting them would take most of the time.
"""

from __future__ import annotations

import os

from .plan import TESTS, pytest_command, task_of
from .processes import Record, Task, run_together

LIMIT = 500.0


def tasks(names: list[str]) -> list[Task]:
    given = {"CONR_REHEARSE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment = os.environ | given
    environment.pop("TRITON_INTERPRET", None)
    found = []
    if files := [files[0] for name, (files, *_) in TESTS.items() if name in names]:
        found.append(Task("tests", lambda *_: pytest_command(files, 1), environment))
    if others := [name for name in names if name not in TESTS and name != "warm"]:
        found.append(task_of(",".join(others), environment | {"TRITON_INTERPRET": "1"}))
    if "warm" in names:
        found.append(task_of("warm", environment))
    return found


def run(names: list[str], record: Record) -> None:
    print("A rehearsal on the CPU: no number of it means anything.", flush=True)
    run_together(tasks(names), LIMIT, record)
