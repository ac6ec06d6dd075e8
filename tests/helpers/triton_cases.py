"""Inputs of the tests of interpreted Triton kernels, buffers that show who writes outside of them,
and the kernels of each regime at any size.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from conr_kernels import Variant, conr_loss
from conr_kernels.triton_backend import call, launch, launch_dense, launch_order, launch_sweeps

F64, F16, BF16 = torch.float64, torch.float16, torch.bfloat16
GUARD = 160
#: Not a number also where a kernel keeps floating-point numbers in integers.
SENTINEL = 2**31 - 1


def fill_value(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else SENTINEL


def in_guard_zone(t: Tensor, gap: int = 0) -> tuple[Tensor, Tensor]:
    """A copy of t with NaN before, after and (gap) between its rows; and the whole buffer."""
    rows = t.shape[0] if t.dim() > 1 else 1
    width = t.numel() // max(rows, 1) + gap
    buffer = torch.full((rows * width + 2 * GUARD,), fill_value(t.dtype), dtype=t.dtype)
    strides = list(t.contiguous().stride())
    if t.dim() > 1:
        strides[0] = width
    view = buffer.as_strided(t.shape, strides, GUARD)
    view.copy_(t)
    return view, buffer


@contextlib.contextmanager
def guarded_allocations():
    """Every buffer of the backend is prefilled with NaN and must leave the NaN around it alone, and
    between its parts.
    """
    buffers, workspaces = [], []
    plain_new_empty, plain_new = torch.Tensor.new_empty, launch.Parts.new

    def new(parts, x):
        workspaces.append((parts, plain_new(parts, x)))
        return workspaces[-1][1]

    def allocate(shape, dtype):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        n = torch.Size(shape).numel()
        buffer = torch.full((n + 2 * GUARD,), fill_value(dtype), dtype=dtype)
        buffers.append((buffer, n))
        return buffer[GUARD : GUARD + n].view(shape)

    def new_empty(self, *shape, dtype=None, **options):
        if options:  # the interpreter's own
            return plain_new_empty(self, *shape, **options)
        return allocate(shape[0] if len(shape) == 1 else shape, dtype or self.dtype)

    def empty_like(t, memory_format=None):
        return allocate(t.shape, t.dtype)

    with (
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(launch, "GUARD", GUARD),
        mock.patch.object(launch.Parts, "new", new),
        mock.patch.object(launch_dense, "_plans", {}),
        mock.patch.object(launch_sweeps, "_plans", {}),
    ):
        yield
    assert buffers
    for parts, whole in workspaces:
        is_free = torch.ones(parts.size, dtype=torch.bool)
        for _, start, n, _ in parts.parts.values():
            is_free[start : start + n] = False
        assert is_free.sum() >= GUARD or not parts.parts
        assert (whole[is_free] == SENTINEL).all(), "a kernel wrote outside its part of a workspace"
    for buffer, n in buffers:
        for zone in (buffer[:GUARD], buffer[GUARD + n :]):
            intact = zone.isnan() if buffer.is_floating_point() else zone == SENTINEL
            assert intact.all(), "a kernel wrote outside its buffer"


@contextlib.contextmanager
def forced(regime: str, allocations=guarded_allocations):
    """The kernels of the regime at any size, with guarded buffers.

    "parts": sweeps that keep H_ij of one tile of pairs, and copies of one order, at a time, and
    a list of their pairs in 64 bits;
    "in turn": sweeps that add up the gradient one after the other;
    "windows": of three tiles of float32, and copies of both orders;
    "parts", "sweeps", "windows": the forward pass takes each pair once;
    "pieces": a window has every tile of anchors, one tile of keys at a time.
    """
    pairs = launch_dense.DENSE_PAIRS if "dense" in regime else -1
    kept = -1 if regime == "dense-recomputed" else launch_dense.KEPT_PAIRS
    workspace = {"parts": 1, "windows": 3 * 64 * 64 * 4}.get(regime, 2**27)
    chunks = 0 if regime == "dense-split" else launch_dense.GRAM_CHUNKS
    mirrored = 2 if regime in ("parts", "sweeps", "windows") else 2**31
    of_calls = dict(
        WIDE_FEATURES=0,
        PIECE_KEYS=1 if regime == "pieces" else 8192,
        PIECES=2**31,
        LIST_NUMBERS=0 if regime == "parts" else 2**31 - 1,
        WORKSPACE=(workspace, workspace),
        MIRRORED_ROWS=(mirrored, mirrored, 1),
        MIRRORED_BYTES=0,
        SHORT_ROWS=2**14 if regime == "parts" else 0,
    )
    of_few = dict(
        DENSE_PAIRS=pairs, KEPT_PAIRS=kept, GRAM_CHUNKS=chunks, GRAM_PART=1 if chunks == 0 else 4
    )
    of_order = dict(SORT_BLOCK=128, MERGE_FANS={}, MERGE_FAN=2, SEARCHES=64)
    of_order["MOST_SORTED"] = 2**16 * (regime not in ("parts", "in turn"))
    of_sweeps = dict(
        PROGRAMS=3,
        WIDE_PROGRAMS={90: 3},
        WIDE_SLICES=3,
        BOTH_ORDERS=0 if regime == "parts" else 2**26,
        PARTS_BYTES=0 if regime == "in turn" else 2**25,
        WIDE_BOTH_ORDERS=0 if regime == "parts" else 2**28,
    )
    with (
        mock.patch.multiple(launch_dense, **of_few),
        mock.patch.multiple(call, **of_calls),
        mock.patch.multiple(launch_order, **of_order),
        mock.patch.multiple(launch_sweeps, **of_sweeps),
        allocations(),
    ):
        yield


@dataclass(frozen=True)
class Case:
    N: int
    D: int
    variant: str | Variant = "paper"
    dtype: torch.dtype = torch.float32
    regime: str = "sweeps"
    L: int = 1
    distance: str = "mae"
    K: int = 0
    window: float = 1.0
    temperature: float = 0.2
    push_scale: float = 0.05
    labels: str = "halves"
    weights: str = "random"

    def __str__(self) -> str:
        name = self.variant if isinstance(self.variant, str) else self.variant.code
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.regime}-{name}-N{self.N}-K{self.K}-D{self.D}-{dtype}-L{self.L}{self.distance}"
            f"-h{self.window}-t{self.temperature}-e{self.push_scale}-{self.labels}-{self.weights}"
        )

    def inputs(self) -> dict[str, Tensor | None]:
        g = torch.Generator().manual_seed(self.N * 1000 + self.D + self.K)
        n = self.N + self.K
        x = torch.randn(n, self.D, generator=g)
        x *= 10 ** torch.randn(n, 1, generator=g)
        if n > 3:
            x[n // 2] = 0
        shape = (n, self.L)
        y, noise = {
            "halves": lambda: (torch.randint(0, 12, shape, generator=g) / 2, 2.0),
            "decimal": lambda: (torch.randint(0, 40, shape, generator=g) / 10, 0.3),
            "ages": lambda: (torch.randint(0, 60, shape, generator=g).float(), 7.0),
            "rare": lambda: (torch.rand(shape, generator=g) * 1e4, 1.0),
            "equal": lambda: (torch.zeros(shape), 1.0),
            "tiny": lambda: (torch.randint(0, 3, shape, generator=g) * 1e-36, 0.0),
        }[self.labels]()
        p = y + torch.randn(shape, generator=g) * noise
        if self.labels == "decimal":
            p = (p * 10).round() / 10
        w = {
            "random": lambda: torch.rand(self.N, generator=g) + 0.1,
            "zeros": lambda: (torch.rand(self.N, generator=g) > 0.5).float(),
            "huge": lambda: 10 ** (torch.rand(self.N, generator=g) * 30),
            "none": lambda: None,
        }[self.weights]()
        return dict(x=x.to(self.dtype), y=y, p=p, w=w, upstream=torch.rand(self.N, generator=g))

    def run(self, backend: str, dtype: torch.dtype, given: dict) -> tuple[Tensor, Tensor]:
        """Row losses and the gradient for a random upstream gradient."""
        N = self.N
        x = given["x"].detach().to(dtype)
        if backend == "triton":
            x = in_guard_zone(x, gap=3)[0]
        features = x[:N].detach().requires_grad_()
        keys = (x[N:], given["y"][N:], given["p"][N:]) if self.K else None
        loss = conr_loss(
            features, given["y"][:N], given["p"][:N], given["w"], window=self.window,
            temperature=self.temperature, push_scale=self.push_scale, variant=self.variant,
            distance=self.distance, reduction="none", backend=backend, keys=keys,
        )  # fmt: skip
        (loss * given["upstream"]).sum().backward()
        return loss.detach(), features.grad

    def run_triton(self, given: dict) -> tuple[Tensor, Tensor]:
        with forced(self.regime):
            return self.run("triton", self.dtype, given)
