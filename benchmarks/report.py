"""Rows as a table and as the few sentences that matter.

``python -m benchmarks.report FILE.csv [README.md]`` prints the README's table, or writes it there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .providers import BASELINE
from .rows import Row, read

Key = tuple[str, int, str]
PRODUCT = "q @ q.T"
#: Smaller growth says nothing: it depends on what the allocator happens to have left over.
SMALLEST_MEMORY = 2**20


def by_case(rows: list[Row]) -> dict[Key, dict[str, float]]:
    """``{(kernel, N, provider): {metric: value}}`` in the rows' order."""
    cases: dict[Key, dict[str, float]] = {}
    for row in rows:
        cases.setdefault((row.kernel, row.size, row.provider), {})[row.metric] = row.value
    return cases


def seconds_text(value: float) -> str:
    return f"{value * 1e3:,.2f} ms" if value < 1 else f"{value:,.2f} s"


def bytes_text(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB" if value < 2**30 else f"{value / 2**30:,.2f} GiB"


def ratio_text(value: float) -> str:
    return f"{value:,.2f}×" if value < 10 else f"{value:,.0f}×"


def ratios(base: dict[str, float], metrics: dict[str, float]) -> list[str]:
    """Eager's time and memory over a line's, where both say something."""
    least = {"time": 0.0, "memory": SMALLEST_MEMORY}
    return [
        ratio_text(base[metric] / metrics[metric]) if base and metrics[metric] >= floor else ""
        for metric, floor in least.items()
    ]


def table(rows: list[Row]) -> str:
    """One line per kernel, N and provider; ratios are eager's value over the line's."""
    lines = [
        f"{'kernel':<25}{'N':>7}  {'provider':<21}{'time':>11}{'memory':>12}"
        f"{'speed':>9}{'saving':>9}{'difference':>12}"
    ]
    cases, previous = by_case(rows), None
    for (kernel, size, provider), metrics in cases.items():
        base = cases.get((kernel, size, BASELINE), {})
        speed, saving = ratios({} if provider in (BASELINE, PRODUCT) else base, metrics)
        if previous not in (None, (kernel, size)):
            lines.append("")
        previous = (kernel, size)
        difference = f"{metrics['difference']:.1e}" if "difference" in metrics else ""
        lines.append(
            f"{kernel:<25}{size:>7,}  {provider:<21}{seconds_text(metrics['time']):>11}"
            f"{bytes_text(metrics['memory']):>12}{speed:>9}{saving:>9}{difference:>12}"
        )
    return "\n".join(lines)


def summary(rows: list[Row], features: int = 128) -> str:
    """The ratios of this run that the README names."""
    cases = by_case(rows)
    lines = []
    for (kernel, size, provider), metrics in cases.items():
        if not provider.startswith("conr_kernels"):
            continue
        notes = []
        if base := cases.get((kernel, size, BASELINE)):
            notes.append(f"{ratio_text(base['time'] / metrics['time'])} the speed of eager")
        if bare := cases.get((kernel, size, PRODUCT)):
            notes.append(f"{metrics['time'] / bare['time']:.2f} of the time of q @ q.T alone")
        if size == 65_536:
            share = metrics["memory"] / (4 * size * features)
            notes.append(f"peak memory {share:.1f}× the features")
            if smaller := cases.get((kernel, 8192, provider)):
                growth = metrics["time"] / smaller["time"]
                notes.append(f"{growth:.0f}× the time of N = 8,192 (N² would be 64×)")
        if notes:
            lines.append(f"  {provider}, {kernel}, N = {size:,}: {'; '.join(notes)}")
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """Eager against each fused backend, one line per N and backend."""
    cases = by_case(rows)
    lines = [
        "| labels, N | eager | | conr_kernels | | speed | memory saved |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (kernel, size, provider), metrics in cases.items():
        if not provider.startswith("conr_kernels"):
            continue
        base = cases.get((kernel, size, BASELINE), {})
        eager = [seconds_text(base["time"]), bytes_text(base["memory"])] if base else ["", ""]
        backend = provider.removeprefix("conr_kernels ").strip("()")
        ours = [f"{seconds_text(metrics['time'])} ({backend})", bytes_text(metrics["memory"])]
        label = kernel.removeprefix("conr paper, ").replace("constant p", "constant predictions")
        cells = [f"{label}, {size:,}", *eager, *ours, *ratios(base, metrics)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_figures(readme: Path, name: str, table: str) -> None:
    """Puts a table between the marks of its name, behind the first mark's comment."""
    text = readme.read_text(encoding="utf-8")
    start, end = text.index(f"<!-- {name}:"), text.index(f"<!-- end of {name}")
    start = text.index("-->", start) + len("-->")
    readme.write_text(f"{text[:start]}\n\n{table}\n\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    print(markdown(found))
    print()
    print(summary(found))
    for name in sys.argv[2:]:
        write_figures(Path(name), "figures", markdown(found))
