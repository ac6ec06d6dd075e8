"""What the stages of ``make gpu`` do, without a GPU: kernels compiled ahead, proposals, reasons."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.jit import JITFunction

from benchmarks.gpu import device, rows
from benchmarks.gpu.stages import choices, counters, dense, packages, providers, speed, tune, warm
from benchmarks.gpu.stages.providers import F32, Size
from benchmarks.static import compiled
from benchmarks.static.shipped import specialization
from conr_kernels import conr_loss, triton_backend
from conr_kernels.triton_backend.configs import KINDS, TABLE, Config
from tests.gpu import test_gpu
from tests.helpers.triton_kernels import kernels_of

NCU = """==PROF== Connected to process 7
a line of the program
"ID","Kernel Name","sm__cycles_active.avg","sm__cycles_active.max",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__issue_active.avg.pct_of_peak_sustained_active"
"","","cycle","cycle","%","%","%"
"0","conr_a_kernel","1,000","1,100","37.5","12.5","30"
"1","conr_a_kernel","100","100","1","1","1"
"2","conr_b_kernel","50","60","0","6","99"
"""


def test_counters_of_every_kernels_slowest_launch_are_read():
    found = counters.parsed(NCU)
    assert list(found) == ["conr_a_kernel", "conr_b_kernel"]
    of_a = {"tensor pipe": 37.5, "occupancy": 12.5, "no eligible warp": 70, "imbalance": 10}
    assert found["conr_a_kernel"] == pytest.approx(of_a)
    assert found["conr_b_kernel"]["imbalance"] == pytest.approx(20)
    assert counters.parsed("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_the_profiler_is_asked_for_every_kernel(monkeypatch):
    commands = []

    def start(command: list[str]) -> None:
        commands.append(command)
        raise KeyboardInterrupt

    stage = rows.Stage("counters", 10.0)
    monkeypatch.setattr(stage, "start", start)
    with pytest.raises(KeyboardInterrupt):
        counters.profile(stage, "ncu", Size(512))
    (command,) = commands
    pattern = command[command.index("--kernel-name") + 1].removeprefix("regex:")
    assert all(re.search(pattern, name) for name in kernels_of())
    assert command[command.index("--clock-control") + 1] == "none"


def test_what_is_missing_is_not_run_and_says_why(monkeypatch, capsys):
    monkeypatch.setattr(device, "REHEARSAL", False)
    monkeypatch.setattr(device.shutil, "which", lambda name, path=None: None)
    stage = rows.Stage("counters", 10.0)
    assert counters.counters(stage) == 0 and "ncu is not installed" in capsys.readouterr().out
    monkeypatch.setattr(packages, "MODULES", {"memeff": "no_such_module"})
    monkeypatch.setattr(device, "DEVICE", "cpu")
    speed.measure(stage, Size(20, 16), ["memeff"])
    out = capsys.readouterr().out
    assert '"metric": "not run"' in out and '"note": "ModuleNotFoundError' in out


def test_a_wrong_provider_is_not_timed(monkeypatch, capsys):
    plain = providers.PROVIDERS["eager"]
    wrong = replace(plain, losses=lambda *args: plain.losses(*args) * 1.1)
    monkeypatch.setitem(providers.PROVIDERS, "triton", wrong)
    monkeypatch.setattr(device, "DEVICE", "cpu")
    monkeypatch.setattr(device, "synchronize", lambda: None)
    monkeypatch.setattr(device, "bytes_free", lambda: 2**34)
    monkeypatch.setattr(device, "extra_bytes", lambda function: 1)
    monkeypatch.setattr(device, "seconds", lambda functions, *_: dict.fromkeys(functions, 0.5))
    stage = rows.Stage("speed", 100.0)
    size = Size(300, 16, torch.float32)
    speed.measure(stage, size, ["triton", "eager", "q @ q.T"])
    out = capsys.readouterr().out
    timed = [line for line in out.splitlines() if '"metric": "time"' in line]
    assert stage.status == 1 and '"metric": "wrong"' in out
    assert ["eager" in timed[0], "q @ q.T" in timed[1], len(timed)] == [True, True, 2]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("n_rows", "least"), [(300, 4), (4200, 7)])
def test_kernels_compiled_ahead_are_those_that_calls_look_for(
    monkeypatch, n_rows, least, reduction
):
    """Few rows, and the sweeps: a step of the mean or of single losses, forward and backward."""

    call = warm.call_of(N=n_rows, D=16, dtype=torch.float16, precision="highest",
                        reduction=reduction)  # fmt: skip
    plain, looked_for = JITFunction.run, set()

    def without_launch(kernel, *args, grid, warmup, **options):
        looked_for.add(plain(kernel, *args, grid=grid, warmup=True, **options).hash)

    work = warm.distinct([call, call], 90)
    ahead = set()
    with mock.patch.object(JITFunction, "run", autospec=True) as launcher:
        launcher.side_effect = lambda *a, **k: ahead.add(plain(*a, **k).hash)
        assert {warm.compile_one(*task, 90) for task in work} == {""}
    x, y = torch.randn(n_rows, 16).half().requires_grad_(), torch.rand(n_rows)
    with warm.compiling_for(90), mock.patch.object(JITFunction, "run", without_launch):
        monkeypatch.setattr(triton_backend, "unavailable", lambda *_: None)
        conr_loss(x, y, y, y, backend="triton", reduction=reduction).sum().backward()
    assert len(ahead) == len(work) >= least and looked_for == ahead


def arguments_of(function) -> Iterator[dict[str, object]]:
    """Of every case of a test."""
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    names = [[mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0] for mark in marks]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        found: dict[str, object] = {}
        for of, value in zip(names, values, strict=True):
            found |= zip(of, [value] if len(of) == 1 else value, strict=True)
        yield found


def test_every_kernel_that_the_gpu_tests_launch_is_compiled_ahead(monkeypatch):
    class Recorded(Exception):
        pass

    looked_for = {}

    def record(rows, backend, path="", *, wide=False, **options):
        (N, D), L = rows[0].shape, rows[1].shape[1]
        of = dict(reduction="none", precision=torch.get_float32_matmul_precision()) | options
        with device.path(path):
            launches = compiled.recorded_launches(N, D, rows[0].dtype, 90, L=L, **of)
        looked_for.update({specialization(launch): of | {"N": N, "D": D} for launch in launches})
        raise Recorded

    def rows_of(N, D, dtype, L=1):
        x, y, w = (torch.empty(shape, device="meta") for shape in ((N, D), (N, L), (N,)))
        return x.to(dtype), y, y.clone(), w, w

    monkeypatch.setattr(test_gpu, "loss_and_gradient", record)
    monkeypatch.setattr(test_gpu, "conr_loss", lambda x, *rest, backend, reduction: record(
        (x, *rest), backend, reduction=reduction))  # fmt: skip
    monkeypatch.setattr(test_gpu, "batch", rows_of)
    monkeypatch.setattr(device, "bytes_free", lambda: 2**40)
    monkeypatch.setattr(device, "DEVICE", "meta")
    monkeypatch.setattr(device, "graph", lambda function: function())
    left_out = "test_auto_picks_triton", "test_a_synchronisation_would_show"
    for name, function in vars(test_gpu).items():
        if name.startswith("test_") and name not in left_out:
            for case in arguments_of(function):
                has_precision = "matmul_precision" in inspect.signature(function).parameters
                for how in ("highest", "high") if has_precision else ("highest",):
                    given = case | ({"matmul_precision": how} if has_precision else {})
                    with compiled.matmul_precision(how), pytest.raises(Recorded):
                        function(**given)
    ahead = {specialization(launch) for call in warm.calls("tests")
             for launch in warm.launches(call, 90)}  # fmt: skip
    assert len(looked_for) > 500
    assert not (missing := set(looked_for) - ahead), looked_for[missing.pop()]


def test_a_run_of_few_stages_compiles_what_they_launch():
    sizes, found = speed.sizes(), {name: warm.calls(name) for name in ("speed", "choices", "tests")}
    assert {Size(65_536), Size(2**20), Size(16_384, 2048), Size(65_536, 128, F32)} < set(sizes)
    assert len(found["speed"]) == 2 * len(sizes) + 1  # the comparator's
    assert set(found["speed"]) < set(found["choices"]) and set(found["speed"]) < set(found["tests"])
    assert set(found["choices"]) | set(found["tests"]) < set(warm.calls())
    of_sanitizer = set(warm.calls("sanitizer")) - set(found["speed"])
    assert of_sanitizer and {dict(call)["has_weights"] for call in of_sanitizer} == {False}


def test_no_two_choices_share_a_row() -> None:
    """Whose latest would stand for both."""
    keys = [(size, name) for size, ways, _ in choices.CHOICES for name in ways]
    assert len(set(keys)) == len(keys)


def test_a_path_chooses_the_kernels():
    def names(path: str, d: int = 128) -> set[str]:
        call = warm.call_of(N=1100, D=d, dtype=torch.bfloat16, path=path)
        return {launch.name.removeprefix("conr_").removesuffix("_kernel")
                for launch in warm.launches(call, 90)}  # fmt: skip

    assert names("") == names("every pair") > {"dense_sums"}
    assert {"forward", "backward_parts"} < names("sorted") and "mirrored" not in names("sorted")
    assert {"mirrored", "mirrored_sums"} < names("once") and "forward" not in names("once")
    assert names("once, in turns") - names("once") == {"backward"}
    assert "mirrored" in names("once", 300) and "forward" in names("listed", 300)
    for path, is_mirrored in (("sorted", False), ("listed", True), ("once", True)):
        call = warm.call_of(N=1100, D=300, dtype=torch.bfloat16, path=path)
        (listing,) = [of for of in warm.launches(call, 90) if "wide_list" in of.name]
        assert listing.arguments["MIRRORED"] is is_mirrored


def choose(monkeypatch, capsys, **gradients) -> tuple[int, list[tuple[str, str]]]:
    """The exit status, and metrics of a choice between ways that replay these gradients."""
    taken = []

    @contextlib.contextmanager
    def take(path):
        taken.append(path)
        yield

    def graph(step):
        gradient = gradients[taken[-1]]
        held = [gradient()]
        return lambda: held.__setitem__(0, gradient()), lambda: held[0]

    monkeypatch.setattr(device, "path", take)
    monkeypatch.setattr(device, "graph", graph)
    monkeypatch.setattr(device, "DEVICE", "cpu")
    monkeypatch.setattr(device, "seconds", lambda functions, *_: dict.fromkeys(functions, 0.5))
    choice = choices.paths(Size(20, 16), *gradients)
    stage = rows.Stage("choices", 100.0)
    status = stage.run({"case": functools.partial(choices.choose, stage, choice)})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(rows.ROW)]
    found = [json.loads(line.removeprefix(rows.ROW)) for line in lines]
    return status, [(row.get("mode", "").removeprefix("cuda graph, "), row["metric"])
                    for row in found]  # fmt: skip


def test_ways_that_differ_by_a_bit_or_by_much_are_not_timed(monkeypatch, capsys):
    x, n = torch.ones(3), itertools.count()
    gradients = {
        "sorted": lambda: x,
        "once": lambda: x + 1e-3,
        "far": lambda: x * 1.2,
        "other": lambda: x + 1e-6 * (next(n) == 9),
        "nan": lambda: x * torch.nan,
    }
    status, found = choose(monkeypatch, capsys, **gradients)
    assert [way for way, metric in found if metric == "wrong"] == ["far", "other", "nan"]
    assert [way for way, metric in found if metric == "time"] == ["sorted", "once"]
    assert status == 1


def test_a_path_that_fails_is_a_failure(monkeypatch, capsys):
    def fail() -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    status, _ = choose(monkeypatch, capsys, sorted=lambda: torch.ones(3), once=fail)
    assert status == 1


def test_a_candidate_is_launched_by_the_kernels_of_its_kind_alone(monkeypatch):
    monkeypatch.setattr(device, "DEVICE", "cpu")
    assert {kind for kind, *_ in tune.ITEMS} == set(KINDS) - {"product"}
    for kind, size, how in tune.ITEMS:
        near = tune.neighbours(kind, size, how)
        assert len(near) >= 3 and len(set(near)) == len(near)
        odd = replace(near[0], num_warps=16, num_stages=7)  # as no shipped entry
        call = warm.call_of(N=size.N, D=size.D, dtype=size.dtype, precision=how,
                            tried=(kind, odd))  # fmt: skip
        marked = [n for n in warm.launches(call, 90) if n.options.get("num_stages") == 7]
        assert marked, (kind, size)
        assert {launch.arguments["BLOCK_I"] for launch in marked} == {odd.BLOCK_I}
        of_other = {"forward": "backward", "backward": "forward", "wide": "forward_"}
        of_other["mirrored"] = "forward_"
        if other := of_other.get(kind):
            assert not any(other in launch.name for launch in marked), kind


def test_the_dense_comparators_kernels_are_compiled_ahead_with_all_their_candidates():
    found = [
        (launch.name, *(launch.arguments[side] for side in ("BLOCK_I", "BLOCK_J")), launch.options)
        for launch in warm.launches(warm.call_of(dense=128), 90)
    ]
    for kernel in (dense.dense_forward_kernel, dense.dense_backward_kernel):
        for config in kernel.configs:
            launch = {k: v for k, v in config.all_kwargs().items() if k not in config.kwargs}
            assert (kernel.base_fn.__name__, *config.kwargs.values(), launch) in found


def test_a_proposed_entry_has_the_form_of_the_shipped_ones(monkeypatch):
    monkeypatch.setattr(device, "DEVICE", "cpu")
    line = tune.entry("backward", Size(512), "high", Config(64, 128, 128, 4, 2))
    assert line.startswith("bfloat16, backward: (") and "128, (64, 128, None, 4, 2))," in line
    proposed = eval(line.split(": ")[1].rstrip(","))
    for shipped in TABLE["bfloat16"]["backward"]:
        assert len(shipped) == len(proposed) and len(shipped[2]) in (len(proposed[2]), 7)
    line = tune.entry("forward", Size(512), "high", Config(64, 64, 128, 4, 3, 128, True))
    assert "128, (64, 64, None, 4, 3, 128, True))," in line
    line = tune.entry("wide", Size(512, 512), "high", Config(128, 128, 64, 8, 3, 128))
    assert "(128, 128, 64, 8, 3, 128))," in line
    line = tune.entry("forward", Size(512, 512, F32), "high", Config(64, 32, 16, 4, 3))
    assert line == "float32, forward: (90, 0, (64, 32, 16, 4, 3)),"
