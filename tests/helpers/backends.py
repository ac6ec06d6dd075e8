"""The backends that run here, each in its regimes, and the batch that they are called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from conr_kernels import conr_loss, cuda_backend
from conr_kernels.cuda_backend import backend as cuda
from conr_kernels.triton_backend.availability import interpreted
from conr_kernels.variants import Settings, Variant
from tests.helpers import cuda_shim
from tests.helpers.bounds import label_distance
from tests.helpers.regimes import REGIMES, force

#: Triton's kernels run in a process whose Triton is interpreted from the start, and there alone.
NAMES = ("triton",) if interpreted() else (*REGIMES, "cuda")


class Batch(NamedTuple):
    """What a backend is given, and the upstream gradient g of the row losses [N]."""

    x: Tensor
    y: Tensor
    p: Tensor
    w: Tensor | None
    g: Tensor
    settings: Settings
    is_dense: bool

    def asks(self, **changes: float | Variant) -> Batch:
        """The same rows with other settings."""
        return self._replace(settings=replace(self.settings, **changes))

    @property
    def weights(self) -> Tensor:
        """``w_i``, 1 where none are given."""
        return torch.ones_like(self.g) if self.w is None else self.w

    def take(self, rows: Tensor | slice) -> Batch:
        x, y, p, w, g = (t if t is None else t[rows] for t in self[:5])
        return self._replace(x=x, y=y, p=p, w=w, g=g)

    def sets(self) -> tuple[Tensor, Tensor, Tensor]:
        """``d_ij``, ``[j ∈ P_i]``, ``[j ∈ M_i]`` [N, N]: the definition, pair by pair."""
        h, distance = self.settings.window, self.settings.distance
        d_ij = label_distance(self.y, distance)
        negative = d_ij > h
        if self.settings.variant.negatives == "confused":
            negative = negative & (label_distance(self.p, distance) <= h)
        return d_ij.double(), (d_ij <= h).fill_diagonal_(False), negative


class Backend(NamedTuple):
    """A backend by the name that ``conr_loss`` knows it by.

    ``paths`` is the module that chooses between one dense pass and two bands, where a batch does.
    """

    name: str
    paths: ModuleType | None = None

    def __repr__(self) -> str:
        return self.name

    def __call__(
        self, batch: Batch, keys: Batch | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Row losses [N] and the gradient of the features for the upstream gradient, in float64."""
        x = batch.x.detach().requires_grad_()
        rows = self.loss(batch, x, keys, "none", mask)
        rows.backward(batch.g)
        return rows.detach().double(), x.grad.double()

    def reduced(self, batch: Batch, reduction: str) -> tuple[Tensor, Tensor]:
        """The mean or sum and its gradient."""
        x = batch.x.detach().requires_grad_()
        loss = self.loss(batch, x, None, reduction)
        loss.backward()
        return loss.detach().double(), x.grad.double()

    def loss(
        self,
        batch: Batch,
        x: Tensor,
        keys: Batch | None,
        reduction: str,
        mask: Tensor | None = None,
    ) -> Tensor:
        if self.paths is not None:
            self.paths.DENSE_PAIRS = 2**40 if batch.is_dense else -1
        return conr_loss(
            x, batch.y, batch.p, batch.w, **vars(batch.settings), reduction=reduction,
            backend=self.name, keys=None if keys is None else keys[:3], mask=mask,
        )  # fmt: skip


@contextmanager
def running(name: str, folder: Path) -> Iterator[Backend]:
    """The named backend, forced into its regime; fresh tensors hold NaN until they are written.

    Skips the test where the CUDA source cannot be compiled, into ``folder``, for the host.
    """
    with pytest.MonkeyPatch.context() as patch:
        backend = _make(name, patch, folder)
        torch.use_deterministic_algorithms(True)
        try:
            yield backend
        finally:
            torch.use_deterministic_algorithms(False)


def _make(name: str, patch: pytest.MonkeyPatch, folder: Path) -> Backend:
    if name == "triton":
        from conr_kernels.triton_backend import launch_dense

        patch.setattr(launch_dense, "DENSE_PAIRS", launch_dense.DENSE_PAIRS)
        return Backend(name, launch_dense)
    if name != "cuda":
        return Backend(force(patch, name))
    if (reason := cuda_shim.missing_tool()) is not None:
        pytest.skip(reason)
    shim = cuda_shim.load(folder)
    patch.setattr(cuda_backend, "unavailable", lambda device, dtype: None)
    patch.setattr(cuda, "_operators", lambda: shim)
    patch.setattr(cuda, "DENSE_PAIRS", cuda.DENSE_PAIRS)
    patch.setattr(cuda, "DENSE_SHARE", 2.0)
    return Backend(name, cuda)
