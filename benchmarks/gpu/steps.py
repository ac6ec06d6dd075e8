"""What a step takes, what its device takes, and its memory, side by side.

``python -m benchmarks.gpu.steps rows.csv … [README.md]`` prints the README's tables of it and of
training steps, or writes them there; of several runs the last that measured a case.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .. import report
from . import claims
from .claims import Rows

GRAPH = "cuda graph"
STAGES = ("speed", "compare", "cuda", "grid")
KEYS = ("stage", "N", "D", "dtype", "regime", "provider")
Columns = dict[str, float]


def by_case(rows: Rows) -> dict[tuple[str, ...], tuple[str, Columns]]:
    """The commit, and of its steps *step*: events around steps in a row; *device*: the same steps
    as a CUDA graph.
    """
    found: dict[tuple[str, ...], tuple[str, Columns]] = {}
    for row in rows.rows:
        if row.get("stage") in STAGES and row["metric"] in ("time", "memory"):
            is_graph = row["mode"] == GRAPH
            column = "device" if is_graph else "step" if row["metric"] == "time" else "memory"
            key, commit = tuple(row.get(name, "") for name in KEYS), row.get("commit", "")
            if found.get(key, ("", {}))[0] != commit:
                found[key] = commit, {}
            found.setdefault(key, (commit, {}))[1][column] = float(row["value"])
    return found


def table(rows: Rows) -> str:
    units = {"step": ("step, ms", 1e3), "device": ("device, ms", 1e3), "memory": ("MiB", 2**-20)}
    widths = dict(zip(KEYS, (9, 9, 6, 18, 13, 16), strict=True))
    lines = ["".join(f"{name:<{width}}" for name, width in widths.items())]
    lines[0] += "".join(f"{title:>12}" for title, _ in units.values())
    for key, (_, values) in by_case(rows).items():
        line = "".join(f"{text:<{width}}" for text, width in zip(key, widths.values(), strict=True))
        for column, (_, factor) in units.items():
            text = f"{values[column] * factor:.4g}" if column in values else "–"
            line += f"{text:>12}"
        lines.append(line)
    return "\n".join(lines)


def markdown(rows: Rows) -> str:
    """A line for each case of the stage ``speed``: ours, eager and the bare product; ours' commits
    where they differ.
    """
    cases: dict[tuple[str, ...], dict[str, Columns]] = {}
    commits: dict[tuple[str, ...], str] = {}
    for (stage, *case, provider), (commit, columns) in by_case(rows).items():
        if stage == "speed" and case[-1]:
            cases.setdefault(tuple(case), {})[provider] = columns
            if provider == "triton":
                commits[tuple(case)] = commit[:7]
    is_mixed = len(set(commits.values())) > 1
    lines = [
        "| N | D | features, predictions | step | **device** | memory | eager step | eager device "
        "| eager memory | `q @ q.T` |" + " commit |" * is_mixed,
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|" + "---|" * is_mixed,
    ]
    for (n, d, dtype, regime), providers in sorted(
        cases.items(), key=lambda item: (item[0][2:], int(item[0][1]), int(item[0][0]))
    ):
        ours, eager, product = (providers.get(p, {}) for p in ("triton", "eager", "q @ q.T"))
        cells = [f"{int(n):,}", f"{int(d):,}", f"{dtype}, {regime}"]
        cells += [_time(ours, "step"), f"**{_time(ours, 'device')}**", _memory(ours)]
        cells += [_time(eager, "step"), _time(eager, "device"), _memory(eager)]
        cells += [_time(product, "device")]
        cells += [commits.get((n, d, dtype, regime), "–")] * is_mixed
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def training(rows: Rows) -> str:
    """A line for each batch: training steps without ConR, with it, and with eager instead."""
    found = rows.find(mode="training step")
    lines = [
        "| batch | without ConR | with it | more | with eager instead | more "
        "| memory, with it | with eager |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for n in sorted({int(row["N"]) for row in found}):
        values: dict[str, Columns] = {name: {} for name in ("no ConR", "fused", "eager")}
        for row in found:
            if row["N"] == str(n):
                values[row["provider"]][row["metric"].replace("time", "step")] = float(row["value"])
        without, ours, eager = values.values()
        if not all("step" in of for of in values.values()):  # cut off
            continue
        cells = [f"{n:,}", _time(without, "step")]
        for of in (ours, eager):
            cells += [_time(of, "step"), _time({"step": of["step"] - without["step"]}, "step")]
        lines.append("| " + " | ".join([*cells, _memory(ours), _memory(eager)]) + " |")
    return "\n".join(lines)


def _time(columns: Columns, name: str) -> str:
    return f"{columns[name] * 1e3:.3g} ms" if name in columns else "–"


def _memory(columns: Columns) -> str:
    return report.bytes_text(columns["memory"]) if "memory" in columns else "–"


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]]
    runs = [claims.read(path).rows for path in paths if path.suffix == ".csv"]
    rows = Rows([row for run in runs for row in run])
    for name, found in (("GPU figures", markdown(rows)), ("GPU training", training(rows))):
        print(found)
        for path in paths[len(runs) :] if found.count("\n") > 1 else []:  # more than a head
            report.write_figures(path, name, found)
