"""The picture of a GPU run: time and memory over N, what the device takes dashed.

``python -m benchmarks.gpu.plot rows.csv environment.json picture.png`` draws it again.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from matplotlib.axes import Axes

from .. import plot
from ..plot import DARK, GREY, plt
from . import claims, steps

REGIME_COLORS = {"converged": "#3a9d6e", "7 years off": "#1f6f8b", "collapsed": "#7b4ea3"}
EAGER_COLOR = "#c8553d"
DEVICE = ", device alone"
Lines = dict[str, list[tuple[int, float]]]


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


def picture(rows: claims.Rows, environment: dict[str, object], path: Path) -> None:
    panels = {
        "Time of one step": lines_of(rows, "time"),
        "Peak extra memory of one step": lines_of(rows, "memory"),
    }
    if not panels["Time of one step"]:
        raise ValueError("no times of steps")
    with plt.rc_context({"font.size": 12, "axes.edgecolor": GREY, "text.color": DARK}):
        figure, both = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
        texts = (plot._seconds, plot._bytes)
        for axes, (title, lines), text in zip(both, panels.items(), texts, strict=True):
            _panel(axes, lines, title, text)
        figure.suptitle(
            "ConR loss, forward and backward: D = 128, bfloat16, AgeDB labels",
            fontsize=15, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
        text = f"{environment['gpu']}, torch {environment['torch']}, triton {environment['triton']}"
        figure.text(0.01, -0.035, text, color=GREY)
        figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white", pad_inches=0.2)
        plt.close(figure)


def _panel(axes: Axes, lines: Lines, title: str, text) -> None:
    for name, points in lines.items():
        points = [(n, value) for n, value in points if value > 0] or points
        sizes, values = zip(*points, strict=True)
        is_ours = name.startswith("conr_kernels")
        color = REGIME_COLORS[name.split(", ")[1]] if is_ours else EAGER_COLOR
        is_product, is_device = name == "q @ q.T", name.endswith(DEVICE)
        axes.plot(
            sizes, values, color=GREY if is_product else color, linewidth=3 if is_ours else 2,
            linestyle=":" if is_device else "--" if is_product else "-", marker="o", markersize=4,
            label=f"{name} (forward only)" if is_product else name, zorder=3 if is_ours else 2,
        )  # fmt: skip
    sizes = sorted({n for points in lines.values() for n, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sizes[::2]
    axes.set_xticks(ticks, [f"{n:,}" if n < 1024 else f"{n // 1024}k" for n in ticks])
    if text is plot._bytes:
        values = [value for points in lines.values() for _, value in points] or [2.0**20]
        low, high = math.log2(max(min(values), 1)), math.log2(max(*values, 2))
        axes.set_yticks([2.0**k for k in range(0, 61, 2) if low - 2 <= k <= high + 2])
    plot.style(axes, title, text, has_legend=bool(lines))


if __name__ == "__main__":
    source, about, target = map(Path, sys.argv[1:])
    picture(claims.read(source), json.loads(about.read_text()), target)
