"""Which runs make up a stage, and the settings that validation sets have chosen."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import methods
from .rows import Row, Run, read
from .splits import PROTOCOLS

STAGES = ("tune", "table", "ablations", "sweeps", "protocols", "traces", "large", "cost")
#: Seeds of the choice of settings; no seed of a table is among them.
TUNING_SEEDS = (1001, 1002)
WEIGHTS = (0.1, 0.5, 2.0)
WINDOWS = (1.0, 3.0)
ABLATIONS = ("contrastive", "no-pushing", "no-weight", "no-similarity")
#: Multiples of the chosen setting, one varied at a time.
FACTORS = (0.25, 0.5, 2.0, 4.0)


@dataclass(frozen=True)
class Size:
    """How much of everything is run."""

    data: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    n_steps: int
    n_train: int
    weights: tuple[float, ...]
    windows: tuple[float, ...]
    studied: tuple[str, ...]
    n_study_seeds: int
    large_data: tuple[str, ...]
    batches: tuple[int, ...]
    n_large_seeds: int
    n_large_rows: int

    def only(self, names: Collection[str]) -> Size:
        kept = {
            name: tuple(t for t in getattr(self, name) if t in names)
            for name in ("data", "studied", "large_data")
        }
        return replace(self, **kept)


FULL = Size(
    data=("abalone", "concrete", "fifa", "digits angle", "bikeshare", "digits shift"),
    methods=methods.NAMES, seeds=tuple(range(10)), n_steps=500, n_train=3000,
    weights=WEIGHTS, windows=WINDOWS, studied=("abalone", "digits angle"), n_study_seeds=5,
    large_data=("diamonds", "randhie"), batches=(64, 256, 1024, 4096, 16_384),
    n_large_seeds=3, n_large_rows=40_000,
)  # fmt: skip
QUICK = Size(
    data=("abalone", "fifa", "digits angle"),
    methods=("vanilla", "LDS", "Balanced MSE", "RankSim", "InfoNCE", "Rank-N-Contrast"),
    seeds=(0, 1, 2), n_steps=200, n_train=1500, weights=(0.5,), windows=(1.0,),
    studied=("abalone",), n_study_seeds=2, large_data=("diamonds",), batches=(64, 1024),
    n_large_seeds=1, n_large_rows=4096,
)  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """Chosen settings: ``(data, added method)`` → weight, ``data`` → weight and window of ConR."""

    weights: dict[tuple[str, str], float]
    conr: dict[str, tuple[float, float]]


def tuned(path: Path) -> Tuned:
    return choose(read(path) if path.exists() else ())


def choose(rows: Iterable[Row]) -> Tuned:
    """The settings with the smallest mean bMAE of the validation sets; test errors are not read."""
    errors: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        if row.stage == "tune" and row.metric == "validation bMAE":
            added = "ConR" if row.conr else row.method
            setting = (row.conr_weight, row.window) if row.conr else row.weight
            errors[row.data, added, setting].append(row.value)
    best: dict[tuple[str, str], tuple[float, object]] = {}
    for (name, added, setting), values in errors.items():
        candidate = (statistics.fmean(values), setting)
        best[name, added] = min(best.get((name, added), candidate), candidate)
    settings = {key: setting for key, (_, setting) in best.items()}
    return Tuned(
        weights={key: value for key, value in settings.items() if key[1] != "ConR"},
        conr={name: value for (name, added), value in settings.items() if added == "ConR"},
    )


def runs(stage: str, size: Size, chosen: Tuned) -> list[Run]:
    """The runs of a stage, seed by seed: an interrupted stage has fewer seeds of everything."""
    return list(_STAGES[stage](size, chosen))


def with_conr(run: Run, chosen: Tuned, variant: str = "paper") -> Run:
    weight, window = chosen.conr.get(run.data, (WEIGHTS[1], WINDOWS[0]))
    return replace(run, conr=variant, conr_weight=weight, window=window, push=1.0)


def with_method(run: Run, method: str, chosen: Tuned) -> Run:
    is_added = method in methods.ADDED
    weight = chosen.weights.get((run.data, method), WEIGHTS[1]) if is_added else 0.0
    return replace(run, method=method, weight=weight)


def _tune(size: Size, chosen: Tuned) -> Iterator[Run]:
    for name in dict.fromkeys((*size.data, *size.large_data)):
        for seed in TUNING_SEEDS:
            base = Run("tune", name, "vanilla", seed)
            for weight in size.weights:
                for window in size.windows:
                    yield replace(base, conr="paper", conr_weight=weight, window=window, push=1.0)
                for method in methods.ADDED:
                    if method in size.methods and name in size.data:
                        yield replace(base, method=method, weight=weight)


def _table(size: Size, chosen: Tuned) -> Iterator[Run]:
    for seed in size.seeds:
        for name in size.data:
            for method in size.methods:
                run = with_method(Run("table", name, method, seed), method, chosen)
                yield run
                yield with_conr(run, chosen)


def _ablations(size: Size, chosen: Tuned) -> Iterator[Run]:
    for seed in size.seeds[: size.n_study_seeds]:
        for name in size.studied:
            for variant in ("paper", *ABLATIONS):
                yield with_conr(Run("ablations", name, "vanilla", seed), chosen, variant)


def _sweeps(size: Size, chosen: Tuned) -> Iterator[Run]:
    for seed in size.seeds[: size.n_study_seeds]:
        for name in size.studied:
            run = with_conr(Run("sweeps", name, "vanilla", seed), chosen)
            yield run
            for field in ("conr_weight", "window", "push"):
                for factor in FACTORS:
                    yield replace(run, **{field: factor * getattr(run, field)})


def _protocols(size: Size, chosen: Tuned) -> Iterator[Run]:
    for seed in size.seeds[: size.n_study_seeds]:
        for name in size.studied:
            for protocol in [t for t in PROTOCOLS if t != "natural"]:
                run = Run("protocols", name, "vanilla", seed, protocol=protocol)
                yield run
                yield with_conr(run, chosen)


def _traces(size: Size, chosen: Tuned) -> Iterator[Run]:
    for seed in size.seeds[: size.n_study_seeds]:
        for name in size.studied:
            run = with_conr(Run("traces", name, "vanilla", seed), chosen)
            yield replace(run, conr="", conr_weight=0.0)  # seen through the same window
            yield run


def _large(size: Size, chosen: Tuned) -> Iterator[Run]:
    """The largest batch comes last and once: it takes minutes."""
    *usual, largest = size.batches
    cases = [(seed, batch) for seed in range(size.n_large_seeds) for batch in usual]
    for seed, batch in (*cases, (0, largest)):
        for name in size.large_data:
            run = Run("large", name, "vanilla", seed, batch=batch)
            yield run
            yield with_conr(run, chosen)


_STAGES = {
    "tune": _tune,
    "table": _table,
    "ablations": _ablations,
    "sweeps": _sweeps,
    "protocols": _protocols,
    "traces": _traces,
    "large": _large,
}
