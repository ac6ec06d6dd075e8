"""A made-up table with a skewed label, for tests of the training benchmark."""

import torch

from benchmarks.training.data import Table


def make_table(n: int = 900, n_labels: int = 1) -> Table:
    """Labels 0 … 20 on a grid of 1 (L = 1), small ones the many; six inputs turn with the label."""
    generator = torch.Generator().manual_seed(0)
    labels = 20 * torch.rand(n, n_labels, generator=generator) ** 3
    labels = labels.round() if n_labels == 1 else labels
    phase = torch.arange(6) / 2
    inputs = torch.sin(labels.mean(dim=1, keepdim=True) / 6 + phase)
    inputs = inputs + 0.2 * torch.randn(n, 6, generator=generator)
    return Table("made up", inputs, labels, bin_width=1.0, window=1.5)
