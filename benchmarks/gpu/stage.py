"""One stage in a process of its own: what ``make gpu`` starts (``python -m benchmarks.gpu``)."""

from __future__ import annotations

import argparse
import sys
import traceback

import torch

from . import device
from .rows import Stage

#: A rehearsal's pairs of rows that Triton's kernels without a sort serve.
REHEARSAL_PAIRS = 400


def architecture() -> tuple[int, int]:
    return (9, 0) if device.REHEARSAL else torch.cuda.get_device_capability()


def run(stage: Stage, backend: str) -> int:
    """Imports what this stage needs and no more: under compute-sanitizer that takes long."""
    if stage.name in ("warm", "build"):
        major, minor = architecture()
    if stage.name == "warm":
        from .stages.warm import warm

        return warm(stage, 10 * major + minor)
    if stage.name == "train":
        from .stages.train import train

        return train(stage)
    if stage.name == "tune":
        from .stages.tune import tune

        return tune(stage)
    if stage.name in ("inductor", "speed", "compare", "cuda", "grid"):
        from .stages import speed

        return getattr(speed, stage.name)(stage)
    if stage.name == "counters":
        from .stages.counters import counters

        return counters(stage)
    from .stages import checks

    return {
        "build": lambda: checks.build(stage, f"{major}.{minor}"),
        "sanitizer": lambda: checks.sanitize(stage),
        "kernels": lambda: checks.run_kernels(backend),
        "planted-fault": checks.plant_fault,
    }[stage.name]()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", help="its name, or several with commas between them")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--done", action="append", default=[], help="a case to leave out")
    parser.add_argument("--backend", default="triton")
    options = parser.parse_args()
    reason = device.reason_against()
    if reason is not None:
        print(f"not run: {reason}")
        return 0
    if device.REHEARSAL:
        from conr_kernels.triton_backend import call

        torch.set_num_threads(1)
        call.DENSE_PAIRS = REHEARSAL_PAIRS
    status = 0
    for name in options.stage.split(","):
        stage = Stage(name, options.seconds, options.done)
        try:
            status = max(status, run(stage, options.backend))
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            stage.add("failed", 1, note=f"{type(error).__name__}: {error}".split("\n")[0][:300])
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
