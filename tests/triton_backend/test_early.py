"""Kernels that start while the one before still runs: which do, and that they wait before they
read or write what it may write or read.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.static import compiled, shipped
from benchmarks.static.compiled import Launch, recorded_launches
from conr_kernels.triton_backend import call
from conr_kernels.triton_backend.configs import ARCHITECTURES
from tests.helpers.triton_kernels import kernels_of

KERNELS = kernels_of()
#: Beyond the parts of a gradient that one launch leaves for both sweeps.
MANY = 200_000


@functools.cache
def shipped_launches(architecture: int) -> list[Launch]:
    return [launch for form in shipped.calls() for launch in form.launches(architecture)]


def of_each_kernel(architecture: int) -> dict[str, Launch]:
    """The first launch of every kernel, and of the negatives' with a late wait."""
    found = {}
    for launch in [
        *recorded_launches(MANY, 128, torch.bfloat16, architecture),
        *shipped_launches(architecture),
    ]:
        late = " late" if launch.arguments.get("LATE") else ""
        found.setdefault(launch.name + late, launch)
    return found


LATE = ("conr_backward_kernel", "conr_wide_scores_kernel")
NAMES = [*KERNELS, *(f"{name} late" for name in LATE)]


@functools.cache
def compiled_for(architecture: int, name: str) -> dict[str, str]:
    return compiled.compile_launch(of_each_kernel(architecture)[name], architecture).asm


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch_waits_from_compute_capability_9_on(architecture: int) -> None:
    """And those of the backward pass and of few pairs start before they need to."""
    launches, starting = shipped_launches(architecture), set()
    of_90 = {name for name in KERNELS if "mirrored" in name}
    others = set() if architecture == 90 else of_90
    assert {launch.name for launch in launches} == set(KERNELS) - others
    for launch in launches:
        is_early = architecture >= 90
        assert launch.arguments["EARLY"] is is_early, launch.name
        if "launch_pdl" in launch.options:
            assert is_early and launch.options["launch_pdl"]
            starting.add(launch.name.removeprefix("conr_").removesuffix("_kernel"))
    expected = {"backward", "backward_parts", "gradient", "wide_gradient", "wide_product"}
    expected |= {"wide_scores", "gram"}
    expected |= {f"dense_{part}" for part in ("sums", "rows", "gradient", "finish")}
    assert starting == (expected if architecture >= 90 else set())


@pytest.mark.parametrize(("N", "starts"), [(1024, True), (1025, False), (4096, False)])
def test_kernels_of_few_pairs_start_early(N: int, starts: bool) -> None:
    launches = recorded_launches(N, 128, torch.bfloat16, 90)
    assert all(("launch_pdl" in launch.options) is starts for launch in launches)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernels_first_statement_waits(name: str) -> None:
    function = ast.parse(inspect.getsource(KERNELS[name].fn)).body[0]
    late = {
        "conr_backward_kernel": "if not LATE:\n    await_earlier(EARLY)",
        "conr_wide_scores_kernel": (
            "if LATE:\n    start_next(EARLY)\nelse:\n    await_earlier(EARLY)"
        ),
        "conr_wide_product_kernel": "start_next(EARLY)",
    }  # which say why
    first = ast.unparse(function.body[1])  # behind the docstring
    assert first == late.get(name, "await_earlier(EARLY)")


def accesses(ptx: str) -> Iterator[int]:
    """The lines that read or write memory that other kernels see."""
    for number, line in enumerate(ptx.splitlines()):
        words = re.sub(r"^\s*(@!?%p\d+)?\s*", "", line)
        is_local = re.match(r"ld\.param|\w+\.(volatile\.)?shared", words)
        if not is_local and re.match(r"(ld|st|atom|red|cp|prefetch)\b", words):
            yield number


def line_of(text: str, what: str) -> int:
    """Of its only occurrence."""
    (found,) = (n for n, line in enumerate(text.splitlines()) if what in line)
    return found


