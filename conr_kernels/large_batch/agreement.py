"""What the ranks of a group exchange before any row, so that all go on or all raise."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch import Batch
from .ranks import Union, all_gather, as_bytes, existing_group

#: The header that every rank sends: whether it failed, rows, keys, whether it has a mask; and text
#: of this many bytes.
HEADER_NUMBERS = 4
TEXT_BYTES = 1000


def agree(group: Any, prepared: Batch | Exception) -> tuple[Batch, Union]:
    """This rank's batch and all ranks' sizes, once they have agreed on everything else.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: on every rank, if the ranks disagree or one of them has no batch (which raises
            its own error).
    """
    group = existing_group(group)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group= must contain this process, got a group of other ranks")
    if isinstance(prepared, Exception):  # the other ranks wait for this one's header
        numbers, text = [1, 0, 0, 0], f"{type(prepared).__name__}: {prepared}"
    else:
        n_keys = 0 if prepared.keys is None else len(prepared.keys[0])
        has_mask = prepared.mask is not None
        numbers, text = [0, len(prepared.x), n_keys, has_mask], _facts(prepared)

    headers = _exchange(numbers, text, group, _header_device(group, prepared))
    if isinstance(prepared, Exception):
        raise prepared
    failed = headers[:, 0].nonzero().flatten().tolist()
    if failed:
        reasons = "; ".join(f"rank {r}: {_text(headers[r])}" for r in failed)
        raise ValueError(f"another rank of the group cannot take part: {reasons}")
    if not bool((headers[:, HEADER_NUMBERS:] == headers[rank, HEADER_NUMBERS:]).all()):
        raise ValueError(_disagreement([_text(header) for header in headers]))
    _, sizes, key_sizes, masks = headers[:, :HEADER_NUMBERS].t().tolist()
    return prepared, Union(group, rank, sizes, key_sizes, any(masks))


def _facts(batch: Batch) -> str:
    """What all ranks must have in common, one ``name=value`` per line."""
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
        "backend": backend_kind(batch),
    }
    return "\n".join(f"{name}={value}" for name, value in facts.items())


def backend_kind(batch: Batch) -> str:
    """The kind of backend, which decides on the collectives; ranks may mix fused backends."""
    if batch.backend == "reference":
        return "reference"
    is_shared = batch.backend == "torch" and batch.x.device.type == "cpu"
    return "torch on the CPU" if is_shared else "fused"


def _header_device(group: Any, prepared: Batch | Exception) -> torch.device:
    """The CPU where the group has a backend for it, else the current accelerator."""
    if "cpu" in {part.split(":")[0] for part in dist.get_backend_config(group).split(",")}:
        return torch.device("cpu")
    if isinstance(prepared, Batch):
        return prepared.x.device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _exchange(numbers: list[int], text: str, group: Any, device: torch.device) -> Tensor:
    """Every rank's numbers and text, as rows of int64 on the CPU."""
    encoded = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
    words = torch.frombuffer(bytearray(encoded), dtype=torch.int64)
    mine = torch.cat([words.new_tensor(numbers), words]).to(device)
    headers = mine.new_empty(dist.get_world_size(group), len(mine))
    all_gather(headers.view(-1), mine, group)
    return headers.cpu()


def _text(header: Tensor) -> str:
    return bytes(as_bytes(header[HEADER_NUMBERS:]).tolist()).rstrip(b"\0").decode(errors="ignore")


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
