"""``setup.py`` with and without nvcc, and what nvcc makes of ``csrc/``."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conr_kernels.cuda_backend import backend as cuda_backend
from tests.helpers import cuda_shim

pytest.importorskip("setuptools", reason="no setuptools: setup.py is not run")

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ("75", "80", "90")

#: Interpreters with other versions of PyTorch, and folders ``torch/include`` of other versions, of
#: which CI has none: ``make abi PYTHONS="…" HEADERS="…"``.
OTHER_PYTHONS = os.environ.get("CONR_OTHER_PYTHONS", "").split()
OTHER_HEADERS = os.environ.get("CONR_OTHER_HEADERS", "").split()
#: PyTorch's macros that torch 2.10.0's headers define as every later version's do.
MACROS_OF_2_10 = {
    "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK",
    "TORCH_ABI_VERSION", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK",
}  # fmt: skip

TARGET_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: the extension is not built")
needs_other_pythons = pytest.mark.skipif(
    not OTHER_PYTHONS, reason="CONR_OTHER_PYTHONS names no interpreter with another PyTorch"
)


def run_setup(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py`` on a copy of the sources; what is built lies in ``folder/lib``."""
    sources = folder / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "_conr_cuda.*")
    for name in ("conr_kernels", "csrc"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignore)
    shutil.copy(ROOT / "setup.py", sources)
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("CONR_", "FORCE_", "TORCH_"))
    }
    return subprocess.run(
        [sys.executable, "setup.py", command, "--build-lib", str(folder / "lib")],
        cwd=sources,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@dataclass
class Build:
    log: str
    library: Path
    record: dict
    cpu_seconds: float


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """The extension as a user on another machine would build it, and what ptxas said."""
    folder = tmp_path_factory.mktemp("extension")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_setup(
        folder,
        "build_ext",
        FORCE_CUDA="1",
        TORCH_CUDA_ARCH_LIST=";".join(f"{a[0]}.{a[1]}" for a in ARCHITECTURES),
        NVCC_APPEND_FLAGS="-Xptxas -v",
    )
    assert done.returncode == 0, done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    package = folder / "lib" / "conr_kernels" / "cuda_backend"
    record = json.loads((package / "_conr_cuda.json").read_text())
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Build(done.stdout, package / cuda_backend.LIBRARY, record, seconds)


@needs_nvcc
def test_nvcc_compiles_without_a_warning(build):
    lines = [line for line in build.log.splitlines() if re.search("warning|error", line, re.I)]
    assert not lines, "\n".join(lines)
    assert build.record["architectures"] == [f"sm_{a}" for a in ARCHITECTURES]


@needs_nvcc
def test_no_kernel_spills(build):
    """As many reports as kernels, at least the 11 sweeps for each architecture, all of them
    clean.
    """
    spills = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes"
    reports = re.findall(spills, build.log)
    sweeps = re.findall(r"Compiling entry function '.*conr_(?:for|back)ward_kernel", build.log)
    assert len(sweeps) == 11 * len(ARCHITECTURES)
    assert len(reports) >= len(sweeps)
    assert set(reports) == {("0", "0", "0")}


@needs_nvcc
def test_the_build_takes_less_than_90_seconds_of_one_core(build):
    assert build.cpu_seconds < 90


def abi_check(python: str, task: str, library: Path) -> str:
    """What ``tests.helpers.abi_check`` prints in a process of its own under that interpreter."""
    done = subprocess.run(
        [python, "-m", "tests.helpers.abi_check", task, str(library)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{python}: {done.stdout}"
    return done.stdout


@needs_nvcc
def test_the_library_loads_and_registers_its_operators(build):
    assert abi_check(sys.executable, "registers", build.library).count("conr_kernels_cuda::") == 2


@needs_other_pythons
@needs_nvcc
def test_the_same_library_loads_under_other_versions_of_pytorch(build):
    for python in OTHER_PYTHONS:
        printed = abi_check(python, "registers", build.library)
        assert printed.count("conr_kernels_cuda::") == 2
        print(f"built with torch {torch.__version__}, loads under {printed.splitlines()[0]}")


@needs_other_pythons
def test_the_same_host_build_runs_under_other_versions_of_pytorch(tmp_path):
    if (reason := cuda_shim.missing_tool()) is not None:
        pytest.skip(reason)
    library = cuda_shim.compile_shim(tmp_path)
    for python in (sys.executable, *OTHER_PYTHONS):
        print(abi_check(python, "runs", library))


def undefined_symbols(path: Path, *options: str) -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("no nm: symbols are not listed")
    command = ["nm", "--undefined-only", *options, str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}


def beyond_2_10(symbols: set[str]) -> set[str]:
    """Those that are asked of PyTorch's stable ABI and that torch 2.10.0 does not export."""
    lines = (ROOT / "tests" / "helpers" / "torch_2_10_symbols.txt").read_text().splitlines()
    asked = {s for s in symbols if s.startswith(("aoti_torch_", "torch_"))}
    assert asked
    return asked - {line for line in lines if not line.startswith("#")}


@needs_nvcc
def test_only_the_stable_abi_of_torch_2_10_is_linked(build):
    """Every symbol asked of PyTorch is a C function that torch 2.10.0 exports; Python is not linked
    at all.
    """
    symbols = undefined_symbols(build.library, "-D")
    assert not beyond_2_10(symbols)
    assert not {s for s in symbols if re.search(r"^_Z.*(c10|at|torch|caffe2)\d", s)}
    assert not {s for s in symbols if s.startswith(("Py", "_Py"))}


def compile_operators(headers: Path | str, output: Path, *options: str) -> None:
    """``conr_ops.cpp`` for the host, with the headers of some PyTorch."""
    command = ["g++", "-std=c++17", "-O0", "-c", "-DCONR_DISPATCH_KEY=CPU", *filter(None, options)]
    command += [f"-I{folder}" for folder in (ROOT / "csrc", cuda_shim.SIMT)]
    command += ["-isystem", str(headers), str(ROOT / "csrc/conr_ops.cpp"), "-o", str(output)]
    subprocess.run(command, check=True)


@pytest.mark.skipif(
    not OTHER_HEADERS, reason="CONR_OTHER_HEADERS names no folder of another PyTorch's headers"
)
def test_the_operators_compile_with_the_headers_of_other_versions_of_pytorch(tmp_path):
    for headers in OTHER_HEADERS:
        output = tmp_path / "conr_ops.o"
        compile_operators(headers, output, TARGET_2_10, "-Wall", "-Wextra", "-Werror")
        assert not beyond_2_10(undefined_symbols(output))


def test_only_macros_of_torch_2_10_are_used():
    """Newer headers define more: STABLE_TORCH_ERROR_CODE_CHECK, which torch 2.11 does not know."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc").iterdir())
    used = set(re.findall(r"\b(?:STABLE|STD|TORCH|AOTI|C10)_[A-Z0-9_]+\b", sources))
    assert used == MACROS_OF_2_10


@pytest.mark.parametrize("targets_2_10", [True, False], ids=["2.10", "no target"])
def test_the_target_version_keeps_out_what_torch_2_10_lacks(tmp_path, targets_2_10):
    """Without the target the same source asks for functions of the PyTorch it is compiled with."""
    if (reason := cuda_shim.missing_tool()) is not None:
        pytest.skip(reason)
    if not targets_2_10 and torch.__version__.startswith("2.10."):
        pytest.skip("this PyTorch is 2.10: there is nothing newer to ask for")
    output = tmp_path / "conr_ops.o"
    target = TARGET_2_10 if targets_2_10 else ""
    compile_operators(Path(torch.__file__).parent / "include", output, target)
    assert bool(beyond_2_10(undefined_symbols(output))) is not targets_2_10


@needs_nvcc
def test_16_bit_sweeps_use_tensor_cores_and_all_wide_copies_without_atomics_or_local_memory(build):
    tool = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if tool is None and spec is not None:
        folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        tool = shutil.which("cuobjdump", path=str(folder))
    if tool is None:
        pytest.skip("no cuobjdump, neither of the CUDA toolkit nor of triton")
    listing = subprocess.run(
        [tool, "-sass", "-arch", "sm_90", str(build.library)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PATH": os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])},
    )
    functions = [part.split(None, 1) for part in listing.stdout.split("Function : ")[1:]]
    sweeps = {name: code for name, code in functions if "ward_kernel" in name}
    assert len(sweeps) == 11
    for name, code in sweeps.items():
        assert ("HMMA" in code) == ("Half" in name or "BFloat16" in name), name
        assert re.search(r"LDGSTS\S*\.128", code), name
        assert not any(f" {word}" in code for word in ("ATOM", "RED.", "LDL", "STL")), name


def is_pure(folder: Path) -> tuple[bool, str]:
    package = folder / "lib" / "conr_kernels" / "cuda_backend"
    record = json.loads((package / "_conr_cuda.json").read_text())
    assert record["built"] is False
    return not (package / cuda_backend.LIBRARY).exists(), record["why"]


@pytest.mark.parametrize(
    ("environment", "why"),
    [({}, "built without CUDA"), ({"CONR_NO_EXT": "1", "FORCE_CUDA": "1"}, "CONR_NO_EXT=1")],
    ids=["nvcc and a CPU build of PyTorch", "CONR_NO_EXT"],
)
def test_the_package_is_pure_python_and_says_why(tmp_path, environment, why):
    if not environment and (NVCC is None or torch.version.cuda is not None):
        pytest.skip("needs nvcc and a PyTorch without CUDA")
    done = run_setup(tmp_path, "build", **environment)
    assert done.returncode == 0, done.stdout
    pure, noted = is_pure(tmp_path)
    assert pure and why in noted
    lines = [line for line in done.stdout.splitlines() if "no CUDA extension" in line]
    assert len(lines) == 1 and why in lines[0]


@pytest.fixture
def setup_module(monkeypatch):
    for name in ("CONR_NO_EXT", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("conr_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_nvcc_or_torch_the_reason_names_what_is_missing(setup_module, monkeypatch):
    monkeypatch.setattr(setup_module, "nvcc_path", lambda: None)
    assert "no nvcc" in setup_module.reason_against_extension()
    monkeypatch.setattr(setup_module, "nvcc_path", lambda: "nvcc")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--no-build-isolation" in setup_module.reason_against_extension()


@needs_nvcc
def test_the_list_of_architectures_is_honoured_or_refused(setup_module, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;9.0+PTX")
    assert setup_module.architectures(NVCC) == ["80", "90a", "90+PTX"]
    for wrong in ("Ampere", "8", "3.5"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
            setup_module.architectures(NVCC)


def test_describe_and_unavailable_say_why_and_what_to_do(monkeypatch):
    record = {"built": True, "abi": "2.10", "architectures": ["sm_80", "sm_90"]}
    monkeypatch.setattr(cuda_backend, "build_record", lambda: record)
    monkeypatch.setattr(cuda_backend, "_load", lambda: None)
    described = cuda_backend.describe()
    assert all(word in described for word in ("sm_80, sm_90", "2.10", "loaded"))
    monkeypatch.setattr(cuda_backend, "build_record", lambda: {"built": False, "why": "no nvcc"})
    assert "not built (no nvcc)" in cuda_backend.describe()
    on_cpu = cuda_backend.unavailable(torch.device("cpu"), torch.float32)
    assert "CUDA tensors" in on_cpu and 'backend="auto"' in on_cpu
    monkeypatch.setattr(cuda_backend, "_load", lambda: "installed without its CUDA extension")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    on_gpu = cuda_backend.unavailable(torch.device("cuda"), torch.float32)
    assert "no nvcc" in on_gpu and "--no-build-isolation" in on_gpu
