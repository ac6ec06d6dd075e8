"""A test that is skipped says why, or fails."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

@pytest.mark.skip
def test_marked(): ...

def test_inside():
    pytest.skip()

@pytest.mark.skip(reason="no moon")
def test_marked_with_reason(): ...

def test_inside_with_reason():
    pytest.skip("no sun")
"""


def test_a_skip_without_a_reason_fails_and_one_with_a_reason_prints_it(tmp_path: Path) -> None:
    (tmp_path / "test_skips.py").write_text(TESTS)
    options = ["-ra", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    for name in ("test_marked", "test_inside"):
        assert f"test_skips.py::{name} is skipped without a reason" in run.stdout
    assert "1 failed, 2 skipped, 1 error" in run.stdout
    assert "no moon" in run.stdout and "no sun" in run.stdout