def test_accesses_of_memory_are_found() -> None:
    lines = [
        "ld.param.b64 %rd1, [p];", "\t@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];",
        "st.shared.v4.b32 [%r1], {%r2};", "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ];",
        "@!%p2 st.global.b32 [ %rd1 + 0 ], { %r1 };", "add.f32 %r1, %r2, %r3;",
    ]  # fmt: skip
    assert list(accesses("\n".join(lines))) == [1, 3, 4]


@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_wait_before_they_touch_memory(name: str) -> None:
    lines = compiled_for(90, name)["ptx"].splitlines()
    waits, starts = (
        [n for n, line in enumerate(lines) if f"griddepcontrol.{what}" in line]
        for what in ("wait", "launch_dependents")
    )
    # Of scores before the first tile's are stored, and behind the loop.
    assert len(waits) == (2 if name == "conr_wide_scores_kernel late" else 1)
    is_window = name in ("conr_wide_scores_kernel late", "conr_wide_product_kernel")
    assert (min(starts) < min(waits)) is is_window
    touching = list(accesses("\n".join(lines)))
    assert max(touching) > waits[0]
    if "late" in name or is_window:
        assert min(touching) < waits[0]  # of what launches before the one before have left
    else:
        assert min(touching) > waits[0]


def derived_from(ir: str, pointers: set[str]) -> Iterator[int]:
    """The lines that read or write memory through the arguments of these names."""
    reached = {f"%{name}" for name in pointers}
    for number, line in enumerate(ir.splitlines()):
        if "tt.func" in line or not (used := reached & set(re.findall(r"%[\w#]+", line))):
            continue
        if re.search(r"tt\.(load|store)|async_copy_global|tt\.atomic", line):
            yield number
        elif made := re.match(r"\s*(%\w+)(:\d+)? = ", line):
            assert used and ":" not in (made[2] or ""), line  # through no loop
            reached.add(made[1])


def test_the_negatives_wait_late_before_they_touch_the_gradient() -> None:
    """What the positives' launch writes, and what is overwritten."""
    ir = compiled_for(90, "conr_backward_kernel late")["ttgir"]
    wait = line_of(ir, "griddepcontrol.wait")
    touching = list(derived_from(ir, {"G_ptr", "G_rest_ptr", "gradient_ptr"}))
    assert len(touching) >= 3 and min(touching) > wait
    stores = [n for n, line in enumerate(ir.splitlines()) if re.search(r"tt\.(store|atomic)", line)]
    assert min(stores) > wait


@pytest.mark.parametrize(
    ("name", "pointers"),
    [
        ("conr_wide_scores_kernel late", {"H_ptr", "H_scale_ptr"}),
        ("conr_wide_product_kernel", {"H_ptr", "H_scale_ptr", "G_ptr", "G_rest_ptr"}),
    ],
)
def test_windows_wait_before_they_touch_what_the_launch_before_does(
    name: str, pointers: set[str]
) -> None:
    ir = compiled_for(90, name)["ttir"].splitlines()
    wait = min(n for n, line in enumerate(ir) if "griddepcontrol.wait" in line)
    uses = [n for n, line in enumerate(ir) if re.search(rf"%({'|'.join(pointers)})\b", line)]
    uses = [n for n in uses if "tt.func" not in ir[n]]
    assert uses and min(uses) > wait
    assert min(n for n, line in enumerate(ir) if "tt.store" in line) > wait


