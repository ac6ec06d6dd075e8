"""What every process of test_distributed.py runs: checks of ``group=`` on 1, 2 and 4 ranks.

One spawn of four processes serves all checks; a check takes the group and returns a text to print.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conr_kernels import (
    ConRLoss,
    conr_loss,
    gradient_cache,
)
from conr_kernels.large_batch import agreement, ranks, union
from conr_kernels.torch_backend import backend as torch_backend
from conr_kernels.torch_backend import sweeps as torch_sweeps
from conr_kernels.torch_backend import tiles as torch_tiles

WORLD = 4
UNEVEN = {1: [37], 2: [25, 12], 4: [20, 0, 5, 12]}
EVEN = {1: [36], 2: [18, 18], 4: [9, 9, 9, 9]}


def make_rows(n_rows: int, seed: int, dtype: torch.dtype, n_labels: int = 1) -> list[Tensor]:
    """Features, labels on a grid with ties, predictions and weights."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 12, (n_rows, n_labels), generator=g).to(dtype)
    p = y + 2 * torch.randn(n_rows, n_labels, generator=g).to(dtype)
    w = 0.5 + torch.rand(n_rows, generator=g).to(dtype)
    return [torch.randn(n_rows, 6, generator=g).to(dtype), y, p, w]


def part(rows: list[Tensor], sizes: list[int], rank: int) -> list[Tensor]:
    start = sum(sizes[:rank])
    return [t[start : start + sizes[rank]] for t in rows]


def check_union(group: dist.ProcessGroup) -> str:
    """Values and gradients are the union's, whatever the sizes, reduction, keys, backend and
    variant.
    """
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    cases = [
        (sizes, keys, reduction, backend, options)
        for sizes in (UNEVEN[n_ranks], EVEN[n_ranks], [0] * n_ranks)
        for keys in (None, [3 * r for r in range(n_ranks)])
        for reduction, backend, options in (
            ("mean", "torch", {}),
            ("sum", "reference", dict(variant="released-depth")),
            ("none", "torch", dict(variant="released-age", distance="rmse")),
            ("none", "reference", dict(variant="contrastive", temperature=0.02)),
            ("sum", "torch", dict(temperature=0.01, push_scale=0.5)),
            ("mean", "torch", dict(variant="contrastive")),
        )
    ]
    for number, (sizes, key_sizes, reduction, backend, options) in enumerate(cases):
        L = 2 if "distance" in options else 1
        rows = make_rows(sum(sizes), number, torch.float64, L)
        keys = None if key_sizes is None else make_rows(sum(key_sizes), 99, torch.float64, L)[:3]
        options = dict(options, reduction=reduction)
        g = (
            torch.linspace(0.5, 1.5, sum(sizes)).double()
            if reduction == "none"
            else torch.tensor(1.7)
        )

        x = rows[0].clone().requires_grad_()
        expected = conr_loss(x, *rows[1:], keys=keys, backend="reference", **options)
        expected.backward(g.expand_as(expected))

        mine = part(rows, sizes, rank)
        my_keys = None
        if keys is not None and key_sizes[rank] > 0:
            my_keys = tuple(part(keys, key_sizes, rank))
        x_mine = mine[0].clone().requires_grad_()
        loss = conr_loss(x_mine, *mine[1:], keys=my_keys, backend=backend, group=group, **options)
        if reduction == "none":
            expected, g = part([expected, g], sizes, rank)
        loss.backward(g.expand_as(loss))
        message = f"case {number}: {sizes} {key_sizes} {backend} {options}"
        torch.testing.assert_close(loss, expected, msg=lambda m, at=message: f"{at}: {m}")
        torch.testing.assert_close(
            x_mine.grad,
            n_ranks * part([x.grad], sizes, rank)[0],
            msg=lambda m, at=message: f"{at}: {m}",
        )
    return f"{len(cases)} cases on {n_ranks} ranks"


