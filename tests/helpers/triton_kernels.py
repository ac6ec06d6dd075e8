"""The modules of the Triton kernels, and what they launch."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable
from types import ModuleType

from triton.runtime.jit import JITFunction

from conr_kernels.triton_backend import kernels

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
]


def kernels_of(modules: Iterable[ModuleType] = MODULES) -> dict[str, JITFunction]:
    """Those that are launched, by name."""
    return {
        name: kernel
        for module in modules
        for name, kernel in vars(module).items()
        if re.fullmatch("conr_.*_kernel", name)
    }
