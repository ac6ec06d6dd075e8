"""Results as tidy rows: one measured number each, with all that identifies it."""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from conr_kernels import __version__

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    """``metric``: ``"time"`` (s, median), ``"memory"`` (peak extra bytes) or ``"difference"``."""

    kernel: str
    provider: str
    mode: str
    metric: str
    size: int
    features: int
    dtype: str
    value: float
    n_runs: int
    device: str
    threads: int
    torch: str
    package: str
    commit: str


def environment(device: str) -> dict[str, object]:
    """The fields of a row that one run has in common."""
    name = torch.cuda.get_device_name() if device != "cpu" else processor()
    return dict(
        features=128,
        dtype="float32",
        device=name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        package=__version__,
        commit=commit(),
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """``CONR_COMMIT`` where the sources came without their history, else what git says."""
    if given := os.environ.get("CONR_COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """With the columns of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_csv(rows), encoding="utf-8")


def read(path: Path) -> list[Row]:
    kinds = {
        field.name: {"int": int, "float": float, "str": str}[field.type] for field in fields(Row)
    }
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in rows]
