"""The Triton backend without a GPU: the interpreter's cases in a process of their own, launches.

test_static.py tests their machine code.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.static import compiled
from conr_kernels import conr_loss, triton_backend
from conr_kernels.core.inputs import Inputs
from conr_kernels.triton_backend import call, launch_dense, launch_sweeps
from conr_kernels.triton_backend.call import largest_total
from conr_kernels.variants import PRESETS, Settings

ROOT = Path(__file__).parents[2]


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_interpreted_kernels_agree_with_the_float64_reference() -> None:
    names = ("interpreted", "structured", "mirrored", "strips", "races", "columns")
    files = [f"tests/helpers/triton_{name}.py" for name in names]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    options = ["-n", "2", "-q", "--tb=short", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options],
        cwd=ROOT, env=outside | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:]
    assert "[100%]" in run.stdout, run.stdout[-2000:]


def test_cpu_tensors_without_the_interpreter_are_refused_with_a_remedy() -> None:
    x, y = torch.randn(4, 3), torch.zeros(4)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        conr_loss(x, y, y, backend="triton")


@pytest.mark.parametrize(
    ("capability", "column", "is_early"),
    [((8, 0), 80, False), ((8, 9), 80, False), ((9, 0), 90, True), ((10, 0), 100, True),
     ((11, 0), 100, True), ((12, 0), 80, True), ((12, 1), 80, True)],
)  # fmt: skip
def test_the_column_of_the_table_is_the_devices_tensor_cores(
    capability: tuple[int, int], column: int, is_early: bool
) -> None:
    gpu = torch.device("cuda", 7)
    call.capability.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(call, "_can_be_early", lambda: True),
    ):
        assert (call.architecture(call.capability(gpu)), call.is_early(gpu)) == (column, is_early)
        call.capability.cache_clear()
        with mock.patch.object(torch.version, "hip", "7.0"):
            assert (call.architecture(call.capability(gpu)), call.is_early(gpu)) == (80, False)
    call.capability.cache_clear()


def test_host_and_kernels_have_the_same_sizes() -> None:
    from conr_kernels.triton_backend.kernels import dense, layout, tile_list

    assert layout.ROW_PAD.value == call.ROW_PAD
    assert dense.PAD.value == launch_dense.PAD
    assert (tile_list.HEAD.value, tile_list.PER_TILE.value) == (call.LIST_HEAD, call.LIST_TILE)


def test_without_triton_the_package_works_and_says_what_to_do() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, conr_kernels\n"
        "from conr_kernels.triton_backend import unavailable\n"
        "x, y = torch.randn(4, 3), torch.zeros(4)\n"
        "conr_kernels.conr_loss(x, y, y)\n"
        "for device in ('cuda', 'cpu'):\n"
        "    print(unavailable(torch.device(device), torch.float32))\n"
    )
    run = in_process(code)
    assert run.returncode == 0, run.stderr
    of_gpu, of_cpu = run.stdout.splitlines()
    assert "not installed" in of_gpu and "pip install triton" in of_gpu
    assert "the tensors are on the CPU" in of_cpu and "install" not in of_cpu


def test_importing_the_package_does_not_import_triton() -> None:
    run = in_process("import sys, conr_kernels; assert 'triton' not in sys.modules")
    assert run.returncode == 0, run.stderr


def test_the_interpreter_asks_for_a_numpy_that_it_works_with(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("numpy.__version__", "2.4.1")
    assert "numpy<2.4" in triton_backend.unavailable(torch.device("cpu"), torch.float32)
    monkeypatch.setattr("numpy.__version__", "2.3.5")
    assert triton_backend.unavailable(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("labels", [torch.int64, torch.float64, torch.bfloat16, torch.uint8])
def test_kernels_of_few_rows_take_labels_of_any_dtype(labels: torch.dtype) -> None:
    x, p = torch.empty(100, 16, device="meta"), torch.empty(100, device="meta")
    assert triton_backend.takes_any_labels(x)
    y = torch.empty(100, dtype=labels, device="meta")
    inputs = Inputs(x, y, p, None, None, 0, Settings(1.0, 0.2, 0.01, PRESETS["paper"]), None)
    with compiled.intercepted(90) as launches:
        triton_backend.reduced(inputs, None, "mean", True)
    assert {at.arguments["y_ptr"].dtype for at in launches if "y_ptr" in at.arguments} == {labels}


@pytest.mark.parametrize("variant", ["paper", "released-age", "contrastive"])
@pytest.mark.parametrize(
    ("N", "D", "limit"),
    [(1, 1, 4), (128, 128, 4), (1024, 2048, 4), (1024, 8192, 5), (32, 1_000_000, 5),
     (1100, 128, 4), (4200, 128, 12), (65_536, 128, 14), (65_536, 2048, 85), (1_048_576, 128, 20)],
)  # fmt: skip
def test_launches_of_forward_and_backward(variant: str, N: int, D: int, limit: int) -> None:
    for L, K in ((1, None), (3, None), (3, N + 500)):
        if K is not None and N <= 1024 < K:
            continue
        launches = compiled.recorded_launches(N, D, torch.bfloat16, variant=variant, L=L, K=K)
        assert len(launches) <= limit, [launch.name for launch in launches]
        assert all(len(launch.grid) == 1 for launch in launches)


@pytest.mark.parametrize(
    ("N", "D", "dtype", "times"),
    [(65_536, 512, torch.bfloat16, 7.1), (262_144, 512, torch.bfloat16, 5.1),
     (2**20, 512, torch.bfloat16, 2.6), (2**20, 512, torch.float32, 1.6)],
)  # fmt: skip
def test_memory_of_wide_features(N: int, D: int, dtype: torch.dtype, times: float) -> None:
    """Beside the gradient, as many times the features': fewer the larger they are."""
    x, y = torch.empty(N, D, dtype=dtype, device="meta"), torch.empty(N, 1, device="meta")
    settings = Settings(1.0, 0.2, 0.01, PRESETS["paper"])
    plan = launch_sweeps.Plan(call.form_of(x, y, None, 0, "mean"), settings)
    for parts in (plan.work, plan.work_of_gradient):
        assert 4 * (parts.size + plan.kept.size) <= times * x.numel() * x.element_size()