def check_union_in_shares(group: dist.ProcessGroup) -> str:
    """The same where every rank takes a share of the pairs forward, down to a few rows."""
    changed = ((union, "SHARED_ROWS", 1), (torch_tiles, "BLOCK_I", 2),
               (torch_tiles, "TILE_PAIRS", 64), (torch_tiles, "TILE_COST", 4))  # fmt: skip
    saved = [getattr(module, name) for module, name, _ in changed]
    dense_share = torch_sweeps.DENSE_SHARE
    shares, layouts = [], []

    def counted(*args: object, of: Callable = torch_backend.union_sweeps) -> tuple:
        shares.append(args[-1])
        return of(*args)

    def unpacked(*args: object, of: Callable = torch_backend.unpack_sweeps, **options) -> list:
        layouts.append(args[0])
        return of(*args, **options)

    plain = torch_backend.union_sweeps, torch_backend.unpack_sweeps
    torch_backend.union_sweeps, torch_backend.unpack_sweeps = counted, unpacked
    try:
        for module, name, value in changed:
            setattr(module, name, value)
        text = check_union(group) + check_same_bits(group) + check_dtypes(group)
        for share in (-1, 9):  # one sweep over all pairs, and never
            torch_sweeps.DENSE_SHARE = share
            check_union(group)
        torch_sweeps.DENSE_SHARE = dense_share
        check_second_derivative(group)
        check_not_finite(group)
        check_dtypes_of_labels(group)
        check_smallest_window(group)
    finally:
        torch_sweeps.DENSE_SHARE = dense_share
        torch_backend.union_sweeps, torch_backend.unpack_sweeps = plain
        for (module, name, _), value in zip(changed, saved, strict=True):
            setattr(module, name, value)
    n_ranks = dist.get_world_size(group)
    assert not shares if n_ranks == 1 else set(shares) == {(dist.get_rank(group), n_ranks)}
    assert bool(layouts) == (n_ranks > 1), "backward found the pairs again"
    return text


def check_dtypes_of_labels(group: dist.ProcessGroup) -> str:
    """Labels and predictions are compared each in its own dtype: ties at the window tell."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    n = 60
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n * n_ranks, 5, generator=g)
    y, p = (torch.randint(0, 20, (n * n_ranks,), generator=g).double() / 10 for _ in range(2))
    losses = []
    for labels in ((y, p.float()), (y.float(), p), (y.float(), p.float()), (y, p)):
        rows, mine = (x, *labels), part([x, *labels], [n] * n_ranks, rank)
        results = []
        for (features, *rest), of in ((rows, None), (mine, group)):
            features = features.clone().requires_grad_()
            loss = conr_loss(features, *rest, window=0.2, backend="torch", group=of)
            loss.backward()
            results.append((loss.detach(), features.grad))
        (expected, gradient), (loss, own_gradient) = results
        torch.testing.assert_close(loss, expected)
        own = n_ranks * part([gradient], [n] * n_ranks, rank)[0]
        torch.testing.assert_close(own_gradient, own, rtol=1e-4, atol=1e-6)
        losses.append(expected.item())
    assert len(set(losses)) > 1, "no tie tells the dtypes apart"
    return ""


def check_smallest_window(group: dist.ProcessGroup) -> str:
    """Negatives count also where their pushing weights underflow the sums."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    x, y = tiny_distances(n_ranks)
    expected = conr_loss(x, y, 0 * y, window=0.0, temperature=0.05, backend="reference")
    x, y = part([x, y], [6] * n_ranks, rank)
    loss = conr_loss(x, y, 0 * y, window=0.0, temperature=0.05, group=group)
    torch.testing.assert_close(loss, expected)
    return ""


def tiny_distances(n: int) -> tuple[Tensor, Tensor]:
    """Features and labels [6n] with label distances near the smallest float32 number."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
    y = torch.tensor([0.0, 0.0, 0.0, 1e-38, 1e-38, 1e-38])
    return torch.cat([x, -x]).repeat(n, 1), y.repeat(n)


def check_same_bits(group: dist.ProcessGroup) -> str:
    """Every rank has the same bits of the loss, and every run of it."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    rows = make_rows(sum(UNEVEN[n_ranks]), 5, torch.float32)
    runs = []
    for _ in range(2):
        x, *rest = part(rows, UNEVEN[n_ranks], rank)
        x.requires_grad_()
        loss = conr_loss(x, *rest, group=group)
        loss.backward(retain_graph=True)
        first = x.grad.clone()
        x.grad = None
        loss.backward()
        assert torch.equal(first, x.grad)
        runs.append((loss.detach(), first))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    losses = [torch.empty(()) for _ in range(n_ranks)]
    dist.all_gather(losses, runs[0][0], group=group)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    return ""


