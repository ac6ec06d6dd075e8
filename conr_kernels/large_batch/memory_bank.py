"""A bank of earlier rows as keys: positives and negatives from beyond the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import notices, validation


def _holding_both(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype for labels of both dtypes. Integers with floats take float32, in which the loss
    compares them: 16 bits would round them.
    """
    both = torch.promote_types(a, b)
    is_mixed = a.is_floating_point != b.is_floating_point
    return torch.promote_types(both, torch.float32) if is_mixed else both


class MemoryBank(nn.Module):
    """The last ``size`` rows that were pushed, to serve as ``keys`` of ``conr_loss``.

    The rows are buffers: they move with the module and are part of its state dict, from which rows
    and their number are loaded together or not at all. Labels and predictions are kept exactly,
    since a window decides on them: they keep their dtype when the module changes its own, and wider
    ones that are pushed or loaded widen it. Like the loss, a bank of floating labels takes integers
    in float32, exact up to 2²⁴. ::

        loss = conr(features, targets, predictions, keys=bank, mask=mask)
        bank.push(features, targets, predictions, mask)

    Keep the bank outside ``DistributedDataParallel``, which would copy rank 0's rows to every rank
    before each forward pass, or name its buffers in ``_ddp_params_and_buffers_to_ignore``. Only a
    ``push`` inside that forward pass can see the wrapper, and warns once (``UserWarning``).

    Args:
        size: K, the most rows kept. n_features: D. n_labels: L, components of a label.
        dtype: of the features. label_dtype: of labels and predictions, until wider ones are pushed.
    """

    features: Tensor
    targets: Tensor
    predictions: Tensor
    mask: Tensor
    n_pushed: int
    has_mask: bool

    def __init__(
        self,
        size: int,
        n_features: int,
        n_labels: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        label_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        validation.check_counts(size=size, n_features=n_features, n_labels=n_labels)
        labels = dict(dtype=label_dtype, device=device)
        self.n_pushed, self.has_mask = 0, False
        self.register_buffer("features", torch.zeros(size, n_features, dtype=dtype, device=device))
        self.register_buffer("targets", torch.zeros(size, n_labels, **labels))
        self.register_buffer("predictions", torch.zeros(size, n_labels, **labels))
        # uint8: averaging models subtracts buffers, which PyTorch does not do with bools.
        self.register_buffer("mask", torch.ones(size, dtype=torch.uint8, device=device))
        validation.check_features("features (dtype)", self.features)
        validation.check_real("labels (label_dtype)", self.targets)

    def __len__(self) -> int:
        """Rows held now, those that take no part included."""
        return min(self.n_pushed, len(self.features))

    def keys(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Features (in ``dtype`` if given), targets and predictions of the rows held, without
        gradient; and, once any push had a mask, the mask.

        They share the bank's memory: use them before the next ``push``.
        """
        K = len(self)
        keys = (self.features[:K].to(dtype), self.targets[:K], self.predictions[:K])
        return (*keys, self.mask[:K].bool()) if self.has_mask else keys

    def clear(self) -> None:
        """Forgets all rows."""
        self.n_pushed, self.has_mask = 0, False

    @torch.no_grad()
    def push(
        self, features: Tensor, targets: Tensor, predictions: Tensor, mask: Tensor | None = None
    ) -> None:
        """Appends rows [N, …] and drops the oldest; of more than ``size`` rows the last are kept.

        ``mask``, bool [N] or [N, 1], is True for the rows that take part, as in ``conr_loss``. The
        others are nobody's keys and may hold anything, but use up places, since nothing is read
        from the device: until rows are dropped, the loss is the same as without them.
        """
        validation.check_tensors(features, targets, predictions, None, None, mask)
        size, D = self.features.shape
        N, L = len(features), self.targets.shape[1]
        if features.shape[1] != D or validation.n_components(targets) != L:
            raise ValueError(
                f"the bank holds D = {D} features and L = {L} labels per row, got features "
                f"{tuple(features.shape)} and targets {tuple(targets.shape)}"
            )
        notices.look_for_copied_rows(self.features)
        self._make_writable(targets=targets.dtype, predictions=predictions.dtype)
        self.has_mask |= mask is not None
        takes_part = self.mask.new_ones(N) if mask is None else mask.reshape(N)
        kept = min(N, size)
        start = (self.n_pushed + N - kept) % size
        until_end = min(kept, size - start)
        for held, rows in (
            (self.features, features),
            (self.targets, targets.reshape(N, L)),
            (self.predictions, predictions.reshape(N, L)),
            (self.mask, takes_part),
        ):
            rows = rows[N - kept :]
            held[start : start + until_end] = rows[:until_end]
            held[: kept - until_end] = rows[until_end:]
        self.n_pushed += N

    def _make_writable(self, **dtypes: torch.dtype) -> None:
        """Replaces buffers that are too narrow for these dtypes, or were made in inference mode."""
        for name, held in self._buffers.items():
            dtype = _holding_both(held.dtype, dtypes.get(name, held.dtype))
            is_locked = not torch.compiler.is_compiling() and held.is_inference()
            if dtype != held.dtype or is_locked:
                with torch.inference_mode(False):
                    setattr(self, name, held.to(dtype, copy=True))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *of_the_call: Any
    ) -> None:
        """Loads rows with their number, or nothing where a filtered state lacks some of them."""
        found = {name: state_dict.get(prefix + name) for name in self._buffers}
        numbers, x = state_dict.get(prefix + "_extra_state"), found["features"]
        if found["mask"] is None and not (numbers is None or numbers.dim() or x is None):
            found["mask"] = x.new_ones(len(x), dtype=torch.uint8)  # version 0.1.0 had no masks
            state_dict = {**state_dict, prefix + "mask": found["mask"]}
        is_whole = prefix + "_extra_state" in state_dict and all(
            t is not None and t.shape == self._buffers[name].shape for name, t in found.items()
        )
        if is_whole:
            dtypes = {name: found[name].dtype for name in ("targets", "predictions")}
            self._make_writable(**dtypes)
        else:
            *_, missing_keys, _, error_messages = of_the_call
            error_messages += [
                f"size mismatch for {prefix}{name}: the state has {tuple(t.shape)}, the bank "
                f"{tuple(self._buffers[name].shape)}"
                for name, t in found.items()
                if t is not None and t.shape != self._buffers[name].shape
            ]
            expected = (prefix + name for name in (*found, "_extra_state"))
            missing_keys += [name for name in expected if name not in state_dict]
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(prefix)}
            of_the_call = (of_the_call[0], False, [], [], [])
        super()._load_from_state_dict(state_dict, prefix, *of_the_call)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.n_pushed, self.has_mask], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.n_pushed, *has_mask = state.reshape(-1).tolist()
        self.has_mask = any(has_mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryBank:
        before = {name: t for name, t in self._buffers.items() if name != "features"}
        super()._apply(fn, recurse)
        for name, held in before.items():
            moved = getattr(self, name)
            if moved.dtype != held.dtype:
                setattr(self, name, held.to(moved.device))
        return self

    def extra_repr(self) -> str:
        size, D = self.features.shape
        return f"{size}, {D}, {self.targets.shape[1]}, dtype={self.features.dtype}"
