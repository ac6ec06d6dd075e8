"""The source distribution and the wheel hold what an installation needs, and no part of a part."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = {"DESIGN.md", "MATHEMATICS.md", "large_batch/README.md"}


TOP = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.py")


def copied_sources(folder: Path) -> Path:
    sources = folder / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "_conr_cuda.*")
    for name in ("conr_kernels", "csrc", "tests/interface"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignore)
    for name in (*TOP, "MANIFEST.in", "tests/test_rooms.py"):
        shutil.copy(ROOT / name, sources / name)
    return sources


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, set[str]]:
    """The names in both; of the source distribution below the one folder that it makes."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("built")
    sources = copied_sources(folder)
    stale = sources / "build" / "lib" / "conr_kernels"
    stale.mkdir(parents=True)
    (stale / "gone.py").touch()
    command = [sys.executable, "setup.py", "-q"]
    command += ["sdist", "-d", str(folder), "bdist_wheel", "-d", str(folder)]
    environment = os.environ | {"CONR_NO_EXT": "1"}
    subprocess.run(command, cwd=sources, env=environment, check=True, capture_output=True)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(source) as archive:
        of_source = {name.partition("/")[2] for name in archive.getnames()}
    return {"source": of_source, "wheel": set(zipfile.ZipFile(wheel).namelist())}


def test_the_source_distribution_builds_and_documents_the_package(built):
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()]
    assert built["source"] >= {*files, *TOP}
    assert not any(name.startswith(("tests", "benchmarks")) for name in built["source"])


def test_the_package_is_whole_in_both(built):
    package = ROOT / "conr_kernels"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    expected = {f"conr_kernels/{name}" for name in modules | TEXTS | {"py.typed"}}
    for kind, names in built.items():
        assert expected <= names, kind
    assert "conr_kernels/gone.py" not in built["wheel"]  # of an earlier build
    assert any(name.endswith("licenses/LICENSE") for name in built["wheel"])


def run_setup(sources: Path, *command: str, **environment: str) -> None:
    pytest.importorskip("setuptools", minversion="77")
    subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=sources, env=os.environ | environment,
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_build_removes_nothing_but_an_earlier_build(tmp_path):
    sources = copied_sources(tmp_path)
    linked, named_alike = tmp_path / "linked", tmp_path / "conr_kernels"
    linked.mkdir()
    for path in sources.iterdir():
        if path.name == "setup.py":
            shutil.copy(path, linked)
        else:
            (linked / path.name).symlink_to(path)
    run_setup(linked, "build", "--build-lib", ".", CONR_NO_EXT="1")  # the sources, by a link
    assert (sources / "conr_kernels" / "api.py").exists()

    kept = tmp_path / "elsewhere" / "mine.py"
    kept.parent.mkdir()
    kept.touch()
    lib = tmp_path / "lib"
    lib.mkdir()
    (lib / "conr_kernels").symlink_to(kept.parent)
    run_setup(sources, "build", "--build-lib", str(lib), CONR_NO_EXT="1")
    assert kept.exists()

    sources.rename(named_alike)
    run_setup(named_alike, "build", "--build-lib", str(tmp_path), CONR_NO_EXT="1")
    assert (named_alike / "setup.py").exists()


NVCC = """#!/bin/sh
[ "$1" = --list-gpu-code ] && { echo sm_80 sm_90; exit; }
while [ $# -gt 1 ]; do shift; done
echo library > "$1"
"""


@pytest.mark.skipif(os.name == "nt", reason="nvcc is replaced by a script of a POSIX shell")
def test_an_extension_that_is_built_first_stays(tmp_path):
    sources, nvcc = copied_sources(tmp_path), tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    environment = dict(CUDA_HOME=str(tmp_path / "cuda"), FORCE_CUDA="1", CONR_NO_EXT="0")
    run_setup(sources, "build_ext", "build", **environment)
    assert {path.name for path in sources.glob("build/lib*/**/_conr_cuda.*")} == {
        "_conr_cuda.so",
        "_conr_cuda.json",
    }
