"""Batches that hypothesis draws: each is a ``Case`` of a few numbers, which fit in one line of
JSON, and its tensors follow from them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace

import torch
from hypothesis import strategies as st

from conr_kernels.triton_backend.availability import interpreted
from conr_kernels.variants import LOGS, NEGATIVES, PRESETS, PUSHINGS, Settings, Variant
from tests.helpers.backends import Batch

#: The interpreter takes a tenth of a second for a few rows.
ROWS = st.integers(5, 9) if interpreted() else st.integers(6, 16) | st.integers(1, 60)
#: A case in JSON, as a failing test prints it: the only one that is drawn.
ONLY_CASE = "CONR_CASE"


@dataclass(frozen=True)
class Case:
    """A batch of N rows in D columns with labels of L components.

    Attributes:
        step, places: labels are ``step`` times an integer below ``places``.
        predictions: ``"near"`` the labels, ``"collapsed"`` to hardly more than one value, or the
            ``"same"``, which leaves no confused negatives.
        window: in steps; halves fall between the distances.
        weights: ``"none"``, ``"random"``, or ``"zeros"``: about half of them.
        zero_rows: every so many rows is zero; 0 for none.
        is_dense: the path of the backends that have a dense one and bands (CUDA, Triton).
    """

    seed: int
    N: int
    D: int
    L: int
    step: float
    places: int
    predictions: str
    window: float
    temperature: float
    push_scale: float
    variant: str
    distance: str
    weights: str
    zero_rows: int
    is_wide: bool
    is_dense: bool

    def __repr__(self) -> str:
        return json.dumps(asdict(self))

    def batch(self) -> Batch:
        g = torch.Generator().manual_seed(self.seed)
        dtype = torch.float64 if self.is_wide else torch.float32
        x = torch.randn(self.N, self.D, generator=g) * 2 ** torch.randn(self.N, 1, generator=g)
        if self.zero_rows:
            x[:: self.zero_rows] = 0
        shape = (self.N, self.L)
        y = torch.randint(0, self.places, shape, generator=g)
        noise = torch.randint(-3, 4, shape, generator=g)
        p = {"near": y + noise, "collapsed": noise.clamp(-1, 1), "same": y}[self.predictions]
        w = 2 * torch.rand(self.N, generator=g)
        if self.weights == "zeros":
            w[torch.rand(self.N, generator=g) < 0.5] = 0
        upstream = torch.randn(self.N, generator=g).to(dtype)
        w = None if self.weights == "none" else w.to(dtype)
        variant = PRESETS.get(self.variant) or Variant.from_code(self.variant)
        settings = Settings(
            self.window * self.step, self.temperature, self.push_scale, variant, self.distance
        )
        y, p = y * self.step, p * self.step
        return Batch(x.to(dtype), y, p, w, upstream, settings, self.is_dense)


#: In the interpreter, where no number of examples is asked for: nearly all rows are anchors.
INTERPRETED = (
    Case(
        seed=288, N=9, D=5, L=2, step=0.25, places=3, predictions="collapsed", window=1.0,
        temperature=0.07, push_scale=0.2, variant="released-age", distance="mae",
        weights="random", zero_rows=0, is_wide=False, is_dense=True,
    ),
    Case(
        seed=279, N=9, D=3, L=1, step=1.0, places=8, predictions="near", window=1.0,
        temperature=0.2, push_scale=1.0, variant="paper", distance="rmse",
        weights="zeros", zero_rows=3, is_wide=False, is_dense=False,
    ),
)  # fmt: skip


def _free_variants() -> st.SearchStrategy[str]:
    flags = st.booleans()
    variants = st.tuples(
        st.sampled_from(LOGS), st.sampled_from(list(PUSHINGS)), st.sampled_from(NEGATIVES),
        flags, flags, flags,
    ).filter(lambda fields: fields[0] == "inside" or not fields[4])  # fmt: skip
    return variants.map(lambda fields: Variant(*fields).code)


def cases(**fixed: float) -> st.SearchStrategy[Case]:
    """Cases in which the ``fixed`` fields have these values."""
    if ONLY_CASE in os.environ:
        return st.just(Case(**json.loads(os.environ[ONLY_CASE])))
    if interpreted() and "CONR_EXAMPLES" not in os.environ:
        return st.sampled_from([replace(case, **fixed) for case in INTERPRETED])
    fields = dict(
        seed=st.integers(0, 2**31 - 1),
        N=ROWS,
        D=st.integers(1, 17),
        L=st.integers(1, 3),
        step=st.sampled_from((0.25, 0.1, 1.0)),
        places=st.sampled_from((8, 3, 20)),
        predictions=st.sampled_from(("collapsed", "near", "collapsed", "near", "same")),
        window=st.sampled_from((1.0, 2.0, 0.5, 2.5, 0.0)),
        temperature=st.sampled_from((0.2, 0.07, 0.02, 1.0)),
        push_scale=st.sampled_from((0.01, 0.2, 1.0, 0.0)),
        variant=st.sampled_from(tuple(PRESETS)) | _free_variants(),
        distance=st.sampled_from(("mae", "rmse")),
        weights=st.sampled_from(("random", "none", "zeros")),
        zero_rows=st.sampled_from((0, 3)),
        is_wide=st.booleans(),
        is_dense=st.booleans(),
    )
    fields |= {name: st.just(value) for name, value in fixed.items()}
    return st.builds(Case, **fields)
