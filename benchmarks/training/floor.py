"""What ConR sees in a batch, from labels and predictions alone."""

from __future__ import annotations

from torch import Tensor


def floor_and_anchors(y: Tensor, p: Tensor, window: float) -> tuple[float, float]:
    """The mean of ``A_i·log n_i``, below which the loss cannot fall, and the share of anchors.

    Args:
        y, p: labels and predictions [N, L]; distances are means over the L components.
    """
    d = (y[:, None] - y).abs().mean(dim=2)
    delta = (p[:, None] - p).abs().mean(dim=2)
    n = (d <= window).sum(dim=1) - 1
    m = ((d > window) & (delta <= window)).sum(dim=1)
    is_anchor = (n > 0) & (m > 0)
    floor = is_anchor * n.clamp(min=1).log()
    return floor.mean().item(), is_anchor.float().mean().item()
