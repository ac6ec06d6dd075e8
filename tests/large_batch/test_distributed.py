"""``group=``: the loss of the union of all ranks' rows, its gradient, its traffic and its
errors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conr_kernels import conr_loss
from conr_kernels.batch import Batch
from conr_kernels.large_batch import agreement
from conr_kernels.variants import Settings, resolve_variant
from tests.helpers import ranks


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory) -> ranks.Outcomes:
    """Of the checks that are selected."""
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    selected = " ".join(item.name for item in request.session.items)
    checks = [check for check in ranks.CHECKS if f"[{check.__name__}-" in selected]
    return ranks.run_ranks(checks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("check", ranks.CHECKS, ids=lambda c: c.__name__)
def test_on_every_rank(check, n_ranks: int, outcomes: ranks.Outcomes) -> None:
    name = f"{check.__name__}-{n_ranks}"
    for rank in range(n_ranks):
        verdict, _ = outcomes[rank].get(name, ("not run", ""))
        assert verdict == "passed", (
            f"{name} on rank {rank}: {verdict}\n{ranks.what_happened(outcomes)}"
        )
    print(outcomes[0][name][1])


def check_that_fails_on_rank_1(group: dist.ProcessGroup) -> str:
    found = torch.tensor([12.0, 345.0])
    if dist.get_rank(group) == 1:
        torch.testing.assert_close(found, found + 1)
    dist.all_reduce(found, group=group)  # the others wait here
    return ""


def test_a_failure_names_the_rank_the_check_and_the_values(tmp_path: Path) -> None:
    """The other ranks, in a collective that never ends, are not waited for."""
    outcomes = ranks.run_ranks([check_that_fails_on_rank_1], tmp_path, sizes=(2,))
    assert outcomes[0] == {"check_that_fails_on_rank_1-2": ("started", "")}
    message = ranks.what_happened(outcomes)
    assert message.startswith("rank 1 failed check_that_fails_on_rank_1-2:")
    assert "Tensor-likes are not close" in message and "345." in message


def test_ranks_that_wait_for_ever_are_named_with_their_checks() -> None:
    outcomes = [{"a-2": ("started", "")}, {"a-2": ("passed", ""), "b-2": ("started", "")}, {}]
    assert ranks.what_happened(outcomes) == (
        "no check failed; rank 0 was in a-2; rank 1 was in b-2; rank 2 was in no check"
    )


def test_group_without_process_group_names_the_remedy() -> None:
    x, y = torch.randn(3, 2), torch.arange(3.0)
    with pytest.raises(RuntimeError, match="init_process_group"):
        conr_loss(x, y, y, group=dist.ProcessGroup(0, 1))


def test_ranks_must_agree_on_what_decides_their_collectives() -> None:
    """On the CPU only the torch backend's ranks exchange sums: a mixture would wait for ever."""
    x, y = torch.randn(3, 2), torch.arange(3.0)[:, None]
    settings = Settings(1.0, 0.2, 0.01, resolve_variant("paper"), "mae")
    batch = Batch(x, y, y, None, None, settings, "mean", "torch")
    facts = {agreement._facts(batch._replace(backend=name)) for name in ("torch", "triton")}
    assert len(facts) == 2
