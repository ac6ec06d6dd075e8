"""Stages that need a tool: the CUDA extension's build by nvcc, and compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch

from conr_kernels import available_backends, conr_loss

from ...rows import ROOT
from .. import device
from ..rows import Stage
from .providers import BF16, F32

#: compute-sanitizer's exit status where it found a fault, and the rows of text kept of its report.
FAULT, REPORT_LINES = 9, 60
RAN = "ran every regime"


def build(stage: Stage) -> int:
    """Builds csrc/ in place by setup.py, with nvcc, for this GPU alone."""
    major, minor = device.architecture()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if device.REHEARSAL:  # what would be done, without a compiler
        command = [sys.executable, "-c", "import setup; print(setup.REASON)"]
    start = time.monotonic()
    run = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    status, output = stage.output_of(run)
    print(output[-6000:], flush=True)
    if status:
        last = (output.strip().split("\n") or [""])[-1]
        stage.add("failed", 1, provider="cuda", note=last[:300])
        return stage.status
    stage.add("wall seconds", time.monotonic() - start, provider="cuda")
    reason = "rehearsal" if device.REHEARSAL else _fresh_reason()
    if reason in ("None", "rehearsal"):
        stage.add("built", 1, provider="cuda", note=f"sm_{major}{minor}")
    else:
        stage.add("not run", 1, provider="cuda", note=reason[:300])
    return stage.status


def _fresh_reason() -> str:
    """Why the backend does not run, as a new process sees it: "None" where it does."""
    code = "from conr_kernels import available_backends as a; print(a()['cuda'])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or run.stderr.strip()[-300:]


def triton_kernels(stage: Stage) -> int:
    return _every_regime("triton")


def cuda_kernels(stage: Stage) -> int:
    return _every_regime("cuda")


def _every_regime(backend: str) -> int:
    """Once, small, in both directions."""
    torch.manual_seed(0)
    stand_in = "torch" if device.REHEARSAL else backend
    for n, d in ((33, 17), (1100, 128), (1100, 300), (32, 20_000)):
        for dtype, variant in ((BF16, "paper"), (F32, "released-age")):
            x = torch.randn(n, d, device=device.DEVICE).to(dtype).requires_grad_()
            y = torch.randint(0, 60, (n,), device=device.DEVICE).float()
            p = y + 8 * torch.randn(n, device=device.DEVICE)
            conr_loss(x, y, p, variant=variant, backend=stand_in).backward()
            device.synchronize()
            if not x.grad.isfinite().all():
                raise AssertionError(f"non-finite gradient at N={n} D={d} {dtype} {variant}")
    print(RAN, flush=True)
    return 0


def planted_fault(stage: Stage) -> int:
    """A store just behind its buffer, which nothing but a sanitizer notices."""
    if device.REHEARSAL:
        return FAULT
    from .fault import store_kernel

    x = torch.zeros(1024, device=device.DEVICE)
    store_kernel[(1,)](x, 1024, BLOCK=1024)
    device.synchronize()
    print(RAN, flush=True)
    return 0


def sanitizer(stage: Stage) -> int:
    """compute-sanitizer over every regime, after it has caught a fault that is there on purpose."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    prefix = [tool, "--error-exitcode", str(FAULT), "--tool"]
    # PyTorch asks the driver for what it may not have: answers that are no faults.
    options = {"memcheck": ["memcheck", "--report-api-errors", "no"], "racecheck": ["racecheck"]}
    if not device.REHEARSAL and not Path(tool).exists():
        stage.add("not run", 1, note="compute-sanitizer is not installed")
        return 0
    checks = {"planted fault": ("memcheck", "planted-fault")}
    backends = ["triton"]
    if device.REHEARSAL or available_backends()["cuda"] is None:
        backends.append("cuda")
    for backend in backends:
        for check in ("memcheck",) if device.REHEARSAL else ("memcheck", "racecheck"):
            checks[f"{backend} {check}"] = (check, f"{backend}-kernels")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for name, (check, program) in checks.items():
        command = [sys.executable, "-m", "benchmarks.gpu.stage", program]
        command = command if device.REHEARSAL else [*prefix, *options[check], *command]
        running[name] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    outcomes = {name: _outcome(stage, process) for name, process in running.items()}
    is_caught = outcomes.pop("planted fault")[0] == FAULT
    stage.add("caught" if is_caught else "not run", 1, case="planted fault")
    for name, (code, has_run) in outcomes.items():
        if not is_caught:
            metric, note = "not run", "the planted fault was missed"
        elif code == FAULT:
            metric, note = "failed", "faults: see the log"
        elif code == 0 and has_run:
            metric, note = "clean", ""
        elif code == 1:
            metric, note = "failed", "the program itself: see the log"
        else:
            metric, note = "not run", f"exit status {code}, {'' if has_run else 'not '}at its end"
        stage.add(metric, 1, provider=name.split()[0], case=name, note=note)
    return stage.status


def _outcome(stage: Stage, process: subprocess.Popen) -> tuple[int, bool]:
    """Exit status, and whether the program came to its end; the ends of its output are printed,
    indented: its own rows, of a fault that is there on purpose too, are none of this stage.
    """
    status, output = stage.output_of(process)
    lines = output.strip().split("\n")
    kept = lines[:REPORT_LINES] + lines[REPORT_LINES:][-10:]
    print(textwrap.indent("\n".join(kept), "    "), flush=True)
    return status, RAN in output
