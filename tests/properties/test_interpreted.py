"""Properties and golden cases on Triton's kernels: in a process that is interpreted from its
start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
#: What depends on a kernel most, where no number of examples is asked for: a call takes long.
WORDS = "agrees or refused or keys or equal or float32"
CHOSEN = [] if "CONR_EXAMPLES" in os.environ else ["-k", WORDS]


def test_interpreted_triton_kernels_have_the_properties_and_the_golden_values() -> None:
    names = "properties/test_properties", "properties/test_pushings", "golden/test_golden"
    files = [f"tests/{name}.py" for name in names]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *CHOSEN, "--tb=short", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:]
    assert "[100%]" in run.stdout, run.stdout[-2000:]
