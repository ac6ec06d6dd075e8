"""Training with a fused backend is training with the eager one: the same losses and errors."""

import pytest
import torch

from benchmarks.training import metrics
from benchmarks.training.methods import ConR
from benchmarks.training.methods.vanilla import Vanilla
from benchmarks.training.splits import split
from benchmarks.training.train import Budget, predictions, train
from conr_kernels import available_backends

from .training_table import make_table

BUDGET = Budget(batch=64, n_steps=200)
#: The interpreter of Triton takes seconds for a step: its kernels have their own tests.
FUSED = [name for name, problem in available_backends().items() if problem is None]
FUSED.remove("reference")


def trained(backend: str) -> tuple[torch.Tensor, float]:
    """Loss of each step, and the test error after the last."""
    sample = split(make_table(), seed=0)
    parts = [Vanilla(), ConR(0.5, window=1.5, backend=backend)]
    losses = []

    def watch(epoch, step, net):
        loss = parts[0].regression(step) + parts[1].weight * parts[1].term(step)
        losses.append(loss.item())

    net = train(sample, parts, 0, BUDGET, watch=watch)
    p = predictions(net, sample.test.inputs)
    return torch.tensor(losses), metrics.row_errors(p, sample.test.labels).mean().item()


@pytest.fixture(scope="module")
def eager():
    return trained("reference")


@pytest.mark.parametrize("backend", FUSED)
def test_two_hundred_steps_agree_with_eager_training(backend, eager):
    losses, error = trained(backend)
    assert len(losses) == len(eager[0]) >= 190 and losses[-20:].mean() < losses[:20].mean()
    torch.testing.assert_close(losses[:50], eager[0][:50], rtol=1e-4, atol=0)
    assert abs(error - eager[1]) <= 0.01 * eager[1]


def test_there_is_a_fused_backend_to_train_with():
    assert FUSED
