"""The picture of a GPU run: time and memory over N, what the device takes dotted.

``python -m benchmarks.gpu.plot rows.csv … environment.json picture.png`` draws it again, of several
runs the last that measured a point.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .. import plot
from ..plot import EAGER, GREY, Lines
from . import claims, steps

COLORS = {"converged": "#3a9d6e", "7 years off": "#1f6f8b", "collapsed": "#7b4ea3"}
DEVICE = ", device alone"


def lines_of(rows: claims.Rows, metric: str) -> Lines:
    """Points of each line at D = 128 in bfloat16, of the latest row of each: Triton by its
    predictions, eager and the bare product; the device's time apart from the step's.
    """
    lines: dict[str, dict[int, float]] = {}
    for row in rows.find(metric=metric, D=128, dtype="bfloat16"):
        provider, is_graph = row["provider"], row["mode"] == steps.GRAPH
        is_drawn = provider in ("triton", "eager", "q @ q.T") and row["stage"] in ("speed", "grid")
        if not is_drawn or (provider == "q @ q.T" and (metric == "memory" or is_graph)):
            continue
        name = f"conr_kernels, {row['regime']}" if provider == "triton" else provider
        points = lines.setdefault(name + DEVICE * is_graph, {})
        points[int(row["N"])] = float(row["value"])
    return {name: sorted(lines[name].items()) for name in sorted(lines) if len(lines[name]) > 1}


def look(name: str) -> dict[str, str]:
    regime = name.removesuffix(DEVICE).removeprefix("conr_kernels, ")
    if name.startswith("q @ q.T"):
        return {"color": GREY, "linestyle": "--"}
    return {"color": COLORS.get(regime, EAGER), "linestyle": ":" if name.endswith(DEVICE) else "-"}


def picture(rows: claims.Rows, environment: dict[str, object], path: Path) -> None:
    time, memory = (lines_of(rows, metric) for metric in ("time", "memory"))
    if not time:
        raise ValueError("no times of steps")
    title = "ConR loss, forward and backward: D = 128, bfloat16, AgeDB labels"
    note = f"{environment['gpu']}, torch {environment['torch']}, triton {environment['triton']}"
    plot.draw(path, title, note, time, memory, look, ["conr_kernels, 7 years off"])


if __name__ == "__main__":
    *sources, about, target = map(Path, sys.argv[1:])
    found = claims.Rows([row for source in sources for row in claims.read(source).rows])
    picture(found, json.loads(about.read_text()), target)
