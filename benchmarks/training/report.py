"""``python -m benchmarks.training.report [FOLDER]``: the rows' summary, pictures and README."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import bytes_text, seconds_text

from . import pictures, plan
from .compare import Difference, by_run, mean, paired
from .cost import MEMORY_BUDGET
from .rows import LAST, Row, read

Rows = dict[str, list[Row]]
ERRORS = (("MAE", "all"), ("MAE", "many"), ("MAE", "median"), ("MAE", "few"), ("bMAE", "all"))
START, END = "<!-- figures -->", "<!-- end of figures -->"


def load(folder: Path) -> Rows:
    """The rows of every stage, none for a stage that was not run."""
    paths = {stage: folder / f"{stage}.csv" for stage in plan.STAGES}
    return {s: list(read(path)) if path.exists() else [] for s, path in paths.items()}


def write(folder: Path) -> str:
    """Writes ``summary.md`` and the pictures; returns the table of ConR's effect and the claims."""
    found = load(folder)
    sections = [make(found) for make in SECTIONS]
    (folder / "summary.md").write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    pictures.draw(found, folder)
    return "\n".join([effect(found), "", *claims(found)])


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def marked(difference: Difference, unit: str = "") -> str:
    """A difference, bold where its interval leaves out 0."""
    text = f"{difference}{unit}" if difference.n > 1 else "–"
    return f"**{text}**" if difference.is_clear else text


def changes(
    rows: list[Row],
    shown: dict[str, tuple[str, str]],
    label: Callable[[tuple], str],
    relative: bool = False,
) -> str:
    """Errors of L1 without and with ConR and their change: a line for every data, protocol and
    batch, two columns for every metric and shot that is shown."""
    values = {name: by_run(rows, *key) for name, key in shown.items()}
    lines = []
    for key in sorted(next(iter(values.values())), key=_order(rows)):
        a, b = ((*key[:2], "vanilla", conr, key[4]) for conr in ("", "paper"))
        if key != a or not all(b in t for t in values.values() if a in t):
            continue
        line = [label(key), str(max(paired(t[a], t[b]).n for t in values.values() if a in t))]
        for errors in values.values():
            if a in errors:
                change = paired(errors[a], errors[b], relative)
                line += [f"{mean(errors[a]):.3g} → {mean(errors[b]):.3g}"]
                line += [marked(change, " %" if relative else "")]
            else:
                line += ["–", ""]
        lines.append(line)
    columns = [text for name in shown for text in (name, "change")]
    return table(["L1 → L1 + ConR", "seeds", *columns], lines) if lines else ""


def _order(rows: list[Row]) -> Callable[[tuple], tuple]:
    """Data sets and protocols as they come, batches by size."""
    places = {name: k for k, name in enumerate(dict.fromkeys((r.data, r.protocol) for r in rows))}
    return lambda key: (places[key[:2]], key[4])


FEW, BALANCED = {"few MAE": ("MAE", "few")}, {"bMAE": ("bMAE", "all")}


def effect(found: Rows) -> str:
    """ConR's effect on the plain L1 loss, one line per data set."""
    shown = FEW | BALANCED | {"many MAE": ("MAE", "many")}
    return changes(found["table"], shown, lambda key: key[0], relative=True)


def _effect(found: Rows) -> str:
    return "# Does ConR help?\n\n" + NOTE + "\n\n" + effect(found)


NOTE = (
    "Test errors, mean over seeds; changes are paired by seed, with a 95 % t interval, bold where "
    "it leaves out 0. A negative change is an improvement. The test rows are the same for all "
    "seeds; a seed draws validation and training rows, initial weights, batches and views."
)


def _settings(found: Rows) -> str:
    if not found["tune"]:
        return ""
    names = sorted({row.method for row in found["tune"]} - {"vanilla"})
    chosen = plan.choose(found["tune"])
    lines = []
    for name in dict.fromkeys(row.data for row in found["tune"]):
        weight, window = chosen.conr.get(name, (float("nan"), float("nan")))
        added = [
            f"{chosen.weights[name, t]:g}" if (name, t) in chosen.weights else "–" for t in names
        ]
        lines.append([name, f"{weight:g}", f"{window:g}", *added])
    head = ["data", "β of ConR", "window / the data's", *names]
    text = "Chosen by bMAE on validation sets, mean over seeds that no table has."
    return f"## Settings\n\n{text}\n\n{table(head, lines)}"