def check_dtypes(group: dist.ProcessGroup) -> str:
    """16-bit features travel in 16 bits; the union's value is the one process's, no_grad too."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    for dtype in (torch.bfloat16, torch.float16):
        rows = make_rows(sum(UNEVEN[n_ranks]), 6, torch.float32)
        rows[0] = rows[0].to(dtype)
        x = rows[0].clone().requires_grad_()
        expected = conr_loss(x, *rows[1:])
        expected.backward()
        mine = part(rows, UNEVEN[n_ranks], rank)
        with torch.no_grad():
            torch.testing.assert_close(conr_loss(*mine, group=group), expected)
        x_mine = mine[0].clone().requires_grad_()
        conr_loss(x_mine, *mine[1:], group=group).backward()
        own = n_ranks * part([x.grad], UNEVEN[n_ranks], rank)[0]
        assert own.numel() == 0 or own.abs().max() > 1e-3
        torch.testing.assert_close(x_mine.grad, own, rtol=0.02, atol=1e-4)
    return ""


def check_second_derivative(group: dist.ProcessGroup) -> str:
    """The fused backends refuse it; the reference gives the union's."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    rows = make_rows(sum(EVEN[n_ranks]), 7, torch.float64)
    second = {}
    for of in ("union", "mine"):
        x, *rest = rows if of == "union" else part(rows, EVEN[n_ranks], rank)
        x = x.clone().requires_grad_()
        loss = conr_loss(x, *rest, backend="reference", group=None if of == "union" else group)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (second[of],) = torch.autograd.grad((grad**2).sum(), x)
    mine = part([second["union"]], EVEN[n_ranks], rank)[0]
    # Twice times the ranks from the first derivative, once from the second.
    torch.testing.assert_close(second["mine"], n_ranks**3 * mine)

    x, *rest = part(rows, EVEN[n_ranks], rank)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(conr_loss(x, *rest, group=group), x, create_graph=True)
    raised = expect(RuntimeError, lambda: torch.autograd.grad(grad.sum(), x))
    assert 'backend="reference"' in raised
    return ""


def expect(error: type[Exception], call: Callable[[], object]) -> str:
    start = time.perf_counter()
    try:
        call()
    except error as raised:
        took = time.perf_counter() - start
        assert took < 5, f"raised after {took:.1f} s"
        return str(raised)
    raise AssertionError(f"no {error.__name__}")


