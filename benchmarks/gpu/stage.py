"""One stage in a process of its own: what ``make gpu`` starts (``python -m benchmarks.gpu``)."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

from . import device
from .rows import Stage

#: A rehearsal's pairs of rows that Triton's kernels without a sort serve.
REHEARSAL_PAIRS = 400
#: Where a stage is; the others: in speed.
MODULES = {name: name for name in ("warm", "tune", "choices", "counters")} | dict.fromkeys(
    ("build", "sanitizer", "triton-kernels", "cuda-kernels", "planted-fault"), "checks"
)


def run(stage: Stage) -> int:
    """Imports what this stage needs and no more: under compute-sanitizer that takes long."""
    module = f"benchmarks.gpu.stages.{MODULES.get(stage.name, 'speed')}"
    return getattr(importlib.import_module(module), stage.name.replace("-", "_"))(stage)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", help="its name, or several with commas between them")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--done", action="append", default=[], help="a case to leave out")
    options = parser.parse_args()
    reason = device.reason_against()
    if reason is not None:
        print(f"not run: {reason}")
        return 0
    if device.REHEARSAL:
        from conr_kernels.triton_backend import launch_dense

        torch.set_num_threads(1)
        launch_dense.DENSE_PAIRS = REHEARSAL_PAIRS
    status = 0
    for name in options.stage.split(","):
        stage = Stage(name, options.seconds, options.done)
        try:
            status = max(status, run(stage))
        except Exception as error:
            stage.fail(error)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
