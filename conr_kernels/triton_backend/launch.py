"""Launches of Triton kernels: a compiled kernel is looked up by the form of its arguments and run.

Triton's own launch binds, specializes and hashes every argument at each call, which takes the host
as long as a small batch takes the device. It is used in the interpreter, where a hook or a profiler
listens, with versions of Triton outside SERVED, and once for every form of arguments, to compile.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .availability import interpreted

#: Without further keys the anchors are the keys.
OWN_KEYS = {"key_x": "x", "key_y": "y", "key_p": "p"}
#: The first and last version of Triton whose ``CompiledKernel.run`` is known to take what it gets.
SERVED = ((3, 6), (3, 9))
#: Numbers left free behind every part of a workspace: tests put guard zones there.
GUARD = 0
#: Forms of pointers for which steps are remembered; beyond, all are forgotten.
FORMS = 64


class Place(NamedTuple):
    """Where the launches of one call go: a device's number and the address of its stream."""

    device: int
    stream: int


class Parts:
    """Parts of one allocation of 32-bit integers, by name; each starts on 128 bytes."""

    def __init__(self) -> None:
        self.size = 0
        #: Bytes before each part, numbers of 32 bits before it and of it, its dtype.
        self.parts: dict[str, tuple[int, int, int, torch.dtype]] = {}

    def add(self, names: str, n: int, dtype: torch.dtype) -> None:
        """n numbers; of several names, each right behind the other."""
        size = -(-n * dtype.itemsize // 4)
        for name in names.split():
            self.parts[name] = (4 * self.size, self.size, size, dtype)
            self.size += size
        self.size = -(-(self.size + GUARD) // 32) * 32

    def new(self, x: Tensor) -> Tensor:
        """An allocation where x is."""
        return x.new_empty(self.size, dtype=torch.int32)

    def tensors(self, whole: Tensor) -> list[Tensor]:
        return [whole[start : start + n].view(dtype) for _, start, n, dtype in self.parts.values()]


def place_of(x: Tensor) -> Place | None:
    """The current stream of the current device, which is the tensor's (``on_device``); None where
    Triton's own launch is to be used.
    """
    if not _is_on_gpu(x) or (triton := _triton()) is None or _is_observed(triton.knobs):
        return None
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    return Place(device, driver.get_current_stream(device))


def on_device(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """``function(x, *args)`` while the tensor's device is the current one."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return function(x, *args)
    with torch.cuda.device(x.device):
        return function(x, *args)


class Kernel:
    """A kernel with its constants and launch options."""

    def __init__(self, function: Any, options: dict[str, Any], constants: dict[str, Any]) -> None:
        names = function.arg_names
        given = [name for name in names if name not in constants]
        if names[: len(given)] != given:
            raise ValueError(f"{function.__name__} has an argument behind a constant")
        _hash_callees_first(function.fn.__module__)
        self.function = function
        self.keywords = constants | options
        self.constants = tuple(constants[name] for name in names[len(given) :])


class Launch:
    """A kernel with all its arguments but the pointers, which come first among them."""

    def __init__(self, kernel: Kernel, n_programs: int, *numbers: int | float) -> None:
        self.kernel, self.n_programs, self.numbers = kernel, n_programs, numbers
        self.rest = numbers + kernel.constants

    def __call__(self, *tensors: Tensor | None) -> Any:
        """Triton's own launch; what it compiled, unless a hook took that over."""
        kernel = self.kernel
        return kernel.function[(self.n_programs,)](*tensors, *self.numbers, **kernel.keywords)


class Steps:
    """Launches in their order, each with the names of its pointers: of tensors ``given`` at every
    call, of parts of workspaces, of aliases of either, or ``"nothing"``.
    """

    def __init__(
        self,
        given: str,
        aliases: dict[str, str],
        steps: Iterable[tuple[Launch, str]],
        *parts: Parts,
    ) -> None:
        steps, names = list(steps), ["nothing", *given.split()]
        for part in parts:
            names += part.parts
        at = {name: number for number, name in enumerate(names)}
        at |= {alias: at[name] for alias, name in aliases.items()}
        self.steps = [
            (launch, itemgetter(*(at[name] for name in of.split()))) for launch, of in steps
        ]
        self.parts = parts
        self.offsets = [[before for before, *_ in part.parts.values()] for part in parts]
        #: What every launch runs, by the device and the forms of the given tensors.
        self.compiled: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}

    def __call__(
        self, place: Place | None, wholes: Iterable[Tensor], *given: Tensor | None
    ) -> None:
        """Launches everything; ``wholes``: the allocations that hold the parts."""
        if place is None:
            self._launch_plainly(wholes, given)
            return
        addresses = [None if t is None else t.data_ptr() for t in given]
        of_given = zip(given, addresses, strict=True)
        forms = [None if t is None else (t.dtype, at % 16 == 0) for t, at in of_given]
        key = (place.device, *forms)
        found = self.compiled.get(key)
        if found is None:
            compiled = self._launch_plainly(wholes, given)
            if None not in compiled:
                self._remember(key, compiled)
            return
        pointers = [None, *addresses]
        for offsets, whole in zip(self.offsets, wholes, strict=True):
            address = whole.data_ptr()
            pointers += [address + before for before in offsets]
        for pick, n_programs, run, function, metadata, rest in found:
            run(
                n_programs, 1, 1, place.stream, function, metadata, None, None, None,
                *pick(pointers), *rest,
            )  # fmt: skip

    def _launch_plainly(
        self, wholes: Iterable[Tensor], given: tuple[Tensor | None, ...]
    ) -> list[Any]:
        tensors = [None, *given]
        for part, whole in zip(self.parts, wholes, strict=True):
            tensors += part.tensors(whole)
        return [launch(*pick(tensors)) for launch, pick in self.steps]

    def _remember(self, key: tuple[Any, ...], compiled: list[Any]) -> None:
        if len(self.compiled) >= FORMS:
            self.compiled.clear()
        self.compiled[key] = [
            (pick, launch.n_programs, of.run, of.function, of.packed_metadata, launch.rest)
            for (launch, pick), of in zip(self.steps, compiled, strict=True)
        ]


def bind(
    is_early: bool, function: Any, options: dict[str, Any], overlaps: bool = False, **constants: Any
) -> Kernel:
    """A kernel with its constants; ``is_early``: its programs wait for the kernel before
    (``await_earlier``), so that those of a kernel that ``overlaps`` may start while it still runs.

    Where a kernel has many short programs, such a start costs an H200 more than it hides: they
    crowd where the first programs before them end.
    """
    early = {"launch_pdl": True} if is_early and overlaps else {}
    return Kernel(function, _options_here(options) | early, constants | {"EARLY": is_early})


def _options_here(options: dict[str, Any]) -> dict[str, Any]:
    """Those chosen for NVIDIA's GPUs as AMD's take them: as many threads, in wavefronts of 64 or
    32, and one stage, since Triton's pipeline for these keeps the next tile in registers.
    """
    if torch.version.hip is None or interpreted():
        return options
    n_warps = 32 * options.get("num_warps", 4) // wavefront()
    return options | {"num_warps": max(n_warps, 1), "num_stages": 1}


@functools.cache
def wavefront() -> int:
    """Threads of a warp of the current device."""
    import triton

    return triton.runtime.driver.active.get_current_target().warp_size


@functools.cache
def _hash_callees_first(module: str) -> None:
    """Asks for the keys of a module's kernels in Triton's cache on disk, callees' first. Triton 3.6
    (not 3.8) gives a caller another key where a callee has none yet: which kernel a process
    launches first would decide whether it finds what earlier ones compiled.
    """
    if interpreted():
        return
    from triton.runtime.jit import JITFunction

    # A module imports and defines what is called before what calls it.
    for found in list(vars(sys.modules[module]).values()):
        if isinstance(found, JITFunction):
            if found.fn.__module__ != module:
                _hash_callees_first(found.fn.__module__)
            found.cache_key  # noqa: B018


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@functools.cache
def _triton() -> Any:
    """The module, if its version is in SERVED and it compiles."""
    import triton

    lowest, highest = SERVED
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return triton if lowest <= version <= highest and not interpreted() else None


def _is_observed(knobs: Any) -> bool:
    """Whether somebody listens to launches, or asks for another compilation of every kernel."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        runtime.debug
        or knobs.compilation.instrumentation_mode
        or (before is not None and (type(before) is not knobs.HookChain or before.calls))
        or (after is not None and (type(after) is not knobs.HookChain or after.calls))
    )
