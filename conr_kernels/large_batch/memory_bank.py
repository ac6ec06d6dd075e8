"""A bank of earlier rows as keys: positives and negatives of a batch beyond the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import validation


class MemoryBank(nn.Module):
    """The last ``size`` rows that were pushed, to serve as ``keys`` of ``conr_loss``.

    The rows are buffers: they move with the module and are part of its state dict. Labels and
    predictions keep their own dtype when the module changes dtype, since a window decides on them.
    ::

        loss = conr(features, targets, predictions, keys=bank.keys(features.dtype))
        bank.push(features, targets, predictions)

    Keep the bank outside ``DistributedDataParallel``, which would copy rank 0's rows to every rank.

    Args:
        size: K, the most rows kept. n_features: D. n_labels: L, components of a label.
        dtype, label_dtype: of the features, and of the labels and predictions.
    """

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
        self.n_pushed = 0
        self.register_buffer("features", torch.zeros(size, n_features, dtype=dtype, device=device))
        self.register_buffer("targets", torch.zeros(size, n_labels, **labels))
        self.register_buffer("predictions", torch.zeros(size, n_labels, **labels))

    def __len__(self) -> int:
        """Rows held now."""
        return min(self.n_pushed, len(self.features))

    def keys(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Features, in ``dtype`` if given, targets and predictions of the rows held, without
        gradient.

        They share the bank's memory: use them before the next ``push``.
        """
        K = len(self)
        return self.features[:K].to(dtype), self.targets[:K], self.predictions[:K]

    @torch.no_grad()
    def push(self, features: Tensor, targets: Tensor, predictions: Tensor) -> None:
        """Appends rows [N, …] and drops the oldest; of more than ``size`` rows the last are
        kept.
        """
        validation.check_tensors(features, targets, predictions, None, None)
        size, D = self.features.shape
        N, L = len(features), self.targets.shape[1]
        if features.shape[1] != D or validation.n_components(targets) != L:
            raise ValueError(
                f"the bank holds D = {D} features and L = {L} labels a row, got features "
                f"{tuple(features.shape)} and targets {tuple(targets.shape)}"
            )
        kept = min(N, size)
        start = (self.n_pushed + N - kept) % size
        until_end = min(kept, size - start)
        for held, rows in (
            (self.features, features),
            (self.targets, targets.reshape(N, L)),
            (self.predictions, predictions.reshape(N, L)),
        ):
            rows = rows[N - kept :]
            held[start : start + until_end] = rows[:until_end]
            held[: kept - until_end] = rows[until_end:]
        self.n_pushed += N

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.n_pushed)

    def set_extra_state(self, state: Tensor) -> None:
        self.n_pushed = int(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryBank:
        labels = {"targets": self.targets, "predictions": self.predictions}
        super()._apply(fn, recurse)
        for name, held in labels.items():
            moved = getattr(self, name)
            if moved.dtype != held.dtype:
                setattr(self, name, held.to(moved.device))
        return self

    def extra_repr(self) -> str:
        size, D = self.features.shape
        return f"{size}, {D}, {self.targets.shape[1]}, dtype={self.features.dtype}"
