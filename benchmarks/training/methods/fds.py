"""Feature distribution smoothing (Yang et al., ICML 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Method, Task

#: Kernel over bins (offset, σ), momentum of the running statistics, limits of a variance ratio.
HALF_WIDTH, SIGMA, MOMENTUM, RATIOS = 2, 2.0, 0.9, (0.1, 10.0)


class FDS(Method):
    """Moves and stretches each bin's features from its own statistics to those smoothed over bins.

    ``x̃ = (x − μ_b) √(σ̃²_b / σ²_b) + μ̃_b``, statistics of all training rows, updated after each
    epoch; the first epoch trains without.
    """

    def start(self, task: Task) -> None:
        self.task = task
        offsets = (torch.arange(task.n_bins)[:, None] - torch.arange(task.n_bins)).abs()
        kernel = torch.exp(-0.5 * (offsets / SIGMA) ** 2) * (offsets <= HALF_WIDTH)
        kernel = kernel.to(task.labels.device) * (task.bins.bincount(minlength=task.n_bins) > 0)
        self.kernel = kernel / kernel.sum(dim=1, keepdim=True).clamp(min=1e-12)
        self.statistics: Tensor | None = None

    def calibrate(self, x: Tensor, rows: Tensor) -> Tensor:
        if self.statistics is None:
            return x
        b = self.task.bins[rows]
        mean, variance = (t[b] for t in self.statistics)
        smooth_mean, smooth_variance = (t[b] for t in self.smoothed)
        ratio = (smooth_variance / variance).nan_to_num(1.0).clamp(*RATIOS)
        return (x - mean) * torch.where(variance > 0, ratio.sqrt(), 1.0) + smooth_mean

    @torch.no_grad()
    def end_epoch(self, epoch: int, net: nn.Module) -> None:
        x, bins, n_bins = net.encoder(self.task.inputs), self.task.bins, self.task.n_bins
        counts = bins.bincount(minlength=n_bins).clamp(min=1)[:, None]
        zeros = x.new_zeros(n_bins, x.shape[1])
        mean = zeros.index_add(0, bins, x) / counts
        variance = zeros.index_add(0, bins, (x - mean[bins]).square()) / (counts - 1).clamp(min=1)
        found = torch.stack([mean, variance])
        if self.statistics is not None:
            found = MOMENTUM * self.statistics + (1 - MOMENTUM) * found
        self.statistics = found
        self.smoothed = self.kernel @ found
