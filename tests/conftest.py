"""One thread: the batches are small, and two threads would mostly wait for each other. And no test
is skipped without a reason.
"""

from collections.abc import Generator

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped").strip(": ")
        if reason in ("", "unconditional skip"):
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid} is skipped without a reason"
    return report
