"""``csrc/`` compiled for the host: its kernels run on the fibers of simt/, for CPU tensors.

Every tensor that an operator gets is moved between inaccessible pages: an access outside it faults.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SIMT = Path(__file__).resolve().parent / "simt"
SHIM = "libconr_shim.so"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def compile_for_host(folder: Path, name: str, sources: list[Path], *options: str) -> Path:
    library = folder / f"lib{name}.so"
    command = ["g++", *FLAGS, *WARNINGS, "-I", str(SIMT), "-I", str(ROOT / "csrc"), "-x", "c++"]
    command += [*map(str, sources), *options, "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def missing_tool() -> str | None:
    return None if shutil.which("g++") else "no g++: the CUDA source is not run"


def compile_shim(folder: Path) -> Path:
    """All of ``csrc/`` with the shim, against this PyTorch; its operators are for CPU tensors."""
    package = Path(torch.__file__).parent
    libraries = package / "lib"
    return compile_for_host(
        folder,
        "conr_shim",
        [
            ROOT / "csrc/conr_cuda.cu",
            ROOT / "csrc/conr_ops.cpp",
            SIMT / "simt.cpp",
            SIMT / "sweeps.cpp",
        ],
        "-DCONR_DISPATCH_KEY=CPU",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem",
        str(package / "include"),
        f"-L{libraries}",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{libraries}",
    )


def load(folder: Path) -> Shim:
    """The shim of this process, which can register the operators once; compiled into the folder
    where none is loaded yet.
    """
    loaded = [path for path in map(Path, torch.ops.loaded_libraries) if path.name == SHIM]
    return Shim(loaded[0] if loaded else compile_shim(folder))


class Shim:
    """The host build, its controls, and its operators with guarded buffers."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.library.simt_allocate.restype = ctypes.c_void_p
        self.library.simt_allocate.argtypes = [ctypes.c_size_t]
        self.library.simt_release.argtypes = [ctypes.c_void_p]
        self.library.simt_shorten.argtypes = [ctypes.c_char_p]
        #: Argument of an operator, or part of its memory, that ends 8 bytes early: a planted fault.
        self.shortened = ""

    def configure(self, order: int = 0, skipped_line: int = -1) -> None:
        self.library.simt_configure(order, skipped_line)

    def n_launches(self) -> int:
        """Kernels launched since the process began."""
        return self.library.simt_launches()

    def barrier_lines(self) -> list[int]:
        lines = (ctypes.c_int * 64)()
        return lines[: self.library.simt_barrier_lines(lines, 64)]

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.conr_kernels_cuda, name).default

        def call(*args: Any) -> None:
            guarded = []
            self.library.simt_shorten(self.shortened.encode())
            for value, argument in zip(args, operator._schema.arguments, strict=True):
                if isinstance(value, Tensor) and value.numel() > 0:
                    guarded.append((argument, value, *self._guard(value, argument.name)))
                else:
                    guarded.append((argument, value, value, None))
            try:
                operator(*(copy for _, _, copy, _ in guarded))
                for argument, value, copy, address in guarded:
                    if address and argument.alias_info and argument.alias_info.is_write:
                        value.copy_(copy)
            finally:
                addresses = [address for *_, address in guarded if address]
                intact = [self.library.simt_release(address) for address in addresses]
            is_intact = all(intact) and self.library.simt_broken_parts() == 0
            assert is_intact, f"{name} wrote below one of its buffers"

        return call

    def _guard(self, value: Tensor, name: str) -> tuple[Tensor, int]:
        n_bytes = value.numel() * value.element_size()
        n_there = n_bytes - 8 * (name == self.shortened)
        address = self.library.simt_allocate(n_there)
        source = value.contiguous()
        ctypes.memmove(address, source.data_ptr(), n_there)
        memory = (ctypes.c_char * n_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=value.dtype).view(value.shape), address
