"""Fresh tensors with known contents: what is never written shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def fresh_tensors_full_of(byte: int) -> Iterator[None]:
    """Every byte of what ``new_empty`` gives is this one until it is written."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        found = plain(self, *shape, **options)
        found.untyped_storage().fill_(byte)
        return found

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield
