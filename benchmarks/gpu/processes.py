"""Processes of ``make gpu`` side by side: their limits, and their lines as rows, table and log."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

import torch

from ..rows import ROOT, commit, write
from . import claims
from .device import cuda_tool
from .rows import CASE, COLUMNS, ROW, TABLE

#: Characters of one process's log, and of one line, that are kept: a compiler that fails prints
#: whole programs.
LOG_SIZE, LINE_SIZE = 800_000, 2000
MOST_RESTARTS = 4
#: Exit statuses of a process that came to its end, and of one that was killed.
ENDED, KILLED = (0, 1), (-9, 137)
PROBLEMS = ("failed", "wrong", "cut off", "crashed")


@dataclass(frozen=True)
class Task:
    """A process to run: its command, from the seconds it has and the cases that are done."""

    name: str
    command: Callable[[float, list[str]], list[str]]
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


class Record:
    """Everything found so far, in memory and in files that are complete at any time."""

    def __init__(self, out: Path, is_rehearsal: bool = False) -> None:
        self.out, self.is_rehearsal = out, is_rehearsal
        self.rows: list[dict[str, object]] = []
        self.claims: list[dict[str, str]] = []
        self.environment = environment()
        if is_rehearsal:
            self.environment["gpu"] = "rehearsal without a GPU"
        self._lock = threading.Lock()
        self.n_rows: Counter[str] = Counter()
        self._logged: Counter[str] = Counter()
        for name in ("rows.csv", "claims.csv", "log.txt", "triton_table.txt", "steps.png"):
            (out / name).unlink(missing_ok=True)
        (out / "environment.json").write_text(json.dumps(self.environment, indent=1) + "\n")
        with self._open("rows.csv") as file:
            csv.writer(file).writerow((*COLUMNS, "gpu", "torch", "commit"))

    def _open(self, name: str) -> TextIO:
        return (self.out / name).open("a", newline="")

    def add(self, **row: object) -> None:
        common = (self.environment[key] for key in ("gpu", "torch", "commit"))
        with self._lock, self._open("rows.csv") as file:
            self.rows.append(row)
            csv.writer(file).writerow([*(row.get(name, "") for name in COLUMNS), *common])
        if row.get("metric") in PROBLEMS:
            print(f"        {_problem(row)}"[:200], flush=True)

    def line(self, name: str, line: str) -> str | None:
        """Takes one line of a process; the case that it begins, if any."""
        if line.startswith(ROW):
            try:
                self.add(**json.loads(line.removeprefix(ROW)))
                self.n_rows[name] += 1
                return None
            except (ValueError, TypeError):
                pass  # two processes' lines in one: it is in the log
        elif line.startswith(TABLE):
            with self._lock, self._open("triton_table.txt") as file:
                file.write(line.removeprefix(TABLE) + "\n")
            return None
        self._logged[name] += min(len(line), LINE_SIZE)
        if self._logged[name] < LOG_SIZE:
            with self._lock, self._open("log.txt") as file:
                file.write(f"{name}: {line[:LINE_SIZE]}\n")
        return line.removeprefix(CASE) if line.startswith(CASE) else None

    def decide(self) -> None:
        self.claims = claims.decided(claims.Rows(self.rows), self.is_rehearsal)
        write(self.out / "claims.csv", self.claims)

    def problems(self) -> list[str]:
        return [_problem(row) for row in self.rows if row.get("metric") in PROBLEMS]


def _problem(row: dict[str, object]) -> str:
    parts = [row.get(key, "") for key in ("stage", "metric", "case", "provider", "note")]
    return " · ".join(str(part) for part in parts if part not in ("", None))[:220]


def run_together(tasks: list[Task], seconds: float, record: Record) -> None:
    """Every task in a thread of its own; returns when all have ended or been cut off."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        list(pool.map(lambda task: _run(task, seconds, record), tasks))


def _run(task: Task, seconds: float, record: Record) -> None:
    """Starts the task, and again behind the case that ended it, until it ends or time is up."""
    start, begun = time.monotonic(), []
    for _ in range(1 + MOST_RESTARTS):
        n_begun = len(begun)
        status = _one_process(task, seconds - (time.monotonic() - start), record, begun)
        took = time.monotonic() - start
        is_late, has_begun = status in KILLED and took >= seconds, len(begun) > n_begun
        if is_late:
            note = f"after {took:.0f} s{f', in {begun[-1]}' if begun else ''}"
            record.add(stage=task.name, metric="cut off", value=1, note=note)
        elif status not in ENDED:
            case, note = begun[-1] if has_begun else "", f"exit status {status}: see the log"
            record.add(stage=task.name, case=case, metric="crashed", value=1, note=note)
        if is_late or status in ENDED or not has_begun:
            break
    record.add(stage=task.name, metric="stage seconds", value=round(took, 1))
    print(f"        {task.name}: {record.n_rows[task.name]} rows, {took:.0f} s", flush=True)


def _one_process(task: Task, seconds: float, record: Record, begun: list[str]) -> int:
    """Its exit status; where time is up it is ended with all its processes."""
    limit = ["timeout", "--signal=KILL", f"{max(seconds, 0) + 0.1:.1f}"]
    process = subprocess.Popen(
        limit + task.command(seconds, begun), cwd=ROOT, env=task.environment, text=True,
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for line in process.stdout:
        case = record.line(task.name, line.rstrip("\n"))
        if case is not None:
            begun.append(case)
    return process.wait()


def environment() -> dict[str, object]:
    """The machine, the versions and the commit of a run."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    smi = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split("\n")[0]
    gpu = dict(zip(query.split(","), smi.split(", "), strict=False)) if smi else {}
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return dict(
        gpu=gpu.get("name", "none"), details=gpu, commit=commit(),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        torch=torch.__version__, cuda=torch.version.cuda, triton=triton_version,
        nvcc=_output(cuda_tool("nvcc") or "nvcc", "--version").split("\n")[-1],
        python=platform.python_version(), kernel=platform.release(), cores=os.cpu_count(),
    )  # fmt: skip


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
