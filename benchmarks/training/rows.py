"""Results as tidy rows, one number each, in one CSV per stage that a later run continues."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.rows import commit, processor
from conr_kernels import __version__

#: The last row of every run: a run without it was interrupted.
LAST = "seconds"


@dataclass(frozen=True)
class Run:
    """What is trained. ``conr``: ``""`` (without), ``"paper"`` or the name of an ablation.

    ``weight``, ``window``, ``push``: of the added term; window as a multiple of the data's, push
    scale as a multiple of one over the range of the training labels; 0 where nothing is added.
    ``backend``: of ConR; ``"gradient_cache"`` encodes in chunks, with ``"auto"``.
    """

    stage: str
    data: str
    method: str
    seed: int
    conr: str = ""
    protocol: str = "natural"
    batch: int = 64
    weight: float = 0.0
    conr_weight: float = 0.0
    window: float = 0.0
    push: float = 0.0
    backend: str = "auto"


@dataclass(frozen=True)
class Row(Run):
    """``at``: the epoch, the bin's middle or the label that the value belongs to, if any."""

    shot: str = "all"
    metric: str = ""
    at: float = 0.0
    value: float = 0.0
    device: str = ""
    torch: str = ""
    package: str = ""
    commit: str = ""


RUN_FIELDS = [field.name for field in fields(Run)]
ROW_FIELDS = [field.name for field in fields(Row)]
NUMBERS = {"seed": int, "batch": int} | dict.fromkeys(
    ("weight", "conr_weight", "window", "push", "at", "value"), float
)


def environment(device: str) -> dict[str, str]:
    """The fields that one call of the command has in common."""
    name = torch.cuda.get_device_name() if device != "cpu" else processor()
    return dict(device=name, torch=torch.__version__, package=__version__, commit=commit())


def run_of(row: Row) -> Run:
    return Run(**{name: getattr(row, name) for name in RUN_FIELDS})


class Store:
    """The rows of one stage. Rows of a run that was interrupted are dropped when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = list(read(path)) if path.exists() else []
        self.done = {run_of(row) for row in found if row.metric == LAST}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        with scratch.open("w", newline="") as file:
            csv.DictWriter(file, ROW_FIELDS).writeheader()
        self._append(scratch, (row for row in found if run_of(row) in self.done))
        os.replace(scratch, path)

    def append(self, run: Run, rows: Iterable[Row]) -> None:
        """Adds the rows of a run, of which the last one's metric must be ``LAST``."""
        rows = list(rows)
        if not rows or rows[-1].metric != LAST:
            raise ValueError(f"the last row of a run must be its {LAST!r}")
        self._append(self.path, rows)
        self.done.add(run)

    @staticmethod
    def _append(path: Path, rows: Iterable[Row]) -> None:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, ROW_FIELDS).writerows(
                asdict(row) | {"value": f"{row.value:.6g}", "at": f"{row.at:.6g}"} for row in rows
            )


def read(path: Path) -> Iterator[Row]:
    """The rows of a file; a last line that is not whole is left out."""
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["commit"]:
                yield Row(**row | {name: kind(row[name]) for name, kind in NUMBERS.items()})
