"""The tiles of other GPUs' columns of the table, in the interpreter, which reads sm_90's otherwise.

Collected by test_triton.py alone, as triton_interpreted.py is.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from conr_kernels.triton_backend import call, launch_sweeps

from .triton_cases import BF16, F16, Case, forced

#: One launch of both sweeps and one each, narrow and wide features, H_ij of two tiles once and not.
CASES = [
    Case(201, 100, dtype=BF16, labels="ages"),
    Case(201, 200, dtype=F16, labels="ages", regime="in turn"),
    Case(130, 200, "released-age", BF16),
    Case(201, 300, dtype=BF16, labels="ages", regime="pieces"),
    Case(130, 300, dtype=F16, labels="ages", regime="windows"),
    Case(130, 260, "released-depth", BF16, L=2, K=40, regime="pieces"),
    Case(201, 200, dtype=BF16, regime="dense-recomputed"),
    Case(130, 120, labels="ages", regime="in turn"),
    Case(130, 150, labels="ages", regime="windows"),
]


@pytest.mark.parametrize(
    ("column", "case"),
    [*((80, case) for case in CASES), *((100, case) for case in CASES[1:4])],
    ids=str,
)
def test_tiles_of_other_columns_are_as_exact(column: int, case: Case) -> None:
    given = case.inputs()
    with (
        mock.patch.object(call, "capability", lambda device: column),
        forced(case.regime),
        mock.patch.object(launch_sweeps, "WIDE_PROGRAMS", {column: 3}),
    ):
        got = case.run("triton", case.dtype, given)
    exact = case.run("reference", torch.float64, given)
    limits = {F16: (2e-4, 3e-3), BF16: (2e-3, 4e-2), torch.float32: (2e-6, 2e-6)}[case.dtype]
    for ours, truth, limit in zip(got, exact, limits, strict=True):
        assert (ours.double() - truth).abs().max() <= limit * truth.abs().max()
