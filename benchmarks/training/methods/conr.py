"""ConR through this package: the term that every method is tried with and without."""

from __future__ import annotations

from torch import Tensor

from conr_kernels import conr_loss, density_weights

from .base import Method, Step, Task

TEMPERATURE = 0.2


class ConR(Method):
    """The paper's loss (or one of its ablations) on both views, weights as LDS makes them.

    Args:
        weight: β of ``α·L_R + β·L_ConR``.
        window: in the labels' units.
        push: times one over the training labels' range is the push scale ``e``.
    """

    def __init__(
        self,
        weight: float = 1.0,
        window: float = 1.0,
        push: float = 1.0,
        variant: str = "paper",
        backend: str = "auto",
    ) -> None:
        super().__init__(weight)
        self.window, self.push, self.variant, self.backend = window, push, variant, backend

    def start(self, task: Task) -> None:
        self.w = density_weights(
            task.labels, "sqrt_inverse", bin_width=task.bin_width, smoothing="gaussian"
        )
        self.push_scale = self.push / (task.labels.max() - task.labels.min()).item()

    def term(self, step: Step) -> Tensor:
        return conr_loss(
            step.x, step.y, step.p.detach(), self.w[step.rows],
            window=self.window, temperature=TEMPERATURE, push_scale=self.push_scale,
            variant=self.variant, backend=self.backend,
        )  # fmt: skip
