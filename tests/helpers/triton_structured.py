"""The Triton kernels in the interpreter on structured cases, full tiles and ties.

Collected by test_triton.py alone, as triton_interpreted.py is.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from conr_kernels import conr_loss, triton_backend
from conr_kernels.triton_backend.call import arithmetic
from conr_kernels.triton_backend.configs import bucket, config

from .cases import EMPTY_KINDS, KINDS, VARIANTS, cover, structured_cases, tie_cases
from .oracle import assert_as_good_as_eager
from .triton_interpreted import BF16, F16, forced

F32 = torch.float32
#: One tile each: the interpreter takes long.
SMALL = dict(n=(17, 33), d=(1, 7, 16), kind=[kind for kind in KINDS if kind[1] == "near"])
EMPTY = [kind for kind in EMPTY_KINDS if kind[0] != "ages"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_as_good_as_eager_on_structured_cases(variant: str) -> None:
    cases = [
        c for c in structured_cases(empty_kinds=EMPTY, **SMALL) if c.choice["variant"] == variant
    ]
    for number, case in enumerate(cases):
        with forced(("sweeps", "dense")[number % 2]):
            assert_as_good_as_eager(triton_backend, case)


@pytest.mark.parametrize(("n_components", "distance"), [(3, "mae"), (2, "rmse")])
def test_ties_beyond_the_reach_are_positives_and_negatives(n_components: int, distance: str):
    for case in tie_cases(n_components, distance):
        with forced("sweeps"):
            assert_as_good_as_eager(triton_backend, case)


FULL = dict(
    variant=("paper", "released-depth", "released-age", "inside-distance"),
    temperature=(0.2, 0.02),
    dtype=(F32, F16, BF16),
    D=(16, 200),
)


@pytest.mark.parametrize("choice", list(cover(FULL)), ids=lambda c: "-".join(map(str, c.values())))
def test_tiles_of_positives_only(choice: dict) -> None:
    """Where so many rows share a label, pairs of tiles need no mask; D = 200 of float32 is wide."""
    dtype, D, tau = choice["dtype"], choice["D"], choice["temperature"]
    width = bucket(D, arithmetic(dtype))
    kinds = ("forward", "backward" if width else "wide")
    of_kinds = [config(kind, 90, width, arithmetic(dtype)) for kind in kinds]
    n_alike = max(of.BLOCK_I + of.BLOCK_J for of in of_kinds) + 4
    g = torch.Generator().manual_seed(D)
    N = n_alike + 20
    x, p = torch.randn(N, D, generator=g).to(dtype), torch.randn(N, generator=g)
    y = torch.where(torch.randperm(N, generator=g) < n_alike, 0.0, 5.0)
    w, upstream = torch.rand(N, generator=g) + 0.5, torch.rand(N, generator=g)
    results = []
    for backend, of_dtype in (("triton", dtype), ("reference", torch.float64)):
        features = x.to(of_dtype).detach().requires_grad_()
        with forced("sweeps") if backend == "triton" else contextlib.nullcontext():
            loss = conr_loss(
                features, y, p, w, variant=VARIANTS[choice["variant"]], temperature=tau,
                push_scale=0.1, reduction="none", backend=backend,
            )  # fmt: skip
            (loss * upstream).sum().backward()
        results.append((loss.detach().double(), features.grad.double()))
    # The interpreter truncates to bfloat16 where a GPU rounds.
    limits = {F32: (1e-5, 1e-4), F16: (2e-4, 3e-3), BF16: (2e-3, 4e-2)}[dtype]
    for name, ours, truth, limit in zip(("loss", "gradient"), *results, limits, strict=True):
        error = ((ours - truth).abs().max() / truth.abs().max()).item()
        assert error <= limit * 0.2 / tau, f"{name}: {error:.1e}"
