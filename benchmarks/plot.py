"""The picture: a step's time and memory over N; ``python -m benchmarks.plot FILE.csv`` redraws."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (a backend without a display comes first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, NullLocator  # noqa: E402

from . import report, rows  # noqa: E402
from .providers import BASELINE  # noqa: E402

GREY, DARK, EAGER = "#8a8f98", "#30343b", "#c8553d"
COLORS = {BASELINE: EAGER, "eager, row loop": "#e6a57e", report.PRODUCT: GREY}
FUSED_COLORS = ("#1f6f8b", "#3a9d6e", "#7b4ea3")
KERNEL = "conr paper, AgeDB"
#: Points ``(N, value)`` of each line by its name.
Lines = dict[str, list[tuple[int, float]]]
Look = Callable[[str], dict[str, str]]


def draw(
    path: Path, title: str, note: str, time: Lines, memory: Lines, look: Look, ours: list[str]
) -> None:
    """Two log-log panels, time and peak extra memory over N; ``look``: of a line by its name;
    ``ours``: the lines that eager is compared with.
    """
    with plt.rc_context({"font.size": 12, "axes.edgecolor": GREY, "text.color": DARK}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
        _panel(left, time, "Time of one step", EngFormatter("s"), look)
        _panel(right, memory, "Peak extra memory of one step", FuncFormatter(_bytes), look)
        values = [value for points in memory.values() for _, value in points] or [2.0**20]
        low, high = math.log2(max(min(values), 1)), math.log2(max(*values, 2))
        right.set_yticks([2.0**k for k in range(0, 61, 2) if low - 2 <= k <= high + 1])
        _annotate(left, time, ours, "faster")
        _annotate(right, memory, ours, "less")
        figure.suptitle(title, fontsize=15, fontweight="bold", x=0.01, ha="left")
        figure.text(0.01, -0.035, note, color=GREY)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white", pad_inches=0.2)
        plt.close(figure)


def _panel(axes: Axes, lines: Lines, title: str, form: Formatter, look: Look) -> None:
    for name, points in lines.items():
        is_ours, is_product = name.startswith("conr_kernels"), name == report.PRODUCT
        label = f"{name} (forward only)" if is_product else name
        common = dict(marker="o", markersize=5, linewidth=3 if is_ours else 2,
                      zorder=3 if is_ours else 2)  # fmt: skip
        axes.plot(*zip(*points, strict=True), label=label, **(common | look(name)))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({n for points in lines.values() for n, _ in points})
    ticks = sizes if len(sizes) <= 12 else sizes[::2]
    axes.set_xticks(ticks, [f"{n:,}" if n < 1024 else f"{n // 1024}k" for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(form)
    axes.set_xlabel("rows in the batch, N")
    axes.set_title(title, loc="left", fontsize=13)
    axes.grid(True, color="#e4e6ea", linewidth=0.8)
    axes.tick_params(color=GREY, labelcolor=DARK)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        axes.legend(frameon=False, loc="upper left")


def _annotate(axes: Axes, lines: Lines, ours: list[str], word: str) -> None:
    """An arrow from eager to the fastest of ours at the largest N that both have."""
    fused = [dict(lines[name]) for name in ours if name in lines]
    eager = dict(lines.get(BASELINE, ()))
    shared = [n for n in eager if any(n in points for points in fused)]
    if not shared:
        return
    n = max(shared)
    best = min(points[n] for points in fused if n in points)
    if eager[n] < 3 * best:
        return
    arrow = {"arrowstyle": "<->", "color": DARK, "linewidth": 1.2, "shrinkA": 5, "shrinkB": 5}
    axes.annotate("", xy=(n, best), xytext=(n, eager[n]), arrowprops=arrow)
    middle = (eager[n] ** 3 * best) ** 0.25  # above the fused line's own end
    axes.annotate(
        f"{eager[n] / best:,.0f}× {word}", xy=(n, middle), xytext=(8, 0), va="center",
        textcoords="offset points", fontweight="bold", fontsize=13,
    )  # fmt: skip


def _bytes(value: float, _: int) -> str:
    return f"{value / 2**30:g} GiB" if value >= 2**30 else f"{value / 2**20:g} MiB"


def picture(found: list[rows.Row], path: Path) -> None:
    """Of the rows with AgeDB's labels."""
    lines: dict[str, Lines] = {"time": {}, "memory": {}}
    for row in found:
        is_small = row.provider == report.PRODUCT or row.value < report.SMALLEST_MEMORY
        is_drawn = row.metric in lines and not (row.metric == "memory" and is_small)
        if row.kernel == KERNEL and is_drawn:
            lines[row.metric].setdefault(row.provider, []).append((row.size, row.value))
    fused = sorted(set(lines["time"]) - set(COLORS))
    colors = {**COLORS, **dict(zip(fused, FUSED_COLORS, strict=False))}

    def look(name: str) -> dict:
        points = {"linestyle": "none", "marker": "D"} if name == report.PRODUCT else {}
        return {"color": colors[name], **points}

    first = found[0]
    title = f"ConR loss, forward and backward: D = {first.features}, {first.dtype}, AgeDB labels, "
    title += "predictions 7 years off"
    note = f"{first.device}, {first.threads} thread(s), torch {first.torch}"
    draw(path, title, note, lines["time"], lines["memory"], look, fused)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    picture(rows.read(source), source.with_suffix(".png"))
    print(report.table(rows.read(source)))
