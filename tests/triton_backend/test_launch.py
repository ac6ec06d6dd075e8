"""The launch of compiled kernels, before a driver that records: what it looks up, and who serves
where it may not.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from conr_kernels.triton_backend import launch
from conr_kernels.triton_backend.kernels import dense
from conr_kernels.triton_backend.launch import Kernel, Launch, Parts, Place, Steps


class Device:
    """A driver and kernels that record: ``launched`` holds the stream and arguments of each run."""

    def __init__(self) -> None:
        self.device, self.stream = 0, 77
        self.launched: list[tuple] = []
        self.compilations = 0
        self.plain = 0
        self.lock = threading.Lock()

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def compile(self, function: JITFunction, key: str, *_: object) -> CompiledKernel:
        kernel = CompiledKernel.__new__(CompiledKernel)
        kernel.src, kernel.name, kernel.module, kernel.function = None, key, 1, 5
        kernel.packed_metadata = (4, 1, 0)

        def run(*arguments: object) -> None:
            *_, enter, leave = arguments[:9]
            if enter is not None:
                enter(arguments[6])
            with self.lock:
                self.launched.append((key, arguments))
            if leave is not None:
                leave(arguments[6])

        kernel._run = run
        self.compilations += 1
        function.device_caches[self.device][0][key] = kernel
        return kernel


@pytest.fixture
def device():
    found = Device()
    plain = JITFunction.run

    def run(function: JITFunction, *args: object, **kwargs: object):
        found.plain += 1
        return plain(function, *args, **kwargs)

    before = driver._active
    with (
        mock.patch.object(JITFunction, "_do_compile", lambda *args: found.compile(*args)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch, "_is_on_gpu", lambda x: True),
        mock.patch.object(dense.conr_total_kernel, "device_caches", Caches()),
    ):
        driver.set_active(found)
        yield found
        driver._active = before


class Caches(dict):
    def __missing__(self, device: int):
        self[device] = dense.conr_total_kernel.create_binder()
        return self[device]


def total(*n_rows: int, parts: Parts | None = None) -> Steps:
    """Totals of so many rows each, one after another."""
    kernel = Kernel(dense.conr_total_kernel, {"num_warps": 4}, {"BLOCK": 1024, "EARLY": False})
    steps = [(Launch(kernel, 1, n, 1.0), "loss out") for n in n_rows or (8,)]
    return Steps("loss out" if parts is None else "out", {}, steps, *([parts] if parts else []))


def test_the_second_launch_of_a_form_is_run_as_triton_would_run_it(device: Device) -> None:
    launch_total, loss, out = total(), torch.zeros(8), torch.zeros(())
    for _ in range(3):
        launch_total(launch.place_of(loss), [], loss, out)
    assert (device.compilations, device.plain, len(device.launched)) == (1, 1, 3)
    (_, first), (_, second), (_, third) = device.launched
    assert second == third
    addresses = (loss.data_ptr(), out.data_ptr())
    assert second == (1, 1, 1, 77, 5, (4, 1, 0), None, None, None, *addresses, 8, 1.0, 1024, False)
    # Triton's own gives tensors, hooks and their metadata.
    assert first[:6] == second[:6] and first[11:] == second[11:]
    assert tuple(t.data_ptr() for t in first[9:11]) == addresses


TENSORS = [
    torch.zeros(64),
    torch.zeros(64)[1:],
    torch.zeros(64)[4:],
    torch.zeros(64).double(),
    None,
]


def test_tensors_of_one_form_are_specialized_alike(device: Device) -> None:
    """Wherever Triton would compile another kernel, another is looked up."""
    backend, seen = make_backend(GPUTarget("cuda", 90, 32)), {}
    for loss, out in itertools.product(TENSORS, TENSORS[:-1]):
        steps = total()
        steps(Place(0, 77), [], loss, out)
        (form,) = steps.compiled
        of_triton = [native_specialize_impl(backend, t, False, True, True) for t in (loss, out)]
        assert seen.setdefault(form, of_triton) == of_triton
    assert len(seen) == 3 * 4 == len(set(map(tuple, seen.values())))


def test_numbers_of_another_form_are_another_kernel(device: Device) -> None:
    """A number beyond 32 bits has another type, whatever else is specialised."""
    t, launch_totals = torch.zeros(8), total(8, 2**31)
    for _ in range(3):
        launch_totals(launch.place_of(t), [], t, t)
    first, second, *again = [key for key, _ in device.launched]
    assert first != second and again == [first, second] * 2
    assert device.compilations == device.plain == 2


def test_parts_of_a_workspace_follow_it(device: Device) -> None:
    parts = Parts()
    parts.add("before", 3, torch.float64)
    parts.add("loss", 8, torch.float32)
    launch_total, out = total(parts=parts), torch.zeros(())
    wholes = [parts.new(out) for _ in range(3)]
    for whole in wholes:
        launch_total(launch.place_of(out), [whole], out)
    first, *others = [arguments[9] for _, arguments in device.launched]
    assert device.plain == 1 and first.dtype == torch.float32 and first.shape == (8,)
    assert [first.data_ptr(), *others] == [whole.data_ptr() + 128 for whole in wholes]


def test_another_device_dtype_or_alignment_is_another_kernel(device: Device) -> None:
    launch_total, out = total(), torch.zeros(())
    for loss in (torch.zeros(64), torch.zeros(64)[1:], torch.zeros(64).double()):
        for device.device in (0, 1):
            for _ in range(2):
                launch_total(launch.place_of(loss), [], loss, out)
    assert device.compilations == device.plain == 6
    assert [arguments[3] for _, arguments in device.launched] == [77, 77, 78, 78] * 3
    keys = [key for key, _ in device.launched]
    assert keys[::2] == keys[1::2]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_sees_every_launch(device: Device, name: str) -> None:
    launch_total, loss, out = total(), torch.zeros(8), torch.zeros(())
    seen = []
    for _ in range(2):
        launch_total(launch.place_of(loss), [], loss, out)
    hooks = getattr(knobs.runtime, name)
    hooks.add(seen.append)
    try:
        for _ in range(3):
            launch_total(launch.place_of(loss), [], loss, out)
    finally:
        hooks.remove(seen.append)
    assert len(seen) == 3
    launch_total(launch.place_of(loss), [], loss, out)
    assert len(seen) == 3 and device.plain == 1 + 3


def test_an_unknown_triton_launches_itself(device: Device) -> None:
    loss = torch.zeros(8)
    for version, is_served in (
        ("3.5.1", False),
        ("3.6.0", True),
        ("3.9.2", True),
        ("4.0.0", False),
    ):
        launch._triton.cache_clear()
        try:
            with mock.patch("triton.__version__", version):
                assert (launch.place_of(loss) is not None) == is_served
        finally:
            launch._triton.cache_clear()


def test_debug_and_instrumentation_are_left_to_triton(device: Device) -> None:
    loss = torch.zeros(8)
    with mock.patch.object(knobs.runtime, "debug", True):
        assert launch.place_of(loss) is None
    with mock.patch.object(knobs.compilation, "instrumentation_mode", "consan"):
        assert launch.place_of(loss) is None
    assert launch.place_of(loss) == Place(0, 77)


def test_forgotten_forms_are_compiled_by_nobody_again(device: Device) -> None:
    """The bound of the memory: Triton's own cache still has the kernel."""
    launch_total, out = total(), torch.zeros(())
    tensors = [torch.zeros(64, dtype=t) for t in (torch.float32, torch.float64, torch.float16)]
    with mock.patch.object(launch, "FORMS", 2):
        for loss in tensors * 2:
            launch_total(launch.place_of(loss), [], loss, out)
            assert len(launch_total.compiled) <= 2
    assert device.compilations == 3 and len(device.launched) == 6


