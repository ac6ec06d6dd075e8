"""Processes of ``make gpu`` side by side: their limits, and their lines as rows, table and log."""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..rows import commit
from . import claims
from .rows import CASE, COLUMNS, ROW, TABLE

#: Characters of one process's log, and of one line, that are kept: a compiler that fails prints
#: whole programs.
LOG_SIZE, LINE_SIZE = 800_000, 2000
MOST_RESTARTS = 4
#: Exit statuses of a process that came to its end.
ENDED = (0, 1)
PROBLEMS = ("failed", "wrong", "cut off", "crashed")


@dataclass(frozen=True)
class Task:
    """A process to run: its command, from the seconds it has and the cases that are done."""

    name: str
    command: Callable[[float, list[str]], list[str]]
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))


class Record:
    """Everything found so far, in memory and in files that are complete at any time."""

    def __init__(self, out: Path, is_rehearsal: bool = False) -> None:
        self.out, self.is_rehearsal = out, is_rehearsal
        self.rows: list[dict[str, object]] = []
        self.claims: list[dict[str, object]] = []
        self.environment = environment()
        if is_rehearsal:
            self.environment["gpu"] = "rehearsal without a GPU"
        self._lock = threading.Lock()
        self.n_rows: dict[str, int] = {}
        self._logged: dict[str, int] = {}
        for name in ("rows.csv", "claims.csv", "log.txt", "triton_table.txt", "steps.png"):
            (out / name).unlink(missing_ok=True)
        (out / "environment.json").write_text(json.dumps(self.environment, indent=1) + "\n")
        with (out / "rows.csv").open("w", newline="") as file:
            csv.writer(file).writerow((*COLUMNS, "gpu", "torch", "commit"))

    def add(self, **row: object) -> None:
        common = (self.environment[key] for key in ("gpu", "torch", "commit"))
        with self._lock:
            self.rows.append(row)
            with (self.out / "rows.csv").open("a", newline="") as file:
                csv.writer(file).writerow([*(row.get(name, "") for name in COLUMNS), *common])
        if row.get("metric") in PROBLEMS:
            print(f"        {_problem(row)}"[:200], flush=True)

    def log(self, name: str, line: str) -> None:
        with self._lock:
            used = self._logged.get(name, 0) + min(len(line), LINE_SIZE)
            self._logged[name] = used
            if used < LOG_SIZE:
                with (self.out / "log.txt").open("a") as file:
                    file.write(f"{name}: {line[:LINE_SIZE]}\n")

    def line(self, name: str, line: str) -> str | None:
        """Takes one line of a process; the case that it begins, if any."""
        if line.startswith(ROW):
            try:
                self.add(**json.loads(line[len(ROW) :]))
                self.n_rows[name] = self.n_rows.get(name, 0) + 1
                return None
            except (ValueError, TypeError):
                pass  # two processes' lines in one: it is in the log
        elif line.startswith(TABLE):
            with self._lock, (self.out / "triton_table.txt").open("a") as file:
                file.write(line[len(TABLE) :] + "\n")
            return None
        self.log(name, line)
        return line[len(CASE) :] if line.startswith(CASE) else None

    def decide(self) -> None:
        self.claims = claims.decided(claims.Rows(self.rows), self.is_rehearsal)
        claims.write(self.out / "claims.csv", self.claims)

    def problems(self) -> list[str]:
        return [_problem(row) for row in self.rows if row.get("metric") in PROBLEMS]


def _problem(row: dict[str, object]) -> str:
    parts = [row.get(key, "") for key in ("stage", "metric", "case", "provider", "note")]
    return " · ".join(str(part) for part in parts if part not in ("", None))[:220]


def run_together(tasks: list[Task], seconds: float, record: Record, folder: Path) -> None:
    """Every task in a thread of its own; returns when all have ended or been cut off."""
    threads = [
        threading.Thread(target=_run, args=(task, seconds, record, folder)) for task in tasks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run(task: Task, seconds: float, record: Record, folder: Path) -> None:
    """Starts the task, and again behind the case that ended it, until it ends or time is up."""
    start, begun = time.monotonic(), []
    for _ in range(1 + MOST_RESTARTS):
        left = seconds - (time.monotonic() - start)
        n_begun = len(begun)
        status = _one_process(task, left, record, folder, begun)
        took = time.monotonic() - start
        if status is None:
            note = f"after {took:.0f} s{f', in {begun[-1]}' if begun else ''}"
            record.add(stage=task.name, metric="cut off", value=1, note=note)
            break
        if status in ENDED or len(begun) == n_begun:
            if status not in ENDED:
                note = f"exit status {status}: see the log"
                record.add(stage=task.name, metric="crashed", value=1, note=note)
            break
        note = f"exit status {status} in this case"
        record.add(stage=task.name, case=begun[-1], metric="crashed", value=1, note=note)
    record.add(stage=task.name, metric="stage seconds", value=round(took, 1))
    n_rows = record.n_rows.get(task.name, 0)
    print(f"        {task.name}: {n_rows} rows, {took:.0f} s", flush=True)


def _one_process(
    task: Task, seconds: float, record: Record, folder: Path, begun: list[str]
) -> int | None:
    """Its exit status; None where it was cut off, with all its processes."""
    process = subprocess.Popen(
        task.command(seconds, begun), cwd=folder, env=task.environment, text=True,
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    is_late = threading.Event()
    timer = threading.Timer(max(seconds, 0.1), lambda: (is_late.set(), _end(process)))
    timer.start()
    try:
        for line in process.stdout:
            case = record.line(task.name, line.rstrip("\n"))
            if case is not None:
                begun.append(case)
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            _end(process)
    return None if is_late.is_set() else status


def _end(process: subprocess.Popen) -> None:
    """Ends the session that the process leads: its own children too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()


def environment() -> dict[str, object]:
    """The machine, the versions and the commit of a run."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    smi = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    fields = [part.strip() for part in smi.split("\n")[0].split(",")] if smi else []
    gpu = dict(zip(query.split(","), fields, strict=False))
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return dict(
        gpu=gpu.get("name", "none"), details=gpu, commit=commit(),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        torch=torch.__version__, cuda=torch.version.cuda, triton=triton_version,
        nvcc=_output(nvcc, "--version").split("\n")[-1], python=platform.python_version(),
        kernel=platform.release(), cores=os.cpu_count(),
    )  # fmt: skip


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
