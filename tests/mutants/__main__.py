"""``python -m tests.mutants``: plants every fault of the list; exit status 1 if one survives."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from .fault import problems, read_faults
from .runner import Copies, Results, run_all, table

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of faults, or beginnings of files' paths")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--trust", action="store_true", help="do not run tests without a fault")
    parser.add_argument("--list", action="store_true", help="names, files and whys; runs nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="mutants.json, mutants.md")
    options = parser.parse_args()

    faults = [
        fault
        for fault in read_faults()
        if options.only is None
        or fault.name in options.only
        or any(fault.file.startswith(path) for path in options.only)
    ]
    if options.list:
        for fault in faults:
            print(f"{fault.name} ({fault.file}): {fault.why}")
        return 0
    if wrong := problems(faults, ROOT):
        print("the list is refused:", *wrong, sep="\n", file=sys.stderr)
        return 2

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it has started, too
    start = time.perf_counter()
    results = Results(ROOT, options.out / "mutants.json", options.fresh)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        tqdm(total=len(faults), unit="fault") as bar,
    ):
        copies = Copies(ROOT, Path(folder), options.jobs)
        verdicts = run_all(
            faults, copies, results, options.jobs, options.trust, bar.write, bar.update
        )
    text = table(verdicts, time.perf_counter() - start)
    (options.out / "mutants.md").write_text(text)
    print(text.splitlines()[0])
    survivors = [verdict for verdict in verdicts if verdict.kind == "SURVIVED"]
    print(*survivors, sep="\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
