"""Room of the torch backend: ConR as tiles of PyTorch operations, any device and dtype.

Called by ops.py (the four functions of every backend, and the gradient found in the forward pass of
a small batch) and, where ranks share the pairs of a union, by large_batch. Imports core,
reference and variants, never another backend.
"""

from .backend import backward, finds_gradient, forward, layout_size, loss_with_gradient, unavailable

__all__ = [
    "backward",
    "finds_gradient",
    "forward",
    "layout_size",
    "loss_with_gradient",
    "unavailable",
]