def check_disagreements(group: dist.ProcessGroup) -> str:
    """Different shapes, types and settings raise on every rank and name ranks and values."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    if n_ranks == 1:
        return ""
    is_last = rank == n_ranks - 1
    x, y, p, w = make_rows(5, rank, torch.float32)
    wide = torch.cat([x, x], dim=1)
    twice = torch.cat([y, y], dim=1)
    cases = {
        "D": (lambda: conr_loss(wide if is_last else x, y, p, group=group), "12"),
        "L": (
            lambda: conr_loss(x, *((twice, twice) if is_last else (y, p)), group=group),
            "2",
        ),
        "features' dtype": (
            lambda: conr_loss(x.bfloat16() if is_last else x, y, p, group=group),
            "torch.bfloat16",
        ),
        "labels' dtype for comparison": (
            lambda: conr_loss(x, y.double() if is_last else y, p, group=group),
            "torch.float64",
        ),
        "predictions' dtype for comparison": (
            lambda: conr_loss(x, y, p.double() if is_last else p, group=group),
            "torch.float64",
        ),
        "features require a gradient": (
            lambda: conr_loss(x.clone().requires_grad_(is_last), y, p, group=group),
            "True",
        ),
    }
    for name, ordinary, odd in (
        ("window", 1.0, 2.0),
        ("temperature", 0.2, 0.25),
        ("push_scale", 0.01, 0.5),
        ("variant", "paper", "contrastive"),
        ("distance", "mae", "rmse"),
        ("reduction", "mean", "sum"),
        ("backend", "auto", "reference"),
    ):
        options = {name: odd if is_last else ordinary}
        cases[name] = (
            lambda options=options: conr_loss(x, y, p, group=group, **options),
            "outside,none,all" if name == "variant" else str(odd),
        )
    for name, (call, value) in cases.items():
        message = expect(ValueError, call)
        assert f"{name} is " in message, message
        assert f"{value}" in message and f"on rank {n_ranks - 1}" in message, message
    conr_loss(x, y, p, w, group=group)
    return f"{len(cases)} disagreements"


def check_bad_input_on_one_rank(group: dist.ProcessGroup) -> str:
    """The rank with bad input raises its own error, every other one a ValueError: nobody waits."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    x, y, p, w = make_rows(5, rank, torch.float32)
    bad = n_ranks - 1
    for error, call in (
        (TypeError, lambda: conr_loss(x.long() if rank == bad else x, y, p, group=group)),
        (ValueError, lambda: conr_loss(x, y[:2] if rank == bad else y, p, group=group)),
        (ValueError, lambda: conr_loss(x, y, p, window=-1.0 if rank == bad else 1.0, group=group)),
        (OverflowError, lambda: conr_loss(x, y, p, 10**400 if rank == bad else 1.0, group=group)),
        (RuntimeError, lambda: run_unavailable(x, y, p, rank == bad, group)),
    ):
        message = expect(error if rank == bad else ValueError, call)
        if rank != bad:
            assert f"rank {bad}: {error.__name__}: " in message, message
    conr_loss(x, y, p, w, group=group)
    return ""


def run_unavailable(
    x: Tensor, y: Tensor, p: Tensor, is_bad: bool, group: dist.ProcessGroup
) -> Tensor:
    return conr_loss(x, y, p, backend="cuda" if is_bad else "torch", group=group)


def check_not_finite(group: dist.ProcessGroup) -> str:
    """A NaN on one rank shows on all of them."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    for column in range(4):
        rows = make_rows(8, rank, torch.float32)
        if rank == n_ranks - 1:
            rows[column].view(-1)[3] = torch.nan
        x = rows[0].requires_grad_()
        loss = conr_loss(*rows, group=group)
        assert loss.isnan(), column
        loss.backward()
        if rank == n_ranks - 1:
            assert not x.grad.isfinite().all(), column
    for column in range(3):
        rows, keys = (make_rows(8, rank + seed, torch.float32) for seed in (0, 9))
        if rank == n_ranks - 1:
            keys[column].view(-1)[3] = torch.nan
        assert conr_loss(*rows, keys=tuple(keys[:3]), group=group).isnan(), f"key {column}"
    rows = make_rows(8, rank, torch.float32)
    rows[1][5], rows[2][5] = 1000.0, -1000.0  # without pairs
    x = rows[0].requires_grad_()
    g = torch.ones(8)
    g[5] = torch.inf
    conr_loss(*rows, reduction="none", group=group).backward(g)
    assert not x.grad[5].isfinite().any(), "upstream"
    return ""


def check_traffic(group: dist.ProcessGroup) -> str:
    """(N·D + O(N)) elements arrive at a rank; nothing is reduced."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    n, D, N = 1024, 64, 1024 * n_ranks
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(n, D, generator=g, requires_grad=True)
    y = torch.randint(0, 60, (n,), generator=g).float()
    received = {"forward": 0, "backward": 0}
    direction = "forward"

    class Counting:
        def __getattr__(self, name: str) -> object:
            function = getattr(dist, name)
            if name in ("all_reduce", "reduce_scatter_tensor"):
                raise AssertionError(f"{name} was called")
            gathers = ("all_gather_single", "all_gather_into_tensor", "broadcast")
            if name not in (*gathers, "all_to_all_single"):
                return function

            def counted(out: Tensor, *args: object, **kwargs: object) -> object:
                received[direction] += out.numel() * out.itemsize
                return function(out, *args, **kwargs)

            return counted

    agreement.dist = ranks.dist = Counting()
    try:
        loss = conr_loss(x, y, y + torch.randn(n, generator=g), group=group)
        direction = "backward"
        loss.backward()
    finally:
        agreement.dist = ranks.dist = dist
    header = 8 * agreement.HEADER_NUMBERS + agreement.TEXT_BYTES
    if n_ranks > 1:
        sums = 8 * 3 * N  # of the rows' exponentials and positives, as float64
        # Of a row its unit features, label, prediction and norm; of a rank its loss.
        assert received["forward"] == 4 * (N * D + 3 * N + n_ranks) + header * n_ranks + sums
        assert received["backward"] == 4 * 3 * N
    return (
        f"{n_ranks} ranks, N = {N}, D = {D}, float32: {received['forward']} bytes forward "
        f"(N·D is {4 * N * D}), {received['backward']} backward (3 floats a row)"
    )


