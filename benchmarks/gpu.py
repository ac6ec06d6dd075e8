"""``make gpu OUT=folder``: every check and measurement that needs a GPU, in at most nine minutes.

Stages: tests, compute-sanitizer, the benchmark, offline tuning. Each writes its rows as it goes,
so that what was finished remains; a stage whose tool or device is missing says "not run".
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from conr_kernels import conr_loss

ROOT = Path(__file__).parent.parent
#: Seconds from the start at which a stage stops beginning new work.
DEADLINES = {"tests": 200, "sanitizer": 270, "bench": 420, "tune": 520}
REGIMES = ("7 years off", "converged", "collapsed")


class Rows:
    """A CSV file that grows row by row; every row is printed too."""

    def __init__(self, path: Path) -> None:
        self.path, self.columns = path, None

    def add(self, **row: object) -> None:
        with self.path.open("a", newline="") as file:
            if self.columns is None:
                self.columns = list(row)
                csv.writer(file).writerow(self.columns)
            csv.writer(file).writerow([row[name] for name in self.columns])
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)


def batch(n: int, d: int, dtype: torch.dtype, regime: str, device: str) -> tuple[Tensor, ...]:
    """Features, AgeDB-DIR labels, predictions and weights."""
    with (Path(__file__).parent / "agedb_dir_train_ages.csv").open() as file:
        table = [(float(row["age"]), float(row["count"])) for row in csv.DictReader(file)]
    ages, counts = torch.tensor(table).unbind(1)
    g = torch.Generator().manual_seed(n)
    y = ages[torch.multinomial(counts, n, replacement=True, generator=g)]
    noise = torch.randn(n, generator=g)
    p = {
        "7 years off": y + 8.8 * noise,
        "converged": y + 0.5 * noise,
        "collapsed": y.mean() + 0.01 * noise,
    }[regime]
    x = torch.randn(n, d, generator=g).to(dtype)
    w = torch.rand(n, generator=g) + 0.5
    return tuple(t.to(device) for t in (x, y, p, w))


def step_of(rows: tuple[Tensor, ...], backend: str) -> Callable[[], Tensor]:
    x, y, p, w = rows
    x = x.detach().requires_grad_()

    def step() -> Tensor:
        x.grad = None
        conr_loss(x, y, p, w, backend=backend).backward()
        return x.grad

    return step


def providers(rows: tuple[Tensor, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compared. Eager forms about 25 bytes a pair and direction: small batches only."""
    x, y, p, w = rows
    yield "triton", step_of(rows, "triton")
    yield "q @ q.T", lambda: x @ x.T
    if len(x) <= 16_384:
        yield "eager", step_of(rows, "reference")
    if len(x) == 4096 and x.dtype == torch.bfloat16 and x.shape[1] == 128:
        compiled = torch.compile(
            lambda f: conr_loss(f, y, p, w, backend="reference"), dynamic=False
        )
        f = x.detach().requires_grad_()
        yield "compiled eager", lambda: torch.autograd.grad(compiled(f), f)


def seconds(function: Callable[[], object], repeats: int = 9) -> float:
    """Median time on the device."""
    function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def is_correct(rows: tuple[Tensor, ...]) -> bool:
    """No time is taken of a wrong result."""
    got = step_of(rows, "triton")()
    exact = step_of((rows[0].double(), *rows[1:]), "reference")()
    limit = {2: 3e-2, 4: 5e-3, 8: 1e-10}[rows[0].dtype.itemsize]
    return bool((got.double() - exact).abs().max() <= limit * exact.abs().max())


def run_tests(out: Path, late: Callable[[], bool], device: str) -> None:
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-x"]
    with (out / "tests.txt").open("w") as log:
        run = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=240)
    print((out / "tests.txt").read_text()[-1500:])
    Rows(out / "tests.csv").add(stage="tests", result="passed" if run.returncode == 0 else "failed")


def run_sanitizer(out: Path, late: Callable[[], bool], device: str) -> None:
    rows = Rows(out / "sanitizer.csv")
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        rows.add(check="compute-sanitizer", result="not run: not installed")
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("planted-fault", "kernels"):
        command = [
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benchmarks.gpu",
            f"--{check}",
        ]  # noqa: E501
        with (out / f"sanitizer-{check}.txt").open("w") as log:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                    timeout=60,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = -1
        if check == "planted-fault":
            if code != 9:
                rows.add(check="compute-sanitizer", result="not run: missed the planted fault")
                return
            rows.add(check=check, result="caught")
        else:
            rows.add(check=check, result={0: "clean", 9: "faults"}.get(code, "not run: no result"))


