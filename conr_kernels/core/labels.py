"""Labels and weights in the shape and dtype that backends take."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_labels(y: Tensor) -> Tensor:
    """Labels as a contiguous [N, L] in the dtype of comparisons; float32 holds integers exactly up
    to 2²⁴.
    """
    is_wide = y.dtype == torch.float64 and y.device.type == "cpu"
    y = y.detach().to(torch.float64 if is_wide else torch.float32)
    return (y[:, None] if y.dim() == 1 else y).contiguous()


def as_keys(keys: object, dtype: torch.dtype | None = None) -> object:
    """The rows of a MemoryBank, with features in ``dtype`` if given; other keys unchanged."""
    return keys.keys(dtype) if hasattr(keys, "n_pushed") else keys


def as_weights(w: Tensor | float | None, x: Tensor) -> Tensor | None:
    """Weights [N] on the device of ``x`` [N, …], in its accumulation dtype."""
    if w is None:
        return None
    dtype = accumulation_dtype(x)
    is_ready = isinstance(w, Tensor) and w.dtype == dtype and w.device == x.device
    if is_ready and w.shape == x.shape[:1] and not w.requires_grad:
        return w.contiguous()
    if not isinstance(w, Tensor):
        w = torch.inf if w > torch.finfo(dtype).max else float(w)
        return torch.full((x.shape[0],), w, dtype=dtype, device=x.device)
    w = w.detach().to(device=x.device, dtype=dtype)
    return w.reshape(-1).expand(x.shape[0]).contiguous()
