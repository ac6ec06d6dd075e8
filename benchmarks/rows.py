"""Results as tidy rows: one measured number each, with all that identifies it."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
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


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            Row(
                **{
                    **row,
                    "size": int(row["size"]),
                    "features": int(row["features"]),
                    "value": float(row["value"]),
                    "n_runs": int(row["n_runs"]),
                    "threads": int(row["threads"]),
                }
            )
            for row in csv.DictReader(file)
        ]