def test_scores_wait_late_only_right_behind_products() -> None:
    """Nothing but windows' launches comes between the list, or copies, and the last of them."""
    late = []
    for variant in ("paper", "released-age"):
        for K in (None, 20_000):
            for most in (2**20, 2**40):
                with mock.patch.multiple(
                    "conr_kernels.triton_backend.launch_sweeps",
                    BOTH_ORDERS=most,
                    WIDE_BOTH_ORDERS=most,
                ):
                    launches = recorded_launches(
                        20_000, 512, torch.bfloat16, 90, variant=variant, K=K
                    )
                names = [launch.name for launch in launches]
                for at, name in enumerate(names):
                    if name == "conr_wide_scores_kernel":
                        is_behind = names[at - 1] == "conr_wide_product_kernel"
                        assert launches[at].arguments["LATE"] is is_behind
                        assert names[at + 1] == "conr_wide_product_kernel"
                        late.append((names[at - 1], launches[at].arguments["LATE"]))
    assert {*late} == {
        ("conr_wide_list_kernel", False), ("conr_order_kernel", False),
        ("conr_wide_product_kernel", True),
    }  # fmt: skip


def test_the_negatives_wait_late_only_right_behind_the_positives() -> None:
    """Where copies come between, these replace what the positives read."""
    late = []
    for variant in ("paper", "released-depth", "released-age"):
        for K in (None, MANY // 2):
            for most in (2**20, 2**40):  # room for both orders' copies, or not
                with mock.patch.multiple(
                    "conr_kernels.triton_backend.launch_sweeps", BOTH_ORDERS=most, PARTS_BYTES=0
                ):
                    launches = recorded_launches(MANY, 64, torch.bfloat16, 90, variant=variant, K=K)
                (at,) = (
                    n for n, launch in enumerate(launches)
                    if launch.name == "conr_backward_kernel" and launch.arguments["NEGATIVES"]
                )  # fmt: skip
                before = launches[at - 1]
                is_behind = before.name == "conr_backward_kernel"
                assert is_behind or before.name == "conr_order_kernel"
                assert launches[at].arguments["LATE"] is is_behind
                positives = [x for x in launches if x.arguments.get("NEGATIVES") is False]
                assert [x.arguments["LATE"] for x in positives] == [False]
                late.append(is_behind)
    assert {*late} == {True, False}


@pytest.mark.parametrize("name", [name for name in NAMES if "mirrored" not in name])
def test_older_architectures_have_no_such_instruction(name: str) -> None:
    assert "griddepcontrol" not in compiled_for(80, name)["ptx"]


@pytest.fixture
def asked_anew():
    call._can_be_early.cache_clear()
    yield
    call._can_be_early.cache_clear()


def is_any_early() -> bool:
    few = recorded_launches(100, 32, torch.float32, 90)
    many = recorded_launches(5000, 32, torch.float32, 90)
    found = {launch.arguments["EARLY"] for launch in few + many}
    assert found == {"launch_pdl" in launch.options for launch in few}
    (is_early,) = found
    assert is_early >= any("launch_pdl" in launch.options for launch in many)
    return is_early


def test_interpreted_kernels_are_not_early(asked_anew: None) -> None:
    with mock.patch.object(call, "interpreted", lambda: True):
        assert not is_any_early()


def test_a_triton_without_the_instruction_is_not_early(asked_anew: None) -> None:
    with mock.patch("triton.language.extra.cuda", SimpleNamespace()):
        assert not is_any_early()


@pytest.mark.parametrize(("driver", "is_early"), [(12020, False), (12030, True), (13000, True)])
def test_older_drivers_are_not_early(driver: int, is_early: bool, asked_anew: None) -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(call, "driver_version", lambda: driver),
    ):
        assert call._can_be_early() is is_early
    assert is_any_early() is is_early  # asked once


def test_the_driver_is_asked_for_its_version(monkeypatch) -> None:
    def ask(pointer) -> int:
        pointer._obj.value = 12040
        return 0

    library = SimpleNamespace(cuDriverGetVersion=ask)
    monkeypatch.setattr(call.ctypes, "CDLL", lambda name: library)
    assert call.driver_version() == 12040


def test_without_a_driver_there_is_no_version(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(call.ctypes, "CDLL", missing)
    assert call.driver_version() == 0


def test_launches_that_wait_for_all_before_can_be_asked_for() -> None:
    with mock.patch.object(call, "EARLIEST", 1000):
        assert not is_any_early()
    assert is_any_early()
