"""``python -m benchmarks.host``: what a step costs the host, counted and timed without a GPU.

One row for each size, bfloat16, D = 128, forward and backward of the weighted mean: Triton
``launches``; ``torch_ops`` that run a kernel too; ``allocations``; ``calls`` of functions as
cProfile counts them, C's included; ``microseconds``, a median over turns. step.py says what of it
is real.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..rows import ROOT, write

STEP = Path(__file__).with_name("step.py")
SIZES = (128, 512, 1024, 4096, 16_384, 65_536)
D = 128
TURNS = 7
COUNTS = ("launches", "allocations", "torch_ops", "calls")
COLUMNS = ("commit", "N", "D", *COUNTS, "microseconds")


class Host:
    """A process that measures one checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        self.process = subprocess.Popen(
            [sys.executable, str(STEP)], cwd=checkout, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, N: int, D: int) -> dict[str, Any]:
        print(N, D, file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{STEP.name} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A commit's files in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(ROOT), "archive", commit]
        archive = subprocess.run(command, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def rows(against: str | None) -> Iterator[dict[str, Any]]:
    """The rows of this checkout ("here") and of the other commit, measured in turns."""
    with ExitStack() as stack:
        hosts = {"here": Host(ROOT)}
        if against is not None:
            hosts[against] = Host(stack.enter_context(checkout(against)))
        for host in hosts.values():
            stack.callback(host.close)
        for N in SIZES:
            turns = [{name: host.ask(N, D) for name, host in hosts.items()} for _ in range(TURNS)]
            for name in hosts:
                time = statistics.median(turn[name]["microseconds"] for turn in turns)
                counts = {count: turns[0][name][count] for count in COUNTS}
                yield {"commit": name, "N": N, "D": D, **counts, "microseconds": f"{time:.0f}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", type=Path, help="write the rows there too")
    parser.add_argument("--against", metavar="COMMIT", help="measure that commit too, in turns")
    asked = parser.parse_args()
    found = []
    print(*(f"{name:>12}" for name in COLUMNS))
    for row in rows(asked.against):
        print(*(f"{row[name]:>12}" for name in COLUMNS), flush=True)
        found.append(row)
    if asked.csv is not None:
        write(asked.csv, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
