"""The benchmark itself: what it compares, what it refuses to time, and what it measures."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import measure, plot, providers, report, rows
from benchmarks.batches import AGES, make_batch
from benchmarks.gpu import plan

BASELINE, ROW_LOOP, *FUSED = providers.providers("cpu")


def test_batches_have_agedb_labels_and_predictions_seven_years_off():
    batch = make_batch(65_536, 2)
    error = (batch.p - batch.y).abs().mean().item()
    assert abs(error - 7) < 0.1
    with AGES.open() as file:
        counts = {float(row["age"]): float(row["count"]) for row in csv.DictReader(file)}
    for age in (20.0, 35.0, 60.0):
        expected = counts[age] / sum(counts.values())
        share = (batch.y == age).double().mean().item()
        assert abs(share - expected) < 5 * (expected / 65_536) ** 0.5
    assert make_batch(512, labels="constant").p.unique().numel() == 1
    assert torch.equal(make_batch(512).x, make_batch(512).x)


def test_the_gate_passes_for_every_provider_and_the_cpu_has_a_fused_one():
    assert [t.name for t in FUSED] == ["conr_kernels (torch)"]
    assert measure.gate([BASELINE, ROW_LOOP, *FUSED], "cpu") == []


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_nothing_is_timed_or_written_when_a_provider_is_wrong(
    monkeypatch, capsys, tmp_path, factor
):
    wrong = replace(FUSED[0], losses=lambda *args: FUSED[0].losses(*args) * factor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "providers", lambda device: [BASELINE, wrong])
    monkeypatch.setattr(measure, "first_step", lambda step: pytest.fail("timed a wrong result"))
    assert command.main(["--largest", "64", "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "Nothing was timed" in captured.err and "loss differs" in captured.err
    assert "gradient differs" in captured.err and list(tmp_path.iterdir()) == []


def test_the_gate_finds_a_wrong_baseline():
    wrong = replace(BASELINE, losses=lambda *args: BASELINE.losses(*args) * 1.001)
    assert any(t.startswith("eager") for t in measure.gate([wrong, *FUSED], "cpu"))


def test_row_difference_sees_a_wrong_row():
    assert measure.row_difference(FUSED[0], 301, "agedb", "cpu") < 1e-6

    def shifted(batch, reduction):
        losses = FUSED[0].losses(batch, reduction)
        return losses + 0.01 * losses.max() * (torch.arange(len(losses)) == 3)

    wrong = replace(FUSED[0], losses=shifted)
    assert 0.009 < measure.row_difference(wrong, 301, "agedb", "cpu") < 0.011


def test_peak_memory_counts_what_a_step_holds_for_a_moment():
    # q and the N×N product in float32: 3000² · 4 = 36 MB; eager holds several of them.
    seconds, bare = measure.first_step(measure.Step("q @ q.T", 3000, "agedb", "cpu"))
    assert 0 < seconds < 60 and 34e6 < bare < 60e6
    _, eager = measure.first_step(measure.Step("eager", 3000, "agedb", "cpu"))
    assert eager > 4 * bare


def test_a_run_writes_tidy_rows_and_a_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--largest", "128", "--output", str(tmp_path)]) == 0
    found = rows.read(tmp_path / "cpu.csv")
    assert {(t.size, t.metric) for t in found} == {
        (n, metric) for n in (64, 128) for metric in ("time", "memory", "difference")
    }
    assert len(found) == 2 * 3 * (2 + len(FUSED))
    assert all(t.value > 0 for t in found if t.metric == "time")
    assert all(t.value < 1e-6 for t in found if t.metric == "difference")
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    assert report.table(found) in capsys.readouterr().out


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(measure, "memory_available", lambda device: 10**9)
    by_name = {t.name: t for t in (BASELINE, *FUSED)}
    assert not command.fits(measure.Step("eager", 16_384, "agedb", "cpu"), by_name)
    assert "skipped: eager at N = 16,384 needs about" in capsys.readouterr().out
    assert command.fits(measure.Step(FUSED[0].name, 65_536, "agedb", "cpu"), by_name)


def test_table_ratios_are_eager_over_ours():
    common = dict(
        kernel=plot.KERNEL, mode="forward+backward", size=8192, features=128, dtype="float32",
        n_runs=3, device="d", threads=2, torch="t", package="p", commit="c",
    )  # fmt: skip
    found = [
        rows.Row(provider=provider, metric=metric, value=value, **common)
        for provider, metric, value in [
            ("eager", "time", 4.0),
            ("eager", "memory", 2.0**31),
            ("conr_kernels (torch)", "time", 0.08),
            ("conr_kernels (torch)", "memory", 2.0**25),
        ]
    ]
    line = report.table(found).splitlines()[-1]
    assert "80.00 ms" in line and "32.0 MiB" in line and " 50×" in line and " 64×" in line
    assert "50× the speed of eager" in report.summary(found)


def test_careful_eager_multiplies_16_bit_features_in_16_bits():
    batch = make_batch(129, 33, dtype=torch.bfloat16)
    exact = measure.exact(batch, torch.full((129,), 1 / 129))
    losses, gradient = BASELINE.row_losses(batch), BASELINE.step(batch)
    assert losses.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    for got, truth, limit in zip((losses, gradient), exact, (1e-2, 5e-2), strict=True):
        assert 1e-5 < (got.double() - truth).abs().max() / truth.abs().max() < limit


def test_every_stage_of_the_gpu_run_is_rehearsed_on_the_cpu(tmp_path):
    """``python -m benchmarks.gpu --rehearse``: no stage fails, no claim is without its rows."""
    pytest.importorskip("triton", reason="triton is not installed: its stages are not rehearsed")
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"CONR_COMMIT": "abc"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    with (tmp_path / "claims.csv").open(newline="") as file:
        claims = list(csv.DictReader(file))
    unknown = [row["claim"] for row in claims if row["verdict"] != "rehearsed"]
    assert len(claims) > 35 and unknown == [], run.stdout[-6000:]
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    stages = {row["stage"] for row in found}
    assert stages >= set(plan.NAMES), set(plan.NAMES) - stages
    assert {row["commit"] for row in found} == {"abc"}
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) <= 6  # what comes back from a lent machine
