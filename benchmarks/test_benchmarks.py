"""The cases of ``python -m benchmarks`` under pytest-benchmark.

``pytest benchmarks --benchmark-autosave``, change, ``pytest benchmarks --benchmark-compare``.
"""

from __future__ import annotations

import pytest
import torch

from . import measure
from .__main__ import SIZES, cases, fits
from .measure import Step
from .providers import providers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = providers(DEVICE)
STEPS = [step for steps in cases(PROVIDERS, DEVICE, SIZES[-1]) for step in steps]


@pytest.fixture(scope="session", autouse=True)
def correct() -> None:
    """Nothing is timed where a result is wrong."""
    problems = measure.gate(PROVIDERS, DEVICE)
    if problems:
        pytest.exit("nothing was timed: " + "; ".join(problems), returncode=1)


@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s.provider}-{s.n}-{s.labels}")
def test_time(benchmark, step: Step) -> None:
    if not fits(step, {provider.name: provider for provider in PROVIDERS}):
        pytest.skip("needs more memory than is available")
    run = step.prepare()
    benchmark.group = f"N = {step.n}, {step.labels}"
    rounds = 20 if step.n <= 1024 else 5 if step.n <= 4096 else 2
    # measure.seconds waits for the device.
    benchmark.pedantic(measure.seconds, args=(run,), rounds=rounds, warmup_rounds=1)