def _methods(found: Rows) -> str:
    parts = []
    errors = {key: by_run(found["table"], *key) for key in ERRORS}
    for name in dict.fromkeys(row.data for row in found["table"]):
        lines = []
        for method in dict.fromkeys(row.method for row in found["table"]):
            a, b = ((name, "natural", method, conr, 64) for conr in ("", "paper"))
            for key in (a, b):
                if key not in errors["bMAE", "all"]:
                    continue
                label = method + (" + ConR" if key[3] else "")
                line = [label, str(len(errors["bMAE", "all"][key]))]
                for metric in ERRORS:
                    values = errors[metric].get(key)
                    line.append(f"{mean(values):.3g}" if values else "–")
                for metric in (("MAE", "few"), ("bMAE", "all")):
                    base, own = errors[metric].get(a), errors[metric].get(key)
                    is_pair = key[3] and base and own
                    line.append(marked(paired(base, own)) if is_pair else "")
                lines.append(line)
        heads = [f"{metric} {shot}" if metric == "MAE" else metric for metric, shot in ERRORS]
        head = ["method", "seeds", *heads, "ConR: few", "ConR: bMAE"]
        parts.append(f"### {name}\n\n{table(head, lines)}")
    return "## All methods\n\n" + "\n\n".join(parts) if parts else ""


def _variants(found: Rows) -> str:
    """Ablations, sweeps and protocols: each against the paper's loss, or against no ConR."""
    parts = []
    for stage, describe in (("ablations", lambda row: row.conr), ("sweeps", _setting)):
        parts += _against_first(found, stage, describe)
    return "\n\n".join(parts)


def _setting(row: Row) -> str:
    return f"β {row.conr_weight:g}, window × {row.window:g}, push × {row.push:g}"


def _against_first(found: Rows, stage: str, describe: Callable[[Row], str]) -> list[str]:
    parts = []
    for name in dict.fromkeys(row.data for row in found[stage]):
        values: dict[str, dict[str, dict[int, float]]] = {}
        for row in found[stage]:
            metric = {("MAE", "few"): "few", ("bMAE", "all"): "bMAE"}.get((row.metric, row.shot))
            if row.data == name and metric:
                per_seed = values.setdefault(describe(row), {}).setdefault(metric, {})
                per_seed[row.seed] = row.value
        first = next(iter(values.values()))
        lines = []
        for label, errors in values.items():
            line = [label]
            for metric in ("few", "bMAE"):
                line += [f"{mean(errors[metric]):.3g}"]
                line += ["" if errors is first else marked(paired(first[metric], errors[metric]))]
            lines.append(line)
        head = [name, "few MAE", "change", "bMAE", "change"]
        parts.append(f"## {stage.capitalize()}, {name}\n\n{table(head, lines)}")
    return parts


def _protocols(found: Rows) -> str:
    shown = FEW | {"zero MAE": ("MAE", "zero")} | BALANCED
    lines = changes(found["protocols"], shown, lambda key: f"{key[0]}, {key[1]}")
    text = "Zero: test rows in bins without a training row."
    return f"## Label protocols\n\n{text}\n\n{lines}" if lines else ""


def _large(found: Rows) -> str:
    lines = changes(found["large"], FEW | BALANCED, lambda key: f"{key[0]}, batch {key[4]:,}")
    text = "6 epochs, but at least 60 steps; the learning rate grows with the batch's root, to 4×."
    return f"## Large batches: errors\n\n{text}\n\n{lines}" if lines else ""


Cost = dict[tuple[str, int, str, str, str], dict[str, float]]


def costs(found: Rows) -> Cost:
    """``(data, batch, method, conr, backend)`` → metric → value."""
    values: Cost = {}
    for row in found["cost"]:
        key = (row.data, row.batch, row.method, row.conr, row.backend)
        values.setdefault(key, {})[row.metric] = row.value
    return values


