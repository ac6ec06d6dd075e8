"""The cases of ``python -m benchmarks`` under pytest-benchmark, forward and backward apart.

``pytest benchmarks --benchmark-autosave``, change, ``pytest benchmarks --benchmark-compare``.
"""

from __future__ import annotations

import pytest
import torch

from . import measure
from .__main__ import CONSTANT_SIZE, SIZES
from .batches import make_batch
from .providers import providers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = providers(DEVICE)
CASES = [
    pytest.param(provider, n, labels, id=f"{provider.name}-{n}-{labels}")
    for n, labels in [*((n, "agedb") for n in SIZES), (CONSTANT_SIZE, "constant")]
    for provider in PROVIDERS
    if n <= provider.largest
]


@pytest.fixture(scope="session", autouse=True)
def correct() -> None:
    """Nothing is timed where a result is wrong."""
    problems = measure.gate(PROVIDERS, DEVICE)
    if problems:
        pytest.exit("nothing was timed: " + "; ".join(problems), returncode=1)


@pytest.mark.parametrize(("provider", "n", "labels"), CASES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_time(benchmark, provider, n, labels, direction):
    available = measure.memory_available(DEVICE)
    if n**2 * provider.pair_bytes > 0.9 * available:
        pytest.skip(f"needs about {n**2 * provider.pair_bytes:,} bytes, has {available:,}")
    batch = make_batch(n, labels=labels, device=DEVICE)
    synchronize = torch.cuda.synchronize if DEVICE != "cpu" else lambda: None

    def forward() -> torch.Tensor:
        loss = provider.loss(batch)
        synchronize()
        return loss

    def backward(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, batch.x)
        synchronize()

    benchmark.group = f"{direction}, N = {n}, {labels}"
    rounds = 20 if n <= 1024 else 5 if n <= 4096 else 2
    if direction == "forward":
        benchmark.pedantic(forward, rounds=rounds, warmup_rounds=1)
    else:
        benchmark.pedantic(
            backward, setup=lambda: ((forward(),), {}), rounds=rounds, warmup_rounds=n <= 4096
        )
