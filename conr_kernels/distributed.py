"""The loss of the union of all ranks' rows, by ``torch.distributed``: each rank's rows against
everybody's.

A rank sends its features and labels forward and 3 (at most 5) floats per row backward, from which
every rank computes the complete gradient of its own rows: no N×D gradient is ever reduced. On CPUs
the ranks share the forward pass (shared.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .batch import Batch, Keys, reference_losses
from .rows import no_statistics, scale_statistics
from .shared import SharedRowLosses

#: What a rank tells the others before any data moves: flag, rows, keys, and text of this many
#: bytes.
HEADER_NUMBERS = 3
TEXT_BYTES = 1000
#: From this many rows of the union on, half of a forward pass costs more than another exchange.
SHARED_ROWS = 2048


def union_loss(group: Any, prepare: Callable[[], Batch]) -> Tensor:
    """The loss of the union of the batches that the ranks of the group prepare.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: on every rank, if the ranks disagree or one of them cannot prepare its batch
            (that one raises its own error).
    """
    batch, union = _agree(group, prepare)
    rows = union.row_losses(batch)
    if batch.reduction == "none":
        return rows
    total = _Total.apply(rows.sum(), union)
    return total if batch.reduction == "sum" else total / max(union.n_rows, 1)


@dataclass(frozen=True)
class Union:
    """Who has how many rows: ``sizes[r]`` anchors and ``key_sizes[r]`` further keys on rank r."""

    group: Any
    rank: int
    sizes: list[int]
    key_sizes: list[int]

    @property
    def n_ranks(self) -> int:
        return len(self.sizes)

    @property
    def n_rows(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])

    def gather(self, t: Tensor, sizes: list[int]) -> Tensor:
        """Rows [n_r, C] of every rank, in the ranks' order: [Σ n_r, C]."""
        out = t.new_empty(sum(sizes), *t.shape[1:])
        start = sum(sizes[: self.rank])
        out[start : start + len(t)] = t.detach()
        for work in self.start_gather(out, sizes):
            work.wait()
        return out

    def start_gather(self, out: Tensor, sizes: list[int]) -> list[Any]:
        """Fills in the other ranks' rows of ``out`` [Σ n_r, C], which has this rank's. Returns what
        to wait for before it is read.
        """
        stops = list(accumulate(sizes))
        # On the CPU gloo gathers through a buffer of its own, and takes three times as long.
        if len(set(sizes)) == 1 and out.device.type != "cpu":
            if sizes[0] > 0:
                mine = out[stops[self.rank] - sizes[0] : stops[self.rank]]
                _all_gather(_bytes(out), _bytes(mine), self.group)
            return []
        return [
            dist.broadcast(
                _bytes(out[stop - size : stop]), group=self.group, group_src=rank, async_op=True
            )
            for rank, (size, stop) in enumerate(zip(sizes, stops, strict=True))
            if size > 0
        ]

    def shares_forward(self, batch: Batch) -> bool:
        """Whether the ranks share the pairs: only there s_ij = s_ji is used, and the host reads."""
        is_served = _way(batch) == "torch on the CPU"
        return is_served and self.n_ranks > 1 and self.n_rows >= SHARED_ROWS

    def deal(self, sums: Tensor) -> Tensor:
        """Sums [S, N] that every rank has of all rows: of this rank's rows, from all ranks
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

        They travel side by side in the widest of their dtypes, and come back each in its own.
        """
        together = self.gather(torch.cat(columns, dim=1), self.sizes)
        if self.n_keys > 0:
            together_j = self.gather(torch.cat(of_keys, dim=1), self.key_sizes)
            together = torch.cat([together, together_j])
        parts = together.split([t.shape[1] for t in columns], dim=1)
        return [part.to(t.dtype).contiguous() for part, t in zip(parts, columns, strict=True)]

    def gather_keys(self, batch: Batch, x: Tensor) -> Keys:
        """The keys, of features x of all ranks' rows."""
        key_x, *key_labels = self.own_keys(batch)
        if self.n_keys > 0:
            x = torch.cat([x, self.gather(key_x, self.key_sizes)])
        return x, *self.gather_columns((batch.y, batch.p), tuple(key_labels))

    @property
    def n_keys(self) -> int:
        return sum(self.key_sizes)

    @staticmethod
    def own_keys(batch: Batch) -> Keys:
        nothing = (batch.x[:0].detach(), batch.y[:0], batch.p[:0])
        return nothing if batch.keys is None else batch.keys

    def row_losses(self, batch: Batch) -> Tensor:
        """``ℓ_i`` of this rank's rows."""
        if batch.backend != "reference":
            function = SharedRowLosses if self.shares_forward(batch) else _RowLosses
            return function.apply(batch.x, batch, self)
        if self.n_ranks == 1:
            return reference_losses(batch, batch.x, batch.all_keys(), 0)
        x = _Gather.apply(batch.x, self)
        return reference_losses(batch, x[self.own], self.gather_keys(batch, x), self.offset)

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + self.sizes[self.rank])


