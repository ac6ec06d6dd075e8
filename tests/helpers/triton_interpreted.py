"""The Triton kernels in the interpreter against the float64 reference.

Collected by test_triton.py alone, in a process that has TRITON_INTERPRET=1 from its start.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from conr_kernels import Variant, conr_loss, reference, triton_backend
from conr_kernels.core.inputs import Inputs
from conr_kernels.triton_backend import call, launch, launch_dense, launch_order, launch_sweeps
from conr_kernels.variants import PRESETS, PUSHINGS, Settings

from . import triton_cases
from .triton_cases import BF16, F16, F64, Case, forced, guarded_allocations

INSIDE_COUNTED = Variant("inside", "exponential", "all", True, True, True)
CASES = [
    *(Case(N, D) for N, D in ((1, 1), (2, 2), (31, 1), (33, 31), (127, 33), (33, 127), (129, 16))),
    *(
        Case(N, D, regime="dense")
        for N, D in ((1, 1), (2, 3), (17, 31), (33, 1), (17, 129), (16, 64), (65, 16))
    ),
    *(Case(30, 70, v, regime="dense-split") for v in ("paper", "released-age")),
    *(Case(70, 33, v, regime="dense-recomputed") for v in ("paper", "released-age")),
    Case(40, 20, "released-depth", L=3, K=33, regime="dense-recomputed"),
    Case(40, 40, "released-age", torch.float64, regime="dense-recomputed"),
    *(Case(70, 150, v) for v in ("paper", "released-depth", "contrastive")),
    *(Case(50, 20, "released-depth", L=L, distance=d, regime=r)
      for L, d, r in itertools.product((2, 3), ("mae", "rmse"), ("sweeps", "dense"))),
    *(Case(40, 20, v, K=50, regime=r)
      for v, r in itertools.product(("paper", "released-age", "contrastive"), ("sweeps", "dense"))),
    Case(33, 150, "released-age", K=40),
    Case(140, 150, labels="ages", regime="parts"),
    Case(130, 150, "released-age", K=20, labels="ages", regime="parts"),
    Case(140, 130, "contrastive", regime="parts"),
    Case(200, 150, labels="ages", regime="windows"),
    Case(300, 130, "contrastive", labels="rare", regime="windows"),
    Case(130, 150, "released-depth", K=95, L=3, distance="rmse", regime="windows"),
    Case(150, 70, "released-age", F64, labels="ages", regime="windows"),
    Case(200, 150, labels="ages", regime="pieces"),
    Case(200, 130, "contrastive", labels="rare", regime="pieces"),
    Case(140, 16, labels="ages", regime="parts"),
    Case(70, 24, labels="decimal", window=0.2, regime="parts"),
    Case(130, 16, "released-age", K=20, labels="ages", regime="parts"),
    *(Case(N, D, regime="in turn") for N, D in ((31, 1), (129, 16))),
    *(Case(40, 20, v, K=50, regime="in turn") for v in ("paper", "contrastive")),
    Case(70, 24, "released-age", labels="ages", regime="in turn"),
    Case(40, 20, "released-depth", K=95, L=3, distance="rmse"),
    *(Case(70, 24, v, labels="decimal", window=0.2) for v in ("paper", "released-age")),
    Case(70, 24, "paper", labels="decimal", window=0.2, L=2, distance="rmse"),
    Case(60, 24, "paper", labels="decimal", window=0.2, L=3, distance="rmse", regime="dense"),
    *(Case(129, 16, v, labels="ages") for v in ("paper", "released-age", "no-weight")),
    *(Case(70, 16, v, labels="rare") for v in ("paper", "released-depth")),
    Case(70, 16, labels="equal"),
    *(Case(40, 16, v, labels="tiny", window=0.0, regime=r)
      for v, r in itertools.product(("paper",), ("sweeps", "dense"))),
    *(Case(70, 16, v, window=float("inf")) for v in ("paper", "contrastive")),
    Case(70, 16, window=0.0),
    *(Case(40, 24, v, temperature=t, regime=r) for v, t, r in itertools.product(
        ("paper", "released-depth"), (0.005, 0.04), ("sweeps", "dense"))),
    *(Case(50, 16, v, weights=w) for v, w in itertools.product(
        ("paper", "released-age"), ("zeros", "huge", "none"))),
    *(Case(50, 16, "paper", push_scale=0.0, regime=r) for r in ("sweeps", "dense")),
    *(Case(50, 16, INSIDE_COUNTED, push_scale=-0.5, temperature=t, regime=r)
      for t, r in itertools.product((0.2, 0.02), ("sweeps", "dense"))),
    *(Case(40, 40, v, F64, regime=r) for v, r in itertools.product(
        ("paper", "released-age"), ("sweeps", "dense"))),
    Case(40, 70, "released-depth", F64),
    *(Case(40, 24, Variant(pushing=v), regime=r)
      for v, r in itertools.product(PUSHINGS, ("sweeps", "dense"))),
]  # fmt: skip
HALVES = [
    *(Case(N, D, v, t, regime=r) for (N, D), v, t, r in itertools.product(
        ((33, 65),), ("paper", "released-age"), (F16, BF16),
        ("sweeps", "dense", "dense-recomputed"))),
    *(Case(40, 300, v, t) for v, t in itertools.product(("paper", "released-age"), (F16, BF16))),
    *(Case(40, 200, v, t) for v, t in (("paper", BF16), ("released-age", F16))),
    *(Case(140, 257, dtype=F16, regime=regime) for regime in ("parts", "pieces")),
    *(Case(300, 257, v, BF16, labels="ages", regime=r) for v, r in (
        ("paper", "windows"), ("released-age", "pieces"), ("paper", "parts"))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_three_times_eager_float32(case: Case) -> None:
    given = case.inputs()
    got = case.run_triton(given)
    exact = case.run("reference", torch.float64, given)
    eager_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    eager = case.run("reference", eager_dtype, given)
    # Gradients times ‖x_i‖, so that every row counts; their sums have terms up to upstream/τ.
    norm = given["x"][: case.N].double().norm(dim=1, keepdim=True)
    for name, ours, theirs, truth in zip(("loss", "gradient"), got, eager, exact, strict=True):
        if name == "gradient":
            ours, theirs, truth = ours * norm, theirs * norm, truth * norm
        unit = 1e-13 if case.dtype == torch.float64 else 1e-6
        if name == "gradient" and case.temperature < 0.01:
            # exp(s_ij) has the relative error of the rounded exponent: log₂e·s_ij is kept in base 2
            # up to log₂e/τ = 288, where half a last place is 2⁻¹⁶·ln 2 = 1.1e-5, and the product of
            # features before it is rounded likewise. Eager's rounding is of that size too, but its
            # own error is no bound: the largest exponents of a batch may round well in one of them.
            unit = 2**-24 / case.temperature
        largest = truth.abs().max() + 1 / case.temperature
        allowed = 3 * (theirs.double() - truth).abs().max() + unit * largest
        error = (ours.double() - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_16_bit_features_lose_no_more_than_their_rounding(case: Case) -> None:
    given = case.inputs()
    got = case.run_triton(given)
    exact = case.run("reference", torch.float64, given)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    loss_limit, gradient_limit = {F16: (2e-4, 3e-3), BF16: (2e-3, 4e-2)}[case.dtype]
    assert got[1].dtype == case.dtype
    assert (got[0] - exact[0]).abs().max() <= loss_limit * exact[0].abs().max()
    assert (got[1].double() - exact[1]).abs().max() <= gradient_limit * exact[1].abs().max()


@pytest.mark.parametrize("spread", [0.1, 0.02])
@pytest.mark.parametrize("D", [64, 200, 300])
@pytest.mark.parametrize(("variant", "places"), [("paper", 0.5), ("released-depth", 2.0)])
def test_nearly_parallel_bfloat16_features_lose_what_their_rounding_loses(
    variant: str, places: float, D: int, spread: float
) -> None:
    """As deep features are: a gradient without its radial part is of the size of the spread, so
    that one last place of bfloat16 (2⁻⁸ where it truncates) is 2⁻⁸/spread of it; more where
    positives and negatives cancel, as they do with the log inside.
    """
    g = torch.Generator().manual_seed(D)
    x = (torch.randn(D, generator=g) + spread * torch.randn(60, D, generator=g)).to(BF16)
    y = torch.randint(0, 12, (60,), generator=g) / 2
    p = y + 2 * torch.randn(60, generator=g)
    gradients = []
    for backend, dtype in (("triton", BF16), ("reference", torch.float64)):
        features = x.to(dtype).detach().requires_grad_()
        with mock.patch.object(launch_dense, "DENSE_PAIRS", -1):
            conr_loss(features, y, p, backend=backend, variant=variant).backward()
        gradients.append(features.grad.double())
    ours, truth = gradients
    assert (ours - truth).norm() <= places * 2**-8 / spread * truth.norm()


def test_a_write_behind_a_part_of_a_workspace_is_found() -> None:
    with pytest.raises(AssertionError, match="outside its part"), guarded_allocations():
        parts = launch.Parts()
        parts.add("first second", 3, torch.float64)
        parts.add("third", 3, torch.float32)
        whole = parts.new(torch.zeros(1))
        for part in parts.tensors(whole):
            part.fill_(1)
        whole[parts.parts["third"][1] - 1] = 0


def test_there_are_at_least_sixty_structured_cases() -> None:
    assert len({str(case) for case in CASES}) == len(CASES) >= 60


SOME = [
    Case(20, 20, regime="dense"),
    Case(40, 20, "released-age", K=20),
    Case(20, 150),
]


@pytest.mark.parametrize("name", ["x", "y", "p", "w", "upstream"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_non_finite_input_shows(case: Case, name: str) -> None:
    bad = float("inf") if name in ("y", "w") else float("nan")
    given = case.inputs()
    given[name].view(-1)[given[name].numel() // 3] = bad
    loss, gradient = case.run_triton(given)
    if name != "upstream":
        row = given[name].numel() // 3 // (given[name].numel() // len(given[name]))
        assert row >= case.N or not loss[row].isfinite()
        assert not loss.sum().isfinite()
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_repeats_and_other_strides_have_the_same_bits(case: Case) -> None:
    given = case.inputs()
    loss, gradient = case.run_triton(given)
    spread = torch.full((case.N + case.K, 2 * case.D), float("nan"))
    spread[:, ::2] = given["x"]
    turned = given["x"].T.contiguous().T
    labels = {k: torch.stack([given[k], given[k] + 1], 2)[..., 0] for k in ("y", "p")}
    for x in (given["x"], spread[:, ::2]):
        again = case.run_triton({**given, **labels, "x": x})
        assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)
    with mock.patch.object(triton_cases, "in_guard_zone", lambda t, gap: (t, t)):
        again = case.run_triton({**given, "x": turned})
    assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)


def gradient_of(case: Case, given: dict, size: int, keys: int = 8192) -> Tensor:
    with (
        forced(case.regime),
        mock.patch.object(call, "WORKSPACE", (size, size)),
        mock.patch.object(call, "PIECE_KEYS", keys),
        mock.patch.object(call, "PIECES", 2**31),
    ):
        return case.run("triton", case.dtype, given)[1]


def test_windows_of_any_size_leave_the_same_gradient() -> None:
    """Of the list of pairs of tiles: rows that span windows, windows with many rows, one for all,
    with the first keys of all rows before the next; the same bits from run to run.
    """
    case = Case(150, 130, "released-age", regime="windows", labels="ages")
    given, tile = case.inputs(), 64 * 64 * 4
    sizes = [(99, 512), (5, 512), (99, 64), (5, 128), (5, 128)]
    whole, *others = (gradient_of(case, given, n * tile, keys) for n, keys in sizes)
    for gradient in others:
        assert (gradient - whole).abs().max() <= 1e-6 * whole.abs().max()
    assert torch.equal(*others[-2:])


BANDS = {
    "one": lambda g: torch.zeros(300),
    "far": lambda g: torch.randint(0, 3, (300,), generator=g) * 100.0,
    "ladder": lambda g: torch.arange(300.0) / 40,
    "normal": lambda g: torch.randn(300, generator=g).round() * 4,
    "crowds": lambda g: torch.cat((torch.zeros(150), torch.arange(150.0))),
}


@pytest.mark.parametrize("labels", BANDS)
@pytest.mark.parametrize("predictions", [*BANDS, None])
def test_windows_suffice_for_any_bands(labels: str, predictions: str | None) -> None:
    """The list ends within them, whatever the bands and the choice of sweep."""
    g = torch.Generator().manual_seed(0)
    y, p = (BANDS[name or labels](g)[:, None] for name in (labels, predictions))
    s = Settings(1.0, 0.2, 0.01, PRESETS["paper" if predictions else "contrastive"])
    x = torch.randn(300, 130, generator=g)
    with forced("windows"):
        *_, layout = triton_backend.forward(Inputs(x[:, :1].contiguous(), y, p, None, None, 0, s))
    for window, keys in itertools.product((1, 2, 7, 30), (64, 128, 8192)):
        size = window * 64 * 64 * 4
        with (
            mock.patch.object(call, "WORKSPACE", (size, size)),
            mock.patch.object(call, "PIECE_KEYS", keys),
            mock.patch.object(call, "PIECES", 2**31),
        ):
            plan = launch_sweeps.Plan(call.form_of(x, y, None, 0, "none"), s)
        launches = [(step.kernel.function.__name__, step) for step, _ in plan.backward.steps]
        (of_list,) = (step for name, step in launches if "list" in name)
        parts = plan.work_of_gradient
        work = dict(zip(parts.parts, parts.tensors(parts.new(x).fill_(-1)), strict=True))
        of_list(layout, work["list"], work["windows"])
        n_windows, window = sum("scores" in name for name, _ in launches), of_list.numbers[2]
        second, end, last, *n_entries = work["list"][:5].tolist()
        assert end <= second <= last <= n_windows * window and second % window == 0
        half = (len(work["list"]) - 8) // 2
        for sweep, n in enumerate(n_entries):
            starts = work["list"][8 + sweep * half + 7 * 5 :][: n + 1]
            assert starts[[0, -1]].tolist() == [[0, end], [second, last]][sweep]
            numbers = torch.arange(starts[0], starts[-1], window)
            entries = work["windows"][numbers // window].long()
            assert (starts[entries] <= numbers).all() and (numbers < starts[entries + 1]).all()
            assert (starts.diff() >= 0).all() and (starts.diff() <= max(keys // 64, 1)).all()


def test_nan_that_pytorch_sorts_has_no_sign() -> None:
    """On a GPU it stood before all numbers, and bands are searched in what is sorted."""
    y = torch.tensor([[1.0], [-math.inf], [math.inf], [-math.nan], [math.nan], [-0.0]])
    s = Settings(1.0, 0.2, 0.01, PRESETS["paper"])
    with mock.patch.object(launch_order, "MOST_SORTED", 0):
        plan = launch_sweeps.Plan(call.form_of(torch.ones(6, 1), y, None, 0, "none"), s)
        values, orders = plan.sorts(y, y, None)
    assert not values[:, -2:].signbit().any() and values[:, -2:].isnan().all()
    assert orders.tolist() == [[1, 5, 0, 2, 3, 4]] * 2 and y[3].signbit()


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_predictions_that_are_not_finite_count_as_no_keys_in_the_choice_of_sweep(
    lost: float,
) -> None:
    """Labels within the window leave nothing outside their bands: windows suffice for this choice
    alone.
    """
    y, p = torch.zeros(300, 1), torch.zeros(300, 1)
    p[65:] = lost
    s = Settings(1.0, 0.2, 0.01, PRESETS["paper"])
    with forced("windows"):
        *_, layout = triton_backend.forward(Inputs(torch.ones(300, 1), y, p, None, None, 0, s))
    assert layout[0] == 1


@pytest.mark.parametrize("N", [3, 5, 16, 17])
def test_columns_behind_the_last_key_add_nothing_where_exponents_are_large(N: int) -> None:
    """Few rows, opposite features, τ = 0.005: exp2 of a column that is no key overflows."""
    x = torch.zeros(N, 2)
    x[:, 0] = 1.0
    x[-1, 0] = -1.0
    x.requires_grad_()
    y = torch.zeros(N)
    y[1] = 5.0
    conr_loss(x, y, torch.zeros(N), temperature=0.005, backend="triton").backward()
    exact = x.detach().double().requires_grad_()
    conr_loss(exact, y, torch.zeros(N), temperature=0.005, backend="reference").backward()
    assert x.grad.isfinite().all()
    scale = max(exact.grad.abs().max().item(), 1.0)
    assert (x.grad - exact.grad).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("variant", ["released-age", "released-depth", "contrastive"])
@pytest.mark.parametrize("regime", ["sweeps", "dense", "dense-recomputed"])
def test_masked_rows_take_no_part(regime: str, variant: str) -> None:
    case = Case(45, 12, variant, F64, regime, labels="ages")
    given = case.inputs()
    mask = torch.arange(case.N) % 3 != 1
    present = {name: t[mask] for name, t in given.items()}
    x = given["x"].masked_fill(~mask[:, None], torch.nan).requires_grad_()
    y = given["y"].masked_fill(~mask[:, None], torch.nan)
    options = dict(variant=variant, reduction="none")
    with forced(regime):
        rows = conr_loss(x, y, given["p"], given["w"], **options, backend="triton", mask=mask)
        (rows * given["upstream"]).sum().backward()
    features = present["x"].requires_grad_()
    expected = conr_loss(
        features, present["y"], present["p"], present["w"], **options, backend="reference"
    )
    (expected * present["upstream"]).sum().backward()
    torch.testing.assert_close(rows[mask], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad[mask], features.grad, rtol=1e-7, atol=1e-10)
    assert not rows[~mask].any() and not x.grad[~mask].any()


@pytest.mark.parametrize("variant", ["released-age", "released-depth", "contrastive"])
@pytest.mark.parametrize("regime", ["sweeps", "dense", "dense-recomputed"])
def test_masked_further_keys_take_no_part(regime: str, variant: str) -> None:
    x, y, p, w = (Case(75, 12, variant, F64, regime, labels="ages").inputs()[k] for k in "xypw")
    own, keys = [t[:40] for t in (x, y, p)], [t[40:] for t in (x, y, p)]
    mask = torch.arange(35) % 3 != 1
    holes = [t.masked_fill(~mask.view(-1, *(1,) * (t.dim() - 1)), torch.nan) for t in keys]
    found = []
    for backend, further in (("triton", (*holes, mask)), ("reference", [t[mask] for t in keys])):
        features = own[0].clone().requires_grad_()
        options = dict(variant=variant, backend=backend, keys=further)
        with forced(regime) if backend == "triton" else contextlib.nullcontext():
            loss = conr_loss(features, *own[1:], w[:40], **options)
            loss.backward()
        found.append((loss, features.grad))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("regime", ["sweeps", "dense"])
def test_an_empty_batch_has_no_rows(regime: str) -> None:
    x = torch.zeros(0, 5, requires_grad=True)
    loss = conr_loss(x, torch.zeros(0), torch.zeros(0), backend="triton")
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 5)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_labels_and_predictions_of_two_dtypes_are_refused(reduction: str) -> None:
    x, y = torch.randn(5, 3), torch.arange(5.0)
    with pytest.raises(RuntimeError, match="both float64 or neither"):
        conr_loss(x, y.double(), y, reduction=reduction, backend="triton")


@pytest.mark.parametrize(
    "predictions, choice", [("good", 0), ("anchor far", 1), ("key far", 1), ("constant", 2)]
)
def test_the_choice_of_sweep_is_made_from_the_bands(predictions: str, choice: int) -> None:
    """Constant predictions: outside the label bands, and without a look at them where none is far
    from another; predictions as good as labels: in their bands.
    """
    x, w = torch.randn(300, 16), torch.rand(300)
    y = torch.arange(300.0).remainder(10).floor_divide(9).mul(150)  # 0, and of every tenth row 150
    p = torch.zeros(300)
    if predictions == "good":
        y = torch.arange(300.0) * 10
        p = y + 50
    key_p = p.clone()
    for side, of in (("anchor far", p), ("key far", key_p)):
        of[7] += 101 * (predictions == side)
    x, y, p, key_p, w = x.double(), y[:, None], p[:, None], key_p[:, None], w.double()
    settings = Settings(100.0, 0.2, 0.01, PRESETS["paper"])
    with (
        mock.patch.object(launch_dense, "DENSE_PAIRS", -1),
        mock.patch.multiple(launch_sweeps, PROGRAMS=1, WIDE_SLICES=1),
    ):
        inputs = Inputs(x, y, p, w, (x, y, key_p), 0, settings)
        losses, _, layout = triton_backend.forward(inputs)
    expected = reference.row_losses(x, y, p, w, (x, y, key_p), 0, settings)
    assert layout[0] == choice
    torch.testing.assert_close(losses, expected)
