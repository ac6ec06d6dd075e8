"""Launches of Triton kernels: the compiled kernel is looked up by the form of its arguments and run.

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


def place_of(x: Tensor) -> Place | None:
    """The current stream of the tensor's device; None where Triton's own launch has to serve.

    The device is the current one (``on_device``).
    """
    if not _is_on_gpu(x) or not _is_served() or _is_observed():
        return None
    from triton.runtime import driver

    active = driver.active
    device = active.get_current_device()
    return Place(device, active.get_current_stream(device))


def on_device(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """``function(x, *args)`` while the tensor's device is the current one."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return function(x, *args)
    with torch.cuda.device(x.device):
        return function(x, *args)


class Kernel:
    """A kernel with its constants and launch options, which its form of call decides.

    Called with a place, the number of programs, and the arguments before the constants, in order:
    pointers (tensors or None), then numbers.
    """

    def __init__(self, function: Any, options: dict[str, Any], **constants: Any) -> None:
        self.function = function
        self.keywords = constants | options
        names = function.arg_names
        given = [name for name in names if name not in constants]
        assert names[: len(given)] == given, f"{function.__name__}: constants are last"
        self._constants = tuple(constants[name] for name in names[len(given) :])
        self._n_pointers = sum(name.endswith("_ptr") for name in given)
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        params = getattr(function, "params", ())[self._n_pointers : len(given)]
        #: Among the numbers: integers, and those whose values Triton compiles in.
        self._integers = tuple(i for i, p in enumerate(params) if not p.annotation_type)
        self._specialized = tuple(i for i in self._integers if not params[i].do_not_specialize)

    def __call__(self, place: Place | None, n_programs: int, *arguments: Any) -> None:
        if place is None:
            self._launch_plainly(n_programs, arguments)
            return
        pointers, numbers = arguments[: self._n_pointers], arguments[self._n_pointers :]
        addresses = [None if t is None else t.data_ptr() for t in pointers]
        key = self.form(place.device, pointers, addresses, numbers)
        found = self._compiled.get(key)
        if found is None:
            compiled = self._launch_plainly(n_programs, arguments)
            if compiled is not None:
                self._remember(key, compiled)
            return
        run, function, metadata = found
        run(
            n_programs, 1, 1, place.stream, function, metadata, None, None, None,
            *addresses, *numbers, *self._constants,
        )  # fmt: skip

    def form(
        self,
        device: int,
        pointers: tuple[Tensor | None, ...],
        addresses: list[int | None],
        numbers: tuple[int | float, ...],
    ) -> tuple[Any, ...]:
        """All that Triton compiles another kernel for, beside constants and options."""
        key: list[Any] = [device]
        for t, address in zip(pointers, addresses, strict=True):
            key.append(None if address is None else (t.dtype, address % 16 == 0))
        for i in self._integers:
            key.append(-(2**31) <= numbers[i] < 2**31)
        for i in self._specialized:
            key += numbers[i] == 1, numbers[i] % 16 == 0
        return tuple(key)

    def _launch_plainly(self, n_programs: int, arguments: tuple[Any, ...]) -> Any:
        return self.function[(n_programs,)](*arguments, **self.keywords)

    def _remember(self, key: tuple[Any, ...], compiled: Any) -> None:
        if len(self._compiled) >= FORMS:
            self._compiled.clear()
        self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@functools.cache
def _is_served() -> bool:
    import triton

    lowest, highest = SERVED
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return lowest <= version <= highest and not interpreted()


def _is_observed() -> bool:
    """Whether somebody listens to launches, or asked for another compilation of every kernel."""
    from triton import knobs

    runtime = knobs.runtime
    if runtime.debug or knobs.compilation.instrumentation_mode:
        return True
    return _has_hook(runtime.launch_enter_hook) or _has_hook(runtime.launch_exit_hook)


def _has_hook(hook: Any) -> bool:
    """A hook, a chain with hooks, or none of either."""
    return hook is not None and bool(getattr(hook, "calls", True))


@functools.lru_cache(maxsize=256)
def _bound(function: Any, options: tuple[tuple, ...], constants: tuple[tuple, ...]) -> Kernel:
    return Kernel(function, dict(options), **dict(constants))


def bind(function: Any, options: dict[str, Any], **constants: Any) -> Kernel:
    """The kernel with these constants and options: one object for all the plans that name it."""
    return _bound(function, tuple(options.items()), tuple(constants.items()))
