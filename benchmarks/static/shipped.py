"""Every kernel launch that the package ships, up to its sizes: the calls that reach every entry of
the table of configurations and every branch that a constant compiles in or out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from conr_kernels.triton_backend.configs import BUCKETS, REGISTER_D, SHORT_ROWS

from . import compiled
from .compiled import Launch

#: Rows of a call: of sweeps, SHORT and not, each pair twice; the most not sorted; with s_ij kept.
SWEEPS, BETWEEN, FEW, KEPT = 16_384, 24_576, 4096, 1024
#: Beyond the parts of a gradient that one launch leaves for both sweeps.
LARGE = 2**18
#: A D of the bucket 0, whose rows are read in chunks: of ResNet-50, and beyond one program's part.
CHUNKED, LONG = 2048, 8192
#: One that the widest tiles of columns do not divide.
UNEVEN = 384
#: D and rows of few, by arithmetic: every tile that is chosen for them.
FEW_SIZES = {
    "float16": [(128, KEPT), (256, FEW)],
    "bfloat16": [(128, 128), (128, 512), (128, FEW), (256, KEPT), (256, FEW), (LONG, KEPT)],
    "float32": [(128, 128), (128, 512), (128, KEPT), (128, FEW), (LONG, KEPT)],
    "float32 highest": [(128, KEPT), (128, FEW), (LONG, KEPT)],
    "float64": [(64, KEPT), (64, FEW), (LONG, KEPT)],
}


@dataclass(frozen=True)
class Call:
    """The form of one call of the backend.

    ``part``: the launches of interest, ``"all"``, those that read the ``"table"``, or those of the
    ``"wide"`` kernels or of ``"order"``.
    """

    N: int
    D: int
    arithmetic: str
    variant: str = "paper"
    L: int = 1
    distance: str = "mae"
    temperature: float = 0.2
    window: float = 1.0
    has_keys: bool = False
    has_weights: bool = True
    part: str = "all"

    @property
    def is_few(self) -> bool:
        return self.N <= FEW

    def __str__(self) -> str:
        """The variant and what else differs from the defaults."""
        rows = f"{self.N} rows" if self.is_few else f"N={BETWEEN}" if self.N == BETWEEN else ""
        words = [self.variant, rows]
        words.append(f"L={self.L} {self.distance}" if self.L > 1 else "")
        words.append(f"t={self.temperature:g}" if self.temperature != 0.2 else "")
        words.append(f"h={self.window:g}" if self.window != 1 else "")
        words += ["keys"] * self.has_keys + ["no weights"] * (not self.has_weights)
        return " ".join(word for word in words if word)

    def launches(self, architecture: int, n: int | None = None) -> list[Launch]:
        """Its launches on an architecture, for ``n`` rows instead of N."""
        n = n or self.N
        found = compiled.recorded_launches(
            n, self.D, getattr(torch, self.arithmetic.split()[0]), architecture,
            variant=self.variant, L=self.L, K=self._keys(n), temperature=self.temperature,
            distance=self.distance, window=self.window, has_weights=self.has_weights,
            precision="highest" if self.arithmetic.endswith("highest") else "high",
        )  # fmt: skip
        return [launch for launch in found if self._has(launch)]

    def _has(self, launch: Launch) -> bool:
        if self.part in ("wide", "order", "rank", "merge", "forward", "mirrored"):
            return self.part in launch.name
        return self.part == "all" or "BLOCK_J" in launch.arguments

    def _keys(self, n: int) -> int | None:
        if not self.has_keys:
            return None
        return n if self.is_few else 2 * n


def _flags(call: Call) -> list[Call]:
    """Calls that, beside the presets below, take every branch that is not the arithmetic's."""
    return [
        replace(call, variant="released-depth", has_keys=True),
        replace(call, variant="no-pushing", L=3),
        replace(call, variant="no-weight", window=0.0),
        replace(call, variant="no-similarity", has_weights=False, temperature=0.02),
        replace(call, variant="contrastive"),
        replace(call, variant="contrastive", L=3, distance="rmse", has_keys=True),
    ]


