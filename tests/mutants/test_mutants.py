"""The list of planted faults fits the code, and the runner's verdicts are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants.fault import Fault, problems, read_faults
from tests.mutants.runner import Copies, Results, run_all, table

ROOT = Path(__file__).resolve().parents[2]
CODE = "def half(x):\n    return x / 2  # exact\n\n\ndef name():\n    return 'half'\n"
TESTS = "from conr_kernels.code import half\n\n\ndef test_half():\n    assert half(4) == 2\n"
HALF = Fault("half", "conr_kernels/code.py", "x / 2", "x / 3", "halves", ("tests/test_half.py",))
NAME = Fault("name", "conr_kernels/code.py", "'half'", "'third'", "a name", HALF.tests)
SAME = Fault("same", "conr_kernels/code.py", "x / 2", "0.5 * x", "exact", is_equivalent=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of two functions, of which its tests know one."""
    root = tmp_path / "project"
    for name, text in (("conr_kernels/code.py", CODE), ("tests/test_half.py", TESTS)):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    return root


def verdicts(root: Path, faults: list[Fault], folder: Path, said: list[str]) -> dict[str, tuple]:
    results = Results(root, folder / "mutants.json")
    folder.mkdir(exist_ok=True)
    copies = Copies(root, folder / "copies", 2)
    found = run_all(faults, copies, results, 2, is_trusted=False, say=said.append)
    assert table(found, 0.0).count("\n|") == len(faults) + 2
    return {verdict.name: (verdict.kind, verdict.detail) for verdict in found}


def test_every_fault_of_the_list_fits_the_code_and_names_its_tests_and_why() -> None:
    faults = read_faults()
    assert not problems(faults, ROOT)
    assert len(faults) >= 50
    covered = {fault.file.split("/")[1] for fault in faults if fault.file.startswith("conr_")}
    assert covered >= {path.name for path in (ROOT / "conr_kernels").glob("*_b*") if path.is_dir()}
    assert {fault.file for fault in faults} >= {f"csrc/{p.name}" for p in ROOT.glob("csrc/*.cu")}


@pytest.mark.parametrize(
    ("change", "gist"),
    [
        (dict(text="return"), "half: its text occurs 2 times in conr_kernels/code.py, not once"),
        (dict(text="x / 9"), "half: its text occurs 0 times in conr_kernels/code.py, not once"),
        (dict(by="x / 2"), "half: changes nothing"),
        (dict(by="x / ("), "half: is no Python"),
        (dict(why=""), "half: does not say why it is a fault"),
        (dict(tests=()), "half: names no test"),
        (dict(tests=("tests/test_half.py::test_third",)), "half: there is no tests/test_half.py::"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_by_name(project, change: dict, gist: str) -> None:
    assert not problems([HALF, NAME, SAME], project)
    (found,) = problems([replace(HALF, **change)], project)
    assert found.startswith(gist)


def test_a_fault_is_killed_or_survives_and_what_is_known_is_not_run_again(project, tmp_path):
    said: list[str] = []
    expected = {
        "half": ("killed", "tests/test_half.py::test_half"),
        "name": ("SURVIVED", "its tests pass"),
        "same": ("equivalent", "exact"),
    }
    assert verdicts(project, [HALF, NAME, SAME], tmp_path / "out", said) == expected
    assert (project / HALF.file).read_text() == CODE

    known = tmp_path / "again"
    known.mkdir()
    (tmp_path / "out" / "mutants.json").rename(known / "mutants.json")
    said.clear()
    assert verdicts(project, [HALF], known, said) == {"half": expected["half"]}
    assert not said


def test_a_test_that_fails_without_a_fault_kills_nothing(project, tmp_path):
    (project / HALF.tests[0]).write_text(TESTS.replace("== 2", "== 3"))
    found = verdicts(project, [HALF], tmp_path / "out", [])
    gist = "without a fault tests/test_half.py: tests/test_half.py::test_half"
    assert found == {"half": ("SURVIVED", gist)}
