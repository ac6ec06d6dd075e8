"""What ``torch.compile`` has to be told. Imported only while tracing, as it loads the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

from .ops import backend_module


@torch.compiler.assume_constant_result
def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend's answer, without tracing its import."""
    return backend_module(backend).unavailable(device, dtype)


def constant(value: Any) -> Any:
    """A number that tracing may have made symbolic, as a constant with a guard.

    numpy's numbers are arrays to tracing: the checks refuse them, and the call runs in eager mode.
    """
    return guard_scalar(value) if isinstance(value, (int, float)) else value
