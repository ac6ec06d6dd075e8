"""Who has how many rows of a union, and how rows travel between the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch import Batch, extent
from ..core.inputs import Keys

#: A process group of ``torch.distributed``, and what stands for it in processes outside of it.
PROCESS_GROUP: Any = dist.ProcessGroup if dist.is_available() else ()
NOT_A_MEMBER = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None


@dataclass(frozen=True)
class GroupName:
    """The name of a process group in a copy or a pickle, until this process finds the group."""

    name: str


def check_group(group: Any) -> None:
    """Checks the type. Whether this process is a member is checked when the group is used."""
    if isinstance(group, str) and group != "world":
        raise ValueError(f"group must be a process group, 'world' or None, got {group!r}")
    is_group = group is None or isinstance(group, (str, GroupName, PROCESS_GROUP))
    is_constant = type(group) is type(NOT_A_MEMBER) and group == NOT_A_MEMBER
    if not is_group and not is_constant:
        kind = type(group).__name__
        raise TypeError(f"group must be 'world', a ProcessGroup or None, got {kind}")


def group_name(group: Any) -> Any:
    """What replaces ``group=`` in a copy or a pickle: ``"world"``, a GroupName, or None."""
    if not isinstance(group, PROCESS_GROUP):
        return group
    return "world" if group is dist.group.WORLD else GroupName(group.group_name)


def find_group(named: Any) -> Any:
    """The group that a GroupName names, if this process has it; anything else unchanged, so that
    ``"world"`` is looked up at each call.
    """
    if isinstance(named, GroupName) and dist.is_available() and dist.is_initialized():
        for group, name in dist.distributed_c10d._world.pg_names.items():
            if name == named.name:
                return group
    return named


def existing_group(group: Any) -> Any:
    """The process group that ``group=`` means now.

    Raises:
        RuntimeError: there is none, or the call is inside a ``torch.func`` transform.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "group= exchanges rows between processes, which torch.func transforms cannot follow: "
            "use torch.autograd.grad or backward()"
        )
    if not dist.is_available() or not dist.is_initialized():
        of = ' of "world"' if isinstance(group, str) else ""
        raise RuntimeError(
            f"group= needs an initialised process group{of}: call "
            "torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if isinstance(group, str) else find_group(group)
    if isinstance(group, GroupName):
        raise RuntimeError(
            f"group= was pickled as the process group {group.name!r}, which this process does not "
            "have: set the loss's group, or create that group before loading"
        )
    return group


@dataclass(frozen=True)
class Union:
    """The rows of all ranks: ``sizes[r]`` anchors and ``key_sizes[r]`` further keys on rank r; and
    whether any rank has a mask.
    """

    group: Any
    rank: int
    sizes: list[int]
    key_sizes: list[int]
    has_mask: bool

    @property
    def n_ranks(self) -> int:
        return len(self.sizes)

    @property
    def n_rows(self) -> int:
        return sum(self.sizes)

    @property
    def n_keys(self) -> int:
        return sum(self.key_sizes)

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + self.sizes[self.rank])

    @staticmethod
    def own_keys(batch: Batch) -> Keys:
        nothing = (batch.x[:0].detach(), batch.y[:0], batch.p[:0])
        return nothing if batch.keys is None else batch.keys

    def gather(self, t: Tensor, sizes: list[int]) -> Tensor:
        """Rows [n_r, C] of every rank, in the ranks' order: [Σ n_r, C]."""
        out = t.new_empty(sum(sizes), *t.shape[1:])
        start = sum(sizes[: self.rank])
        out[start : start + len(t)] = t.detach()
        for work in self.start_gather(out, sizes):
            work.wait()
        return out

    def of_ranks(self, t: Tensor) -> Tensor:
        """Every rank's tensor of this one's shape: [n_ranks, …]."""
        return self.gather(t[None], [1] * self.n_ranks)

    def start_gather(self, out: Tensor, sizes: list[int]) -> list[Any]:
        """Fills in the other ranks' rows of ``out`` [Σ n_r, C], which holds this rank's.

        Returns:
            What to wait for before ``out`` is read.
        """
        stops = list(accumulate(sizes))
        # On the CPU gloo gathers through a buffer of its own, and takes three times as long.
        if len(set(sizes)) == 1 and out.device.type != "cpu":
            if sizes[0] > 0:
                mine = out[stops[self.rank] - sizes[0] : stops[self.rank]]
                all_gather(as_bytes(out), as_bytes(mine), self.group)
            return []
        return [
            dist.broadcast(
                as_bytes(out[stop - size : stop]), group=self.group, group_src=rank, async_op=True
            )
            for rank, (size, stop) in enumerate(zip(sizes, stops, strict=True))
            if size > 0
        ]

    def extent(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``batch.extent`` of all ranks' rows and keys."""
        of_ranks = self.of_ranks(torch.stack([t.double() for t in extent(batch)]))
        n_present, n_absent = of_ranks[:, 1:].sum(0).long().unbind()
        return of_ranks[:, 0].amax(), n_present, n_absent

    def deal(self, sums: Tensor) -> Tensor:
        """Exchanges this rank's sums of all rows [S, N] for all ranks' sums of this rank's rows
        [n_ranks, S, n].
        """
        n_sums, n_own = len(sums), self.sizes[self.rank]
        dealt = sums.new_empty(self.n_ranks, n_sums, n_own)
        dist.all_to_all_single(
            dealt.view(-1),
            torch.cat([part.reshape(-1) for part in sums.split(self.sizes, dim=1)]),
            [n_sums * n_own] * self.n_ranks,
            [n_sums * size for size in self.sizes],
            group=self.group,
        )
        return dealt

    def gather_columns(
        self, columns: tuple[Tensor, ...], of_keys: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """Columns [n, C_k] of all ranks' rows and then of all ranks' further keys.

        They travel side by side in the widest of their dtypes; each is returned in its own.
        """
        together = self.gather(torch.cat(columns, dim=1), self.sizes)
        if self.n_keys > 0:
            together_j = self.gather(torch.cat(of_keys, dim=1), self.key_sizes)
            together = torch.cat([together, together_j])
        parts = together.split([t.shape[1] for t in columns], dim=1)
        return [part.to(t.dtype).contiguous() for part, t in zip(parts, columns, strict=True)]

    def gather_keys(self, batch: Batch, x: Tensor) -> Keys:
        """The union's keys; ``x``: features of all ranks' rows."""
        key_x, *key_labels = self.own_keys(batch)
        if self.n_keys > 0:
            x = torch.cat([x, self.gather(key_x, self.key_sizes)])
        return x, *self.gather_columns((batch.y, batch.p), tuple(key_labels))


def as_bytes(t: Tensor) -> Tensor:
    """The memory of a tensor as uint8, which every process-group backend can send."""
    return t.contiguous().view(-1).view(torch.uint8)


def all_gather(out: Tensor, mine: Tensor, group: Any) -> None:
    # The newer name, where this PyTorch has it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, mine, group=group)
