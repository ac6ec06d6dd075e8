"""The rooms of the package and of the benchmarks: who may import whom, and how large they grow.

Every import counts, those inside functions and under ``TYPE_CHECKING`` too. That of a submodule is
no import of the folder around it, whose front door imports the submodule itself.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: From the top: a module imports from its own floor or from a lower one.
FLOORS = (
    ("", "__main__", "api", "compat", "statistics", "density", "window"),
    ("large_batch",),
    ("notices",),
    ("batch",),
    ("backends",),
    ("tracing", "ops"),
    ("torch_backend", "triton_backend", "cuda_backend"),
    ("core",),
    ("reference",),
    ("variants", "validation", "_version"),
)
BACKENDS = FLOORS[6]
#: What runs on the device.
KERNELS = "conr_kernels.triton_backend.kernels"
#: What the rooms of the benchmarks may import beside themselves; others: the main suite.
ALLOWED = {
    "benchmarks": set(),
    "benchmarks.examples": set(),
    "benchmarks.gpu": {"benchmarks", "benchmarks.static"},
}
MOST_FILES_A_FOLDER = 16
MOST_LINES_A_FILE = {"conr_kernels": 400, "benchmarks": 320}
MOST_LINES = {"conr_kernels": 11_000, "benchmarks": 6_000}

Modules = dict[str, tuple[Path, str]]


def modules() -> Modules:
    """Path below the root and source of every module of both packages, by its name."""
    found = {}
    for package in MOST_LINES:
        for file in sorted((ROOT / package).rglob("*.py")):
            path = file.relative_to(ROOT)
            parts = path.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = (path, file.read_text(encoding="utf-8"))
    return found


def imports(name: str, known: Modules) -> set[str]:
    """The modules of both packages that a module imports, wherever it does."""
    path, source = known[name]
    folder = name.split(".")[: None if path.name == "__init__.py" else -1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            whole = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            found |= {each if each in known else base for each in whole.values()}
    return found & set(known)


def room_of(name: str, known: Modules) -> str:
    """The folder's room: a room in a room belongs to the outer one."""
    parts = name.split(".")
    is_folder = len(parts) > 1 and known[name][0].parent != Path(parts[0])
    return ".".join(parts[: 1 + is_folder])


def circles(arrows: dict[str, set[str]]) -> Iterator[str]:
    """What is left when modules that import nothing of the rest, or that nothing of it imports, are
    taken away, again and again.
    """
    left = {name: targets - {name} for name, targets in arrows.items()}
    while left:
        imported = set().union(*left.values())
        kept = {name for name, targets in left.items() if targets & set(left) and name in imported}
        if kept == set(left):
            yield f"a circle of imports: {', '.join(sorted(left))}"
            return
        left = {name: left[name] & kept for name in kept}


def wrong_arrows(arrows: dict[str, set[str]], known: Modules) -> Iterator[str]:
    floor_of = {name: n for n, floor in enumerate(FLOORS) for name in floor}
    for name, targets in arrows.items():
        for target in sorted(targets):
            ends = [each.split(".") for each in (name, target)]
            (package, *own), (other_package, *other) = ends
            if name.startswith(KERNELS) and not target.startswith(KERNELS):
                yield f"{name} imports {target}, and kernels know themselves alone"
            elif package == other_package == "conr_kernels":
                a, b = ("".join(part[:1]) for part in (own, other))
                if unplaced := {a, b} - set(floor_of):
                    yield f"{', '.join(unplaced)} is on no floor"
                elif floor_of[a] > floor_of[b]:
                    yield f"{name} imports {target}, which is above it"
                elif a != b and a in BACKENDS and b in BACKENDS:
                    yield f"{name} imports another backend, {target}"
            elif package == "conr_kernels":
                yield f"{name} imports {target}"
            elif other_package == "benchmarks":
                a, b = room_of(name, known), room_of(target, known)
                if a != b and b not in ALLOWED.get(a, {"benchmarks"}):
                    yield f"{name} imports {target}, of a room that it may not know"


def sizes(known: Modules) -> Iterator[str]:
    files: Counter[Path] = Counter()
    lines: Counter[str] = Counter()
    for path, source in known.values():
        package, n = path.parts[0], len(source.splitlines())
        files[path.parent] += 1
        lines[package] += n * (path.parts[1] != "training")
        if n > MOST_LINES_A_FILE[package]:
            yield f"{path} has {n} lines, more than {MOST_LINES_A_FILE[package]}"
    for folder, n in files.items():
        if n > MOST_FILES_A_FOLDER:
            yield f"{folder} has {n} Python files, more than {MOST_FILES_A_FOLDER}"
    for package, n in lines.items():
        if n > MOST_LINES[package]:
            yield f"{package} has {n} lines, more than {MOST_LINES[package]}"


def problems(known: Modules) -> list[str]:
    arrows = {name: imports(name, known) for name in known}
    return [*circles(arrows), *wrong_arrows(arrows, known), *sizes(known)]


def test_arrows_go_down_without_circles_and_no_room_overflows() -> None:
    assert problems(modules()) == []


LATE = "def late():\n    from {} import {}\n"
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {} import {}\n"
FAULTS = [
    ("conr_kernels.ops", LATE.format(".tracing", "x"), "circle of imports: conr_kernels.ops, "),
    ("benchmarks.batches", FOR_TYPES.format(".measure", "Step"), "circle of imports: benchmarks."),
    ("conr_kernels.torch_backend.tiles", LATE.format("..cuda_backend", "x"), "another backend"),
    ("conr_kernels.triton_backend.kernels.layout", LATE.format("..call", "x"), "themselves alone"),
    ("conr_kernels.reference", FOR_TYPES.format(".core.sweep", "x"), "above it"),
    ("conr_kernels.variants", "import benchmarks.rows\n", "imports benchmarks.rows"),
    ("conr_kernels.stray", "from . import variants\n", "on no floor"),
    ("benchmarks.rows", LATE.format("benchmarks.gpu", "device"), "may not know"),
    ("benchmarks.examples.train_large_batch", "from ..batches import Batch\n", "may not know"),
    ("benchmarks.static.tiles", "from ..gpu.stages import dense\n", "may not know"),
    ("conr_kernels.backends", "\n" * 500, "conr_kernels/backends.py has"),
    ("benchmarks.batches", "\n" * 401, "benchmarks/batches.py has"),
    *((package, "\n" * MOST_LINES[package], f"{package} has") for package in MOST_LINES),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "problem"), FAULTS)
def test_a_planted_fault_is_found(name: str, text: str, problem: str) -> None:
    known = modules()
    path, source = known.get(name, (Path(name.replace(".", "/") + ".py"), ""))
    known[name] = (path, source + "\n" + text)
    assert any(problem in each for each in problems(known)), problems(known)


def test_a_folder_with_too_many_files_is_found() -> None:
    known = modules()
    for n in range(MOST_FILES_A_FOLDER + 1):
        known[f"benchmarks.flat.module_{n}"] = (Path(f"benchmarks/flat/module_{n}.py"), "")
    text = f"benchmarks/flat has {MOST_FILES_A_FOLDER + 1} Python files"
    assert any(text in each for each in problems(known))