def test_two_threads_launch_at_once(device: Device) -> None:
    launch_total, barrier = total(), threading.Barrier(2)

    def work(loss: torch.Tensor) -> None:
        out = torch.zeros(())
        barrier.wait()
        for _ in range(200):
            launch_total(launch.place_of(loss), [], loss, out)

    rows = [torch.zeros(8), torch.zeros(8).double()]
    threads = [threading.Thread(target=work, args=(loss,)) for loss in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(device.launched) == 400
    by_key: dict[str, set[int]] = {}
    for key, arguments in device.launched:
        address = arguments[9] if isinstance(arguments[9], int) else arguments[9].data_ptr()
        by_key.setdefault(key, set()).add(address)
    assert sorted(map(list, by_key.values())) == sorted([[loss.data_ptr()] for loss in rows])


KEYS = """
import sys, torch
from benchmarks.static.compiled import recorded_launches
calls = [dict(N=64, D=33), dict(N=1024, D=16, L=3, K=1024),
         dict(N=8192, D=64, variant="released-age"), dict(N=32768, D=128), dict(N=32768, D=512)]
for call in calls[:: int(sys.argv[1])]:
    for launch in recorded_launches(dtype=torch.bfloat16, **call):
        print(launch.name, launch.kernel.cache_key)
"""


def test_the_cache_on_disk_does_not_depend_on_which_kernel_is_first() -> None:
    """Two processes launch the same kernels in other orders: the second finds them compiled."""
    command = [sys.executable, "-c", KEYS]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    both = [
        subprocess.run(
            [*command, step],
            check=True,
            capture_output=True,
            env=environment,
            text=True,
            cwd=Path(__file__).parents[2],
            timeout=120,
        )  # fmt: skip
        for step in ("1", "-1")
    ]
    forwards, backwards = (set(one.stdout.splitlines()) for one in both)
    assert len(forwards) > 15
    assert forwards == backwards


def test_a_constant_before_an_argument_is_refused() -> None:
    function = SimpleNamespace(arg_names=["x_ptr", "D", "n"], __name__="kernel")
    with pytest.raises(ValueError, match="behind a constant"):
        Kernel(function, {}, {"D": 3})


@pytest.mark.parametrize(("wavefront", "of_8", "of_1"), [(64, 4, 1), (32, 8, 1)])
def test_amds_gpus_take_as_many_threads_and_one_stage(
    wavefront: int, of_8: int, of_1: int, monkeypatch
) -> None:
    def options(**given: int) -> dict[str, object]:
        kernel = launch.bind(False, dense.conr_total_kernel, given, BLOCK=1024)
        return {name: kernel.keywords.get(name) for name in ("num_warps", "num_stages")}

    assert options(num_warps=8, num_stages=3) == {"num_warps": 8, "num_stages": 3}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(launch, "wavefront", lambda: wavefront)
    assert options(num_warps=8, num_stages=3) == {"num_warps": of_8, "num_stages": 1}
    assert options(num_warps=1) == {"num_warps": of_1, "num_stages": 1}
