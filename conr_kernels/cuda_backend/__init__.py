"""Room of the CUDA C++ backend: the kernels of ``csrc/``, where ``setup.py`` has built them.

Called by ops.py (the four functions of every backend) and by ``python -m conr_kernels``, which
describes the build. Imports core, reference and variants, never another backend; compiles nothing.
"""

from .backend import backward, describe, forward, layout_size, reduces, unavailable

__all__ = ["backward", "describe", "forward", "layout_size", "reduces", "unavailable"]