def calls() -> list[Call]:
    """In the order of the table: every bucket of D in every arithmetic with the paper's loss and in
    one with the drop-in's default, whose exponents are shifted; then the other branches.
    """
    found = []
    for arithmetic, largest in REGISTER_D.items():
        buckets = [width for width in BUCKETS if width <= largest]
        is_first = arithmetic == "bfloat16"
        for D in (*buckets, CHUNKED):
            whole = D == CHUNKED or (is_first and D == 128)
            found.append(Call(SWEEPS, D, arithmetic, part="all" if whole else "table"))
        found.append(Call(SWEEPS, min(largest, 128), arithmetic, "released-age", part="table"))
        found.append(Call(LARGE, largest, arithmetic, part="backward_kernel"))
        found += [Call(N, D, arithmetic) for D, N in FEW_SIZES[arithmetic]]
    found += [Call(KEPT, 128, "bfloat16"), Call(FEW, 128, "bfloat16", "released-age")]
    for N, D, part in (
        (SWEEPS, 128, "all"), (LARGE, 128, "backward_kernel"), (SWEEPS, CHUNKED, "wide"),
        (KEPT, 128, "all"),
    ):  # fmt: skip
        call = Call(N, D, "bfloat16", part=part)
        found += [call, replace(call, variant="released-age"), *_flags(call)]
    found.append(Call(SWEEPS, 256, "bfloat16", L=3, part="table"))
    found.append(Call(SWEEPS, 256, "bfloat16", "released-age", part="table"))
    found.append(Call(SWEEPS, UNEVEN, "bfloat16", part="wide"))
    found += [Call(SWEEPS, D, "float32 highest", L=3, part="table") for D in (64, CHUNKED)]
    found.append(Call(SWEEPS, 128, "bfloat16", "released-age", has_keys=True, part="order"))
    found += [
        Call(2**17, 128, "bfloat16", has_keys=has_keys, part="rank") for has_keys in (False, True)
    ]
    found += [Call(N, 128, "bfloat16", part="merge") for N in (2**13, 2**16)]
    found += [Call(BETWEEN, D, arithmetic, part="table")
              for arithmetic in ("bfloat16", "float16") for D in (64, 128, 256)]  # fmt: skip
    found += [Call(FEW, 256, "bfloat16", L=3), Call(KEPT, 128, "bfloat16", L=6),
              Call(FEW, 128, "float16", "released-age")]  # fmt: skip
    found += [
        Call(2 * SHORT_ROWS, D, arithmetic, has_keys=True, part="forward")
        for arithmetic in ("bfloat16", "float16") for D in (64, 128, 256)
    ]  # fmt: skip
    found += [
        Call(2 * SHORT_ROWS, D, arithmetic, part="mirrored")
        for arithmetic, largest in REGISTER_D.items() for D in (64, 128, 256) if largest >= D
    ]  # fmt: skip
    found += [
        Call(N, D, "bfloat16", variant, part="mirrored")
        for N in (2 * SHORT_ROWS, 2 * LARGE) for D in (64, 128)
        for variant in ("paper", "released-depth")
    ]  # fmt: skip
    found.append(Call(2 * SHORT_ROWS, 128, "bfloat16", "no-pushing", part="mirrored"))
    return found


def specialization(launch: Launch) -> str:
    """What the compiler is given: equal for launches that share one binary."""
    source = compiled.source_of(launch)
    constants = sorted(source.constants.items(), key=str)
    given = (source.signature, constants, source.attrs, sorted(launch.options.items()))
    return f"{launch.name} {given}"


@functools.cache
def distinct(*architectures: int) -> tuple[tuple[Call, int, int], ...]:
    """Every binary once: the first call, the number of its launch, and the architecture."""
    return tuple(_distinct(architectures))


def _distinct(architectures: tuple[int, ...]) -> Iterator[tuple[Call, int, int]]:
    for architecture in architectures:
        seen = set()
        for call in calls():
            for index, launch in enumerate(call.launches(architecture)):
                key = specialization(launch)
                if key not in seen:
                    seen.add(key)
                    yield call, index, architecture
