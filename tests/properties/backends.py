"""The backends that run here, each in its regimes, as the properties call them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from torch import Tensor

from conr_kernels import conr_loss, cuda_backend
from conr_kernels.cuda_backend import backend as cuda
from conr_kernels.triton_backend.availability import interpreted
from tests.helpers import cuda_shim
from tests.helpers.regimes import REGIMES, force
from tests.properties.strategies import Batch

#: Triton's kernels run in a process whose Triton is interpreted from the start, and there alone.
NAMES = ("triton",) if interpreted() else (*REGIMES, "cuda")
MAX_ROWS = 9 if interpreted() else 60


class Backend(NamedTuple):
    """A backend by the name that ``conr_loss`` knows it by.

    ``paths`` is the module that chooses between one dense pass and two bands, where a batch does.
    """

    name: str
    paths: ModuleType | None = None

    def __repr__(self) -> str:
        return self.name

    def __call__(self, batch: Batch, keys: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Row losses [N] and the gradient of the features for the upstream gradient, in float64."""
        x = batch.x.detach().requires_grad_()
        rows = self.loss(batch, x, keys, "none")
        rows.backward(batch.g)
        return rows.detach().double(), x.grad.double()

    def reduced(self, batch: Batch, reduction: str) -> tuple[Tensor, Tensor]:
        """The mean or sum and its gradient."""
        x = batch.x.detach().requires_grad_()
        loss = self.loss(batch, x, None, reduction)
        loss.backward()
        return loss.detach().double(), x.grad.double()

    def loss(self, batch: Batch, x: Tensor, keys: Batch | None, reduction: str) -> Tensor:
        if self.paths is not None:
            self.paths.DENSE_PAIRS = 2**40 if batch.is_dense else -1
        return conr_loss(
            x, batch.y, batch.p, batch.w, **vars(batch.settings), reduction=reduction,
            backend=self.name, keys=None if keys is None else keys[:3],
        )  # fmt: skip


def make_backend(name: str, patch: pytest.MonkeyPatch, folder: Path) -> Backend:
    """The named backend, forced into its regime as long as the patch holds."""
    if name == "triton":
        from conr_kernels.triton_backend import call

        patch.setattr(call, "DENSE_PAIRS", call.DENSE_PAIRS)
        return Backend(name, call)
    if name != "cuda":
        return Backend(force(patch, name))
    if (reason := cuda_shim.missing_tool()) is not None:
        pytest.skip(reason)
    shim = cuda_shim.Shim(cuda_shim.compile_shim(folder))
    patch.setattr(cuda_backend, "unavailable", lambda device, dtype: None)
    patch.setattr(cuda, "_operators", lambda: shim)
    patch.setattr(cuda, "DENSE_PAIRS", cuda.DENSE_PAIRS)
    patch.setattr(cuda, "DENSE_SHARE", 2.0)
    return Backend(name, cuda)
