"""What a process is told once, by a ``UserWarning``: the silent ways in which nothing is learnt."""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import ops
from .batch import Batch
from .core.counts import pair_counts

_told: set[str] = set()


def tell_once(topic: str, message: str) -> None:
    if topic in _told:
        return
    _told.add(topic)
    level, frame = 1, sys._getframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("conr_kernels", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def look_for_ranks() -> None:
    """Tells of a job of several processes whose loss has no group."""
    if torch.compiler.is_compiling() or "ranks" in _told:
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tell_once(
            "ranks",
            f"this is one of {dist.get_world_size()} processes and the ConR loss has no group: "
            "each process compares its own rows only. For the loss of all processes' rows pass "
            'group="world" (looked up at each call; torch.distributed.group.WORLD is None before '
            "init_process_group)",
        )


def look_for_synchronisation(encoder: object) -> None:
    """Tells of a job of several processes in which nobody averages an encoder's gradients."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return
    modules = encoder.modules() if isinstance(encoder, torch.nn.Module) else ()
    if any(hasattr(m, "no_sync") or hasattr(m, "set_requires_gradient_sync") for m in modules):
        return
    tell_once(
        "gradients",
        f"gradient_cache got a {type(encoder).__name__} without DistributedDataParallel or FSDP in "
        f"one of {dist.get_world_size()} processes: each process keeps its own gradients, which "
        "nobody averages. Give it the wrapped module, not what is inside",
    )


def look_for_copied_rows(rows: Tensor) -> None:
    """Tells of a memory bank's rows that DistributedDataParallel, in whose forward pass this is
    called, copies from rank 0 to every rank.
    """
    if torch.compiler.is_compiling() or "bank" in _told:
        return
    # Its own names: a version without them is told nothing.
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not ddp.broadcast_buffers or dist.get_world_size(ddp.process_group) < 2:
        return
    if any(buffer is rows for buffer in getattr(ddp, "modules_buffers", ())):
        tell_once(
            "bank",
            "a MemoryBank is part of a DistributedDataParallel module, which copies rank 0's rows "
            "to every rank before each forward pass: the rows that the others push are lost. Keep "
            "the bank outside, or name its buffers before the module is wrapped: "
            "module._ddp_params_and_buffers_to_ignore = [name for name, _ in "
            'module.named_buffers() if name.startswith("bank.")]',
        )


def look_for_anchors(batch: Batch, loss: Tensor, n_union: Tensor | int | None = None) -> None:
    """Tells of a batch in which nothing can happen, where reading it costs nothing: on the CPU.

    Args:
        loss: what became of the batch; anything but 0 is no such case.
        n_union: rows that take part of the union whose part the batch is; None: it is the whole.
    """
    if not ops.is_plain(batch.x) or batch.x.device.type != "cpu" or "anchors" in _told:
        return
    if loss.detach().any():
        return
    y_i, p_i = batch.y, batch.p
    if batch.mask is not None:
        y_i, p_i = y_i[batch.mask], p_i[batch.mask]
    n_rows = len(y_i) if n_union is None else int(n_union)
    if n_rows < 2:
        return
    reason = f"no row of the union's {n_rows} has both a positive and a negative"
    if n_union is None:
        y_j, p_j = y_i, p_i
        if batch.keys is not None:
            is_key = slice(None) if batch.key_mask is None else batch.key_mask
            key_y, key_p = (t[is_key] for t in batch.keys[1:])
            y_j, p_j = torch.cat([y_i, key_y]), torch.cat([p_i, key_p])
        of_pairs = (batch.settings.window, batch.settings.distance)
        negatives = batch.settings.variant.negatives
        n_i, m_i = pair_counts(y_i, p_i, y_j, p_j, *of_pairs, negatives)
        if ((n_i > 0) & (m_i > 0)).any():
            return  # weights of 0, say
        reason = "no row has both a positive and a negative"
        if not n_i.any():
            reason = "no row has a positive: no two labels lie within the window of each other"
        elif not m_i.any():
            apart = "" if negatives == "all" else " and predictions within it"
            reason = "no row has a negative: no two rows have labels farther apart than the window"
            reason += apart
    low, high = y_i.aminmax() if len(y_i) else (torch.nan, torch.nan)
    tell_once(
        "anchors",
        f"the ConR loss of a batch of {len(y_i)} rows is 0 and trains nothing: {reason} "
        f"(window={batch.settings.window:g}, labels from {low:g} to {high:g}). suggest_window "
        "shows the shares of positives and negatives over windows; told once a process",
    )
