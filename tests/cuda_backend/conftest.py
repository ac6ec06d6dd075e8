"""Fixtures that run the CUDA kernels on CPU tensors, on the host shim, and force a path."""

import pytest
import torch

from conr_kernels import cuda_backend as front_door
from conr_kernels.cuda_backend import backend as cuda_backend
from tests.helpers import cuda_shim


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    if (reason := cuda_shim.missing_tool()) is not None:
        pytest.skip(reason)
    return cuda_shim.load(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def shim(compiled, monkeypatch):
    """``backend="cuda"`` runs CPU tensors on the shim; fresh tensors hold NaN until written."""
    monkeypatch.setattr(front_door, "unavailable", lambda device, dtype: None)
    monkeypatch.setattr(cuda_backend, "_operators", lambda: compiled)
    monkeypatch.setattr(compiled, "shortened", "")
    compiled.configure()
    torch.use_deterministic_algorithms(True)
    yield compiled
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["dense", "banded"])
def path(request, monkeypatch):
    """One sweep over all pairs, or two over bands, whatever the size."""
    monkeypatch.setattr(cuda_backend, "DENSE_PAIRS", 2**40 if request.param == "dense" else 0)
    monkeypatch.setattr(cuda_backend, "DENSE_SHARE", 2.0)
    return request.param
