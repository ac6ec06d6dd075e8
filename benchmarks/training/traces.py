"""What a training run looks like: the loss over its floor, anchors, collapse, errors, features."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

from . import data, metrics
from .execute import bin_errors, budget_of, parts_of, split_of, test_scores
from .floor import floor_and_anchors
from .methods import ConR, Step
from .plan import Size
from .rows import LAST, Row, Run
from .splits import Split
from .train import Net, predictions, prepare, train

#: Values of y at which the collapse penalty is taken, and the rows of the feature map.
N_VALUES, N_POINTS = 40, 250


class Watcher:
    """Means over each epoch of what ConR sees, whether it is trained with or not."""

    def __init__(self, conr: ConR, sample: Split) -> None:
        self.conr, self.sample = conr, sample
        self.sums: dict[tuple[str, int], list[float]] = defaultdict(list)

    def __call__(self, epoch: int, step: Step, net: Net) -> None:
        floor, anchors = floor_and_anchors(step.y, step.p, self.conr.window)
        with torch.no_grad():
            loss = self.conr.term(step).item()
        is_first = ("loss", epoch) not in self.sums
        found = {"loss": loss, "floor": floor, "excess": loss - floor, "anchors": anchors}
        if is_first:
            found["collapse"] = self.penalties(net).mean().item()
        for name, value in found.items():
            self.sums[name, epoch].append(value)

    def values(self) -> Tensor:
        """Where the collapse penalty is taken: over the range of the test labels."""
        y = self.sample.test.labels.mean(dim=1)
        return torch.linspace(y.min().item(), y.max().item(), N_VALUES)

    def penalties(self, net: Net) -> Tensor:
        test = self.sample.test
        p, y = predictions(net, test.inputs).mean(dim=1), test.labels.mean(dim=1)
        return metrics.collapse_penalty(p, y, self.values(), self.conr.window)


def trace(run: Run, size: Size, device: str, common: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a run with everything that a picture shows; ``shot`` is a bin's or a row's."""
    sample = split_of(run, size)
    window = data.load(run.data).window
    budget = budget_of(run, size, len(sample.train.labels))
    seen = parts_of(replace(run, conr="paper"), window)[1]
    seen.start(prepare(sample, budget.batch, budget.n_steps, device)[0])
    watcher = Watcher(seen, sample)
    start = time.perf_counter()
    net = train(sample, parts_of(run, window), run.seed, budget, device, watcher)
    seconds = time.perf_counter() - start

    def row(metric: str, value: float, at: float = 0.0, shot: str = "all") -> Row:
        return Row(**asdict(run), **common, metric=metric, value=value, at=at, shot=shot)

    for (shot, metric), value in test_scores(net, sample).items():
        yield row(metric, value, shot=shot)
    for (name, epoch), values in watcher.sums.items():
        yield row(f"epoch {name}", sum(values) / len(values), at=epoch)
    for at, value in zip(watcher.values(), watcher.penalties(net), strict=True):
        yield row("collapse penalty", value.item(), at=at.item())
    low = data.load(run.data).labels.mean(dim=1).min().item() // sample.bin_width
    for b, value in bin_errors(net, sample):
        yield row("bin MAE", value, at=(low + b + 0.5) * sample.bin_width)
    if run.seed == 0:
        for b, count in enumerate(sample.counts.tolist()):
            yield row("training rows", count, at=(low + b + 0.5) * sample.bin_width)
        for name, component in zip(("PC 1", "PC 2"), feature_map(net, sample), strict=True):
            for i, (label, value) in enumerate(component):
                yield row(name, value, at=label, shot=f"row {i}")
    yield row(LAST, seconds)


@torch.no_grad()
def feature_map(net: Net, sample: Split) -> list[list[tuple[float, float]]]:
    """``(label, coordinate)`` of test rows along the two main axes of their unit features."""
    every = slice(None, None, max(1, len(sample.test.inputs) // N_POINTS))
    inputs, labels = sample.test.inputs[every], sample.test.labels[every].mean(dim=1)
    q = torch.nn.functional.normalize(net.encoder(inputs.to(net.mean.device)).cpu(), dim=1)
    _, _, axes = torch.linalg.svd(q - q.mean(dim=0), full_matrices=False)
    x = (q - q.mean(dim=0)) @ axes[:2].T
    return [list(zip(labels.tolist(), x[:, k].tolist(), strict=True)) for k in range(2)]
