"""Which backend serves a call: functions of device and dtype; no tensor is read."""

from __future__ import annotations

import torch

from .ops import BACKENDS, backend_module


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Which backends work on a device, and why the others do not.

    Args:
        device: where the features would be, whether or not this machine has it; None for the GPU if
            there is one, else the CPU.

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
    device = torch.device(device)
    status = {name: _unavailable(name, device, torch.float32) for name in BACKENDS}
    return {**status, "reference": None}


def _no_such_device(device: torch.device | str) -> str | None:
    """Why no tensor can be there; None where one can."""
    try:
        device = torch.device(device)
        if device.type in ("cpu", "meta"):
            return None
        module = torch.get_device_module(device)
        n_devices = module.device_count() if module.is_available() else 0
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"{device!r} is not a device of this PyTorch: {str(error).splitlines()[0]}"
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


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves ``backend``, which may be ``"auto"``: on a CPU ``"torch"``, elsewhere
    the first of BACKENDS that runs there.

    Raises:
        RuntimeError: an explicit backend cannot run there; the message says why and what to do.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        of_device = ("torch",) if device.type == "cpu" else BACKENDS
        return next(name for name in of_device if _unavailable(name, device, dtype) is None)
    reason = _unavailable(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot run here: {reason}')
    return backend
