"""``UserWarning``s, each once per process, about batches and ranks from which nothing is learnt."""

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
    """Warns with the caller's line: the first outside of this package and PyTorch."""
    if topic in _told:
        return
    _told.add(topic)
    level, frame = 1, sys._getframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("conr_kernels", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def look_for_ranks() -> None:
    """Warns where a job has several processes and the loss no group."""
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
    """Warns where a job has several processes and nothing averages an encoder's gradients."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return
    modules = encoder.modules() if isinstance(encoder, torch.nn.Module) else ()
    if any(hasattr(m, "no_sync") or hasattr(m, "set_requires_gradient_sync") for m in modules):
        return
    tell_once(
        "gradients",
        f"gradient_cache got a {type(encoder).__name__} without DistributedDataParallel or FSDP in "
        f"one of {dist.get_world_size()} processes: each process keeps its own gradients, which "
        "nobody averages. Pass the wrapped module, not the one inside it",
    )


def look_for_copied_rows(rows: Tensor) -> None:
    """Warns if these rows, a memory bank's, are among the buffers that DistributedDataParallel, in
    whose forward pass this is called, copies from rank 0 to every rank.
    """
    if torch.compiler.is_compiling() or "bank" in _told:
        return
    # Private names: with a version that lacks them there is no warning.
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
    """Warns of a batch without anchors. On the CPU only, where reading values costs nothing.

    Args:
        loss: the batch's; it is 0 without anchors.
        n_union: the number of rows that take part in the union of which the batch is a part; None
            if it is none.
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
        reason = _missing_sets(batch, y_i, p_i)
    if reason is None:  # the loss is 0 for another reason, such as weights of 0
        return
    low, high = y_i.aminmax() if len(y_i) else (torch.nan, torch.nan)
    tell_once(
        "anchors",
        f"the ConR loss of a batch of {len(y_i)} rows is 0 and trains nothing: {reason} "
        f"(window={batch.settings.window:g}, labels from {low:g} to {high:g}). suggest_window "
        "shows the shares of positives and negatives over windows; shown once per process",
    )


def _missing_sets(batch: Batch, y_i: Tensor, p_i: Tensor) -> str | None:
    """Which sets are empty, of rows with these labels and predictions; None if one is an anchor."""
    y_j, p_j = y_i, p_i
    if batch.keys is not None:
        is_key = slice(None) if batch.key_mask is None else batch.key_mask
        key_y, key_p = (t[is_key] for t in batch.keys[1:])
        y_j, p_j = torch.cat([y_i, key_y]), torch.cat([p_i, key_p])
    s = batch.settings
    negatives = s.variant.negatives
    n_i, m_i = pair_counts(y_i, p_i, y_j, p_j, s.window, s.distance, negatives)
    if ((n_i > 0) & (m_i > 0)).any():
        return None
    if not n_i.any():
        return "no row has a positive: no two labels lie within the window of each other"
    if not m_i.any():
        apart = "no two rows have labels farther apart than the window"
        similar = "" if negatives == "all" else " and predictions within it"
        return f"no row has a negative: {apart}{similar}"
    return "no row has both a positive and a negative"
