"""What a planted fault is, how a list of them is written, and what makes the list sound."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "faults"


@dataclass(frozen=True)
class Fault:
    """One change to one file.

    Attributes:
        name: unique in the list.
        file: relative to the root of the project.
        text, by: what is replaced, which occurs exactly once in the file, and by what.
        why: the promise that it breaks; of an equivalent, the proof that it breaks none.
        tests: arguments of pytest, a process each, the one that should notice first; variables
            of its environment in front.
        is_equivalent: nothing can notice it; it is not run.
        may_hang: a run beyond its time limit counts as noticed.
    """

    name: str
    file: str
    text: str
    by: str
    why: str
    tests: tuple[str, ...] = ()
    is_equivalent: bool = False
    may_hang: bool = False

    def changed(self, source: str) -> str:
        return source.replace(self.text, self.by)

    def test_files(self) -> list[str]:
        return [file_of(test) for test in self.tests]


def split_test(test: str) -> tuple[dict[str, str], list[str]]:
    """Variables of the environment, ``NAME=value`` in front, and pytest's arguments."""
    words = shlex.split(test)
    n = next(k for k, word in enumerate(words) if "=" not in word)
    return dict(word.split("=", 1) for word in words[:n]), words[n:]


def file_of(test: str) -> str:
    return split_test(test)[1][0].split("::")[0]


def read_faults(folder: Path = FOLDER) -> list[Fault]:
    """The faults of all ``*.txt`` of a folder, whose README.md says how they are written.

    Raises:
        ValueError: a line is none of a fault's.
    """
    faults = []
    for file in sorted(folder.glob("*.txt")):
        for paragraph in file.read_text().split("\n\n"):
            lines = [t for t in paragraph.split("\n") if t.strip() and not t.startswith("#")]
            if lines:
                faults.append(_read_fault(lines, file.name))
    return faults


def _read_fault(lines: list[str], source: str) -> Fault:
    name, _, file = lines[0].partition(": ")
    parts: dict[str, list[str]] = {key: [] for key in ("-", "+", "why", "proof", "test", "may")}
    for line in lines[1:]:
        key, _, rest = line.partition(" ")
        if key not in parts:
            raise ValueError(f"{source}: {name}: no line of a fault begins with {key!r}")
        parts[key].append(rest)
    return Fault(
        name=name,
        file=file,
        text="\n".join(parts["-"]),
        by="\n".join(parts["+"]),
        why=" ".join(parts["why"] + parts["proof"]),
        tests=tuple(parts["test"]),
        is_equivalent=bool(parts["proof"]),
        may_hang=parts["may"] == ["hang"],
    )


def problems(faults: list[Fault], root: Path) -> list[str]:
    """What is wrong with the list, a line each that names the fault; nothing is run."""
    found = []
    for name, count in Counter(fault.name for fault in faults).items():
        if count > 1:
            found.append(f"{name}: the name of {count} faults")
    for fault in faults:
        at = root / fault.file
        source = at.read_text() if at.is_file() else ""
        if not fault.text or source.count(fault.text) != 1:
            count = source.count(fault.text) if fault.text else 0
            found.append(f"{fault.name}: its text occurs {count} times in {fault.file}, not once")
        elif fault.file.endswith(".py"):
            try:
                compile(fault.changed(source), fault.file, "exec")
            except SyntaxError as error:
                found.append(f"{fault.name}: is no Python: {error}")
        if fault.text == fault.by:
            found.append(f"{fault.name}: changes nothing")
        if not fault.why:
            found.append(f"{fault.name}: does not say why it is a fault")
        if not fault.tests and not fault.is_equivalent:
            found.append(f"{fault.name}: names no test")
        found += [
            f"{fault.name}: there is no {test}" for test in fault.tests if not _exists(test, root)
        ]
    return found


def _exists(test: str, root: Path) -> bool:
    """Whether the test's file is there and defines the function that it names, if any."""
    at, function = root / file_of(test), split_test(test)[1][0].split("::")[1:]
    if not function:
        return at.exists()
    return at.is_file() and f"def {function[0].split('[')[0]}(" in at.read_text()
