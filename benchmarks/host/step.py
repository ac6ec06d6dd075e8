"""The host's side of a step: real code on tensors without storage, before a driver that records.

Run as a file, with the checkout to measure first on PYTHONPATH (older layouts serve as well): reads
``N D`` from each line of its input, answers a line of JSON. Everything up to Triton's
compiled kernel is real; that does nothing, PyTorch's operators and allocations are those of "meta"
tensors, and the hand-off to autograd's device thread is not there.
"""

from __future__ import annotations

import cProfile
import json
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from conr_kernels import conr_loss, ops

#: Microseconds: steps of one turn.
STEPS = 100
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty"}
VIEWS = {
    "view", "reshape", "slice", "select", "unsqueeze", "squeeze", "expand", "as_strided", "unbind",
    "split", "detach", "alias", "transpose", "t", "permute", "narrow", "to", "contiguous", "lift",
}  # fmt: skip


def _is_untransformed(x: torch.Tensor) -> bool:
    """The package's own, for which tensors without storage are no plain ones."""
    return (
        type(x) in ops.PLAIN
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def install() -> list[str]:
    """From here on Triton's kernels take meta tensors as an H200's, are compiled by nobody, and add
    their names to this list instead of running.
    """
    launched: list[str] = []

    def compiled(function: JITFunction, key: str, *_: Any) -> CompiledKernel:
        kernel, name = CompiledKernel.__new__(CompiledKernel), function.fn.__name__
        kernel.src, kernel.name, kernel.module, kernel.function = None, name, 1, 1
        kernel.packed_metadata = (4, 1, 0)
        kernel._run = lambda *_: launched.append(name)
        function.device_caches[0][0][key] = kernel
        return kernel

    target = GPUTarget("cuda", 90, 32)
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    driver.set_active(device)
    JITFunction._do_compile = compiled
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    # It knows no autocast for tensors without storage.
    torch.is_autocast_enabled = lambda device_type: False
    # Shapes found in C++, as on a device, where PyTorch has them: not by a compiler's Python.
    torch._meta_registrations._meta_lib_dont_use_me_use_register_meta._destroy()
    triton_backend, gpu = ops.backend_module("triton"), torch.device("cuda", 0)
    plain = triton_backend.unavailable
    triton_backend.unavailable = lambda device, dtype: plain(gpu, dtype)
    if hasattr(triton_backend, "launch"):
        triton_backend.launch._is_on_gpu = lambda x: True
    if hasattr(ops, "is_untransformed"):
        ops.is_untransformed = _is_untransformed
    return launched


def make_step(N: int, D: int) -> Callable[[], None]:
    """Forward and backward of the mean, bfloat16, weighted; the gradient is dropped after it."""
    x = torch.empty(N, D, dtype=torch.bfloat16, device="meta").requires_grad_()
    y, p, w = (torch.empty(N, device="meta") for _ in range(3))

    def step() -> None:
        conr_loss(x, y, p, w).backward()
        x.grad = None

    return step


def count_calls(step: Callable[[], None]) -> int:
    """Calls of Python and C functions, in whatever thread."""
    profile = cProfile.Profile()
    threading.setprofile(lambda *_: profile.enable())
    try:
        profile.runcall(step)
    finally:
        threading.setprofile(None)
    # The profiler's own and the step's.
    return sum(entry.callcount for entry in profile.getstats()) - 2


def operators(step: Callable[[], None]) -> tuple[list[str], list[str]]:
    """PyTorch's outermost operators that run a kernel on a device, and those that allocate."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    outer, allocations = [], []
    for event in profile.events():
        if not event.name.startswith("aten::"):
            continue
        name = event.name.removeprefix("aten::")
        parent = event.cpu_parent
        if name in ("empty", "empty_strided"):
            allocations.append(name)
        elif parent is not None and parent.name.startswith("aten::"):
            continue
        elif name not in ALLOCATIONS and (name not in VIEWS or _computes(event)):
            outer.append(name)
    return outer, allocations


def _computes(event: Any) -> bool:
    """A conversion or copy that is one: it has operators below that are no views."""
    below = (child.name.removeprefix("aten::") for child in event.cpu_children)
    return any(name not in VIEWS | ALLOCATIONS for name in below)


def measure(launched: list[str], N: int, D: int) -> dict[str, Any]:
    step = make_step(N, D)
    for _ in range(5):
        step()
    launched.clear()
    step()
    kernels, calls = list(launched), count_calls(step)
    computing, allocations = operators(step)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return {
        "launches": len(kernels), "allocations": len(allocations), "torch_ops": len(computing),
        "calls": calls, "microseconds": (time.perf_counter() - start) / STEPS * 1e6,
        "names": kernels + computing,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    launched = install()
    for line in sys.stdin:
        print(json.dumps(measure(launched, *map(int, line.split()))), flush=True)


if __name__ == "__main__":
    main()
