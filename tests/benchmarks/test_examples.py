"""The examples run, and train."""

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from benchmarks.examples import (
    depth_maps,
    lightning_module,
    schedule_and_statistics,
    several_ranks,
    tabular,
    two_views,
)


@pytest.mark.parametrize("example", [two_views, tabular, depth_maps])
def test_an_example_trains(example, capsys):
    losses = example.main()
    assert sum(losses[-5:]) < sum(losses[:5])
    assert "loss" in capsys.readouterr().out


def test_the_schedule_takes_effect_and_the_excess_is_never_negative():
    log = schedule_and_statistics.main()
    temperatures = [seen["temperature"] for seen in log]
    assert temperatures == sorted(temperatures, reverse=True)
    assert all(seen["excess"] > -1e-5 for seen in log) and log[0]["anchors"] > 0.2


def test_the_lightning_module_trains_by_a_stand_in():
    class LightningModule(nn.Module):
        def log(self, name, value):
            self.logged = (name, value)

    torch.manual_seed(0)
    model = lightning_module.module_class(types.SimpleNamespace(LightningModule=LightningModule))()
    model.setup("fit")
    optimizer = model.configure_optimizers()
    y = torch.randint(20, 60, (64,)).float()
    batch = (torch.sin(y[:, None] / 6 + torch.arange(8)), y)
    losses = []
    for step in range(20):
        loss = model.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and model.logged[0] == "conr"


def test_the_lightning_example_runs_or_says_why_not(capsys):
    try:
        import lightning.pytorch  # noqa: F401
    except ImportError:
        lightning_module.main()
        assert "skipped: lightning is not installed" in capsys.readouterr().out
        pytest.skip("lightning is not installed: the stand-in's test is all")
    lightning_module.main()


def test_several_ranks_started_as_one_process_say_how_to_start_them(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2 -m benchmarks.examples"):
        several_ranks.main()


def test_several_ranks_train_together():
    command = "-m torch.distributed.run --nproc-per-node 2 -m benchmarks.examples.several_ranks"
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step ") == 4 and "floor" in done.stdout
