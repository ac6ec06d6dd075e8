"""Turns a run into its rows: splits, trains, scores."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from . import data, metrics
from .methods import ADDED, REPLACING, ConR, Method
from .plan import Size
from .rows import LAST, Row, Run
from .splits import Split, split
from .train import LEARNING_RATE, Budget, Net, predictions, train

#: Of the large-batch study: epochs, but at least so many steps, and the most by which the learning
#: rate grows with the root of the batch.
LARGE_EPOCHS, LEAST_STEPS, LARGEST_RATE_FACTOR = 6, 60, 4.0


def parts_of(run: Run, window: float, backend: str = "auto") -> list[Method]:
    """The methods that a run's names and settings stand for; ``window`` is the data's own."""
    makes = REPLACING.get(run.method) or ADDED[run.method]
    parts = [makes(run.weight)]
    if run.conr:
        parts.append(ConR(run.conr_weight, run.window * window, run.push, run.conr, backend))
    return parts


def split_of(run: Run, size: Size) -> Split:
    n_train = size.n_large_rows if run.stage == "large" else size.n_train
    return split(data.load(run.data), run.seed, run.protocol, n_train)


def budget_of(run: Run, size: Size, n_train: int) -> Budget:
    if run.stage != "large":
        return Budget(run.batch, size.n_steps)
    factor = min(math.sqrt(run.batch / 64), LARGEST_RATE_FACTOR)
    n_steps = max(LARGE_EPOCHS * (n_train // run.batch), LEAST_STEPS)
    return Budget(run.batch, n_steps, factor * LEARNING_RATE)


def execute(run: Run, size: Size, device: str, common: Mapping[str, str]) -> Iterator[Row]:
    """Trains and yields the scores of the test set, the validation bMAE and the seconds.

    A tuning run yields no score of the test set: it could not be chosen by one.
    """
    sample = split_of(run, size)
    start = time.perf_counter()
    budget = budget_of(run, size, len(sample.train.labels))
    net = train(sample, parts_of(run, data.load(run.data).window), run.seed, budget, device)
    seconds = time.perf_counter() - start

    fields = asdict(run) | common
    if run.stage != "tune":
        for (shot, metric), value in test_scores(net, sample).items():
            yield Row(**fields, shot=shot, metric=metric, value=value)
    p = predictions(net, sample.validation.inputs)
    errors = metrics.row_errors(p, sample.validation.labels)
    value = metrics.balanced_mae(errors, sample.validation.labels)
    yield Row(**fields, metric="validation bMAE", value=value)
    yield Row(**fields, metric=LAST, value=seconds)


def test_scores(net: Net, sample: Split) -> dict[tuple[str, str], float]:
    p = predictions(net, sample.test.inputs)
    return metrics.scores(p, sample.test.labels, sample.shots(sample.test))


def bin_errors(net: Net, sample: Split) -> Iterator[tuple[int, float]]:
    """``(bin, mean error)`` of the test set's bins."""
    p = predictions(net, sample.test.inputs)
    errors = metrics.row_errors(p, sample.test.labels)
    for b in sample.test.bins.unique():
        yield int(b), errors[sample.test.bins == b].mean().item()
