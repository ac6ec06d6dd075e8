"""Room of the CUDA C++ backend: the kernels of ``csrc/``, where ``setup.py`` has built them.

Called by ops.py (its docstring names the functions) and by ``python -m conr_kernels``, which
describes the build. Imports core and variants, never another backend; compiles nothing.
"""

from .backend import (
    backward,
    describe,
    forward,
    layout_size,
    reduced,
    reduced_gradient,
    reduces,
    unavailable,
)

__all__ = [
    "backward", "describe", "forward", "layout_size", "reduced", "reduced_gradient", "reduces",
    "unavailable",
]  # fmt: skip
