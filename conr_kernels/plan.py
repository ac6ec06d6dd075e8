"""Which backend serves a call, and why: pure functions of the call's form, no tensor is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .ops import BACKENDS, backend_module


@dataclass(frozen=True)
class Plan:
    """The backend of a call and the reason for the choice."""

    backend: str
    why: str


def backend_status(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, str | None]:
    """For each fused backend None where it runs on the device, else the reason and the remedy."""
    return {name: _unavailable(name, device, dtype) for name in BACKENDS}


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Which backends work on a device, and why the others do not.

    Args:
        device: where the features would be, there or not; None: the GPU if there is one, else the
            CPU.

    Returns:
        ``{"triton": …, "cuda": …, "torch": …, "reference": None}`` in the order in which ``"auto"``
        prefers them: None for a backend that works there (with float32 features), else the reason
        and what to do.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = _no_such_device(device)
    if reason is not None:
        return dict.fromkeys((*BACKENDS, "reference"), reason)
    return {**backend_status(torch.device(device)), "reference": None}


def _no_such_device(device: torch.device | str) -> str | None:
    """Why no tensor can be there; None where one can."""
    try:
        device = torch.device(device)
        if device.type in ("cpu", "meta"):
            return None
        module = torch.get_device_module(device)
        n_devices = module.device_count() if module.is_available() else 0
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"{device!r} is no device of this PyTorch: {str(error).splitlines()[0]}"
    if (device.index or 0) < n_devices:
        return None
    return (
        f"PyTorch {torch.__version__} finds {n_devices or 'no'} {device.type} devices here; check "
        "the driver, the visible devices and that this build of PyTorch is made for them"
    )


def _unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot run there."""
    if torch.compiler.is_compiling():
        from . import tracing

        return tracing.unavailable(backend, device, dtype)
    return backend_module(backend).unavailable(device, dtype)


def make_plan(backend: str, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan for ``backend``, ``"auto"`` included.

    Raises:
        RuntimeError: an explicit backend cannot run there; the message says why and what to do.
    """
    if backend == "reference":
        return Plan(backend, "asked for")
    if backend == "auto":
        if device.type == "cpu":
            return Plan("torch", "the backend for CPU tensors")
        for name in BACKENDS:
            if _unavailable(name, device, dtype) is None:
                return Plan(name, f"the first of {', '.join(BACKENDS)} that runs on {device}")
    reason = _unavailable(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot run here: {reason}')
    return Plan(backend, "asked for")