class _RowLosses(torch.autograd.Function):
    """``ℓ_i`` of this rank's rows; backward gathers the other ranks' statistics, scaled
    upstream.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, union: Union) -> Tensor:
        settings, backend = batch.settings, batch.backend
        if union.n_ranks == 1:
            keys = batch.all_keys()
        else:
            keys = union.gather_keys(batch, union.gather(x, union.sizes))
        rows, stats, layout = ops.row_losses(
            x.detach(), batch.y, batch.p, batch.w, keys, union.offset, settings, backend
        )
        ctx.save_for_backward(stats, layout, x, batch.y, batch.p, *(keys or (None,) * 3))
        ctx.scalars = (union.offset, *settings.scalars, backend)
        ctx.union = union
        return rows

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        stats, layout, x, y, p, key_x, key_y, key_p = ctx.saved_tensors
        union = ctx.union
        coef_i, coef_j = scale_statistics(stats, g * union.n_ranks), None
        if key_x is not None:
            coef_j = no_statistics(len(key_x), stats)
            coef_j[: union.n_rows] = union.gather(coef_i, union.sizes)
        gradient = torch.ops.conr_kernels.backward(
            coef_i, coef_j, layout, x, y, p, key_x, key_y, key_p, *ctx.scalars
        )
        return gradient, None, None


class _Gather(torch.autograd.Function):
    """All ranks' rows. Backward: the sum of all ranks' gradients, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, union: Union) -> Tensor:
        ctx.union = union
        return union.gather(x, union.sizes)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _SumOwn.apply(g, ctx.union) * ctx.union.n_ranks, None


class _SumOwn(torch.autograd.Function):
    """The sum over ranks of this rank's rows: the transpose of gathering."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, union: Union) -> Tensor:
        ctx.union = union
        total = g.contiguous().clone()
        dist.all_reduce(total, group=union.group)
        return total[union.offset : union.offset + union.sizes[union.rank]]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(g, ctx.union), None


class _Total(torch.autograd.Function):
    """The sum over ranks, added in the ranks' order: the same bits everywhere."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, union: Union) -> Tensor:
        return union.gather(own[None], [1] * union.n_ranks).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _bytes(t: Tensor) -> Tensor:
    """The memory of a tensor as uint8: any dtype in any process-group backend."""
    return t.contiguous().view(-1).view(torch.uint8)


def _all_gather(out: Tensor, mine: Tensor, group: Any) -> None:
    # The newer name, where this PyTorch has it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, mine, group=group)


