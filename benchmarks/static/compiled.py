"""Triton launches without a GPU: what a call of the backend would launch, compiled for any
architecture.

``recorded_launches`` intercepts the launcher, ``compile_launch`` turns a record into a binary.
Nothing here runs a kernel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from conr_kernels import triton_backend
from conr_kernels.core.inputs import Inputs
from conr_kernels.core.rows import scale_statistics
from conr_kernels.triton_backend import call, launch_dense, launch_sweeps
from conr_kernels.triton_backend import launch as launcher
from conr_kernels.triton_backend.configs import Config
from conr_kernels.variants import Settings, resolve_variant

LAUNCH_OPTIONS = (
    "num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_pdl",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One intercepted launch: the kernel, its grid and its arguments by name, launch options
    apart; how far the sorted component of labels reaches, and whether it alone decides.
    """

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    reach: float = 1.0
    is_exact: bool = True

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextlib.contextmanager
def intercepted(
    architecture: int, reach: float = 1.0, is_exact: bool = True
) -> Iterator[list[Launch]]:
    """Collects launches instead of running them; the table is read for that architecture."""
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(kernel, grid, arguments, options, reach, is_exact))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(call, "capability", lambda device: architecture),
    ):
        yield launches


@contextlib.contextmanager
def tried(kind: str, chosen: Config) -> Iterator[None]:
    """The backend takes this configuration for kernels of the kind."""
    plain = call.config

    def config(asked: str, *key: object) -> Config:
        return chosen if asked == kind else plain(asked, *key)

    with mock.patch.object(call, "config", config):
        yield


@contextlib.contextmanager
def matmul_precision(how: str) -> Iterator[None]:
    """Of float32 products."""
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(how)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved)


def recorded_launches(
    N: int,
    D: int,
    dtype: torch.dtype,
    architecture: int = 90,
    *,
    variant: str = "paper",
    L: int = 1,
    K: int | None = None,
    temperature: float = 0.2,
    distance: str = "mae",
    window: float = 1.0,
    has_weights: bool = True,
    precision: str = "high",
    reduction: str = "mean",
) -> list[Launch]:
    """The launches of one step, from tensors without storage: of the losses' mean and its gradient,
    of the losses and theirs where that is asked for (``"none"``) or where there are further keys
    (``K``), of which some are absent.
    """
    settings = Settings(window, temperature, 0.01, resolve_variant(variant), distance)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, w = torch.empty(N, D, dtype=dtype, device="meta"), torch.empty(N, dtype=wide, device="meta")
    y = torch.empty(N, L, device="meta")
    rows = (x, y, y, w if has_weights else None)
    reach = window * (1 if L == 1 else L if distance == "mae" else math.sqrt(L))
    with (
        matmul_precision(precision),
        intercepted(architecture, reach, L == 1) as launches,
    ):
        keys = n_absent = coef_j = None
        if K is not None:
            y_j = torch.empty(K, L, device="meta")
            keys = (torch.empty(K, D, dtype=dtype, device="meta"), y_j, y_j)
            if settings.variant.unit_terms:
                n_absent = torch.empty((), dtype=torch.int64, device="meta")
        inputs = Inputs(*rows, keys, 0, settings, n_absent)
        if K is None and reduction != "none":
            loss, kept, plan = triton_backend.reduced(inputs, None, reduction, True)
            triton_backend.reduced_gradient(x, kept, plan, loss)
            return launches
        loss, stats, layout = triton_backend.forward(inputs)
        coef_i = scale_statistics(stats, loss)
        if K is not None:
            coef_j = coef_i.new_empty((K, coef_i.shape[1]))
        triton_backend.backward(inputs, coef_i, coef_j, layout)
    return launches


def source_of(launch: Launch) -> ASTSource:
    """The specialization that the launcher would choose: constants, and what 16 divides."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = mangle_type(value)
            # Slices of one allocation start where the backend cut them: always on 16 bytes.
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and not parameter.do_not_specialize and value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = parameter.annotation_type or mangle_type(value)
            is_free = isinstance(value, int) and not parameter.do_not_specialize
            if is_free and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, architecture: int | str):
    """The compiled kernel: ``asm`` and ``metadata``; for AMD's GPUs by their name, ``"gfx942"``."""
    if isinstance(architecture, str):
        target = GPUTarget("hip", architecture, wavefront_of(architecture))
    else:
        target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source_of(launch), target=target, options=dict(launch.options))


def wavefront_of(architecture: str) -> int:
    """Threads of a warp: 64 on CDNA, 32 on RDNA."""
    return 64 if architecture.startswith("gfx9") else 32


@contextlib.contextmanager
def on_amd(architecture: str) -> Iterator[None]:
    """Launches are recorded as that GPU's."""
    with (
        mock.patch.object(torch.version, "hip", "7.0"),
        mock.patch.object(launcher, "wavefront", lambda: wavefront_of(architecture)),
        mock.patch.object(launch_dense, "_plans", {}),
        mock.patch.object(launch_sweeps, "_plans", {}),
    ):
        yield
