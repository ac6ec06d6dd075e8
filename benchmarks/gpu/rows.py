"""Rows, cases and limits as a stage's process and ``make gpu`` speak of them: lines of text.

A stage prints ``row: {…}`` for each number, ``case: name`` before each case and ``table: …`` for a
line of a new static table; everything else it prints is its log. A case that fails leaves the later
ones alone, unless it has ended the device's context: then the process ends and is started again
behind that case.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable

import torch

from ..rows import ROOT
from . import device

ROW, CASE, TABLE = "row: ", "case: ", "table: "
COLUMNS = (
    "stage", "case", "provider", "mode", "metric", "N", "D", "dtype", "regime", "value", "note",
)  # fmt: skip
#: In the environment, the stages of a run, for the one that compiles what the others launch.
CHOSEN = "CONR_STAGES"
#: Exit status of a stage's process that has to be started again behind the case that ended it.
BROKEN = 17


class Stage:
    """What a stage's process knows of itself.

    Attributes:
        name: of the stage.
        deadline: ``time.monotonic()`` at which no further case is begun.
        done: cases of an earlier process of this stage.
        status: 1 once something has failed.
    """

    def __init__(self, name: str, seconds: float, done: Iterable[str] = ()) -> None:
        self.name, self.case, self.status = name, "", 0
        self.deadline, self.done = time.monotonic() + seconds, frozenset(done)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, metric: str, value: float | str, **row: object) -> None:
        self.status |= metric in ("failed", "wrong")
        row = {"stage": self.name, "case": self.case, "metric": metric, "value": value, **row}
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ValueError(f"unknown columns {unknown}")
        if isinstance(value, float):
            row["value"] = float(f"{value:.5g}")
        sys.stdout.write(f"{ROW}{json.dumps(row)}\n")  # in one piece
        sys.stdout.flush()

    def fail(self, error: Exception, **row: object) -> None:
        """The whole of it in the log, a row with its first line."""
        traceback.print_exception(error, file=sys.stdout)
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        self.add("failed", 1, **row, note=text[:300])

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        """A process in the repository, with a group of its own, whose output is kept; it ends soon
        after the deadline, whatever becomes of this one.
        """
        limit = ["timeout", "--signal=KILL", f"{max(self.left(), 1) + 1:.1f}"]
        return subprocess.Popen(
            limit + command, cwd=ROOT, env=os.environ | environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def output_of(self, process: subprocess.Popen) -> tuple[int, str]:
        """Exit status and output; a process that outlasts the deadline is ended with those that it
        started, which would hold its output open; what it printed remains.
        """
        try:
            output, _ = process.communicate(timeout=max(self.left(), 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += "\ncut off: it took too long"
        return process.returncode, output

    def run(self, cases: dict[str, Callable[[], None]]) -> int:
        """Every case that is not done, until the deadline; the exit status: 1 if one failed."""
        for self.case, case in cases.items():
            if self.case in self.done:
                continue
            if self.left() < 0:
                self.add("not run", 1, note="no time left")
                continue
            print(CASE + self.case, flush=True)
            start = time.monotonic()
            try:
                case()
            except Exception as error:
                self.fail(error)
                del error
                if device.is_broken():
                    return BROKEN
            torch.cuda.empty_cache()
            self.add("wall seconds", time.monotonic() - start)
        return self.status