def _agree(group: Any, prepare: Callable[[], Batch]) -> tuple[Batch, Union]:
    """This rank's batch and everybody's sizes, after all ranks have agreed on everything else."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group= needs an initialised process group: call "
            "torch.distributed.init_process_group first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group= must contain this process, got a group of other ranks")
    batch = error = None
    try:
        batch = prepare()
        n_keys = 0 if batch.keys is None else len(batch.keys[0])
        numbers, text = [0, len(batch.x), n_keys], _facts(batch)
    except Exception as raised:  # the other ranks wait for this one's header
        error = raised
        numbers, text = [1, 0, 0], f"{type(error).__name__}: {error}"

    device = _header_device(group, batch)
    headers = _exchange(numbers, text, group, device)
    if error is not None:
        raise error
    failed = headers[:, 0].nonzero().flatten().tolist()
    if failed:
        reasons = "; ".join(f"rank {r}: {_text(headers[r])}" for r in failed)
        raise ValueError(f"another rank of the group cannot take part: {reasons}")
    if not bool((headers[:, HEADER_NUMBERS:] == headers[rank, HEADER_NUMBERS:]).all()):
        raise ValueError(_disagreement([_text(header) for header in headers]))
    return batch, Union(group, rank, headers[:, 1].tolist(), headers[:, 2].tolist())


def _facts(batch: Batch) -> str:
    """What all ranks must have in common, one ``name=value`` a line."""
    settings = batch.settings
    facts = {
        "D": batch.x.shape[1],
        "L": batch.y.shape[1],
        "features' dtype": batch.x.dtype,
        "labels' dtype for comparison": batch.y.dtype,
        "predictions' dtype for comparison": batch.p.dtype,
        "device type": batch.x.device.type,
        "features require a gradient": torch.is_grad_enabled() and batch.x.requires_grad,
        "window": settings.window,
        "temperature": settings.temperature,
        "push_scale": settings.push_scale,
        "variant": settings.variant.code,
        "distance": settings.distance,
        "reduction": batch.reduction,
        "backend": _way(batch),
    }
    return "\n".join(f"{name}={value}" for name, value in facts.items())


def _way(batch: Batch) -> str:
    """What decides which collectives a rank calls; other fused backends may be mixed."""
    if batch.backend == "reference":
        return "reference"
    is_shared = batch.backend == "torch" and batch.x.device.type == "cpu"
    return "torch on the CPU" if is_shared else "fused"


def _header_device(group: Any, batch: Batch | None) -> torch.device:
    """The CPU where the group has a backend for it, else the current accelerator."""
    if "cpu" in {part.split(":")[0] for part in dist.get_backend_config(group).split(",")}:
        return torch.device("cpu")
    if batch is not None:
        return batch.x.device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _exchange(numbers: list[int], text: str, group: Any, device: torch.device) -> Tensor:
    """Every rank's numbers and text, as rows of int64 on the CPU."""
    encoded = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
    words = torch.frombuffer(bytearray(encoded), dtype=torch.int64)
    mine = torch.cat([words.new_tensor(numbers), words]).to(device)
    headers = mine.new_empty(dist.get_world_size(group), len(mine))
    _all_gather(headers.view(-1), mine, group)
    return headers.cpu()


def _text(header: Tensor) -> str:
    return bytes(_bytes(header[HEADER_NUMBERS:]).tolist()).rstrip(b"\0").decode(errors="ignore")


def _disagreement(texts: list[str]) -> str:
    """``"the ranks of the group disagree: D is 8 on ranks 0, 2 and 16 on rank 1"``."""
    facts = [dict(line.split("=", 1) for line in text.split("\n")) for text in texts]
    parts = []
    for name in facts[0]:
        ranks_of: dict[str, list[str]] = {}
        for rank, fact in enumerate(facts):
            ranks_of.setdefault(fact[name], []).append(str(rank))
        if len(ranks_of) > 1:
            values = [
                f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
                for value, ranks in ranks_of.items()
            ]
            parts.append(f"{name} is {' and '.join(values)}")
    return "the ranks of the group disagree: " + "; ".join(parts)
