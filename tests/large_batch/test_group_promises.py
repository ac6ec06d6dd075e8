"""Statistics of a union, ``"world"``, copies and what is told, on two ranks."""

import copy
import json
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from conr_kernels import ConRLoss, conr_loss, conr_statistics, notices

SIZES, KEY_SIZES = (25, 12), (3, 7)


def rows(n: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 12, (n,), generator=g) / 10
    return [torch.randn(n, 6, generator=g), y, y + torch.randint(-3, 4, (n,), generator=g) / 10]


def check_statistics_are_the_unions(rank: int, own: slice, own_keys: slice) -> None:
    _, y, p = rows(37)
    w = torch.linspace(0.5, 2, 37)
    mask, key_mask = torch.arange(37) % 5 != 0, torch.arange(10) % 3 != 0
    options = dict(window=0.2, variant="released-age")
    for is_masked in (False, True):
        m = mask if is_masked else None
        keys = [*rows(10, 1), key_mask] if is_masked else rows(10, 1)
        whole = conr_statistics(y, p, keys=keys, mask=m, weights=w, **options)
        found = conr_statistics(
            y[own], p[own], keys=[t[own_keys] for t in keys], mask=None if m is None else m[own],
            weights=w[own], group="world", **options,
        )  # fmt: skip
        for a, b in zip(found[:3], whole[:3], strict=True):
            assert torch.equal(a, b[own])
        torch.testing.assert_close(found.floor, whole.floor)


def check_bad_input_of_one_rank_raises_on_every_rank(rank: int, own: slice, _: slice) -> None:
    _, y, p = rows(37)
    with pytest.raises(ValueError, match="window must be" if rank == 1 else "rank 1: .*window"):
        conr_statistics(y[own], p[own], window=1.0 - 2 * rank, group="world")
    with pytest.raises(ValueError, match="window is 1.0 on rank 0 and 2.0 on rank 1"):
        conr_statistics(y[own], p[own], window=1.0 + rank, group="world")


def check_world_and_copies_give_the_unions_loss(rank: int, own: slice, _: slice) -> None:
    expected = conr_loss(*rows(37))
    for conr in (ConRLoss(group="world"), copy.deepcopy(ConRLoss(group=dist.group.WORLD))):
        torch.testing.assert_close(conr(*(t[own] for t in rows(37))), expected)


def check_the_loss_has_the_dtype_of_sums(rank: int, own: slice, _: slice) -> None:
    x, y, p = (t[own] for t in rows(37))
    for dtype in (torch.float16, torch.float32, torch.float64):
        for mask in (None, y < 1):
            for reduction in ("mean", "sum", "none"):
                loss = conr_loss(x.to(dtype), y, p, reduction=reduction, mask=mask, group="world")
                assert loss.dtype == torch.promote_types(dtype, torch.float32), reduction


def check_transforms_are_refused(rank: int, own: slice, _: slice) -> None:
    x, y, p = (t[own] for t in rows(37))
    for backend in ("auto", "reference"):
        loss = ConRLoss(group="world", backend=backend)
        with pytest.raises(RuntimeError, match="torch.func transforms cannot follow"):
            torch.func.grad(loss)(x, y, p)


def check_labels_may_change_before_backward(rank: int, own: slice, _: slice) -> None:
    for n_ranks_of in (dist.group.WORLD, dist.new_group([rank], use_local_synchronization=True)):
        x, y, p = (t[own].clone() for t in rows(37))
        x.requires_grad_()
        loss = conr_loss(x, y, p, group=n_ranks_of)
        (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
        y.mul_(3), p.add_(1)
        assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def check_a_loss_without_a_group_is_told_once(rank: int, own: slice, _: slice) -> None:
    notices._told.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            conr_loss(*(t[own] for t in rows(37)))
    assert [str(t.message).count('group="world"') for t in told] == [1]


def check_a_union_in_which_nothing_happens_is_told(rank: int, own: slice, _: slice) -> None:
    notices._told.clear()
    x, y, p = (t[own] for t in rows(37))
    with pytest.warns(UserWarning, match="no row of the union's 37 has both .*window=50"):
        conr_loss(x, y, p, window=50, group="world")


def check_a_union_of_missing_labels_is_silent(rank: int, own: slice, _: slice) -> None:
    notices._told.clear()
    x, y, p = (t[own] for t in rows(37))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conr_loss(x, y, p, mask=torch.zeros(len(x), dtype=torch.bool), group="world")
    assert not notices._told


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    start, first = sum(SIZES[:rank]), sum(KEY_SIZES[:rank])
    own, own_keys = slice(start, start + SIZES[rank]), slice(first, first + KEY_SIZES[rank])
    outcome = {}
    for check in CHECKS:
        try:
            check(rank, own, own_keys)
            outcome[check.__name__] = "passed"
        except BaseException:
            outcome[check.__name__] = traceback.format_exc()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run, (str(folder),), 2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_both_ranks(check, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome[check.__name__] == "passed", f"rank {rank}:\n{outcome[check.__name__]}"