@pytest.mark.parametrize(
    "sizes", [(4531, 7000, 8192), (8209, 16_384), (16_400, 20_011, 32_767), (32_769, 65_536)]
)
def test_batch_sizes_share_one_compiled_kernel(sizes: tuple[int, ...]) -> None:
    """No size of a batch is baked into a kernel, unlike D and the variant: kernels change where
    merges and tiles of few rows end.
    """
    per_size = []
    for N in sizes:
        launches = compiled.recorded_launches(N, 128, torch.bfloat16)
        sources = [compiled.source_of(launch) for launch in launches]
        per_size.append([(s.signature, s.constants, s.attrs) for s in sources])
    assert all(found == per_size[0] for found in per_size)


def ptx(N: int, D: int, dtype: torch.dtype, name: str, **options) -> str:
    launches = compiled.recorded_launches(N, D, dtype, 90, **options)
    launch = next(launch for launch in launches if name in launch.name)
    return compiled.compile_launch(launch, 90).asm["ptx"]


def fused_across_threads(ptx: str) -> list[str]:
    """Products that are fused into a sum with what another thread of the warp sent: the two threads
    round differently, and hold two sums of one row where the layout promises one.
    """
    received, found = set(), []
    for line in ptx.splitlines():
        match = re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*);", line)
        if match is None:
            continue
        operation, (target, *sources) = match[1], re.findall(r"%\w+", match[2]) or [""]
        halves = operation.startswith("mov") and received.intersection(sources)
        if operation.startswith("shfl") or halves:
            received.add(target)
        elif operation.startswith("fma") and sources[-1] in received:
            found.append(line.strip())
    return found


def test_a_product_fused_into_another_threads_sum_is_found() -> None:
    sent = "shfl.sync.bfly.b32 \t%r2, %r1, 16, 31, -1;\n"
    double = sent + "mov.b64 \t%rd2, {%r2, %r3};\n"
    assert fused_across_threads(sent + "fma.rn.f32 \t%r4, %r0, %r0, %r2;")
    assert fused_across_threads(double + "fma.rn.f64 \t%rd4, %rd0, %rd0, %rd2;")
    assert not fused_across_threads(sent + "add.f32 \t%r4, %r1, %r2;")
    assert not fused_across_threads(sent + "fma.rn.f32 \t%r4, %r2, %r2, %r1;")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_thread_that_holds_a_rows_sum_has_the_same_bits(dtype: torch.dtype) -> None:
    """Where a thread reads one feature of a row; racecheck found two values written to one place.
    16-bit features have exact squares.
    """
    launches = compiled.recorded_launches(33, 17, dtype, 90)
    names = [launch.name for launch in launches]
    assert "conr_dense_sums_kernel" in names and "conr_dense_finish_kernel" in names
    for launch in launches:
        assert fused_across_threads(compiled.compile_launch(launch, 90).asm["ptx"]) == []


def test_float64_products_use_no_tf32_and_highest_uses_three_of_float16() -> None:
    assert "tf32" not in ptx(4500, 32, torch.float64, "forward_kernel")
    assert "tf32" in ptx(4500, 32, torch.float32, "forward_kernel", precision="high")
    wgmma = re.compile(r"wgmma\.mma_async\S*\.f32\.f16\.f16")
    for D in (32, 300):
        once, thrice = (
            len(wgmma.findall(ptx(4500, D, dtype, "forward_kernel", precision="highest")))
            for dtype in (torch.float16, torch.float32)
        )
        assert thrice == 3 * once > 0


def test_squares_of_differences_are_not_contracted() -> None:
    with mock.patch.object(launch_sweeps, "BOTH_ORDERS", 0):  # a launch for each sweep
        launches = compiled.recorded_launches(4500, 16, torch.float32, L=2, distance="rmse")
    texts = {}
    for launch in launches:
        if "ward_" in launch.name:
            assert launch.options["enable_fp_fusion"] is False
        if "forward_" in launch.name:
            texts[launch.arguments["SWEEPS"]] = compiled.compile_launch(launch, 90).asm["ptx"]
    assert "fma.rn.f32" not in texts["positives"] and "fma.rn.f32" not in texts["negatives"]
    assert re.search(r"(div|sqrt)\.\S*f32", texts["positives"]) is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("distance", ["mae", "rmse"])
def test_totals_are_within_the_window_exactly_where_distances_are(
    distance: str, dtype: str
) -> None:
    """The kernels compare sums over components; the reference their mean or its root."""
    number = np.dtype(dtype).type
    generator = np.random.default_rng(0)
    windows = [0.0, 1e-30, 0.2, 1.0, 3e38, *generator.uniform(0, 10, 40)]
    for window in windows:
        for L in (2, 3, 5, 7):
            largest = largest_total(float(window), L, distance, dtype)
            following = np.nextafter(number(largest), number(np.inf))
            for total, is_within in ((number(largest), True), (following, False)):
                with np.errstate(over="ignore", under="ignore"):
                    mean = total / number(L)
                    d = mean if distance == "mae" else np.sqrt(mean)
                if np.isfinite(total):
                    assert (d <= number(window)) == is_within, (window, L, total)
    assert largest_total(0.3, 1, distance, dtype) == 0.3
    assert largest_total(float("inf"), 3, distance, dtype) == float("inf")