class Encoder(nn.Module):
    def __init__(self, p_dropout: float = 0.0) -> None:
        super().__init__()
        hidden = [nn.Linear(5, 16), nn.Tanh(), nn.Dropout(p_dropout), nn.Linear(16, 6)]
        self.body, self.head = nn.Sequential(*hidden), nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(inputs)
        return features, self.head(features)


def objective(features: Tensor, predictions: Tensor, y: Tensor, group: object) -> Tensor:
    conr = ConRLoss(group=group, temperature=0.1)
    return nn.functional.mse_loss(predictions[:, 0], y) + conr(features, y, predictions)


def check_ddp_training(group: dist.ProcessGroup) -> str:
    """Ranks with DDP train as one process with the union batch, with and without a gradient
    cache.
    """
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    n = 24 // n_ranks
    g = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(24, 5, generator=g), torch.randint(0, 6, (24,), generator=g).float())
        for _ in range(5)
    ]

    def train(how: str) -> Encoder:
        torch.manual_seed(0)
        model = Encoder()
        wrapped = (
            model if how == "one process" else DistributedDataParallel(model, process_group=group)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for inputs, y in batches:
            optimizer.zero_grad()
            if how == "one process":
                objective(*wrapped(inputs), y, None).backward()
            else:
                inputs, y = (t[rank * n : (rank + 1) * n] for t in (inputs, y))
                if how == "cache":
                    gradient_cache(
                        wrapped, inputs, lambda f, p, y=y: objective(f, p, y, group),
                        # Ranks may take different numbers of chunks.
                        chunk_size=3 + rank,
                    )  # fmt: skip
                else:
                    objective(*wrapped(inputs), y, group).backward()
            optimizer.step()
        return model

    start = list(Encoder().parameters())
    one = list(train("one process").parameters())
    assert all(not torch.equal(a, b) for a, b in zip(start, one, strict=True))
    for how in ("ddp", "cache"):
        for a, b in zip(train(how).parameters(), one, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    return ""


class Centred(nn.Module):
    """Reads and moves a buffer, which DDP takes from rank 0 in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.linear(x - self.centre)
        self.centre.lerp_(x.detach().mean(0), 0.5)
        return features, features[:, :1]


def check_gradient_cache_shares_buffers(group: dist.ProcessGroup) -> str:
    """A chunk as large as the batch is a plain DDP step, also where ranks' buffers differ."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    x, y, *_ = part(make_rows(36, 3, torch.float32), EVEN[n_ranks], rank)

    def loss(features: Tensor, predictions: Tensor) -> Tensor:
        return objective(features, predictions, y[:, 0], group)

    found: list[list[Tensor]] = []
    for is_cached in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Centred(), process_group=group)
        values = []
        for _ in range(3):
            if is_cached:
                values.append(gradient_cache(model, x + rank, loss, chunk_size=len(x)))
            else:
                values.append(loss(*model(x + rank)))
                values[-1].backward()
        found.append([t.detach() for t in (*values, model.module.linear.weight.grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
    return ""


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def run(rank: int, folder: str) -> None:
    """One process: every check on groups of 1, 2 and 4 ranks; what happened goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    outcome = {}
    for size, group in groups.items():
        if rank >= size:
            continue
        for check in CHECKS:
            try:
                outcome[f"{check.__name__}-{size}"] = ["passed", check(group)]
            except Exception:
                outcome[f"{check.__name__}-{size}"] = ["failed", traceback.format_exc()]
    dist.barrier()
    dist.destroy_process_group()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(outcome))
