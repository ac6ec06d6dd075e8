"""RRT: regressor re-training, in two stages (Yang et al., ICML 2021)."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Step, Task, row_l1
from .reweighting import Inverse


class RRT(Inverse):
    """Half of the epochs with L1; then the encoder is frozen and a new head is trained with
    inverse weights."""

    def start(self, task: Task) -> None:
        super().start(task)
        self.switch = max(1, task.n_epochs // 2)
        self.is_second_stage = False

    def regression(self, step: Step) -> Tensor:
        return super().regression(step) if self.is_second_stage else row_l1(step).mean()

    def end_epoch(self, epoch: int, net: nn.Module) -> None:
        if epoch == self.switch:
            self.is_second_stage = True
            net.encoder.requires_grad_(False)
            net.head.reset_parameters()
