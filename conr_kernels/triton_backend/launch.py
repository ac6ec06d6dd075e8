"""Launches of Triton kernels: what is compiled is looked up by the form of its arguments and run.

Triton's own launch binds, specializes and hashes every argument anew, which on the host costs what
a small batch costs the device. It serves where this module does not know its way: in the
interpreter, where a hook or a profiler listens, with a Triton outside SERVED, and once for every
form of arguments, when it compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .availability import interpreted

#: Versions of Triton whose ``CompiledKernel.run`` takes what is given here.
SERVED = ((3, 6), (3, 9))
#: Forms of arguments that one kernel remembers; beyond it forgets them all.
FORMS = 64


class Place(NamedTuple):
    """Where the launches of one call go: a device's number and the address of its stream."""

    device: int
    stream: int


#: Numbers ``start … start + n`` of a tensor, taken for a dtype: made a tensor where one is needed.
Slice = tuple[Tensor, int, int, torch.dtype]
#: A tensor as kernels take it, its address, and what of it they are compiled for.
Pointer = tuple[Tensor | Slice | None, int | None, tuple[torch.dtype, bool] | None]

NOTHING: Pointer = (None, None, None)


def pointer(t: Tensor | None) -> Pointer:
    if t is None:
        return NOTHING
    address = t.data_ptr()
    return t, address, (t.dtype, address % 16 == 0)


def _tensor(t: Tensor | Slice | None) -> Tensor | None:
    if not isinstance(t, tuple):
        return t
    whole, start, n, dtype = t
    return whole.view(-1)[start : start + n].view(dtype)


class Parts:
    """Parts of one allocation of 32-bit integers, by name; each starts on 128 bytes."""

    def __init__(self) -> None:
        self.size = 0
        self.parts: dict[str, tuple[int, int, int, torch.dtype, tuple[torch.dtype, bool]]] = {}

    def add(self, name: str, n: int, dtype: torch.dtype) -> None:
        size = -(-n * dtype.itemsize // 4)
        self.parts[name] = (4 * self.size, self.size, size, dtype, (dtype, True))
        self.size += -(-size // 32) * 32

    def new(self, x: Tensor) -> Tensor:
        """An allocation where x is."""
        return x.new_empty(self.size, dtype=torch.int32)

    def pointers(self, whole: Tensor) -> dict[str, Pointer]:
        base = whole.data_ptr()
        return {
            name: ((whole, start, n, dtype), base + at, form)
            for name, (at, start, n, dtype, form) in self.parts.items()
        }


def place_of(x: Tensor) -> Place | None:
    """The current stream of the current device, which is the tensor's (``on_device``); None where
    Triton's own launch has to serve.
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
        self.function = function
        self.keywords = constants | options
        self.constants = tuple(constants[name] for name in names[len(given) :])
        self.n_pointers = sum(name.endswith("_ptr") for name in given)
        #: ``run``, its function and its metadata, by the form of the arguments.
        self.compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def form_of(self, numbers: tuple[int | float, ...]) -> tuple[Any, ...]:
        """What Triton compiles another kernel for, of the numbers."""
        form: list[Any] = []
        params = getattr(self.function, "params", ())[self.n_pointers :]
        for parameter, number in zip(params, numbers, strict=False):
            if isinstance(number, int) and not parameter.annotation_type:
                form.append(-(2**31) <= number < 2**31)
                if not parameter.do_not_specialize:
                    form += number == 1, number % 16 == 0
        return tuple(form)

    def launch_plainly(
        self, n_programs: int, tensors: list[Tensor | None], numbers: tuple[int | float, ...]
    ) -> Any:
        return self.function[(n_programs,)](*tensors, *numbers, **self.keywords)

    def remember(self, key: tuple[Any, ...], kernel: Any) -> None:
        if len(self.compiled) >= FORMS:
            self.compiled.clear()
        self.compiled[key] = kernel.run, kernel.function, kernel.packed_metadata


class Launch:
    """A kernel with all its arguments but the pointers, which come first among them."""

    def __init__(self, kernel: Kernel, n_programs: int, *numbers: int | float) -> None:
        self.kernel, self.n_programs, self.numbers = kernel, n_programs, numbers
        self.form = kernel.form_of(numbers)
        self.rest = numbers + kernel.constants

    def __call__(self, place: Place | None, *pointers: Pointer) -> None:
        tensors, addresses, forms = zip(*pointers, strict=True)
        key = None if place is None else (place.device, self.form, forms)
        found = self.kernel.compiled.get(key)
        if place is None or found is None:
            given = [_tensor(t) for t in tensors]
            kernel = self.kernel.launch_plainly(self.n_programs, given, self.numbers)
            if key is not None and kernel is not None:  # a hook may have taken it over
                self.kernel.remember(key, kernel)
            return
        run, function, metadata = found
        run(
            self.n_programs, 1, 1, place.stream, function, metadata, None, None, None,
            *addresses, *self.rest,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _kernel(function: Any, options: tuple[tuple, ...], constants: tuple[tuple, ...]) -> Kernel:
    return Kernel(function, dict(options), dict(constants))


def bind(function: Any, options: dict[str, Any], **constants: Any) -> Kernel:
    """The kernel with these constants and options: one object for all the plans that name it."""
    return _kernel(function, tuple(options.items()), tuple(constants.items()))


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@functools.cache
def _triton() -> Any:
    """The module, where its version is known here and it compiles."""
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
