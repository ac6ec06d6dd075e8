"""The Triton kernels in the interpreter on structured cases, full tiles and ties.

Collected by test_triton.py alone, as triton_interpreted.py is.
"""

from __future__ import annotations

import contextlib
from functools import partial
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from conr_kernels import conr_loss, ops, triton_backend
from conr_kernels.core.labels import accumulation_dtype
from conr_kernels.triton_backend import call, launch_dense, launch_order, launch_sweeps
from conr_kernels.triton_backend.call import arithmetic
from conr_kernels.triton_backend.configs import bucket, config
from conr_kernels.triton_backend.kernels import wide
from conr_kernels.variants import PRESETS, Settings, resolve_variant

from .cases import EMPTY_KINDS, KINDS, VARIANTS, cover, structured_cases, tie_cases
from .cases import Case as StructuredCase
from .memory import fresh_tensors_full_of
from .oracle import assert_as_good_as_eager
from .triton_cases import BF16, F16, F64, Case, forced

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


#: Few rows with s_ij, without, and too wide for those; sweeps, wide ones, and none by predictions;
#: further keys; several components; five statistics of a row; float64.
RETURNED = [
    *(Case(N, 7, regime="dense") for N in (1, 17, 32, 37)),
    Case(30, 70, "released-age", K=9, regime="dense-split", temperature=0.02),
    *(Case(37, 20, "released-depth", L=3, K=K, regime="dense-recomputed") for K in (0, 12)),
    *(Case(37, D, dtype=F64, regime="dense-recomputed") for D in (20, 70)),
    *(Case(37, 7, v, K=K) for v in ("paper", "contrastive") for K in (0, 12)),
    Case(129, 9, "released-age", F64, L=2, distance="rmse", K=3),
    Case(37, 300, K=100, regime="windows"),
    Case(0, 7, regime="dense", K=5),
    Case(0, 7, K=5),
]


@pytest.mark.parametrize("case", RETURNED, ids=str)
def test_every_number_that_the_forward_operator_returns_is_written(case: Case) -> None:
    """Two calls return the same bits, whatever their memory held before, in the announced form."""
    given, N = case.inputs(), case.N
    rows = [given[name] for name in ("x", "y", "p")]
    keys = rows if case.K else (None,) * 3
    settings = Settings(
        case.window, case.temperature, case.push_scale, resolve_variant(case.variant), case.distance
    )
    w = given["w"].to(accumulation_dtype(given["x"]))
    operands = (*(t[:N] for t in rows), w, *keys, None, 0, *settings.scalars, "triton")
    found = []
    for byte in (0x3F, 0x5A):
        with forced(case.regime, partial(fresh_tensors_full_of, byte)):
            found.append(torch.ops.conr_kernels.forward(*operands))
            announced = ops._forward_fake(*operands)
    for first, second, expected in zip(*found, announced, strict=True):
        assert first.shape == expected.shape and first.dtype == expected.dtype
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize(("n_components", "distance"), [(3, "mae"), (2, "rmse")])
def test_ties_beyond_the_reach_are_positives_and_negatives(n_components: int, distance: str):
    for case in tie_cases(n_components, distance):
        with forced("sweeps"):
            assert_as_good_as_eager(triton_backend, case)


