"""Training with a fused backend is training with the eager one: the same losses and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.training import metrics
from benchmarks.training.methods import ConR
from benchmarks.training.methods.vanilla import Vanilla
from benchmarks.training.splits import split
from benchmarks.training.train import Budget, predictions, train
from conr_kernels import available_backends

from .training_table import make_table

FUSED = [name for name, problem in available_backends().items() if problem is None]
FUSED.remove("reference")
#: One epoch of few rows: Triton's interpreter takes a tenth of a second for a step of 16 rows.
INTERPRETED = {"batch": 8, "n_steps": 8, "n_rows": 120}
TRAIN_INTERPRETED = f"""
import json
from tests.test_training_guard import trained
print(json.dumps(trained("triton", **{INTERPRETED})))
"""


def trained(
    backend: str, batch: int = 64, n_steps: int = 200, n_rows: int = 900
) -> tuple[list[float], float]:
    """Loss of each step, and the test error after the last."""
    torch.set_num_threads(1)
    sample = split(make_table(n_rows), seed=0)
    parts = [Vanilla(), ConR(0.5, window=1.5, backend=backend)]
    losses = []

    def watch(epoch, step, net):
        loss = parts[0].regression(step) + parts[1].weight * parts[1].term(step)
        losses.append(loss.item())

    net = train(sample, parts, 0, Budget(batch, n_steps), watch=watch)
    p = predictions(net, sample.test.inputs)
    return losses, metrics.row_errors(p, sample.test.labels).mean().item()


def check_agreement(found: tuple[list[float], float], eager: tuple[list[float], float]) -> None:
    losses, eager_losses = (torch.tensor(t[0]) for t in (found, eager))
    torch.testing.assert_close(losses[:50], eager_losses[:50], rtol=1e-4, atol=0)
    assert len(losses) == len(eager_losses) and abs(found[1] - eager[1]) <= 0.01 * eager[1]


@pytest.fixture(scope="module")
def eager():
    losses, error = trained("reference")
    assert len(losses) >= 190 and sum(losses[-20:]) < sum(losses[:20])
    return losses, error


@pytest.mark.parametrize("backend", FUSED)
def test_two_hundred_steps_agree_with_eager_training(backend, eager):
    check_agreement(trained(backend), eager)


def test_steps_of_the_interpreted_triton_kernels_agree_with_eager_training():
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", TRAIN_INTERPRETED],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if "RuntimeError" in run.stderr and "numpy" in run.stderr:
        pytest.skip("Triton's interpreter does not work with this numpy")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found[0]) >= 8
    check_agreement(found, trained("reference", **INTERPRETED))


def test_there_is_a_fused_backend_to_train_with():
    assert FUSED
