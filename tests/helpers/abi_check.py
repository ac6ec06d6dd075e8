"""One binary, another PyTorch: run by the interpreter to be checked, on a library built elsewhere.

``python -m tests.helpers.abi_check registers LIBRARY`` loads the extension and prints its
operators; ``python -m tests.helpers.abi_check runs SHIM`` runs the host build's kernels through it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from conr_kernels import conr_loss
from conr_kernels import cuda_backend as front_door
from conr_kernels.cuda_backend import backend as cuda_backend
from tests.helpers.cuda_shim import Shim

OPERATORS = ("forward", "backward")
#: Of the gradient; the loss is good to 1e-6.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}


def registers(library: Path) -> None:
    torch.ops.load_library(str(library))
    for name in OPERATORS:
        print(getattr(torch.ops.conr_kernels_cuda, name).default._schema.name)


def runs(library: Path) -> None:
    shim = Shim(library)
    front_door.unavailable = lambda device, dtype: None
    cuda_backend._operators = lambda: shim
    cuda_backend.DENSE_PAIRS = 0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, 24, generator=generator)
    y = torch.randint(0, 40, (130,), generator=generator) / 4
    p = y + torch.randn(130, generator=generator)
    for dtype, tolerance in TOLERANCES.items():
        found = step(x.to(dtype), y, p, "cuda")
        expected = step(x.to(dtype).double(), y, p, "reference")
        loss, gradient = ((a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True))
        print(f"{dtype}: relative error of the loss {loss:.1e}, of the gradient {gradient:.1e}")
        assert loss <= 1e-6 and gradient <= tolerance


def step(x, y, p, backend):
    x = x.clone().requires_grad_()
    loss = conr_loss(x, y, p, backend=backend)
    loss.backward()
    return loss.detach().double(), x.grad.double()


if __name__ == "__main__":
    print(f"torch {torch.__version__}")
    {"registers": registers, "runs": runs}[sys.argv[1]](Path(sys.argv[2]))
