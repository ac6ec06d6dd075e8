"""Stages that need a tool: the CUDA extension's build by nvcc, and compute-sanitizer."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import torch

from conr_kernels import available_backends, conr_loss

from .. import device
from ..rows import Stage

#: compute-sanitizer's exit status where it found a fault, and the rows of text kept of its report.
FAULT, REPORT_LINES = 9, 60
RAN = "ran every regime"
#: Of one regime behind the other.
RAN_ONE = "ran N="
#: What a program that was cut off has been found to do.
REPORTS = "Invalid __", "Error: Race"
#: Rows, features and ``device.path``, what few tests reach first.
SANITIZED = [
    *((1100, d, path) for d in (128, 300) for path in ("once", "once, in turns", "sorted")),
    (1100, 128, ""), (33, 17, ""), (32, 20_000, ""),
]  # fmt: skip
#: PyTorch asks the driver for what it may not have: answers that are no faults.
OPTIONS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}


def build(stage: Stage) -> int:
    """Builds csrc/ in place by setup.py, with nvcc, for this GPU alone."""
    start, architecture = time.monotonic(), device.architecture()
    command = ["setup.py", "build_ext", "--inplace"]
    if device.REHEARSAL:  # what would be done, without a compiler
        command = ["-c", "import setup; print(setup.REASON)"]
    status, output = stage.output_of(
        stage.start([sys.executable, *command], TORCH_CUDA_ARCH_LIST=f"{architecture / 10:.1f}")
    )
    print(output[-6000:], flush=True)
    if status:
        last = (output.strip().split("\n") or [""])[-1]
        stage.add("failed", 1, provider="cuda", note=last[:300])
        return stage.status
    stage.add("wall seconds", time.monotonic() - start, provider="cuda")
    # Why the backend does not run, as a new process sees it.
    code = "from conr_kernels import available_backends as a; print(a()['cuda'])"
    reason = "None"
    if not device.REHEARSAL:
        _, output = stage.output_of(stage.start([sys.executable, "-c", code]))
        reason = output.strip().split("\n")[-1]
    metric, note = ("built", f"sm_{architecture}") if reason == "None" else ("not run", reason)
    stage.add(metric, 1, provider="cuda", note=note[:300])
    return stage.status


def triton_kernels(stage: Stage) -> int:
    return _every_regime("triton")


def cuda_kernels(stage: Stage) -> int:
    return _every_regime("cuda")


def sanitized(backend: str) -> Iterator[dict[str, object]]:
    """Rows, features, path, dtype and variant of a backend's every regime."""
    for n, d, path in SANITIZED:
        if backend == "cuda" and "once" in path:
            continue
        # Exponents of released-age are shifted, which no pass does that takes each pair once.
        of_float32 = "released-depth" if "once" in path else "released-age"
        for dtype, variant in ((torch.bfloat16, "paper"), (torch.float32, of_float32)):
            yield dict(N=n, D=d, path=path, dtype=dtype, variant=variant)


def _every_regime(backend: str) -> int:
    """Once, small, in both directions."""
    torch.manual_seed(0)
    stand_in = "torch" if device.REHEARSAL else backend
    for regime in sanitized(backend):
        n, d, path, dtype, variant = regime.values()
        x = torch.randn(n, d, device=device.DEVICE).to(dtype).requires_grad_()
        y = torch.randint(0, 60, (n,), device=device.DEVICE).float()
        p = y + 8 * torch.randn(n, device=device.DEVICE)
        with device.path(path):
            conr_loss(x, y, p, variant=variant, backend=stand_in).backward()
        device.synchronize()
        if not x.grad.isfinite().all():
            raise AssertionError(f"non-finite gradient: {regime}")
        print(f"{RAN_ONE}{n} D={d} {path} {dtype} {variant}", flush=True)
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
    tool = device.cuda_tool("compute-sanitizer")
    if not device.REHEARSAL and tool is None:
        stage.add("not run", 1, note="compute-sanitizer is not installed")
        return 0
    programs = {"planted fault": ("memcheck", "planted-fault")}
    has_cuda = device.REHEARSAL or available_backends()["cuda"] is None
    for backend in ("triton", "cuda") if has_cuda else ("triton",):
        for check in ("memcheck",) if device.REHEARSAL else OPTIONS:
            programs[f"{backend} {check}"] = (check, f"{backend}-kernels")
    running = {}
    for name, (check, program) in programs.items():
        prefix = [tool, "--error-exitcode", str(FAULT), "--tool", check, *OPTIONS[check]]
        command = [sys.executable, "-m", "benchmarks.gpu.stage", program]
        running[name] = stage.start(
            command if device.REHEARSAL else prefix + command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
    is_caught = False
    for name, process in running.items():  # the planted fault's is the first
        status, output = _outcome(stage, process)
        if name == "planted fault":
            is_caught = status == FAULT
            stage.add("caught" if is_caught else "not run", 1, case=name)
            continue
        backend = name.split()[0]
        ran = f"{output.count(RAN_ONE)} of {len(list(sanitized(backend)))} regimes"
        if not is_caught:
            metric, note = "not run", "the planted fault was missed"
        elif status == 0 and RAN in output:
            metric, note = "clean", ran
        elif status in (1, FAULT) or any(report in output for report in REPORTS):
            what = "the program itself" if status == 1 else "faults"
            metric, note = "failed", f"{what}: see the log; {ran}"
        else:
            metric, note = "not run", f"exit status {status}, {ran}"
        stage.add(metric, 1, provider=backend, case=name, note=note)
    return stage.status


def _outcome(stage: Stage, process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and output, of which the ends are printed, indented: its own rows, of a fault
    that is there on purpose too, are none of this stage.
    """
    status, output = stage.output_of(process)
    lines = output.strip().split("\n")
    kept = lines[:REPORT_LINES] + lines[REPORT_LINES:][-10:]
    print(textwrap.indent("\n".join(kept), "    "), flush=True)
    return status, output