def _hard_features(kind: str, n: int, D: int) -> torch.Tensor:
    """Features in float64 that sums of two float16 numbers hold worst."""
    g = torch.Generator().manual_seed(D)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    if kind == "one huge entry":
        x *= 10.0 ** -torch.randint(2, 7, (n, D), generator=g)
        x[:, 3] = 1.0
    elif kind == "entries of any size":
        x *= 10.0 ** torch.randint(-42, 0, (n, D), generator=g)
        x[:, 2] += 1.0
    elif kind == "parallel":
        x = x[:4].repeat(-(-n // 4), 1)[:n] * torch.linspace(1e-3, 1e3, n).double()[:, None]
    elif kind == "opposite":
        x = x[:1] * (1 - 2 * torch.arange(n).remainder(2))[:, None]
    else:  # all entries just above a power of two, which the larger half leaves most of
        x = x.sign() * (1 + 2**-11 - 2**-22)
    x[7] = 0.0
    return x


HARD = dict(
    kind=("one huge entry", "entries of any size", "parallel", "opposite", "rounded worst"),
    temperature=(0.2, 0.005, 1e-5, 1e4),
    variant=("paper", "released-depth", "released-age", "inside-distance"),
    D=(16, 128),
)


@pytest.mark.parametrize("choice", list(cover(HARD)), ids=lambda c: "-".join(map(str, c.values())))
def test_highest_float32_is_as_good_as_eager_on_hard_rows(choice: dict) -> None:
    """Exponents of any size too: the copies' scale follows the temperature."""
    n, g = 70, torch.Generator().manual_seed(1)
    y = torch.randint(0, 9, (n, 1), generator=g).float()
    p = y + 2 * torch.randn(n, 1, generator=g)
    x = _hard_features(choice["kind"], n, choice["D"]).float().double()
    settings = Settings(1.0, choice["temperature"], 0.1, VARIANTS[choice["variant"]])
    assert torch.get_float32_matmul_precision() == "highest"
    with forced("sweeps"):
        assert_as_good_as_eager(triton_backend, StructuredCase(choice, x, y, p, None, settings))


@pytest.mark.parametrize("regime", ["sweeps", "dense"])
@pytest.mark.parametrize("D", [7, 300])
def test_a_non_finite_upstream_gradient_of_a_row_without_pairs_shows(regime: str, D: int) -> None:
    y, g = torch.zeros(20), torch.zeros(20)
    y[-1], g[-1] = 100.0, torch.nan
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with forced(regime):
        conr_loss(x, y, y, reduction="none", backend="triton").backward(g)
    assert x.grad.isnan().any()


@pytest.mark.parametrize("regime", ["sweeps", "dense"])
def test_negatives_count_where_their_pushing_weights_underflow_the_sums(regime: str) -> None:
    """Three rows of one label against one at the smallest distance that there is."""
    x = torch.tensor([[1.0, 0.0]] * 3 + [[-1.0, 0.0]])
    y = torch.tensor([0.0, 0.0, 0.0, 1e-45])
    with forced(regime):
        rows = conr_loss(x, y, 0 * y, window=0.0, reduction="none", backend="triton")
    torch.testing.assert_close(rows, torch.tensor([2.0, 2.0, 2.0, 1.0]).log())


@pytest.mark.parametrize("regime", ["sweeps", "dense"])
def test_rows_are_positives_where_the_squares_of_their_distance_underflow(regime: str) -> None:
    x = torch.randn(261, 4, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(261, 2)  # more than a tile of either label
    y[130:260, 0], y[260, 0] = 1e-25, 5.0
    options = dict(window=0.0, distance="rmse", reduction="none")
    expected = conr_loss(x, y, 0 * y, **options, backend="reference")
    with forced(regime):
        rows = conr_loss(x, y, 0 * y, **options, backend="triton")
    assert (expected[:260] > 0).all()
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_of_a_reduced_loss_where_exponents_are_large(reduction: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 5, generator=g), torch.arange(20.0) // 2
    p, gradients = y + torch.randn(20, generator=g), []
    for backend, dtype in (("triton", F32), ("reference", torch.float64)):
        features = x.detach().to(dtype).requires_grad_()
        options = dict(variant="released-depth", temperature=0.02, reduction=reduction)
        with forced("sweeps") if backend == "triton" else contextlib.nullcontext():
            (3 * conr_loss(features, y, p, backend=backend, **options)).backward()
        gradients.append(features.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * gradients[1].abs().max().item())


REDUCED = [
    *(Case(70, 16, regime=regime) for regime in ("sweeps", "parts")),
    Case(129, 16, labels="ages"),
    Case(70, 70, "released-age", F16),
    Case(70, 40, "released-depth", BF16, temperature=0.02),
    Case(40, 20, "released-age", F64, "parts", L=3, distance="rmse"),
    Case(40, 20, "released-depth", L=2, temperature=0.005),
    Case(70, 20, "contrastive", weights="none"),
    Case(40, 150),
    Case(140, 150, "released-age", labels="ages", regime="pieces"),
    Case(40, 150, regime="parts"),
    *(Case(40, 300, "released-age", dtype) for dtype in (F16, BF16)),
    *(Case(45, 40, regime=regime) for regime in ("dense", "dense-split", "dense-recomputed")),
]  # fmt: skip


@pytest.mark.parametrize("case", REDUCED, ids=str)
def test_reduced_losses_have_the_gradients_of_their_rows(case: Case) -> None:
    """Whatever the forward pass keeps for them, twice the same, and times the upstream gradient."""
    given, results = case.inputs(), {}
    norm = given["x"].double().norm(dim=1, keepdim=True)
    for reduction in ("mean", "sum", "none"):
        x = given["x"].detach().requires_grad_()
        with forced(case.regime):
            rows = conr_loss(
                x, given["y"], given["p"], given["w"], temperature=case.temperature,
                variant=case.variant, distance=case.distance, reduction=reduction,
                backend="triton",
            )  # fmt: skip
            loss = 3 * rows.sum() * (case.N if reduction == "mean" else 1)
            first, again = (torch.autograd.grad(loss, x, retain_graph=True) for _ in range(2))
        assert torch.equal(*first, *again)
        results[reduction] = loss.detach(), first[0].double() * norm
    value, gradient = results["none"]
    # H_ij is rounded to 16 bits before or after it is multiplied by the upstream gradient.
    limit = {F64: 1e-13, F32: 1e-5, F16: 2e-3, BF16: 2e-2}[case.dtype]
    for loss, of_loss in (results["mean"], results["sum"]):
        torch.testing.assert_close(loss, value, rtol=1e-6, atol=0)
        assert (gradient - of_loss).abs().max() <= limit * gradient.abs().max()


@pytest.mark.parametrize("D", [5, 300])
def test_few_rows_where_one_program_adds_up_all_tiles_of_keys(D: int) -> None:
    """And where the gradient's columns are finished in several chunks."""
    g = torch.Generator().manual_seed(D)
    x, y = torch.randn(37, D, generator=g), torch.randint(0, 9, (37,), generator=g).float()
    p, results = y + torch.randn(37, generator=g), []
    for backend, dtype in (("triton", F32), ("reference", torch.float64)):
        features = x.detach().to(dtype).requires_grad_()
        of_backend = forced("dense") if backend == "triton" else contextlib.nullcontext()
        with of_backend, mock.patch.object(launch_dense, "PROGRAMS", 1):
            rows = conr_loss(features, y, p, temperature=0.01, reduction="none", backend=backend)
            rows.sum().backward()
        results.append((rows.detach().double(), features.grad.double()))
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).abs().max() <= 1e-4 * truth.abs().max()


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


SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-42, 3.4e38, -3.4e38]


@pytest.mark.parametrize("runs", [4, 8, 32])
@pytest.mark.parametrize(("N", "K"), [(600, 0), (1300, 0), (300, 130)])
def test_as_many_runs_as_shipped_are_merged_into_a_stable_order(N: int, K: int, runs: int) -> None:
    @contextlib.contextmanager
    def sizes():
        with (
            forced("sweeps"),
            mock.patch.multiple(launch_order, MERGE_FANS={2**16: runs}, SEARCHES=32 * runs),
        ):
            yield

    assert not assert_orders_are_stable(N, K, "paper", F32, sizes)


@pytest.mark.parametrize("regime", ["sweeps", "in turn"])
@pytest.mark.parametrize(
    ("N", "K", "variant", "dtype"),
    [
        *((N, 0, "paper", F32) for N in (1, 2, 127, 128, 129, 600)),
        *((N, K, "paper", F32) for N, K in ((1, 300), (300, 130))),
        (130, 0, "contrastive", F32), (150, 40, "contrastive", F64), (270, 0, "paper", F64),
    ],
)  # fmt: skip
def test_orders_and_ranks_are_those_of_a_stable_sort(
    N: int, K: int, variant: str, dtype: torch.dtype, regime: str
) -> None:
    """In blocks of 128, merged by twos, or sorted by PyTorch."""
    is_sorted_there = assert_orders_are_stable(N, K, variant, dtype, partial(forced, regime))
    assert is_sorted_there == (regime == "in turn")


def assert_orders_are_stable(N, K, variant, dtype, sizes) -> bool:
    """Of many equal values, zeros of both signs, NaN of both, infinite and subnormal ones; whether
    PyTorch has sorted.
    """
    g = torch.Generator().manual_seed(N + K)
    n, s, is_confused = N + K, Settings(1.0, 0.2, 0.01, PRESETS[variant]), variant == "paper"
    special = torch.tensor(SPECIAL, dtype=dtype)
    special = torch.cat([special, -special[4:5]])
    y, p = (
        torch.where(
            torch.rand(n, 1, generator=g) < 0.5,
            special[torch.randint(0, len(special), (n, 1), generator=g)],
            torch.randint(-5, 6, (n, 1), generator=g).to(dtype) / 2,
        )
        for _ in range(2)
    )
    x = torch.randn(n, 3, generator=g)
    keys = (x, y, p) if K else None
    with sizes():
        x_i, y_i, p_i = x[K:].clone(), y[K:].clone(), p[K:].clone()
        plan = launch_sweeps.plan_of(x_i, y_i, keys, K, s, "none")
        names = [launch.kernel.function.__name__ for launch, _ in plan.forward.steps]
        del plan.forward.steps[names.index("conr_order_kernel") + 1 :]  # sweeps take long
        work = plan.work.new(x)
        layout = x.new_empty(call.layout_size(N, n, K > 0, is_confused), dtype=torch.int32)
        loss, stats = x.new_empty(N), x.new_empty((N, 3))
        rows = x_i, y_i, p_i, *(keys or (x_i, y_i, p_i))
        sorts = plan.sorts(y_i, p_i, keys)
        plan.forward(None, [work], *rows, None, None, *sorts, loss, stats, layout)
    parts = dict(zip(plan.work.parts, plan.work.tensors(work), strict=True))
    parts |= dict(zip(plan.names_of_sorts.split(), sorts, strict=True))
    keys, anchors = call.padded(n), call.padded(N)
    whose = dict(order_j=keys, bands=2 * anchors) | (dict(order_i=anchors) if K else {})
    whose |= dict(rank_j=keys) | (dict(rank_i=anchors) if K else {})
    head, self, *orders = layout.split(
        [128, anchors * (K > 0), *whose.values(), *(list(whose.values()) * is_confused)]
    )
    for side, n_rows, columns in (("j", n, (y, p)), ("i", N, (y_i, p_i)))[: 1 + (K > 0)]:
        for which in range(1 + is_confused):
            of = dict(zip(whose, orders[len(whose) * which :], strict=False))
            order, rank = (of[f"{name}_{side}"] for name in ("order", "rank"))
            values, expected = columns[which][:, 0].sort(stable=True)
            assert torch.equal(order[:n_rows].long(), expected) and (order[n_rows:] == n_rows).all()
            assert torch.equal(rank[expected], torch.arange(n_rows, dtype=torch.int32))
            assert torch.equal(rank[n_rows:].long(), torch.arange(n_rows, len(rank)))
            found = parts[f"values_{side}"].view(-1, n_rows)[which]
            torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)
    if K:
        of = dict(zip(whose, orders, strict=False))
        assert torch.equal(self[:N], of["rank_j"][K + of["order_i"][:N].long()])
    return bool(sorts)


