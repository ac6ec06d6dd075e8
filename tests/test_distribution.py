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


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, set[str]]:
    """The names in both; of the source distribution below the one folder that it makes."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("built")
    sources = folder / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "_conr_cuda.*")
    for name in ("conr_kernels", "csrc", "tests/interface"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignore)
    for name in (*TOP, "MANIFEST.in", "tests/test_rooms.py"):
        shutil.copy(ROOT / name, sources / name)
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
