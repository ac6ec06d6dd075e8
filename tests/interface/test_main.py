"""``python -m conr_kernels``: what it prints, and that a wrong backend is found."""

import subprocess
import sys

import pytest
import torch

from conr_kernels import __main__ as command
from conr_kernels import __version__, available_backends, cuda_backend, torch_backend


def test_the_command_reports_versions_backends_and_self_tests():
    done = subprocess.run(
        [sys.executable, "-m", "conr_kernels"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"conr_kernels {__version__}, torch {torch.__version__}" in done.stdout
    for backend, reason in available_backends("cpu").items():
        (line,) = [t for t in done.stdout.split("cpu tensors")[1].splitlines() if backend in t[:12]]
        assert (" ok " in line) if reason is None else (reason in line)


def test_available_backends_gives_none_or_a_reason_and_a_remedy():
    status = available_backends("cpu")
    assert list(status) == ["triton", "cuda", "torch", "reference"]
    assert status["torch"] is None and status["reference"] is None
    assert all(reason is None or len(reason) > 20 for reason in status.values())
    default = "cuda" if torch.cuda.is_available() else "cpu"
    assert available_backends() == available_backends(torch.device(default))


@pytest.mark.parametrize("error", [1e-4, float("nan")])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_backend_fails_with_exit_status_1(monkeypatch, capsys, direction, error):
    right = getattr(torch_backend, direction)

    def wrong(*args):
        result = right(*args)
        first = result[0] if direction == "forward" else result
        first[3] += error * first.abs().max()
        return result

    monkeypatch.setattr(torch_backend, direction, wrong)
    assert command.main([]) == 1
    captured = capsys.readouterr()
    assert "torch      FAILED" in captured.out and "torch on cpu" in captured.err
    assert "reference  ok" in captured.out


def test_a_backend_that_raises_is_reported_and_the_others_still_tested(monkeypatch, capsys):
    def broken(*args):
        raise ValueError("no such luck")

    monkeypatch.setattr(torch_backend, "forward", broken)
    assert command.main([]) == 1
    out = capsys.readouterr().out
    assert "torch      FAILED ValueError: no such luck" in out and "reference  ok" in out


def test_the_cuda_backend_describes_itself_where_it_can(monkeypatch, capsys):
    monkeypatch.setattr(cuda_backend, "describe", lambda: "built for sm_90")
    command.main([])
    assert "cuda backend: built for sm_90" in capsys.readouterr().out
