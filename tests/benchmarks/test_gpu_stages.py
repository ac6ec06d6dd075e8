"""What the stages of ``make gpu`` do, without a GPU: kernels compiled ahead, proposals, reasons."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.jit import JITFunction

from benchmarks.gpu import device, rows
from benchmarks.gpu.stages import counters, dense, packages, providers, speed, tune, warm
from benchmarks.gpu.stages.providers import F32, Size
from conr_kernels import conr_loss, triton_backend
from conr_kernels.triton_backend.configs import KINDS, TABLE, Config

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


@pytest.mark.parametrize(("n_rows", "least"), [(300, 4), (4200, 7)])
def test_kernels_compiled_ahead_are_those_that_calls_look_for(monkeypatch, n_rows, least):
    """Few rows, and the sweeps: a step of the mean, forward and backward."""

    call = warm.call_of(N=n_rows, D=16, dtype=torch.float16, precision="highest")
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
        conr_loss(x, y, y, y, backend="triton").backward()
    assert len(ahead) == len(work) >= least and looked_for == ahead


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
