"""Placeholder of the cuda backend: says that it is not part of this version."""

from __future__ import annotations

import torch

from .variants import Settings


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return 'this version has no cuda kernels yet; use backend="auto" or "torch"'


def layout_size(n_anchors: int, n_keys: int, dtype: torch.dtype, settings: Settings) -> int:
    return 0
