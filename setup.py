"""Builds the package, with its CUDA extension where nvcc and a CUDA build of PyTorch are there.

Environment: ``CONR_NO_EXT=1`` never builds the extension, ``FORCE_CUDA=1`` builds it against any
PyTorch, ``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0+PTX") names the GPUs. Static metadata is in
pyproject.toml.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "_conr_cuda.dll" if os.name == "nt" else "_conr_cuda.so"
RECORD = "_conr_cuda.json"
ROOM = "conr_kernels.cuda_backend"
SOURCES = ["csrc/conr_cuda.cu", "csrc/conr_ops.cpp"]
ABI = "2.10"
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"


def nvcc_path() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (path := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return path
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def reason_against_extension() -> str | None:
    """Why the package is to be pure Python; None where the extension can be built."""
    if os.environ.get("CONR_NO_EXT") == "1":
        return "CONR_NO_EXT=1"
    if nvcc_path() is None:
        return "no nvcc on PATH or in CUDA_HOME"
    try:
        import torch
    except ImportError:
        return "PyTorch is not importable during the build: pip needs --no-build-isolation"
    if torch.version.cuda is None and os.environ.get("FORCE_CUDA") != "1":
        return (
            f"PyTorch {torch.__version__} is built without CUDA; FORCE_CUDA=1 builds nevertheless"
        )
    return None


def architectures(nvcc: str) -> list[str]:
    """``TORCH_CUDA_ARCH_LIST``, or those of the default that this nvcc knows: "75", "90+PTX"."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"sm_(\w+)", listing.stdout))
    chosen = []
    for name in re.split(r"[;, ]+", (asked or DEFAULT_ARCHITECTURES).strip()):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise ValueError(f'TORCH_CUDA_ARCH_LIST must look like "8.0;9.0+PTX", got {asked!r}')
        number = name.replace(".", "")
        if re.match(r"\d+", number).group() in known:
            chosen.append(number)
        elif asked:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {name}")
    return chosen


def nvcc_command(nvcc: str, archs: list[str], output: str) -> list[str]:
    import torch

    package = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O3", "--shared", "--threads", "0", "-Xptxas", "-warn-spills"]
    flags += ["-Xcompiler", "/MD" if os.name == "nt" else "-fPIC,-Wall,-fvisibility=hidden"]
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    major, minor = map(int, ABI.split("."))
    flags += [f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}ULL"]
    flags += ["-isystem", str(package / "include"), "-I", str(ROOT / "csrc")]
    libraries = ["-L", str(package / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
    return [nvcc, *flags, *(str(ROOT / source) for source in SOURCES), *libraries, "-o", output]


def write_record(folder: Path, **record: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record) + "\n")


REASON = reason_against_extension()


class BuildPython(build_py):
    """Starts afresh, and records, beside the modules, that there is no extension and why."""

    def run(self) -> None:
        built, source = Path(self.build_lib, "conr_kernels"), (ROOT / "conr_kernels").resolve()
        holds_source = source.is_relative_to(built.resolve())
        holds_extension = self.distribution.have_run.get("build_ext", False)
        if not (self.editable_mode or holds_source or holds_extension):
            # Modules that are no more would be installed. A link is left alone, and what it names.
            shutil.rmtree(built, ignore_errors=True)
        super().run()
        if REASON is not None:
            print(f"conr-kernels: pure Python, no CUDA extension ({REASON})", file=sys.stderr)
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            write_record(folder / ROOM.replace(".", "/"), built=False, why=REASON)


class BuildExtension(build_ext):
    """Compiles with nvcc alone: a library for every Python version and every PyTorch ≥ ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        nvcc, output = nvcc_path(), Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        archs = architectures(nvcc)
        print(f"conr-kernels: CUDA extension for {', '.join(archs)} by {nvcc}", file=sys.stderr)
        subprocess.run(nvcc_command(nvcc, archs, str(output)), check=True)
        names = [f"sm_{arch}" for arch in archs]
        write_record(output.parent, built=True, why="", abi=ABI, architectures=names)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        room = ROOM.replace(".", "/")
        shutil.copy(Path(self.build_lib) / room / RECORD, ROOT / room)


if __name__ == "__main__":
    setup(
        packages=find_packages(include=["conr_kernels", "conr_kernels.*"]),
        ext_modules=[] if REASON else [Extension(f"{ROOM}._conr_cuda", SOURCES)],
        cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
        options={} if REASON else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )
