"""Rows weighed by the (root of the) inverse frequency of their labels."""

from __future__ import annotations

from torch import Tensor

from conr_kernels import density_weights

from .base import Method, Step, Task, row_l1


class Reweighted(Method):
    """``mean w_i |p_i − y_i|``, weights of mean 1 over the training set."""

    method: str
    smoothing: str | None = None

    def start(self, task: Task) -> None:
        self.w = density_weights(
            task.labels, self.method, bin_width=task.bin_width, smoothing=self.smoothing
        )

    def regression(self, step: Step) -> Tensor:
        return (self.w[step.rows] * row_l1(step)).mean()


class Inverse(Reweighted):
    method = "inverse"


class RootInverse(Reweighted):
    method = "sqrt_inverse"
