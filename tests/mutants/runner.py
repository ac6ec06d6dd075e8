"""Plants faults in copies of the project, one at a time, and says which test noticed each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .fault import Fault, file_of, split_test

#: What tests need of the project; a result holds as long as none of the first four changes.
SOURCES = ("conr_kernels", "csrc", "benchmarks", "tests/helpers")
COPIED = (*SOURCES[:3], "tests", "pyproject.toml", "setup.py", "README.md", "Makefile")
#: A run may take this many times what the same tests take without a fault, and at least (seconds).
PATIENCE, LEAST_LIMIT = 10.0, 120.0


@dataclass(frozen=True)
class Outcome:
    """Of one process of tests: passed, failed, skipped, broken (no test ran or failed) or slow."""

    kind: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """killed, SURVIVED, equivalent or not run; and by which test, or why."""

    name: str
    file: str
    kind: str
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind:10s} {self.seconds:6.1f} s  {self.name}: {self.detail}"


def fingerprint(root: Path, paths: Iterable[str]) -> str:
    """A hash of these files and of all Python, CUDA and C++ files in these folders."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        at = root / path
        files = [at] if at.is_file() else sorted(at.rglob("*"))
        for file in files:
            if file.is_file() and (
                at.is_file() or file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")
            ):
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


class Copies:
    """Copies of the project, one for each process that runs at a time."""

    def __init__(self, root: Path, folder: Path, count: int) -> None:
        self.root, self.free = root, queue.SimpleQueue()
        self.running: set[subprocess.Popen[str]] = set()
        ignore = shutil.ignore_patterns("__pycache__", "_conr_cuda.*")
        for k in range(count):
            copy = folder / f"copy{k}"
            for name in COPIED:
                if (root / name).is_dir():
                    shutil.copytree(root / name, copy / name, ignore=ignore)
                elif (root / name).is_file():
                    copy.mkdir(exist_ok=True)
                    shutil.copy(root / name, copy / name)
            self.free.put(copy)

    @contextlib.contextmanager
    def planted(self, fault: Fault | None) -> Iterator[Path]:
        """A copy that nobody else uses, with the fault in it; without it afterwards."""
        copy = self.free.get()
        try:
            if fault is None:
                yield copy
                return
            original = (copy / fault.file).read_text()
            (copy / fault.file).write_text(fault.changed(original))
            try:
                yield copy
            finally:
                (copy / fault.file).write_text(original)
        finally:
            self.free.put(copy)

    def run(self, copy: Path, test: str, limit: float) -> Outcome:
        """Runs pytest with these arguments in a process of its own and reads its summary."""
        variables, arguments = split_test(test)
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-x", "-q", "-rfEs"]
        command += ["--tb=line", "-p", "no:cacheprovider", *arguments]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
        environment |= dict(
            PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", COLUMNS="500",
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",  # half of the time of a short run
        )  # fmt: skip
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=copy, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.running.add(process)
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return Outcome("slow", time.perf_counter() - start, f"still ran after {limit:.0f} s")
        finally:
            self.kill(process)
            self.running.discard(process)
        return read_summary(process.returncode, output, time.perf_counter() - start)

    @staticmethod
    def kill(process: subprocess.Popen[str]) -> None:
        """Ends the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for process in list(self.running):
            self.kill(process)


def read_summary(status: int, output: str, seconds: float) -> Outcome:
    """The outcome that pytest's exit status and its short summary tell."""
    failed = re.search(r"^FAILED (.*?)(?: - .*)?$", output, re.M)
    if status == 1 and failed:
        return Outcome("failed", seconds, failed[1])
    if status == 0 and re.search(r"^\d+ passed|, \d+ passed", output, re.M):
        return Outcome("passed", seconds)
    if status == 0:
        skipped = re.search(r"^SKIPPED (.*)$", output, re.M)
        return Outcome("skipped", seconds, skipped[1] if skipped else "all tests were skipped")
    if status < 0 and -status != signal.SIGKILL:
        return Outcome("failed", seconds, f"the process died of {signal.Signals(-status).name}")
    lines = [line for line in output.splitlines() if line.strip()]
    error = next((line for line in lines if line.startswith("ERROR ")), None)
    return Outcome("broken", seconds, f"exit status {status}: {error or ' '.join(lines[-1:])}")


