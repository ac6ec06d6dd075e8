"""The table of steps: what a step takes, what its device takes, and its memory, side by side."""

from __future__ import annotations

from .claims import Rows

GRAPH = "cuda graph"
STAGES = ("speed", "compare", "cuda", "grid")
KEYS = ("stage", "N", "D", "dtype", "regime", "provider")


def table(rows: Rows) -> str:
    """*step*: events around steps in a row; *device*: the same steps as a CUDA graph."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows.rows:
        if row.get("stage") in STAGES and row["metric"] in ("time", "memory"):
            is_graph = row["mode"] == GRAPH
            column = "device" if is_graph else "step" if row["metric"] == "time" else "memory"
            key = tuple(row.get(name, "") for name in KEYS)
            found.setdefault(key, {})[column] = float(row["value"])
    units = {"step": ("step, ms", 1e3), "device": ("device, ms", 1e3), "memory": ("MiB", 2**-20)}
    widths = dict(zip(KEYS, (9, 9, 6, 18, 13, 16), strict=True))
    lines = ["".join(f"{name:<{width}}" for name, width in widths.items())]
    lines[0] += "".join(f"{title:>12}" for title, _ in units.values())
    for key, values in found.items():
        line = "".join(f"{text:<{width}}" for text, width in zip(key, widths.values(), strict=True))
        for column, (_, factor) in units.items():
            text = f"{values[column] * factor:.4g}" if column in values else "–"
            line += f"{text:>12}"
        lines.append(line)
    return "\n".join(lines)
