"""A kernel with a fault on purpose, which compute-sanitizer must find (benchmarks.gpu)."""

import triton
import triton.language as tl


@triton.jit
def store_kernel(x_ptr, offset, BLOCK: tl.constexpr):
    """Stores BLOCK numbers ``offset`` elements behind the start of x."""
    tl.store(x_ptr + offset + tl.arange(0, BLOCK), 1.0)
