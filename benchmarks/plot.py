"""The picture: a step's time and memory over N; ``python -m benchmarks.plot FILE.csv`` redraws."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (a backend without a display comes first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: E402

from . import report, rows  # noqa: E402
from .providers import BASELINE  # noqa: E402

GREY, DARK = "#8a8f98", "#30343b"
COLORS = {BASELINE: "#c8553d", "eager, row loop": "#e6a57e", report.PRODUCT: GREY}
FUSED_COLORS = ("#1f6f8b", "#3a9d6e", "#7b4ea3")
KERNEL = "conr paper, AgeDB"


def picture(found: list[rows.Row], path: Path) -> None:
    """Two log-log panels, time and peak extra memory over N, labelled at the lines' ends."""
    found = [row for row in found if row.kernel == KERNEL]
    fused = sorted({row.provider for row in found} - set(COLORS))
    colors = {**COLORS, **dict(zip(fused, FUSED_COLORS, strict=False))}
    with plt.rc_context({"font.size": 12, "axes.edgecolor": GREY, "text.color": DARK}):
        figure, panels = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
        titles = ("Time of one step", "Peak extra memory of one step")
        for axes, metric, title in zip(panels, ("time", "memory"), titles, strict=True):
            _panel(axes, found, metric, title, colors)
        first = found[0]
        figure.suptitle(
            f"ConR loss, forward and backward: D = {first.features}, {first.dtype}, AgeDB labels, "
            "predictions 7 years off",
            fontsize=15,
            fontweight="bold",
            x=0.01,
            ha="left",
        )
        figure.text(
            0.01,
            -0.035,
            f"{first.device}, {first.threads} thread(s), torch {first.torch}",
            color=GREY,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white", pad_inches=0.2)
        plt.close(figure)


def _panel(axes: Axes, found: list[rows.Row], metric: str, title: str, colors: dict) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in found:
        if metric == "memory" and (
            row.provider == report.PRODUCT or row.value < report.SMALLEST_MEMORY
        ):
            continue
        if row.metric == metric:
            lines.setdefault(row.provider, []).append((row.size, row.value))
    for provider, points in lines.items():
        sizes, values = zip(*points, strict=True)
        is_fused = provider.startswith("conr_kernels")
        axes.plot(
            sizes,
            values,
            color=colors[provider],
            linewidth=3 if is_fused else 2,
            linestyle="none" if provider == report.PRODUCT else "-",
            marker="D" if provider == report.PRODUCT else "o",
            markersize=5.5,
            label=f"{provider} (forward only)" if provider == report.PRODUCT else provider,
            zorder=3 if is_fused else 2,
        )
    _annotate(axes, lines, metric)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row.size for row in found})
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.set_xticks(sizes, [f"{n:,}" if n < 1024 else f"{n // 1024}k" for n in sizes])
    text = _seconds if metric == "time" else _bytes
    if metric == "memory":
        top = max((value for points in lines.values() for _, value in points), default=2**30)
        ticks = [2.0**k for k in range(20, 41, 2) if 2**k <= 2 * top]
        axes.set_yticks(ticks)
        axes.set_ylim(bottom=report.SMALLEST_MEMORY)
    style(axes, title, text, has_legend=bool(lines))


def style(axes: Axes, title: str, text: Callable[[float], str], has_legend: bool) -> None:
    """Everything of an axes but its lines and ticks; ``text``: of a number on the y axis."""
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.set_xlabel("rows in the batch, N")
    axes.set_title(title, loc="left", fontsize=13)
    axes.grid(True, color="#e4e6ea", linewidth=0.8)
    axes.tick_params(color=GREY, labelcolor=DARK)
    axes.spines[["top", "right"]].set_visible(False)
    if has_legend:
        axes.legend(frameon=False, loc="upper left")


def _annotate(axes: Axes, lines: dict[str, list[tuple[int, float]]], metric: str) -> None:
    """An arrow from eager to the fastest fused backend at the largest N that both have."""
    fused = [dict(points) for name, points in lines.items() if name.startswith("conr_kernels")]
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
    word = "faster" if metric == "time" else "less"
    axes.annotate(
        f"{eager[n] / best:,.0f}× {word}",
        xy=(n, (eager[n] ** 3 * best) ** 0.25),  # above the fused line's own end
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        fontsize=13,
    )


def _seconds(value: float) -> str:
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} s"


def _bytes(value: float) -> str:
    return f"{value / 2**30:g} GiB" if value >= 2**30 else f"{value / 2**20:g} MiB"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    picture(rows.read(source), source.with_suffix(".png"))
    print(report.table(rows.read(source)))
