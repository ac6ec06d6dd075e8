"""A pytest plugin for ``make gpu``: a row for each test as it ends, also in a run that is cut off.

A fault can end the device's context, and then every later test of the process would fail too: such
a process ends itself, and pytest-xdist starts another for the rest.
"""

from __future__ import annotations

import json
import os

import pytest

from . import device
from .rows import ROW

#: By the file; all others are of the stage "integration".
STAGES = {
    "tests/gpu/test_gpu.py": "tests",
    "tests/gpu/test_gpu_host.py": "tests",
    "tests/cuda_backend/test_cuda_gpu.py": "cuda-tests",
}
#: The output before pytest captures it.
_output = os.fdopen(os.dup(1), "w", buffering=1)
_failed: set[str] = set()
_is_worker = False


def pytest_configure(config: pytest.Config) -> None:
    """A worker of pytest-xdist leaves the rows to its controller; the environment may be that of
    tests around this run.
    """
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    is_end = report.when == "call" or report.outcome != "passed"
    if report.outcome == "failed":
        _failed.add(report.nodeid)
    if _is_worker or not is_end:
        return
    file, _, name = report.nodeid.partition("::")
    function, _, parameters = name.partition("[")
    note = parameters.rstrip("]")
    if report.outcome == "failed":
        crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
        note += ": " + str(crash.message if crash else report.longrepr).strip().split("\n")[0]
    elif report.outcome == "skipped":
        note += f": {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}"
    row = dict(
        stage=STAGES.get(file, "integration"), case=function, provider=file,
        metric=report.outcome, value=1, note=note[:300],
    )  # fmt: skip
    _output.write(f"\n{ROW}{json.dumps(row)}\n")  # behind a line of dots


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    if nodeid in _failed and device.is_broken():
        if _is_worker:
            os._exit(3)
        pytest.exit("a fault has ended the device's context", returncode=3)
