"""``group=``: the loss of the union of all ranks' rows, its gradient, its traffic and its
errors.
"""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from conr_kernels import conr_loss
from conr_kernels.batch import Batch
from conr_kernels.large_batch import agreement
from conr_kernels.variants import Settings, resolve_variant
from tests.helpers import distributed_checks

TIMEOUT = 240


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """Of each rank, what its checks said."""
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    processes = mp.spawn(
        distributed_checks.run, (str(folder),), distributed_checks.WORLD, join=False
    )
    deadline = time.monotonic() + TIMEOUT
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the ranks still ran after {TIMEOUT} s")
    return [
        json.loads((folder / f"rank{rank}.json").read_text())
        for rank in range(distributed_checks.WORLD)
    ]


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("check", distributed_checks.CHECKS, ids=lambda c: c.__name__)
def test_on_every_rank(check, n_ranks: int, outcomes: list[dict[str, list[str]]]) -> None:
    for rank in range(n_ranks):
        verdict, text = outcomes[rank][f"{check.__name__}-{n_ranks}"]
        assert verdict == "passed", f"rank {rank}:\n{text}"
    print(outcomes[0][f"{check.__name__}-{n_ranks}"][1])


def test_group_without_process_group_names_the_remedy() -> None:
    x, y = torch.randn(3, 2), torch.arange(3.0)
    with pytest.raises(RuntimeError, match="init_process_group"):
        conr_loss(x, y, y, group=object())


def test_ranks_must_agree_on_what_decides_their_collectives() -> None:
    """On the CPU only the torch backend's ranks exchange sums: a mixture would wait for ever."""
    x, y = torch.randn(3, 2), torch.arange(3.0)[:, None]
    settings = Settings(1.0, 0.2, 0.01, resolve_variant("paper"), "mae")
    batch = Batch(x, y, y, None, None, settings, "mean", "torch")
    facts = {agreement._facts(batch._replace(backend=name)) for name in ("torch", "triton")}
    assert len(facts) == 2
