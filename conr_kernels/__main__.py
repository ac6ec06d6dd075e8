"""``python -m conr_kernels``: versions, the backends that work here, and a self-test of each."""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from . import __version__, available_backends, conr_loss, cuda_backend
from .variants import PRESETS

#: Every backend's promise: 3 times the float32 equation's error plus 1e-6 of the largest term.
ERROR_FACTOR, ERROR_FLOOR = 3.0, 1e-6
#: The size of the batch of the self-test.
N, D = 129, 24


@dataclass(frozen=True)
class Check:
    """The worst over the presets: relative errors, and the ratio of an error to what is allowed."""

    loss_error: float
    gradient_error: float
    worst_ratio: float

    @property
    def passed(self) -> bool:
        return self.worst_ratio <= 1  # False for NaN too


def self_test(backend: str, device: torch.device) -> Check:
    """Forward and backward of every preset against the float64 reference."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    y = torch.randint(0, 30, (N,), generator=generator) / 2
    p = y + 2 * torch.randn(N, generator=generator)
    w = torch.rand(N, generator=generator) + 0.1
    checks = []
    for variant in PRESETS:
        exact = _rows_and_gradient(x.double(), y, p, w, variant, "reference")
        eager = _rows_and_gradient(x, y, p, w, variant, "reference")
        on_device = (t.to(device) for t in (x, y, p, w))
        found = _rows_and_gradient(*on_device, variant, backend)
        errors, ratios = [], []
        for t, t_eager, t_exact in zip(found, eager, exact, strict=True):
            largest = t_exact.abs().max().item()
            error = (t.cpu() - t_exact).abs().max().item()
            eager_error = (t_eager - t_exact).abs().max().item()
            errors.append(error / largest)
            ratios.append(error / (ERROR_FACTOR * eager_error + ERROR_FLOOR * largest))
        checks.append((*errors, max(ratios, key=_nan_last)))
    return Check(*(max(column, key=_nan_last) for column in zip(*checks, strict=True)))


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _rows_and_gradient(
    x: Tensor, y: Tensor, p: Tensor, w: Tensor, variant: str, backend: str
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    rows = conr_loss(x, y, p, w, variant=variant, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    return rows.detach().double(), gradient.double()


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console may lack the letters of a message
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="python -m conr_kernels",
        description="What is installed, which backends work here and why the others do not, and a "
        "self-test of each that does. Exit status 1 if one fails.",
    )
    parser.add_argument("--version", action="version", version=f"conr_kernels {__version__}")
    parser.parse_args(arguments)
    print(f"conr_kernels {__version__}, torch {torch.__version__}, triton {_installed('triton')}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        print(f"GPU: {name}, sm_{capability[0]}{capability[1]}, CUDA {torch.version.cuda}")
    else:
        print("GPU: none that torch can use")
    print(f"cuda backend: {cuda_backend.describe()}")

    failed = []
    for device in devices:
        print(f"\nBackends for {device.type} tensors (self-test: largest error of loss, gradient)")
        for backend, reason in available_backends(device).items():
            if reason is not None:
                print(f"  {backend:10s} no     {reason}")
                continue
            try:
                check = self_test(backend, device)
            except Exception as error:  # a broken backend must not hide the state of the others
                failed.append(f"{backend} on {device.type}")
                print(f"  {backend:10s} FAILED {type(error).__name__}: {error}")
                continue
            if not check.passed:
                failed.append(f"{backend} on {device.type}")
            print(
                f"  {backend:10s} {'ok    ' if check.passed else 'FAILED'} "
                f"{check.loss_error:.1e}, {check.gradient_error:.1e}; "
                f"{check.worst_ratio:.2f} of what is allowed"
            )
    if failed:
        print(f"\nself-test failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
