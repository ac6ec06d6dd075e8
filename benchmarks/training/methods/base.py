"""What a method may change in a training run: weights, features, loss, further terms, stages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A training set: inputs [N, F], labels [N, L], their bins [N] and the run's length.

    ``scale`` is the labels' standard deviation: regression losses are in units of it.
    """

    inputs: Tensor
    labels: Tensor
    bins: Tensor
    n_bins: int
    bin_width: float
    scale: float
    n_epochs: int


@dataclass(frozen=True)
class Step:
    """A batch of both views, one after the other: features ``x`` [2B, D], labels and predictions
    ``y, p`` [2B, L], and ``rows`` [2B] of the training set."""

    x: Tensor
    y: Tensor
    p: Tensor
    rows: Tensor
    scale: float


class Method(nn.Module):
    """L1 regression; subclasses change what they are about. A term is multiplied by ``weight``."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def start(self, task: Task) -> None:
        """Called once, before training."""

    def calibrate(self, x: Tensor, rows: Tensor) -> Tensor:
        """The features that the head sees in training."""
        return x

    def regression(self, step: Step) -> Tensor:
        return row_l1(step).mean()

    def term(self, step: Step) -> Tensor | None:
        """What is added to the regression loss, without its weight."""
        return None

    def end_epoch(self, epoch: int, net: nn.Module) -> None:
        """Called after each epoch, counted from 1."""


def row_l1(step: Step) -> Tensor:
    """``|p_i − y_i|`` [2B], mean over the components, in units of the scale."""
    return (step.p - step.y).abs().mean(dim=1) / step.scale
