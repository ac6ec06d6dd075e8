"""Whether the Triton backend can run on a device, and what to do where it cannot."""

from __future__ import annotations

import importlib.util
import os

import torch


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, and what to do; None where it can."""
    if device.type == "cpu" and not interpreted():
        return (
            "triton compiles for GPUs and the tensors are on the CPU; move them to a GPU, set "
            'TRITON_INTERPRET=1 before Python starts to use its interpreter, or use backend="auto"'
        )
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; install it (pip install triton) or use backend="auto"'
    if device.type == "cpu":
        return _interpreter_unavailable()
    if device.type != "cuda":
        return f'no triton driver for {device.type} tensors here; use backend="torch" or "auto"'
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"triton needs compute capability 8.0 or above, this GPU has {major}.{minor}; "
            'use backend="cuda", "torch" or "auto"'
        )
    return None


def _interpreter_unavailable() -> str | None:
    """Why Triton's interpreter cannot run: its loops turn one-element arrays into numbers, which
    numpy refuses from 2.4 on. None where it can.
    """
    import numpy

    if tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 4):
        return None
    return (
        f"triton's interpreter does not work with numpy {numpy.__version__}; "
        "install numpy below 2.4 (pip install 'numpy<2.4')"
    )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as the environment of the process says."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