def test_windows_without_pairs_read_nothing_that_was_not_written() -> None:
    """Labels far apart leave most windows of wide features without any."""
    g = torch.Generator().manual_seed(3)
    y = torch.arange(200.0)
    x, p = torch.randn(200, 150, generator=g), y + torch.randn(200, generator=g)
    gradients = []
    for byte in (0, 0x5A):
        features = x.clone().requires_grad_()
        with forced("windows", partial(fresh_tensors_full_of, byte)):
            conr_loss(features, y, p, backend="triton").backward()
        gradients.append(features.grad)
    assert torch.equal(*gradients)


@triton.jit
def entry_kernel(starts_ptr, found_ptr, n_entries, number: tl.int64):
    later_starts = wide._later_starts(0, starts_ptr, n_entries)
    entry = wide._entry_of(number, tl.zeros((), tl.int32), later_starts, starts_ptr, n_entries)
    tl.store(found_ptr, entry)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 256, 257, 258, 513, 800])
def test_the_entry_of_a_pair_of_tiles_is_found(n: int, dtype: torch.dtype) -> None:
    """The last that does not begin behind it, of many without a pair, up to the largest numbers;
    of numbers behind the last pair too, and of -1, which asks for none.
    """
    g = torch.Generator().manual_seed(n)
    n_pairs = torch.randint(0, 3, (n,), generator=g) * (torch.rand(n, generator=g) < 0.1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), n_pairs.cumsum(0)])
    if dtype == torch.int32:
        starts += 2**31 - 6 - starts[-1]
    given = torch.cat([starts, torch.full((600,), -7)]).to(dtype)  # never read: an entry less
    found = torch.zeros(1, dtype=torch.int32)
    for number in {*starts[[0, n // 2, -1]].tolist(), int(starts[-1]) + 3}:
        entry_kernel[(1,)](given, found, n, number)
        assert found.item() == int((starts[:n] <= number).sum()) - 1
    entry_kernel[(1,)](given, found, n, -1)
    assert found.item() == 0


@pytest.mark.parametrize("variant", ["paper", "released-age"])
@pytest.mark.parametrize("D", [16, 150])
def test_tiles_of_similar_predictions_only(D: int, variant: str) -> None:
    """Two crowds of predictions: pairs of tiles within one are compared by their labels alone."""
    g = torch.Generator().manual_seed(D)
    x, order = torch.randn(280, D, generator=g), torch.randperm(280, generator=g)
    y, p = order // 2 * 10.0, order % 2 * 100 + torch.rand(280, generator=g) / 2
    upstream, results = torch.rand(280, generator=g), []
    for backend, dtype in (("triton", F32), ("reference", torch.float64)):
        features = x.clone().to(dtype).requires_grad_()
        with forced("sweeps") if backend == "triton" else contextlib.nullcontext():
            loss = conr_loss(features, y, p, variant=variant, reduction="none", backend=backend)
            (loss * upstream).sum().backward()
        results.append((loss.detach().double(), features.grad.double()))
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()