def _cost_of_methods(found: Rows) -> str:
    values = costs(found)
    lines = []
    for (name, batch, method, conr, backend), cost in values.items():
        if name == next(iter(values))[0] and batch == 64:
            kind = {"auto": " + ConR, fused", "reference": " + ConR, eager"}
            lines.append([method + (kind[backend] if conr else ""), *_cost_text(cost)])
            head = [f"{name}, batch {batch}", "seconds per epoch", "peak memory of a step"]
    return f"## Cost of each method\n\n{table(head, lines)}" if lines else ""


def _cost_of_batches(found: Rows) -> str:
    values = costs(found)
    lines = []
    for (name, batch, _, conr, _), base in values.items():
        forms = [values.get((name, batch, "vanilla", "paper", t)) for t in FORMS]
        if conr or name == next(iter(values))[0] or forms[0] is None:
            continue
        line = [f"{name}, {batch:,}", *_cost_text(base)]
        for form, cost in zip(FORMS, forms, strict=True):
            reason = "does not fit" if form == "reference" else ""
            line += _cost_text(cost) if cost else [reason, ""]
        lines.append(line)
    head = ["data, batch"]
    for label in ("L1", "+ ConR fused", "+ ConR eager", "+ ConR fused, gradient_cache"):
        head += [label, ""]
    text = (
        "Seconds per epoch (of the process, one thread) and peak memory of a step. Eager does not "
        f"fit: its pair matrices would take more than {bytes_text(MEMORY_BUDGET)}."
    )
    parts = ["## Cost over the batch", text, table(head, lines), "\n".join(claims(found))]
    return "\n\n".join(parts) if lines else ""


#: Forms of ConR beside each other: fused, eager, fused with the encoder in chunks.
FORMS = ("auto", "reference", "gradient_cache")


def _cost_text(cost: dict[str, float]) -> list[str]:
    return [seconds_text(cost["epoch seconds"]), bytes_text(cost["peak bytes"])]


def claims(found: Rows) -> list[str]:
    """Whether an epoch with fused ConR takes at most eager's seconds, and, from 1,024 rows on,
    whether what ConR adds to it is at most a third of what eager adds."""
    values, lines = costs(found), []
    for (name, batch, method, conr, _), base in values.items():
        both = [values.get((name, batch, "vanilla", "paper", t)) for t in FORMS[:2]]
        if conr or method != "vanilla" or None in both:
            continue
        fused, eager = (cost["epoch seconds"] for cost in both)
        added = (fused - base["epoch seconds"]) / (eager - base["epoch seconds"])
        is_met = fused <= eager and (batch < 1024 or added <= 1 / 3)
        lines.append(
            f"- {'met' if is_met else 'MISSED'}: {name}, batch {batch:,}: fused, an epoch takes "
            f"{fused / eager:.2f} of eager's, and ConR adds {added:.2f} of what eager adds"
        )
    return lines


def _duration(found: Rows) -> str:
    lines = []
    for stage, rows in found.items():
        seconds = [row.value for row in rows if row.metric == LAST]
        if seconds:
            lines.append([stage, str(len(seconds)), seconds_text(sum(seconds))])
    devices = sorted({(row.device, row.torch) for rows in found.values() for row in rows})
    text = "; ".join(f"{device}, torch {version}" for device, version in devices)
    text = f"One thread, {text}. Training alone (of cost: one epoch per case)."
    return f"## Duration\n\n{text}\n\n{table(['stage', 'runs', 'in all'], lines)}" if lines else ""


SECTIONS = (
    _effect, _settings, _methods, _variants, _protocols, _large, _cost_of_methods, _cost_of_batches,
    _duration,
)  # fmt: skip


def fill(readme: Path, text: str) -> None:
    """Puts the table between the marks of a README."""
    old = readme.read_text(encoding="utf-8")
    head, rest = old.split(START)
    _, tail = rest.split(END)
    readme.write_text(f"{head}{START}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    print(write(folder))
    if len(sys.argv) <= 1:
        fill(Path(__file__).parent / "README.md", effect(load(folder)))
