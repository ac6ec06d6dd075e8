"""The pictures of the rows: effect, errors per bin, features, training and large batches."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (a backend without a display comes first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from .compare import by_run, mean, paired  # noqa: E402
from .rows import Row  # noqa: E402
from .splits import FEW, MANY  # noqa: E402

GREY, DARK = "#8a8f98", "#30343b"
WITHOUT, WITH = "#c8553d", "#1f6f8b"
SHOT_COLORS = {"many": "#1f6f8b", "median": "#3a9d6e", "few": "#e6a57e"}
NAMES = {"": "L1", "paper": "L1 + ConR"}

Rows = dict[str, list[Row]]


def draw(found: Rows, folder: Path) -> None:
    """Writes every picture that there are rows for."""
    with plt.rc_context({"font.size": 11, "axes.edgecolor": GREY, "text.color": DARK}):
        for name, rows, picture in (
            ("effect", found["table"], effect),
            ("bins", found["traces"], bins),
            ("features", found["traces"], features),
            ("training", found["traces"], training),
            ("large", found["large"] + found["cost"], large),
        ):
            if rows:
                figure = picture(rows)
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
                plt.close(figure)


def effect(rows: list[Row]) -> Figure:
    """What ConR changes in the few-shot error and in the bMAE of each method, with intervals."""
    datasets = list(dict.fromkeys(row.data for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    n_columns = len(datasets) if len(datasets) <= 4 else 3
    n_lines = math.ceil(len(datasets) / n_columns)
    figure, panels = plt.subplots(
        n_lines, n_columns, layout="constrained", sharey=True, squeeze=False,
        figsize=(3 * n_columns + 1.2, n_lines * (0.34 * len(methods) + 1.2) + 0.6),
    )  # fmt: skip
    panels = panels.flatten()
    kinds = (("MAE", "few", "few-shot MAE", WITH, -0.14), ("bMAE", "all", "bMAE", "#e6a57e", 0.14))
    for metric, shot, label, color, shift in kinds:
        values = by_run(rows, metric, shot)
        for axes, name in zip(panels, datasets, strict=False):
            for place, method in enumerate(methods):
                a, b = ((name, "natural", method, conr, 64) for conr in ("", "paper"))
                found = paired(values.get(a, {}), values.get(b, {}), relative=True)
                if found.n:
                    half = found.half if found.n > 1 else 0
                    axes.errorbar(
                        found.mean, place + shift, xerr=half, fmt="o", color=color, markersize=5,
                        label=label if place == 0 else None,
                    )  # fmt: skip
    for axes, name in zip(panels, datasets, strict=False):
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_yticks(range(len(methods)), methods)
        _style(axes, name, "change with ConR, %")
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=2, loc="upper right")
    figure.suptitle("What ConR changes in the test error (left of 0: better)", x=0.01, ha="left")
    return figure


def bins(rows: list[Row]) -> Figure:
    """Training rows per bin with their shots, the error of each bin, and what ConR changes."""
    datasets = list(dict.fromkeys(row.data for row in rows))
    figure, panels = plt.subplots(
        3, len(datasets), figsize=(5.5 * len(datasets), 8), layout="constrained", squeeze=False,
        sharex="col",
    )  # fmt: skip
    for (top, middle, bottom), name in zip(panels.T, datasets, strict=True):
        of_data = [row for row in rows if row.data == name]
        counts = {r.at: r.value for r in of_data if r.metric == "training rows" and not r.conr}
        width = min(b - a for a, b in zip(list(counts), list(counts)[1:], strict=False))
        for shot, color in SHOT_COLORS.items():
            at = [x for x, n in counts.items() if shot_of(n) == shot]
            top.bar(at, [counts[x] for x in at], width, color=color, label=f"{shot}-shot")
        top.set_yscale("symlog", linthresh=1)
        errors = {}
        for conr, color in (("", WITHOUT), ("paper", WITH)):
            at, errors[conr] = _mean_by_place(of_data, "bin MAE", conr)
            middle.plot(at, errors[conr], color=color, marker="o", markersize=3, label=NAMES[conr])
        change = [b - a for a, b in zip(errors[""], errors["paper"], strict=True)]
        bottom.bar(at, change, width, color=WITH)
        for axes, title in (
            (top, f"{name}: training rows per bin"),
            (middle, "mean test error per bin"),
            (bottom, "its change with ConR (below 0: better)"),
        ):
            _style(axes, title, "label" if axes is bottom else "")
        top.legend(frameon=False)
        middle.legend(frameon=False)
    return figure


def shot_of(n: float) -> str:
    return "many" if n > MANY else "few" if n < FEW else "median"


def features(rows: list[Row]) -> Figure:
    """Unit features of test rows along their two main axes, coloured by label."""
    datasets = list(dict.fromkeys(row.data for row in rows))
    figure, panels = plt.subplots(
        len(datasets), 2, figsize=(9, 4 * len(datasets)), layout="constrained", squeeze=False
    )
    for line, name in zip(panels, datasets, strict=True):
        for axes, conr in zip(line, ("", "paper"), strict=True):
            own = [r for r in rows if (r.data, r.conr, r.seed) == (name, conr, 0)]
            x, y = ([r for r in own if r.metric == f"PC {k}"] for k in (1, 2))
            drawn = axes.scatter(
                [r.value for r in x], [r.value for r in y], c=[r.at for r in x], s=10,
                cmap="viridis",
            )  # fmt: skip
            _style(axes, f"{name}, {NAMES[conr]}", "first axis")
        figure.colorbar(drawn, ax=line, label="label")
    return figure


def training(rows: list[Row]) -> Figure:
    """Loss and floor, excess, anchors and collapse penalty over the epochs; ``P(y)`` at the end."""
    datasets = list(dict.fromkeys(row.data for row in rows))
    titles = {
        "epoch excess": "ConR's loss over its floor",
        "epoch floor": "floor, mean of A_i log n_i",
        "epoch anchors": "share of anchors",
        "epoch collapse": "collapse penalty, mean over y",
        "collapse penalty": "collapse penalty P(y) at the end",
    }
    figure, panels = plt.subplots(
        len(datasets), len(titles), figsize=(3.4 * len(titles), 3 * len(datasets)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for line, name in zip(panels, datasets, strict=True):
        of_data = [row for row in rows if row.data == name]
        for axes, (metric, title) in zip(line, titles.items(), strict=True):
            for conr, color in (("", WITHOUT), ("paper", WITH)):
                at, values = _mean_by_place(of_data, metric, conr)
                axes.plot(at, values, color=color, label=NAMES[conr])
            axes.set_ylim(bottom=0)
            is_last = metric == "collapse penalty"
            _style(axes, title, "label y" if is_last else "epoch")
        line[0].set_ylabel(name)
        line[0].legend(frameon=False)
    return figure


def large(rows: list[Row]) -> Figure:
    """Few-shot error and seconds per epoch over the batch."""
    datasets = list(dict.fromkeys(row.data for row in rows if row.batch > 64))
    figure, panels = plt.subplots(
        2, len(datasets), figsize=(5 * len(datasets), 7), layout="constrained", squeeze=False
    )
    errors = by_run([row for row in rows if row.stage == "large"], "MAE", "few")
    times: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.stage == "cost" and row.metric == "epoch seconds" and row.method == "vanilla":
            times[row.data, row.backend if row.conr else ""][row.batch] = row.value
    labels = {
        "": ("L1", WITHOUT, "-"),
        "auto": ("L1 + ConR, fused", WITH, "-"),
        "gradient_cache": ("fused, gradient_cache", WITH, ":"),
        "reference": ("L1 + ConR, eager", GREY, "--"),
    }
    for (top, bottom), name in zip(panels.T, datasets, strict=True):
        for conr, color in (("", WITHOUT), ("paper", WITH)):
            points = sorted((k[4], mean(v)) for k, v in errors.items() if k[::3] == (name, conr))
            if points:
                top.plot(*zip(*points, strict=True), "o-", color=color, label=NAMES[conr])
        for backend, (label, color, style) in labels.items():
            points = sorted(times.get((name, backend), {}).items())
            if points:
                bottom.plot(
                    *zip(*points, strict=True), style, marker="o", markersize=4, color=color,
                    label=label,
                )  # fmt: skip
        _style(top, f"{name}: few-shot MAE", "")
        _style(bottom, "seconds per epoch", "rows in a batch, each viewed twice")
        for axes in (top, bottom):
            axes.set_xscale("log", base=2)
            if axes.has_data():
                axes.legend(frameon=False)
        bottom.set_yscale("log")
    return figure


def _mean_by_place(rows: list[Row], metric: str, conr: str) -> tuple[list[float], list[float]]:
    """Places and the mean of the values there over seeds."""
    values: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if (row.metric, row.conr) == (metric, conr):
            values[row.at].append(row.value)
    places = sorted(values)
    return places, [statistics.fmean(values[at]) for at in places]


def _style(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(label)
    axes.grid(True, color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=GREY, labelcolor=DARK)
    axes.spines[["top", "right"]].set_visible(False)
