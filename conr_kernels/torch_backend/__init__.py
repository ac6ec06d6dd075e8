"""Room of the torch backend: ConR as tiles of PyTorch operations, any device and dtype.

Called by ops.py (its docstring names the functions) and by large_batch, where ranks share the pairs
of a union (shared.py). Imports core, reference and variants, never another backend.
"""

from .backend import backward, forward, layout_size, reduced, reduced_gradient, reduces, unavailable

__all__ = [
    "backward",
    "forward",
    "layout_size",
    "reduced",
    "reduced_gradient",
    "reduces",
    "unavailable",
]