class Results:
    """Outcomes and verdicts of earlier runs, each under the hash of all that it depends on."""

    def __init__(self, root: Path, file: Path, is_fresh: bool = False) -> None:
        self.root, self.file = root, file
        self.known = json.loads(file.read_text()) if file.exists() and not is_fresh else {}
        self.sources = fingerprint(root, SOURCES)

    def key(self, what: Fault | str) -> str:
        files = what.test_files() if isinstance(what, Fault) else [file_of(what)]
        text = json.dumps([asdict(what) if isinstance(what, Fault) else what, self.sources])
        return hashlib.sha256((text + fingerprint(self.root, files)).encode()).hexdigest()[:32]

    def get(self, what: Fault | str) -> dict | None:
        return self.known.get(self.key(what))

    def put(self, what: Fault | str, result: Outcome | Verdict) -> None:
        self.known[self.key(what)] = asdict(result)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.known, indent=0))
        part.replace(self.file)


def judge(fault: Fault, copies: Copies, limits: dict[str, float]) -> Verdict:
    """Runs the fault's tests until one fails."""
    seconds, reason = 0.0, "its tests pass"
    with copies.planted(fault) as copy:
        for test in fault.tests:
            outcome = copies.run(copy, test, limits.get(test, LEAST_LIMIT))
            seconds += outcome.seconds
            if outcome.kind == "failed" or (outcome.kind == "slow" and fault.may_hang):
                return Verdict(fault.name, fault.file, "killed", outcome.detail or test, seconds)
            if outcome.kind != "passed":
                reason = f"{test} {outcome.detail}"
    return Verdict(fault.name, fault.file, "SURVIVED", reason, seconds)


def run_all(
    faults: list[Fault],
    copies: Copies,
    results: Results,
    jobs: int,
    is_trusted: bool,
    say: Callable[[str], None] = print,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Verdict]:
    """The verdicts in the faults' order, remembered ones without a run.

    First the tests are run without a fault: a test that does not pass then kills nothing.
    """
    verdicts: dict[str, Verdict] = {}
    for fault in faults:
        if fault.is_equivalent:
            verdicts[fault.name] = Verdict(fault.name, fault.file, "equivalent", fault.why, 0.0)
        elif (known := results.get(fault)) is not None:
            verdicts[fault.name] = Verdict(**known)
    advance(len(verdicts))
    left = [fault for fault in faults if fault.name not in verdicts]

    with ThreadPoolExecutor(jobs) as pool:
        try:
            clean = {} if is_trusted else _run_clean(left, copies, results, pool, say)
            limits = {t: max(PATIENCE * o.seconds, LEAST_LIMIT) for t, o in clean.items()}

            def verdict_of(fault: Fault) -> Verdict:
                for kind, verdict in (("skipped", "not run"), ("broken", "SURVIVED")):
                    of_kind = [t for t in fault.tests if t in clean and clean[t].kind == kind]
                    if len(of_kind) == len(fault.tests) or of_kind and kind == "broken":
                        why = f"without a fault {of_kind[0]}: {clean[of_kind[0]].detail}"
                        return Verdict(fault.name, fault.file, verdict, why, 0.0)
                return judge(fault, copies, limits)

            judged = {pool.submit(verdict_of, fault): fault for fault in left}
            for future in as_completed(judged):
                fault, verdict = judged[future], future.result()
                verdicts[fault.name] = verdict
                if verdict.kind == "killed":
                    results.put(fault, verdict)
                say(str(verdict))
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            copies.stop()
            raise
    return [verdicts[fault.name] for fault in faults]


def _run_clean(
    faults: list[Fault],
    copies: Copies,
    results: Results,
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> dict[str, Outcome]:
    """What each test that is named says without a fault."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    known = {test: Outcome(**found) for test in tests if (found := results.get(test)) is not None}
    new = [test for test in tests if test not in known]
    if new:
        say(f"{len(new)} runs of tests without a fault")

    def run(test: str) -> Outcome:
        with copies.planted(None) as copy:
            outcome = copies.run(copy, test, 600.0)
        is_sound = outcome.kind in ("passed", "skipped")
        return outcome if is_sound else replace(outcome, kind="broken")

    for test, outcome in zip(new, pool.map(run, new), strict=True):
        known[test] = outcome
        if outcome.kind == "passed":
            results.put(test, outcome)
    return known


def table(verdicts: list[Verdict], seconds: float) -> str:
    """The verdicts in Markdown."""
    lines = ["| fault | file | verdict | seconds | by, or why |", "|---|---|---|---|---|"]
    for v in verdicts:
        detail = v.detail.replace("|", "\\|")
        lines.append(f"| {v.name} | {v.file} | {v.kind} | {v.seconds:.1f} | {detail} |")
    kinds = ("killed", "SURVIVED", "equivalent", "not run")
    counts = ", ".join(f"{sum(v.kind == kind for v in verdicts)} {kind}" for kind in kinds)
    return "\n".join([f"{len(verdicts)} faults: {counts}; {seconds:.0f} s.", "", *lines, ""])