def planted_fault(device: str) -> None:
    """A store far behind its buffer, to see whether the sanitizer sees it."""
    from .gpu_fault import store_kernel

    x = torch.zeros(1024, device=device)
    store_kernel[(1,)](x, 1 << 20, BLOCK=1024)


def run_kernels(device: str) -> None:
    """Every regime once, small."""
    for n, d in ((33, 17), (1100, 128), (1100, 300)):
        step_of(batch(n, d, torch.bfloat16, "7 years off", device), "triton")()


def run_bench(out: Path, late: Callable[[], bool], device: str) -> None:
    rows = Rows(out / "bench.csv")
    dtypes = (torch.bfloat16, torch.float32)
    sizes = (128, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
    grid = sorted(itertools.product(sizes, (128, 512, 2048), dtypes, REGIMES), key=_priority)
    for n, d, dtype, regime in grid:
        if late():
            rows.path.with_suffix(".txt").write_text("stopped at the deadline\n")
            return
        if n * d > 2**27 or (n > 65_536 and regime == "collapsed"):
            continue
        if n <= 4096 and not is_correct(batch(n, d, dtype, regime, device)):
            raise AssertionError(f"wrong result at N={n} D={d} {dtype} {regime}: nothing timed")
        data = batch(n, d, dtype, regime, device)
        for name, function in providers(data):
            if name == "q @ q.T" and n > 131_072:
                continue
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            t = seconds(function, 3 if n > 65_536 else 9)
            extra = torch.cuda.max_memory_allocated() - before
            tflops = 6 * n * n * d / t / 1e12 if name != "q @ q.T" else 2 * n * n * d / t / 1e12
            rows.add(
                provider=name, N=n, D=d, dtype=str(dtype)[6:], regime=regime, seconds=f"{t:.3e}",
                extra_MiB=round(extra / 2**20, 1), dense_TFLOPs=round(tflops, 1),
                gpu=torch.cuda.get_device_name(), torch=torch.__version__,
            )  # fmt: skip


def _priority(case: tuple) -> tuple:
    n, d, dtype, regime = case
    return (d != 128, dtype != torch.bfloat16, d, regime != REGIMES[0], n)


CANDIDATES = {
    "forward": [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    "backward": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)],
}  # fmt: skip


def run_tune(out: Path, late: Callable[[], bool], device: str) -> None:
    """Times candidates in place of the table's entries and proposes the fastest of each."""
    from conr_kernels import triton_backend
    from conr_kernels.triton_configs import Config

    rows, chosen = Rows(out / "tuning.csv"), triton_backend.config
    proposals = Rows(out / "proposed_table.csv")
    for d, dtype in itertools.product((128, 64, 256), (torch.bfloat16, torch.float32)):
        data = batch(16_384, d, dtype, "7 years off", device)
        expected = step_of(data, "triton")()
        for kind, candidates in CANDIDATES.items():
            best = (seconds(step_of(data, "triton")), "as shipped")
            for block_i, block_j, num_warps, num_stages in candidates:
                if late():
                    return
                tried = Config(block_i, block_j, d, num_warps, num_stages)

                def lookup(name, *key, kind=kind, tried=tried):
                    return tried if name == kind else chosen(name, *key)

                with mock.patch.object(triton_backend, "config", lookup):
                    try:
                        got = step_of(data, "triton")()
                        t = seconds(step_of(data, "triton"), 5)
                    except Exception as error:  # does not fit this device: no candidate
                        rows.add(
                            kind=kind,
                            D=d,
                            dtype=str(dtype)[6:],
                            config=tried,
                            seconds=type(error).__name__,
                        )  # noqa: E501
                        continue
                is_close = (got - expected).abs().max() <= 2e-2 * expected.abs().max()
                rows.add(kind=kind, D=d, dtype=str(dtype)[6:], config=tried, seconds=f"{t:.3e}")
                if is_close and t < best[0]:
                    best = (t, tried)
            proposals.add(kind=kind, D=d, dtype=str(dtype)[6:], config=best[1], seconds=best[0])


STAGES = {"tests": run_tests, "sanitizer": run_sanitizer, "bench": run_bench, "tune": run_tune}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python3 -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--planted-fault", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: no CUDA device")
        return 0
    if options.planted_fault or options.kernels:
        (planted_fault if options.planted_fault else run_kernels)("cuda")
        torch.cuda.synchronize()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    start, failed = time.monotonic(), False
    for name in options.stages:
        print(f"{name}:", flush=True)

        def late(name=name) -> bool:
            return time.monotonic() - start > DEADLINES[name]

        try:
            STAGES[name](options.out, late, "cuda")
        except Exception as error:
            failed = True
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
