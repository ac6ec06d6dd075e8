"""The stage that measures what constants of the launches decide, in whole steps as CUDA graphs: the
ways of a size take turns, so that a change of pace meets all.

``"sorted"`` against ``"once"`` is what MIRRORED_ROWS and MIRRORED_BYTES of ``call.py`` choose: with
``MIRRORED_ROWS = (2**31,) * 3`` nothing takes a pair once, with its third number alone what
``"listed"`` does is left. ``"sorted"`` against ``"every pair"`` is DENSE_PAIRS of
``launch_dense.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ...static import compiled
from .. import device
from ..rows import Stage
from .providers import BF16, COLLAPSED, F32, LIMITS, PROVIDERS, Size

#: Replays whose bits are compared; turns of a time; steps of a turn with their host.
REPEATS, TURNS, STEPS = (2 if device.REHEARSAL else 15), 7, (1 if device.REHEARSAL else 20)
#: Steps of each way whose kernels are timed by themselves.
STEPS_PROFILED = 5
Graph = tuple[Callable[[], None], Callable[[], Tensor]]


class Choice(NamedTuple):
    """The paths of a size's step (``device.path``) by name; the precision of float32 products."""

    size: Size
    ways: dict[str, str]
    precision: str = "highest"

    def __str__(self) -> str:
        return f"{self.size} {self.precision}: {', '.join(self.ways)}"


def paths(size: Size, *names: str, precision: str = "highest") -> Choice:
    of = "" if precision == "highest" else f" at {precision}"  # no two choices share rows
    return Choice(size, {name + of: name for name in names}, precision)


ONCE = ("sorted", "once")
#: Those whose kernels are timed by themselves too: the asked sizes, and the largest of few rows.
PROFILED = [
    paths(Size(65_536), *ONCE),
    paths(Size(16_384, 2048), *ONCE, "listed"),
    paths(Size(4096), "every pair", "sorted"),
    paths(Size(65_536, 512), *ONCE, "listed"),
    paths(Size(16_384), *ONCE),
    paths(Size(16_384, 512), *ONCE, "listed"),
]
#: The most wanted: between the sizes of MIRRORED_ROWS. Then DENSE_PAIRS.
FIRST = [
    *(paths(Size(n), *ONCE) for n in (24_576, 49_152)),
    *(paths(Size(32_768, d), *ONCE) for d in (128, 64, 256)),
    paths(Size(32_768, 128, F32), *ONCE),
    *PROFILED,
]
REST = [
    *(paths(Size(n), "every pair", "sorted") for n in (3072, 2048, 6144)),
    *(paths(Size(65_536, 128, F32), *ONCE, precision=how) for how in ("highest", "high")),
    *(paths(Size(65_536, d, regime=COLLAPSED), *ONCE) for d in (128, 512)),
    *(paths(Size(n, 512), *ONCE, "listed") for n in (8192, 4096)),
    *(paths(Size(65_536, d), *ONCE) for d in (64, 256)),
    paths(Size(2**20), *ONCE),
]
CHOICES = FIRST + REST


def calls() -> Iterator[dict[str, object]]:
    """Of every way, the path and the arguments of ``compiled.recorded_launches``."""
    for size, ways, precision in CHOICES:
        of = dict(N=size.N, D=size.D, dtype=size.dtype, precision=precision)
        yield from (of | dict(path=path) for path in ways.values())


def choose(stage: Stage, choice: Choice) -> None:
    """Times of every way that is right."""
    size, ways, precision = choice
    step = functools.partial(PROVIDERS["triton"].step, size.batch())
    row = dict(provider="triton", **size.row())
    graphs: dict[str, Graph] = {}
    with compiled.matmul_precision(precision):
        for name, path in ways.items():
            with device.path(path):
                graphs[name] = device.graph(step)
        limit = 2 * LIMITS[size.dtype if precision == "highest" else BF16][1]
        right = right_ones(stage, row, graphs, limit)
        if not right:
            return
        n = device.steps_in_a_row(max(device.seconds(right, 1).values()))
        for name, t in device.seconds(right, TURNS, n).items():
            note = f"{precision}, median of {TURNS}"
            stage.add("time", t, **row, mode=f"cuda graph, {name}", note=note)
        if "every pair" in right:
            with_hosts(stage, row, step, list(right))


def right_ones(
    stage: Stage, row: dict[str, object], graphs: dict[str, Graph], limit: float
) -> dict[str, Callable[[], None]]:
    """Replays of the ways whose gradient has the same bits every time and is the first one's to
    rounding.
    """
    right, expected = {}, None
    for name, (replay, results) in graphs.items():
        replay()
        found, equal = results().clone(), 0
        for _ in range(REPEATS):
            replay()
            equal += results().equal(found)
        expected = found if expected is None else expected
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        of_way = row | dict(mode=f"cuda graph, {name}")
        stage.add("equal replays", equal, **of_way, note=f"of {REPEATS}")
        stage.add("difference", difference, **of_way)
        if equal == REPEATS and difference <= limit:
            right[name] = replay
        else:
            stage.add("wrong", 1, **of_way, note=f"{equal} of {REPEATS} replays are equal, "
                      f"difference {difference:.2g} of {limit:g} at most: not timed")  # fmt: skip
    return right


def with_hosts(
    stage: Stage, row: dict[str, object], step: Callable[[], Tensor], names: list[str]
) -> None:
    """Steps in a row, as a training loop launches them."""

    def in_a_row(name: str) -> None:
        with device.path(name):
            for _ in range(STEPS):
                step()

    runs = {name: functools.partial(in_a_row, name) for name in names}
    for name, t in device.seconds(runs, TURNS).items():
        stage.add("time", t / STEPS, **row, mode=f"forward+backward, {name}")


def kernel_times(stage: Stage, choice: Choice) -> None:
    """Of every kernel of a step of each way, by the profiler, which may slow what comes later:
    all ways of a choice alike.
    """
    activity = ProfilerActivity.CPU if device.REHEARSAL else ProfilerActivity.CUDA
    step = functools.partial(PROVIDERS["triton"].step, choice.size.batch())
    for name, path in choice.ways.items():
        with device.path(path):
            step()
            device.synchronize()
            with profile(activities=[activity]) as found:
                for _ in range(STEPS_PROFILED):
                    step()
                device.synchronize()
        row = dict(provider="triton", **choice.size.row())
        for event in found.key_averages():
            seconds = event.self_device_time_total / STEPS_PROFILED / 1e6
            if seconds or device.REHEARSAL:
                mode, note = f"{event.key[:60]}, {name}", f"{event.count / STEPS_PROFILED:g} a step"
                stage.add("kernel time", seconds, **row, mode=mode, note=note)


def choices(stage: Stage) -> int:
    """The ways of every choice, and the kernels of some."""

    def ways(of: list[Choice]) -> dict[str, Callable[[], None]]:
        return {str(choice): functools.partial(choose, stage, choice) for choice in of}

    cases = ways(FIRST)
    for choice in PROFILED[: 1 if device.REHEARSAL else None]:
        cases[f"kernels, {choice}"] = functools.partial(kernel_times, stage, choice)
    return stage.run(cases | ways(REST))
